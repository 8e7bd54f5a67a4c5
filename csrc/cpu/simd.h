// Vectors of one instruction set: GCC vector types of kVectorBytes, and loads and stores that convert to and from the
// wide type (float; double for double). Included by isa_<name>.cpp inside its own namespace and target options, so it
// uses no std:: template: one instantiated here could be linked into code for lesser processors.

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class E>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class E>
using Wide = typename WideOf<E>::type;

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using integer = int32_t;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vector<double> {
  using integer = int64_t;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
using Index = typename Vector<T>::index;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

typedef uint16_t u16x __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t u32x __attribute__((vector_size(kVectorBytes)));

template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};  // x - 0 is x, also for -0: a plain broadcast
}

inline Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const bfloat16_t* p) {
#if defined(TOKRED_AVX512)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(TOKRED_AVX2)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  u16x half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, u32x) << 16);
#endif
}
inline Vec<float> load(const half_t* p) {
  Vec<float> v;
#if defined(TOKRED_AVX512)
  v = (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(TOKRED_AVX2)
  v = (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
#endif
  return v;
}

inline void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(bfloat16_t* p, Vec<float> v) {
  const u32x bits = (u32x)v;
  const u32x nearest_even = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const u32x is_nan = (u32x)(v != v);
  const u16x half = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & nearest_even), u16x);
  __builtin_memcpy(p, &half, sizeof half);
}
inline void store(half_t* p, Vec<float> v) {
#if defined(TOKRED_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(TOKRED_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Calls f with a zero of the element type; T is its wide type.
template <class T, class F>
inline void with_type(Dtype dtype, const F& f) {
  if constexpr (sizeof(T) == sizeof(double)) {
    f(double{});
  } else {
    switch (dtype) {
      case Dtype::kHalf: return f(half_t{});
      case Dtype::kBFloat16: return f(bfloat16_t{});
      default: return f(float{});
    }
  }
}

// The first n lanes; the others are 0.
template <class E>
inline Vec<Wide<E>> load_first(const E* p, int64_t n) {
  E lanes[kLanes<Wide<E>>] = {};
  __builtin_memcpy(lanes, p, n * sizeof(E));
  return load(lanes);
}
template <class E>
inline void store_first(E* p, Vec<Wide<E>> v, int64_t n) {
  E lanes[kLanes<Wide<E>>];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(E));
}

// lane l of the result is lane index[l] of a followed by b.
template <class T>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, Index<T> index) {
#if defined(__clang__)
  Vec<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = index[l] < kLanes<T> ? a[index[l]] : b[index[l] - kLanes<T>];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// All lanes combined pairwise, the lower half with the upper: the same order for every row.
template <class T, int kCount, class Combine>
inline T fold(const T* lanes, Combine combine) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(kCount / 2 * sizeof(T))));
    Half lower, upper;
    __builtin_memcpy(&lower, lanes, sizeof lower);
    __builtin_memcpy(&upper, lanes + kCount / 2, sizeof upper);
    lower = combine(lower, upper);
    T folded[kCount / 2];
    __builtin_memcpy(folded, &lower, sizeof lower);
    return fold<T, kCount / 2>(folded, combine);
  }
}
template <class T, class V, class Combine>
inline T fold_lanes(V v, Combine combine) {
  T lanes[sizeof(V) / sizeof(T)];
  __builtin_memcpy(lanes, &v, sizeof v);
  return fold<T, sizeof(V) / sizeof(T)>(lanes, combine);
}
template <class T>
inline T sum_lanes(Vec<T> v) {
  return fold_lanes<T>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
inline T max_lanes(Vec<T> v) {
  return fold_lanes<T>(v, [](auto a, auto b) { return a > b ? a : b; });
}
template <class T>
inline auto min_lanes(Index<T> v) {
  return fold_lanes<typename Vector<T>::integer>(v, [](auto a, auto b) { return a < b ? a : b; });
}

// 16 bytes from each of p, p + step, ...
template <class T>
inline Vec<T> load_quarters(const T* p, int64_t step) {
#if defined(TOKRED_AVX512)
  auto at = [=](int l) { return _mm_loadu_ps((const float*)(p + l * step)); };
  __m512 v = _mm512_castps128_ps512(at(0));
  v = _mm512_insertf32x4(v, at(1), 1);
  v = _mm512_insertf32x4(v, at(2), 2);
  return (Vec<T>)_mm512_insertf32x4(v, at(3), 3);
#else
  T lanes[kLanes<T>];
#pragma GCC unroll 4
  for (int l = 0; l < kVectorBytes / 16; ++l) __builtin_memcpy(lanes + l * 16 / sizeof(T), p + l * step, 16);
  return load(lanes);
#endif
}

// to [lanes][lanes] = from [lanes][lanes] transposed; a row of each is `from_row` and `to_row` apart. Columns c .. c +
// q of all rows, q elements being 16 bytes, are loaded so that row r + q l comes to quarter l of vector r; then stage s
// exchanges the off-diagonal s x s blocks of every 2s x 2s block without leaving a quarter.
template <class T>
inline void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int W = kLanes<T>, q = 16 / sizeof(T);
#pragma GCC unroll 4
  for (int c = 0; c < W; c += q) {
    Vec<T> row[q];
#pragma GCC unroll 4
    for (int r = 0; r < q; ++r) row[r] = load_quarters(from + r * from_row + c, q * from_row);
#pragma GCC unroll 2
    for (int s = 1; s < q; s *= 2) {
      Index<T> low, high;
      for (int l = 0; l < W; ++l) low[l] = l & s ? W + l - s : l, high[l] = l & s ? W + l : l + s;
#pragma GCC unroll 4
      for (int i = 0; i < q; ++i)
        if (!(i & s)) {
          const Vec<T> a = row[i], b = row[i + s];
          row[i] = shuffle<T>(a, b, low);
          row[i + s] = shuffle<T>(a, b, high);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < q; ++r) store(to + (c + r) * to_row, row[r]);
  }
}

// Lane l of the result is the sum of the lanes of row[l]: neighbours within each 16 bytes first, then neighbouring 16
// bytes, so that most shuffles stay within a quarter.
template <class T>
__attribute__((always_inline)) inline Vec<T> sum_rows(Vec<T> (&row)[kLanes<T>]) {
  constexpr int W = kLanes<T>, q = 16 / sizeof(T);
#pragma GCC unroll 4
  for (int count = W; count > 1; count /= 2) {
    const bool within = count > W / q;
    Index<T> even, odd;
    for (int l = 0; l < W; ++l) {
      const int second = within ? l % q / (q / 2) * W : 0;  // the rest of the quarters of both, one after another
      even[l] = within ? second + l / q * q + l % (q / 2) * 2 : l / q * 2 * q + l % q;
      odd[l] = even[l] + (within ? 1 : q);
    }
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i)
      row[i] = shuffle<T>(row[2 * i], row[2 * i + 1], even) + shuffle<T>(row[2 * i], row[2 * i + 1], odd);
  }
  return row[0];
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One allocation for all scratch arrays of an image; each begins on a vector boundary. Under AddressSanitizer every
// array is followed by a poisoned 64 bytes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(aligned_alloc(64, bytes + 64)) {
    if (!memory_) throw_out_of_memory(bytes);
    next_ = static_cast<char*>(memory_);
  }
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  static int64_t bytes(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), 64) + kGap;
  }
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    poison(array + count, next_);
    return array;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = 64;
  static void poison(const void* from, const char* to) {
    __asan_poison_memory_region(from, to - static_cast<const char*>(from));
  }
#else
  static constexpr int64_t kGap = 0;
  static void poison(const void*, const char*) {}
#endif
  void* memory_;
  char* next_;
};
