// The two products of attention on the matrix units (AMX), for bfloat16: 16 x 16 sums in float32 of exact products, 32
// deep. Masses are rounded to bf16 for the product with the values, as torch rounds them; their sums and the scores are
// not.
//
// Logits come as A = keys [16][32 d] times B = queries in pairs of d [16][16 queries][2]; out^T as A = values^T
// [16 d][32 keys] times B = masses in pairs of keys. Each A and B serves two of the four sums in flight.
//
// Floor at N = 197, H = 6, D = 64: 76 MFLOP with the tiles padded, 27 us of one core at 2,830 GFLOP/s; the exponentials
// take 32 us of its vector units. Splitting a float32 into three bf16 and adding six products is as accurate as
// float32's own arithmetic, but was 1.2x slower here than the vector units: its operands overflow the first-level
// cache.

struct TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// The tile registers, set up while it lives.
class Tiles {
 public:
  Tiles() {
    const TileConfig config;
    fence();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  // GCC's tile intrinsics do not tell the compiler that they read and write memory.
  static void fence() { __asm__ volatile("" ::: "memory"); }
};

class AmxProducts {
  using E = bfloat16_t;
  using T = float;
  static constexpr int W = kLanes<T>, kTile = kQueryTile<T>, kDepth = 32;
  static_assert(W == 16 && kTile == 32);

 public:
  template <class F>
  static void typed(Dtype, const F& f) {
    f(E{});
  }
  static int64_t padded_rows(int64_t keys) { return round_up(keys, kDepth); }
  static int64_t bytes(const AttentionBatch& a, int64_t keys) {
    const int64_t Dp = round_up(a.D, kDepth), rows = padded_rows(keys);
    return Scratch::bytes<E>(rows * Dp) * 2 + Scratch::bytes<E>(kTile * Dp) + Scratch::bytes<float>(kTile * Dp / 2) +
           Scratch::bytes<uint32_t>(rows / 2 * kTile) + Scratch::bytes<T>(W * Dp) + Scratch::bytes<T>(kTile * kDepth);
  }
  AmxProducts(const AttentionBatch& a, int64_t keys, Scratch& scratch)
      : D_(a.D),
        Dp_(round_up(a.D, kDepth)),
        rows_n_(padded_rows(keys)),
        keys_(scratch.take<E>(rows_n_ * Dp_)),
        values_(scratch.take<E>(rows_n_ * Dp_)),
        rows_(scratch.take<E>(kTile * Dp_)),
        queries_(scratch.take<float>(kTile * Dp_ / 2)),
        masses_(scratch.take<uint32_t>(rows_n_ / 2 * kTile)),
        staged_(scratch.take<T>(W * Dp_)),
        sums_(scratch.take<T>(kTile * kDepth)) {}

  void add_key(int64_t n, const E* k) { copy_row(k, keys_ + n * Dp_); }
  void add_value(int64_t n, const E* v) {
    with_values_ = true;
    widen_row(v, D_, Dp_, staged_ + n % W * Dp_);
    if (n % W == W - 1) transpose_values(n - n % W);
  }
  void finish(int64_t n) {
    memset(keys_ + n * Dp_, 0, (padded_rows(n) - n) * Dp_ * sizeof(E));
    for (int64_t i = n; with_values_ && i < padded_rows(n); ++i) {
      memset(staged_ + i % W * Dp_, 0, Dp_ * sizeof(T));
      if (i % W == W - 1) transpose_values(i - i % W);
    }
  }

  // queries_ [Dp / 2][kTile] pairs, moved as floats and never computed with; those beyond `count` are 0.
  void set_queries(const E* q, int64_t s_n, int64_t count) {
    for (int64_t t = 0; t < kTile; ++t)
      if (t < count)
        copy_row(q + t * s_n, rows_ + t * Dp_);
      else
        memset(rows_ + t * Dp_, 0, Dp_ * sizeof(E));
    const float* pairs = reinterpret_cast<const float*>(rows_);
    for (int64_t d = 0; d < Dp_ / 2; d += W)
      for (int64_t t = 0; t < kTile; t += W)
        transpose<float>(pairs + t * Dp_ / 2 + d, Dp_ / 2, queries_ + d * kTile + t, kTile);
  }

  template <int kVectors>
  void logits(int64_t n, Vec<T> factor, T* logits, Vec<T> (&m)[kVectors]) const {
    Tiles::fence();
    for (int64_t j = 0; j < n; j += kDepth) {
      clear<kVectors>();
      for (int64_t d = 0; d < Dp_; d += kDepth) step<kVectors>(keys_ + j * Dp_ + d, Dp_, queries_ + d / 2 * kTile);
      save<kVectors>(logits + j * kTile);
    }
    Tiles::fence();
    for (int64_t j = 0; j < n; ++j)
      for (int u = 0; u < kVectors; ++u) m[u] = maximum(load(logits + j * kTile + u * W) * factor, m[u]);
  }

  template <class Sink>
  void values(int64_t n, const T* mass, int64_t count, const Sink& sink) const {
    if (count > W)
      values_of<2>(n, mass, count, sink);
    else
      values_of<1>(n, mass, count, sink);
  }

 private:
  template <int kVectors, class Sink>
  void values_of(int64_t n, const T* mass, int64_t count, const Sink& sink) const {
    const int64_t padded = padded_rows(n);
    pair_masses<kVectors>(n, padded, mass);
    for (int64_t d = 0; d < Dp_; d += kDepth) {
      Tiles::fence();
      clear<kVectors>();
      for (int64_t j = 0; j < padded; j += kDepth)
        step<kVectors>(values_ + d * rows_n_ + j, rows_n_, masses_ + j / 2 * kTile);
      save<kVectors>(sums_);
      Tiles::fence();
      for (int64_t t = 0; t < count; t += W)
        for (int64_t c = 0; c < kDepth && d + c < D_; c += W) {
          T square[W * W];
          transpose<T>(sums_ + c * kTile + t, kTile, square, W);
          for (int64_t i = 0; i < W && t + i < count; ++i) sink(t + i, d + c, load(square + i * W));
        }
    }
  }

  // masses_ [padded / 2][kTile] pairs of keys.
  template <int kVectors>
  void pair_masses(int64_t n, int64_t padded, const T* mass) const {
    for (int64_t j = 0; j < padded; j += 2)
      for (int u = 0; u < kVectors; ++u) {
        const T* at = mass + j * kTile + u * W;
        const Vec<T> even = j < n ? load(at) : Vec<T>{}, odd = j + 1 < n ? load(at + kTile) : Vec<T>{};
        const u32x pair = nearest_bf16(even) >> 16 | nearest_bf16(odd);
        __builtin_memcpy(masses_ + j / 2 * kTile + u * W, &pair, sizeof pair);
      }
  }
  // In the upper half of a word, of x >= 0; a NaN stays one.
  static u32x nearest_bf16(Vec<float> x) {
    const u32x bits = (u32x)x;
    return x == x ? (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u : bits & 0xffff0000u;
  }

  void copy_row(const E* from, E* to) const {
    memcpy(to, from, D_ * sizeof(E));
    memset(to + D_, 0, (Dp_ - D_) * sizeof(E));
  }

  // values_ [Dp][rows_n_], columns n .. n + W, from staged_ [W][Dp].
  void transpose_values(int64_t n) {
    for (int64_t d = 0; d < Dp_; d += W) {
      T square[W * W];
      transpose<T>(staged_ + d, Dp_, square, W);
      for (int64_t i = 0; i < W; ++i)
        _mm256_storeu_si256((__m256i*)(values_ + (d + i) * rows_n_ + n),
                            _mm512_cvtepi32_epi16((__m512i)((u32x)load(square + i * W) >> 16)));
    }
  }

  template <int kVectors>
  static void clear() {
    _tile_zero(0);
    _tile_zero(2);
    if (kVectors == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
  }
  // Tiles 0, 1 += a_0 (b_0, b_1), tiles 2, 3 += a_1 (b_0, b_1).
  template <int kVectors>
  static void step(const E* a, int64_t a_row, const void* b) {
    _tile_loadd(4, a, a_row * 2);
    _tile_loadd(6, b, kTile * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + 16 * a_row, a_row * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (kVectors == 2) {
      _tile_loadd(7, static_cast<const char*>(b) + 64, kTile * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  template <int kVectors>
  static void save(T* to) {  // [32][kTile]
    _tile_stored(0, to, kTile * 4);
    _tile_stored(2, to + 16 * kTile, kTile * 4);
    if (kVectors == 2) {
      _tile_stored(1, to + 16, kTile * 4);
      _tile_stored(3, to + 16 * kTile + 16, kTile * 4);
    }
  }

  const int64_t D_, Dp_, rows_n_;
  E *keys_, *values_, *rows_;
  float* queries_;
  uint32_t* masses_;
  T *staged_, *sums_;
  bool with_values_ = false;
};

void attention_units(const AttentionBatch& a, int64_t begin, int64_t end) {
  if (a.dtype != Dtype::kBFloat16) return avx512::attention_units(a, begin, end);
  const Tiles tiles;
  AttentionHead<float, AmxProducts> head(a);
  for (int64_t unit = begin; unit < end; ++unit) head.run(unit);
}
