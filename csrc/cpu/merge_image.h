// merge, one image: out_j = sum_i w_i x_i / sum_i w_i over assign_i = j, members in index order, accumulated in the
// wide type. add_merge_norm: the same of x and a branch, and the LayerNorm of each row; see norm_image.h.
//
// The members of each row are linked lists built from the back, so that they read in index order; a row with one member
// is a memcpy, one with several is added up in registers, 4 vectors of channels at a time, and written once.
//
// Floor at N = 197, M = 184, C = 384, float32: 303 KB read, 283 KB written; scratch 4 (N + M) bytes. Reached on a Xeon,
// 1 thread: 174 us at B = 8, where copying x takes 164 us. add_merge_norm: 605 KB read, 565 KB written, where an
// addition, merge and a LayerNorm read 1190 KB and write 868 KB. Reached: 45 us at B = 1, those three take 78; 423 us
// at B = 8, 75 % of the speed of copying, where they take 800.

constexpr int32_t kNone = -1;

template <Add kAdd, class E>
struct Rows {
  Tokens<kAdd, E> tokens;
  const int32_t* next;  // [N] the next member of the same row
  const Wide<E>* w;     // [N] or null
};

// kVectors vectors of channels at c of the members from `first` on; out = sum w x / divisor, or the maximum.
template <int kVectors, bool kAmax, Add kAdd, class E>
inline void reduce_chunk(const Rows<kAdd, E>& rows, int32_t first, int64_t c, Wide<E> divisor,
                         Vec<Wide<E>> (&acc)[kVectors]) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>;
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) acc[v] = kAmax ? rows.tokens.at(first, c + v * W) : Vec<T>{};
  for (int32_t i = first; i != kNone; i = rows.next[i]) {
    const T w = rows.w ? rows.w[i] : T(1);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> value = rows.tokens.at(i, c + v * W);
      if (kAmax)
        acc[v] = (value > acc[v]) | (value != value) ? value : acc[v];
      else
        acc[v] += w * value;
    }
  }
  if (!kAmax && divisor != 1)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[v] /= divisor;
}

// The last n < lanes channels, one at a time.
template <bool kAmax, Add kAdd, class E>
void reduce_tail(const Rows<kAdd, E>& rows, int32_t first, int64_t c, int64_t n, Wide<E> divisor, E* out) {
  using T = Wide<E>;
  Vec<T> acc = kAmax ? rows.tokens.at(first, c, n) : Vec<T>{};
  for (int32_t i = first; i != kNone; i = rows.next[i]) {
    const Vec<T> value = rows.tokens.at(i, c, n);
    if (kAmax)
      acc = (value > acc) | (value != value) ? value : acc;
    else
      acc += (rows.w ? rows.w[i] : T(1)) * value;
  }
  store_first(out, !kAmax && divisor != 1 ? acc / divisor : acc, n);
}

template <bool kAmax, Add kAdd, class E>
void reduce_row(const Rows<kAdd, E>& rows, int32_t first, int64_t C, Wide<E> divisor, E* out) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>, kVectors = 4;
  int64_t c = 0;
  for (; c + kVectors * W <= C; c += kVectors * W) {
    Vec<T> acc[kVectors];
    reduce_chunk<kVectors, kAmax>(rows, first, c, divisor, acc);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(out + c + v * W, acc[v]);
  }
  for (; c + W <= C; c += W) {
    Vec<T> acc[1];
    reduce_chunk<1, kAmax>(rows, first, c, divisor, acc);
    store(out + c, acc[0]);
  }
  if (c < C) reduce_tail<kAmax>(rows, first, c, C - c, divisor, out + c);
}

template <Add kAdd, class E>
void merge_image_of(const MergeImage& m) {
  using T = Wide<E>;
  Scratch scratch(Scratch::bytes<int32_t>(m.M) + Scratch::bytes<int32_t>(m.N));
  int32_t* first = scratch.take<int32_t>(m.M);
  int32_t* next = scratch.take<int32_t>(m.N);
  for (int64_t j = 0; j < m.M; ++j) first[j] = kNone;
  for (int64_t i = m.N - 1; i >= 0; --i) {
    const int32_t j = m.assign[i];
    if (j < 0 || j >= m.M) continue;  // dropped
    next[i] = first[j];
    first[j] = int32_t(i);
  }

  const bool sum = m.reduce == kReduceSum, amax = m.reduce == kReduceAmax;
  const T* size = static_cast<const T*>(m.size);
  const T* w = static_cast<const T*>(m.weight);
  if (!w && !sum) w = size;
  const Tokens<kAdd, E> tokens(m.x, m.s_n, m.tail);
  const Rows<kAdd, E> weighted{tokens, next, w}, plain{tokens, next, nullptr};
  E* out = static_cast<E*>(m.out);
  E* normed = static_cast<E*>(m.tail.normed);
  T* size_out = static_cast<T*>(m.size_out);
  for (int64_t j = 0; j < m.M; ++j, out += m.C) {
    T total_w = 0, total_size = 0;
    int64_t members = 0;
    for (int32_t i = first[j]; i != kNone; i = next[i], ++members) {
      total_w += w ? w[i] : T(1);
      total_size += size ? size[i] : T(1);
    }
    size_out[j] = total_size;
    if (m.C == 0) continue;
    const bool copy = members == 1 && (!sum || !w), massless = !sum && total_w == 0;  // which leaves the plain mean
    if (members == 0)
      memset(out, 0, m.C * sizeof(E));
    else if (copy)
      tokens.copy(first[j], m.C, out);
    else if (kAdd == kNothing && amax)
      reduce_row<true>(weighted, first[j], m.C, T(1), out);
    else
      reduce_row<false>(massless ? plain : weighted, first[j], m.C, sum ? T(1) : massless ? T(members) : total_w, out);
    if (kAdd != kNothing) normalize_row(out, m.C, m.tail, normed + j * m.C);
  }
}

template <class E>
void merge_image_in(const MergeImage& m) {
  if (!m.tail.normed) return merge_image_of<kNothing, E>(m);
  m.tail.branch_scale || m.tail.branch_bias ? merge_image_of<kScaled, E>(m) : merge_image_of<kPlain, E>(m);
}

void merge_image(const MergeImage& m) {
  switch (m.dtype) {
    case Dtype::kFloat: return merge_image_in<float>(m);
    case Dtype::kHalf: return merge_image_in<half_t>(m);
    case Dtype::kBFloat16: return merge_image_in<bfloat16_t>(m);
    case Dtype::kDouble: return merge_image_in<double>(m);
  }
}
