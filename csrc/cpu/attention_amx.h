// The two products of attention on the matrix units (AMX): 16 x 16 sums in float32 of products of bf16, 32 deep.
//
// bfloat16 inputs enter as they are, and masses are rounded to bf16 for the product with the values (their sums and the
// scores are not). A float32 is the exact sum of three bf16, hi + mid + lo of 8 bits each; of the nine products of two
// such sums the six from hi hi down to lo hi are added, smallest first. What is left out is below 2^-24 of the product,
// so the result is as good as float32's own. Infinities have no such sum: `finish` and `set_queries` then refuse.
//
// Tiles: logits^T come as A = keys [16][32 d] times B = queries in pairs of d [16][16 queries][2]; out^T as A =
// values^T [16 d][32 keys] times B = masses in pairs of keys. Each A and B serves two of the four sums in flight.
//
// Floor at N = 197, H = 6, D = 64: 65 M products padded to tiles, at 2,830 GFLOP/s 27 us for bf16, 160 us for float32;
// the exponentials take 35 us of the vector units.

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

// x = sum_i part_i, each the upper half of a word; exact for three parts, and for one if x is a bf16.
template <int kParts>
inline void split(Vec<float> x, u32x (&part)[kParts]) {
  for (int i = 0; i < kParts; ++i) {
    part[i] = (u32x)x & 0xffff0000u;
    if (i + 1 < kParts) x -= (Vec<float>)part[i];
  }
}
inline void store_upper(uint16_t* p, u32x words) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)(words >> 16)));
}
inline u32x nearest_bf16(Vec<float> x) {  // of x >= 0; a NaN stays one
  const u32x bits = (u32x)x;
  return (x == x) ? (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u : bits;
}

// One step of four sums: tiles 0, 1 += a_0 (b_0, b_1), tiles 2, 3 += a_1 (b_0, b_1); 1 and 3 only with two columns.
template <bool kTwo>
inline void tile_step(const uint16_t* a, int64_t a_row, const uint32_t* b) {
  _tile_loadd(4, a, a_row * 2);
  _tile_loadd(6, b, 128);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, a + 16 * a_row, a_row * 2);
  _tile_dpbf16ps(2, 5, 6);
  if (kTwo) {
    _tile_loadd(7, b + 16, 128);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <class E>
class AmxProducts {
  using T = float;
  static constexpr int W = kLanes<T>, kTile = kQueryTile<T>, kDepth = 32;
  static constexpr int kParts = sizeof(E) == 2 ? 1 : 3;
  static_assert(W == 16 && kTile == 32);

 public:
  static int64_t padded_rows(int64_t keys) { return round_up(keys, kDepth); }
  static int64_t bytes(const AttentionBatch& a, int64_t keys) {
    const int64_t Dp = round_up(a.D, kDepth), rows = padded_rows(keys);
    return Scratch::bytes<uint16_t>(kParts * rows * Dp) * 2 + Scratch::bytes<uint16_t>(kParts * kTile * Dp) * 2 +
           Scratch::bytes<uint32_t>(kParts * rows / 2 * kTile) + Scratch::bytes<T>(W * Dp) +
           Scratch::bytes<T>(kTile * kDepth);
  }
  AmxProducts(const AttentionBatch& a, int64_t keys, Scratch& scratch)
      : D_(a.D),
        Dp_(round_up(a.D, kDepth)),
        rows_n_(padded_rows(keys)),
        keys_(scratch.take<uint16_t>(kParts * rows_n_ * Dp_)),
        values_(scratch.take<uint16_t>(kParts * rows_n_ * Dp_)),
        rows_(scratch.take<uint16_t>(kParts * kTile * Dp_)),
        queries_(reinterpret_cast<uint32_t*>(scratch.take<uint16_t>(kParts * kTile * Dp_))),
        masses_(scratch.take<uint32_t>(kParts * rows_n_ / 2 * kTile)),
        staged_(scratch.take<T>(W * Dp_)),
        sums_(scratch.take<T>(kTile * kDepth)) {}

  void add_key(int64_t n, const E* k) { split_row(k, keys_ + n * Dp_, rows_n_ * Dp_); }
  void add_value(int64_t n, const E* v) {
    with_values_ = true;
    widen_row(v, D_, Dp_, staged_ + n % W * Dp_);
    if (n % W == W - 1) transpose_values(n - n % W);
  }
  bool finish(int64_t n) {
    const int64_t padded = padded_rows(n);
    for (int part = 0; part < kParts; ++part)
      memset(keys_ + (part * rows_n_ + n) * Dp_, 0, (padded - n) * Dp_ * sizeof(uint16_t));
    for (int64_t i = n; with_values_ && i < padded; ++i) {
      memset(staged_ + i % W * Dp_, 0, Dp_ * sizeof(T));
      if (i % W == W - 1) transpose_values(i - i % W);
    }
    return was_finite();
  }

  // queries_ [part][Dp / 2][kTile] words of two; those beyond `count` are 0.
  bool set_queries(const E* q, int64_t s_n, int64_t count) {
    for (int64_t t = 0; t < kTile; ++t)
      if (t < count)
        split_row(q + t * s_n, rows_ + t * Dp_, kTile * Dp_);
      else
        for (int part = 0; part < kParts; ++part) memset(rows_ + (part * kTile + t) * Dp_, 0, Dp_ * sizeof(uint16_t));
    const float* words = reinterpret_cast<const float*>(rows_);  // moved, never computed with
    float* to = reinterpret_cast<float*>(queries_);
    const int64_t pairs = Dp_ / 2;
    for (int part = 0; part < kParts; ++part)
      for (int64_t w = 0; w < pairs; w += W)
        for (int64_t t = 0; t < kTile; t += W)
          transpose<float>(words + (part * kTile + t) * pairs + w, pairs, to + (part * pairs + w) * kTile + t, kTile);
    return was_finite();
  }

  template <int kVectors>
  void logits(int64_t n, Vec<T> factor, T* logits, Vec<T> (&m)[kVectors]) const {
    constexpr bool kTwo = kVectors == 2;
    Tiles::fence();
    for (int64_t j = 0; j < n; j += kDepth) {
      clear<kTwo>();
      for (int order = kParts - 1; order >= 0; --order)
        for (int a = 0; a <= order; ++a)
          for (int64_t d = 0; d < Dp_; d += kDepth)
            tile_step<kTwo>(keys_ + (a * rows_n_ + j) * Dp_ + d, Dp_, queries_ + ((order - a) * Dp_ + d) / 2 * kTile);
      save<kTwo>(logits + j * kTile);
    }
    Tiles::fence();
    for (int64_t j = 0; j < n; ++j)
      for (int u = 0; u < kVectors; ++u) m[u] = maximum(load(logits + j * kTile + u * W) * factor, m[u]);
  }

  template <class Sink>
  void values(int64_t n, const T* mass, int64_t count, const Sink& sink) const {
    if (count > W)
      values_of<true>(n, mass, count, sink);
    else
      values_of<false>(n, mass, count, sink);
  }

 private:
  template <bool kTwo, class Sink>
  void values_of(int64_t n, const T* mass, int64_t count, const Sink& sink) const {
    const int64_t padded = padded_rows(n);
    pair_masses<kTwo>(n, padded, mass);
    for (int64_t d = 0; d < Dp_; d += kDepth) {
      Tiles::fence();
      clear<kTwo>();
      for (int order = kParts - 1; order >= 0; --order)
        for (int a = 0; a <= order; ++a)
          for (int64_t j = 0; j < padded; j += kDepth)
            tile_step<kTwo>(values_ + (a * Dp_ + d) * rows_n_ + j, rows_n_,
                            masses_ + ((order - a) * rows_n_ + j) / 2 * kTile);
      save<kTwo>(sums_);
      Tiles::fence();
      for (int64_t t = 0; t < count; t += W)
        for (int64_t c = 0; c < kDepth && d + c < D_; c += W) {
          T square[W * W];
          transpose<T>(sums_ + c * kTile + t, kTile, square, W);
          for (int64_t i = 0; i < W && t + i < count; ++i) sink(t + i, d + c, load(square + i * W));
        }
    }
  }

  // masses_ [part][padded / 2][kTile] words of two keys.
  template <bool kTwo>
  void pair_masses(int64_t n, int64_t padded, const T* mass) const {
    for (int64_t j = 0; j < padded; j += 2)
      for (int u = 0; u < (kTwo ? 2 : 1); ++u) {
        const T* at = mass + j * kTile + u * W;
        const Vec<T> even = j < n ? load(at) : Vec<T>{}, odd = j + 1 < n ? load(at + kTile) : Vec<T>{};
        u32x low[kParts], high[kParts];
        if (kParts == 1) {
          low[0] = nearest_bf16(even), high[0] = nearest_bf16(odd);
        } else {
          split(even, low), split(odd, high);
        }
        for (int part = 0; part < kParts; ++part) {
          const u32x words = low[part] >> 16 | high[part];
          __builtin_memcpy(masses_ + (part * rows_n_ + j) / 2 * kTile + u * W, &words, sizeof words);
        }
      }
  }

  // Rows of parts [kParts], `apart` elements from one to the next.
  void split_row(const E* from, uint16_t* to, int64_t apart) {
    u32x largest = {};
    for (int64_t d = 0; d < Dp_; d += W) {
      const Vec<T> x = d + W <= D_ ? load(from + d) : d < D_ ? load_first(from + d, D_ - d) : Vec<T>{};
      split_and_store(x, to + d, apart, largest);
    }
    remember(largest);
  }
  // largest: of the magnitudes, as integers.
  static void split_and_store(Vec<T> x, uint16_t* to, int64_t apart, u32x& largest) {
    u32x part[kParts];
    split(x, part);
    const u32x magnitude = (u32x)x & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
    for (int i = 0; i < kParts; ++i) store_upper(to + i * apart, part[i]);
  }
  void remember(u32x largest) { largest_ = largest > largest_ ? largest : largest_; }
  bool was_finite() {
    bool finite = true;
    for (int l = 0; l < W && kParts > 1; ++l) finite &= largest_[l] < 0x7f800000u;
    largest_ = u32x{};
    return finite;
  }

  // staged_ [W][Dp] are the values of keys n ..
  void transpose_values(int64_t n) {
    u32x largest = {};
    for (int64_t d = 0; d < Dp_; d += W) {
      T square[W * W];
      transpose<T>(staged_ + d, Dp_, square, W);
      for (int64_t i = 0; i < W; ++i)
        split_and_store(load(square + i * W), values_ + (d + i) * rows_n_ + n, Dp_ * rows_n_, largest);
    }
    remember(largest);
  }

  template <bool kTwo>
  static void clear() {
    _tile_zero(0);
    _tile_zero(2);
    if (kTwo) {
      _tile_zero(1);
      _tile_zero(3);
    }
  }
  template <bool kTwo>
  static void save(T* to) {  // [32][kTile]
    _tile_stored(0, to, kTile * 4);
    _tile_stored(2, to + 16 * kTile, kTile * 4);
    if (kTwo) {
      _tile_stored(1, to + 16, kTile * 4);
      _tile_stored(3, to + 16 * kTile + 16, kTile * 4);
    }
  }

  const int64_t D_, Dp_, rows_n_;
  uint16_t *keys_, *values_, *rows_;
  uint32_t *queries_, *masses_;
  T *staged_, *sums_;
  u32x largest_ = {};
  bool with_values_ = false;
};

template <class E>
void attention_units_of(const AttentionBatch& a, int64_t begin, int64_t end) {
  const Tiles tiles;
  AttentionHead<E, AmxProducts<E>> head(a);
  for (int64_t unit = begin; unit < end; ++unit)
    if (!head.run(unit)) avx512::attention_units(a, unit, unit + 1);
}

void attention_units(const AttentionBatch& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::kFloat: return attention_units_of<float>(a, begin, end);
    case Dtype::kBFloat16: return attention_units_of<bfloat16_t>(a, begin, end);
    default: return avx512::attention_units(a, begin, end);
  }
}
