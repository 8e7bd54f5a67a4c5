// topk and topk_gather, one image: the k patches with the best scores keep their order; the others are dropped, or are
// one more row: sum_i score_i x_i, in a mean divided by sum_i score_i (sum_i x_i / count where that is 0).
// add_topk_gather_norm: the same of x and a branch, and the LayerNorm of each row; see norm_image.h.
//
// 1. keys: the scores as integers of the same order, -0 like +0, NaN like -inf.
// 2. the k-th largest key by bisection on its bits, at most 32 (64 for double): a vectorised count of the keys from a
//    bound on for each, fewer where a count is k. Of the keys equal to it the first are kept. Nothing is sorted.
// 3. one pass over the keys writes assign; one over x copies the kept rows and adds the others, in index order and the
//    wide type, to C sums in the first-level cache.
//
// Floor at N = 197, C = 384, k = 138, float32: 303 KB read, 215 KB written; the sum is 2 * 58 * 384 = 45 kFLOP, the
// selection at most 32 * 196 comparisons. Scratch 4 (N + C) bytes. add_topk_gather_norm, one row fused: 605 KB read,
// 430 KB written, where an addition, topk_gather and a LayerNorm read 1123 KB and write 733 KB.

template <class T>
using Key = typename Vector<T>::integer;

template <class T>
inline Index<T> load_keys(const Key<T>* keys) {
  Index<T> v;
  __builtin_memcpy(&v, keys, sizeof v);
  return v;
}

// keys [P padded to the lanes with the lowest integer, which no score has].
template <class T>
void make_keys(const T* score, int64_t P, Key<T>* keys) {
  constexpr int W = kLanes<T>;
  constexpr Key<T> kLowest = Key<T>(uint64_t(1) << (8 * sizeof(T) - 1));
  const Vec<T> worst = splat(T(-__builtin_inf()));
  for (int64_t i = 0; i < P; i += W) {
    const Vec<T> value = P - i < W ? load_first(score + i, P - i) : load(score + i);
    const Vec<T> ordered = value != value ? worst : value + T(0);  // -0 + 0 is +0
    Index<T> bits;
    __builtin_memcpy(&bits, &ordered, sizeof bits);
    bits ^= (bits < 0) & ~kLowest;
    __builtin_memcpy(keys + i, &bits, sizeof bits);
  }
  for (int64_t i = P; i < round_up(P, W); ++i) keys[i] = kLowest;
}

template <class T>
int64_t count_from(const Key<T>* keys, int64_t P, Key<T> bound) {
  Index<T> count = {};
  for (int64_t i = 0; i < P; i += kLanes<T>) count -= load_keys<T>(keys + i) >= bound;
  return fold_lanes<Key<T>>(count, [](auto a, auto b) { return a + b; });
}

template <class T>
void topk_image_of(const TopkImage& m) {
  const int64_t P = m.N - m.p;
  if (m.k == P) {
    for (int64_t n = 0; n < m.N; ++n) m.assign[n] = int32_t(n);
    return;
  }
  Scratch scratch(Scratch::bytes<Key<T>>(round_up(P, kLanes<T>)));
  Key<T>* keys = scratch.take<Key<T>>(round_up(P, kLanes<T>));
  make_keys(static_cast<const T*>(m.score) + m.p, P, keys);

  constexpr uint64_t kSign = uint64_t(1) << (8 * sizeof(T) - 1);
  uint64_t found = 0;  // bits of the k-th largest key, its sign bit flipped
  int64_t above = 0;   // keys that are larger than it and all it may still become
  for (uint64_t bit = kSign; bit; bit >>= 1) {
    const int64_t count = count_from<T>(keys, P, Key<T>((found | bit) ^ kSign));
    if (count >= m.k)
      found |= bit;
    else
      above = count;
    if (count == m.k) break;
  }

  const Key<T> bound = Key<T>(found ^ kSign);
  int64_t ties = m.k - above;  // keys equal to bound that are kept; at least all of them where the count was k
  int32_t row = int32_t(m.p);
  for (int64_t n = 0; n < m.p; ++n) m.assign[n] = int32_t(n);
  for (int64_t i = 0; i < P; ++i) {
    const bool tie = (keys[i] == bound) & (ties > 0), kept = tie | (keys[i] > bound);
    m.assign[m.p + i] = kept ? row : m.others;
    row += kept, ties -= tie;
  }
}

void topk_image(const TopkImage& m) { m.dtype == Dtype::kDouble ? topk_image_of<double>(m) : topk_image_of<float>(m); }

// sum [C padded to the lanes] += w x of token i
template <Add kAdd, class E>
inline void add_row(const Tokens<kAdd, E>& tokens, int64_t i, Wide<E> w, int64_t C, Wide<E>* sum) {
  constexpr int W = kLanes<Wide<E>>;
  int64_t c = 0;
  for (; c + W <= C; c += W) store(sum + c, load(sum + c) + w * tokens.at(i, c));
  if (c < C) store(sum + c, load(sum + c) + w * tokens.at(i, c, C - c));
}

template <class E>
void store_row(const Wide<E>* sum, Wide<E> divisor, int64_t C, E* out) {
  constexpr int W = kLanes<Wide<E>>;
  int64_t c = 0;
  for (; c + W <= C; c += W) store(out + c, load(sum + c) / divisor);
  if (c < C) store_first(out + c, load(sum + c) / divisor, C - c);
}

template <Add kAdd, class E>
void topk_gather_image_of(const TopkGatherImage& g) {
  using T = Wide<E>;
  topk_image_of<T>(g.topk);
  if (g.C == 0) return;
  const int32_t* assign = g.topk.assign;
  const int64_t N = g.topk.N, others = g.copied;
  const T* w = static_cast<const T*>(g.topk.score);
  T divisor = 1;
  if (g.mean) {
    divisor = 0;
    for (int64_t i = g.topk.p; i < N; ++i) divisor += assign[i] == others ? w[i] : T(0);
    if (divisor == 0) w = nullptr, divisor = T(N - others);  // the plain mean
  }

  const Tokens<kAdd, E> tokens(g.x, g.s_n, g.tail);
  E* out = static_cast<E*>(g.out);
  E* normed = static_cast<E*>(g.tail.normed);
  Scratch scratch(Scratch::bytes<T>(round_up(g.C, kLanes<T>)));
  T* sum = scratch.take<T>(round_up(g.C, kLanes<T>));
  memset(sum, 0, round_up(g.C, kLanes<T>) * sizeof(T));
  for (int64_t i = 0; i < N; ++i) {
    const int32_t j = assign[i];
    if (j < 0) continue;
    if (j >= others) {
      add_row(tokens, i, w ? w[i] : T(1), g.C, sum);
      continue;
    }
    tokens.copy(i, g.C, out + j * g.C);
    if (kAdd != kNothing) normalize_row(out + j * g.C, g.C, g.tail, normed + j * g.C);
  }
  if (others == g.M) return;
  store_row(sum, divisor, g.C, out + others * g.C);
  if (kAdd != kNothing) normalize_row(out + others * g.C, g.C, g.tail, normed + others * g.C);
}

template <class E>
void topk_gather_image_in(const TopkGatherImage& g) {
  if (!g.tail.normed) return topk_gather_image_of<kNothing, E>(g);
  g.tail.branch_scale || g.tail.branch_bias ? topk_gather_image_of<kScaled, E>(g) : topk_gather_image_of<kPlain, E>(g);
}

void topk_gather_image(const TopkGatherImage& g) {
  switch (g.dtype) {
    case Dtype::kFloat: return topk_gather_image_in<float>(g);
    case Dtype::kHalf: return topk_gather_image_in<half_t>(g);
    case Dtype::kBFloat16: return topk_gather_image_in<bfloat16_t>(g);
    case Dtype::kDouble: return topk_gather_image_in<double>(g);
  }
}
