// pairwise_distance, one image: d_ij = scale sqrt(sum_c (x_ic - x_jc)^2).
//
// 1. x in the wide type, padded with zeros: row-major, and in panels of kCols rows ([panel][C][kCols]).
// 2. tiles of kRows x kCols that are not wholly below the diagonal: a subtraction and a multiply-add a pair and
// channel,
//    channels in ascending order, in sums of kChunk which are then added (a float sum of 384 is 4 times less exact).
//    Every pair takes the same steps, so d_ij and d_ji, and the rows of equal tokens, are bitwise equal.
// 3. what is below the diagonal is copied from above it.
//
// Floor at N = 196, C = 384, float32: 301 KB read, 154 KB written; 196 * 195 / 2 * 384 = 7.3 M pairs of a subtraction
// and a multiply-add, 0.24 ms at 61 G vector lanes a second (two vectors of 16 lanes a cycle, 1.9 GHz). Scratch 8 N C
// bytes a thread, in the second-level cache.

constexpr int kChunk = 64;

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
  const T *rows, *panels;  // [N padded][Cp], [N padded / kCols][Cp][kCols]
  T* out;                  // [N, N]
  int64_t N, C, Cp;
  T scale;
};

// Rows i .. i + kRows against kVectors vectors of columns from j on.
template <int kVectors, class T>
inline void distance_tile(const Pairs<T>& p, int64_t i, int64_t j) {
  constexpr int W = kLanes<T>;
  const T *a = p.rows + i * p.Cp, *b = p.panels + j * p.Cp;
  Vec<T> total[kRows][kVectors] = {};
  for (int64_t from = 0; from < p.C; from += kChunk) {
    const int64_t to = from + kChunk < p.C ? from + kChunk : p.C;
    Vec<T> sum[kRows][kVectors] = {};
    for (int64_t c = from; c < to; ++c) {
      Vec<T> column[kVectors];
      for (int u = 0; u < kVectors; ++u) column[u] = load(b + c * kCols<T> + u * W);
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t)
        for (int u = 0; u < kVectors; ++u) {
          const Vec<T> difference = column[u] - splat(a[t * p.Cp + c]);
          sum[t][u] += difference * difference;
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
      for (int u = 0; u < kVectors; ++u) total[t][u] += sum[t][u];
  }
  for (int t = 0; t < kRows && i + t < p.N; ++t)
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

// Below the diagonal: d_ij = d_ji.
template <class T>
void mirror(T* d, int64_t N) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < N; ++i) {
    const int64_t above = i / kCols<T> * kCols<T>;  // the columns from here on were computed
    const bool blocks = i / W * W + W <= N;
    for (int64_t j = 0; blocks && i % W == 0 && j < above; j += W) transpose<T>(d + j * N + i, N, d + i * N + j, N);
    for (int64_t j = 0; !blocks && j < above; ++j) d[i * N + j] = d[j * N + i];
    d[i * N + i] = 0;
  }
}

template <class E>
void pairwise_image_of(const PairwiseImage& m) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>;
  const int64_t N = m.N, Cp = round_up(m.C, W), columns = round_up(N, kCols<T>), padded = columns + kRows;
  Scratch scratch(Scratch::bytes<T>(padded * Cp) + Scratch::bytes<T>(columns * Cp));
  T* rows = scratch.take<T>(padded * Cp);
  T* panels = scratch.take<T>(columns * Cp);
  for (int64_t n = 0; n < N; ++n) {
    const E* x = static_cast<const E*>(m.x) + n * m.s_n;
    int64_t c = 0;
    for (; c + W <= m.C; c += W) store(rows + n * Cp + c, load(x + c));
    if (c < m.C) store(rows + n * Cp + c, load_first(x + c, m.C - c));
  }
  memset(rows + N * Cp, 0, (padded - N) * Cp * sizeof(T));
  for (int64_t j = 0; j < columns; j += kCols<T>) pack_panel(rows + j * Cp, Cp, panels + j * Cp);

  T* out = static_cast<T*>(m.out);
  const Pairs<T> pairs = {rows, panels, out, N, m.C, Cp, T(m.scale)};
  for (int64_t j = 0; j < N; j += kCols<T>)
    for (int64_t i = 0; i < N && i < j + kCols<T>; i += kRows)
      if (N - j > W)
        distance_tile<2>(pairs, i, j);
      else
        distance_tile<1>(pairs, i, j);
  mirror(out, N);
}

void pairwise_image(const PairwiseImage& m) {
  switch (m.dtype) {
    case Dtype::kFloat: return pairwise_image_of<float>(m);
    case Dtype::kHalf: return pairwise_image_of<half_t>(m);
    case Dtype::kBFloat16: return pairwise_image_of<bfloat16_t>(m);
    case Dtype::kDouble: return pairwise_image_of<double>(m);
  }
}
