// pairwise_distance, one image: d_ij = scale sqrt(sum_c (x_ic - x_jc)^2).
//
// 1. x in the wide type, in panels of kCols tokens ([panel][C][kCols]), padded with zeros.
// 2. tiles of kPairRows x kCols that are not wholly below the diagonal: a subtraction and a multiply-add a pair and
//    channel, channels in ascending order, in sums of kChunk which are then added (a float sum of 384 is 4 times less
//    exact). Every pair takes the same steps, so d_ij and d_ji, and the rows of equal tokens, are bitwise equal.
// 3. what is on the other side of the diagonal is copied.
//
// Floor at N = 196, C = 384, float32: 301 KB read, 154 KB written; 7.3 M pairs and channels, a subtraction and a
// multiply-add each, are 0.92 M vectors of 16 lanes: 197 us where a loop of these two alone issues 4.65 G a second.
// Reached there, on a Xeon with AMX: 205 us, 1.6 to 1.7 times as fast as torch.cdist with its matrix product.
// Scratch 4 N C bytes a thread, in the second-level cache.

constexpr int kChunk = 64;
// Rows of a tile; they divide kCols, so that those of a tile are beside each other in their panel.
#if defined(TOKRED_AVX512)
constexpr int kPairRows = 8;
#else
constexpr int kPairRows = 4;
#endif

inline Vec<float> square_root(Vec<float> v) {
#if defined(TOKRED_AVX512)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif defined(TOKRED_AVX2)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#else
  for (int l = 0; l < kLanes<float>; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
#endif
}
inline Vec<double> square_root(Vec<double> v) {
  for (int l = 0; l < kLanes<double>; ++l) v[l] = __builtin_sqrt(v[l]);
  return v;
}

template <class T>
struct Pairs {
  const T* panels;  // [N padded / kCols][Cp][kCols]
  T* out;           // [N, N]
  int64_t N, C, Cp;
  T scale;
  const char *ahead, *ahead_end;  // PairwiseImage::ahead
  // Channel c of token n is at(n)[c * kCols].
  const T* at(int64_t n) const { return panels + n / kCols<T> * kCols<T> * Cp + n % kCols<T>; }
};

// Rows i .. i + kPairRows against kVectors vectors of columns from j on.
template <int kVectors, class T>
inline void distance_tile(Pairs<T>& p, int64_t i, int64_t j) {
  constexpr int W = kLanes<T>;
  const T *a = p.at(i), *b = p.at(j);
  const char* ahead = p.ahead;
  Vec<T> total[kPairRows][kVectors] = {};
  for (int64_t from = 0; from < p.C; from += kChunk) {
    const int64_t to = from + kChunk < p.C ? from + kChunk : p.C;
    Vec<T> sum[kPairRows][kVectors] = {};
    for (int64_t c = from; c < to; ++c) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ahead < p.ahead_end ? 64 : 0;
      Vec<T> column[kVectors];
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) column[u] = load(b + c * kCols<T> + u * W);
#pragma GCC unroll 16
      for (int t = 0; t < kPairRows; ++t) {
        const Vec<T> row = splat(a[c * kCols<T> + t]);
#pragma GCC unroll 16
        for (int u = 0; u < kVectors; ++u) {
          const Vec<T> difference = row - column[u];
          sum[t][u] += difference * difference;
        }
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kPairRows; ++t)
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) total[t][u] += sum[t][u];
  }
  p.ahead = ahead;
  for (int t = 0; t < kPairRows && i + t < p.N; ++t)
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) {
      const Vec<T> distance = square_root(total[t][u]) * p.scale;
      const int64_t from = j + u * W, n = p.N - from;
      T* out = p.out + (i + t) * p.N + from;
      if (n >= W)
        store(out, distance);
      else if (n > 0)
        store_first(out, distance, n);
    }
}

// The kCols tokens from j on as a panel; `rows` [kCols][Cp] holds them on the way.
template <class E>
void pack_tokens(const PairwiseImage& m, int64_t j, int64_t Cp, Wide<E>* rows, Wide<E>* panel) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>;
  for (int64_t n = 0; n < kCols<T>; ++n) {
    T* row = rows + n * Cp;
    if (j + n >= m.N) {
      memset(row, 0, Cp * sizeof(T));
      continue;
    }
    const E* x = static_cast<const E*>(m.x) + (j + n) * m.s_n;
    int64_t c = 0;
    for (; c + W <= m.C; c += W) store(row + c, load(x + c));
    if (c < m.C) store(row + c, load_first(x + c, m.C - c));
  }
  pack_panel(rows, Cp, panel);
}

// All tiles on and above the diagonal of the first n tokens, and what is below it: d_ij = d_ji.
template <class T>
void triangle(Pairs<T>& p, int64_t n) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < n; j += kCols<T>)
    for (int64_t i = 0; i < n && i < j + kCols<T>; i += kPairRows)
      if (i >= j + W)
        distance_tile<1>(p, i, j + W);  // the other half of the tile is below the diagonal
      else if (n - j > W)
        distance_tile<2>(p, i, j);
      else
        distance_tile<1>(p, i, j);
  T* d = p.out;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t above = i / W * W;  // the columns from here on were computed
    const bool blocks = above + W <= n;
    for (int64_t j = 0; blocks && i == above && j < above; j += W)
      transpose<T>(d + j * p.N + i, p.N, d + i * p.N + j, p.N);
    for (int64_t j = 0; !blocks && j < above; ++j) d[i * p.N + j] = d[j * p.N + i];
  }
}

// The last tokens, from `first` on, at most kPairRows of them: rows of all columns, which costs less than columns of
// all rows, most of them padding (N = 196: -7 %).
template <class T>
void last_rows(Pairs<T>& p, int64_t first) {
  for (int64_t j = 0; j <= first; j += kCols<T>) distance_tile<2>(p, first, j);
  for (int64_t i = 0; i < first; ++i)
    for (int64_t j = first; j < p.N; ++j) p.out[i * p.N + j] = p.out[j * p.N + i];
}

template <class E>
void pairwise_image_of(const PairwiseImage& m) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>;
  const int64_t N = m.N, Cp = round_up(m.C, W), padded = round_up(N, kCols<T>);
  Scratch scratch(Scratch::bytes<T>(kCols<T> * Cp) + Scratch::bytes<T>(padded * Cp));
  T* rows = scratch.take<T>(kCols<T> * Cp);
  T* panels = scratch.take<T>(padded * Cp);
  for (int64_t j = 0; j < N; j += kCols<T>) pack_tokens<E>(m, j, Cp, rows, panels + j * Cp);

  T* out = static_cast<T*>(m.out);
  Pairs<T> pairs = {panels, out, N, m.C, Cp, T(m.scale), m.ahead, m.ahead + m.ahead_bytes};
  const int64_t whole = N / kCols<T> * kCols<T>, first = N - whole <= kPairRows ? whole : N;
  triangle(pairs, first);
  if (first < N) last_rows(pairs, first);
  for (int64_t i = 0; i < N; ++i) out[i * N + i] = 0;
}

void pairwise_image(const PairwiseImage& m) {
  switch (m.dtype) {
    case Dtype::kFloat: return pairwise_image_of<float>(m);
    case Dtype::kHalf: return pairwise_image_of<half_t>(m);
    case Dtype::kBFloat16: return pairwise_image_of<bfloat16_t>(m);
    case Dtype::kDouble: return pairwise_image_of<double>(m);
  }
}
