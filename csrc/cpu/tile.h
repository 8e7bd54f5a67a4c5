// What every matrix product is made of: a tile of sums in registers, and exp2.

// Sums of a tile, which with a row of vectors and a broadcast must fit the registers (32, 16, 16): keys times queries
// and, for the values, queries times columns.
#if defined(TOKRED_AMX)
constexpr int kQueryVectors = 2;  // the products are 32 x 32
#elif defined(TOKRED_AVX512)
constexpr int kKeyRows = 8, kQueryVectors = 3, kOutRows = 12, kOutVectors = 2;
#else
constexpr int kKeyRows = 4, kQueryVectors = 3, kOutRows = 6, kOutVectors = 2;
#endif
template <class T>
constexpr int kQueryTile = kQueryVectors * kLanes<T>;
#if !defined(TOKRED_AMX)
template <class T>
constexpr int kOutTile = kOutVectors * kLanes<T>;
#endif

// acc[t][u] += sum_k a[t * a_t + k * a_k] * b[k * b_k + u * lanes], k ascending: one broadcast and kVectors
// multiply-adds a row, so a tile keeps the multipliers busy from 8 sums on (latency 4, two a cycle).
template <int kRows, int kVectors, class T>
__attribute__((always_inline)) inline void multiply(Vec<T> (&acc)[kRows][kVectors], int64_t K, const T* a, int64_t a_t,
                                                    int64_t a_k, const T* b, int64_t b_k) {
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> column[kVectors];
#pragma GCC unroll 8
    for (int u = 0; u < kVectors; ++u) column[u] = load(b + k * b_k + u * kLanes<T>);
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
      const Vec<T> row = splat(a[t * a_t + k * a_k]);
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) acc[t][u] += row * column[u];
    }
  }
}

// The larger of each lane; b where one is NaN, as the instruction has it.
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
#if defined(TOKRED_AVX512)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(TOKRED_AVX2)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

constexpr double kLog2E = 1.4426950408889634;

// The minimax polynomial of degree 6 for 2^f, |f| <= 1/2: relative error 2e-9, 8e-8 after the rounding of float.
constexpr float kExp2[] = {1.0f, 0.69314718f, 0.24022646f, 0.055503286f, 0.0096184816f, 0.0013399953f, 0.0001534741f};

// 2^x = 2^n 2^f for x <= 0 (as every exponent of a softmax is), n the nearest integer; NaN stays NaN. Exactly 0 below
// 2^-126: a product with a denormal number is slower by two orders of magnitude.
inline Vec<float> exp2_lanes(Vec<float> x) {
#if !defined(TOKRED_AVX512)
  x = maximum(splat(-200.0f), x);
#endif
  const Vec<float> n = (x + 12582912.0f) - 12582912.0f;  // 1.5 2^23: the sum has no bits below 1
  const Vec<float> f = x - n;
  Vec<float> p = splat(kExp2[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) p = p * f + kExp2[i];
#if defined(TOKRED_AVX512)
  const __mmask16 held = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(held, (__m512)p, (__m512)n);
#else
  const Index<float> exponent = __builtin_convertvector(n, Index<float>) + 127;
  return p * (Vec<float>)((exponent < 0 ? Index<float>{} : exponent) << 23);
#endif
}
inline Vec<double> exp2_lanes(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = exp2(x[l]);
  return x;
}
