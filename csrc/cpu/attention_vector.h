// The two products of attention on the vector units: register tiles of broadcast keys times queries in lanes, and of
// broadcast masses times values in lanes. Any element type; sums of the wide type in k order, those over keys in chains
// of kChainKeys: torch's own errs as little.

template <class T>
class VectorProducts {
  static constexpr int W = kLanes<T>, kTile = kQueryTile<T>, kPanel = kOutTile<T>;

 public:
  template <class F>
  static void typed(Dtype dtype, const F& f) {
    with_type<T>(dtype, f);
  }
  static int64_t padded_rows(int64_t keys) { return round_up(keys, kKeyRows); }
  static int64_t bytes(const AttentionBatch& a, int64_t keys) {
    const int64_t Dp = round_up(a.D, W);
    return Scratch::bytes<T>(padded_rows(keys) * Dp) + Scratch::bytes<T>(keys * Dp) + Scratch::bytes<T>(Dp * kTile) +
           Scratch::bytes<T>(Dp * W);
  }
  VectorProducts(const AttentionBatch& a, int64_t keys, Scratch& scratch)
      : D_(a.D),
        Dp_(round_up(a.D, W)),
        keys_n_(keys),
        keys_(scratch.template take<T>(padded_rows(keys) * Dp_)),
        values_(scratch.template take<T>(keys * Dp_)),
        queries_(scratch.template take<T>(Dp_ * kTile)),
        rows_(scratch.template take<T>(Dp_ * W)) {}

  template <class E>
  void add_key(int64_t n, const E* k) {
    widen_row(k, D_, Dp_, keys_ + n * Dp_);
  }
  // In panels of kPanel columns, [keys][kPanel]; the last may be narrower.
  template <class E>
  void add_value(int64_t n, const E* v) {
    for (int64_t d = 0; d < Dp_; d += kPanel) {
      const int64_t width = Dp_ - d < kPanel ? Dp_ - d : kPanel, D = D_ - d;
      widen_row(v + d, D < width ? D : width, width, values_ + d * keys_n_ + n * width);
    }
  }
  void finish(int64_t n) { memset(keys_ + n * Dp_, 0, (padded_rows(n) - n) * Dp_ * sizeof(T)); }

  // queries_ [Dp][kTile]; those beyond `count` are 0 up to a whole vector.
  template <class E>
  void set_queries(const E* q, int64_t s_n, int64_t count) {
    for (int64_t t = 0; t < count; t += W) {
      const T* rows = rows_;
      int64_t s_row = Dp_;
      if constexpr (sizeof(E) == sizeof(T))
        if (t + W <= count && D_ == Dp_) rows = q + t * s_n, s_row = s_n;  // as they are
      for (int64_t i = 0; rows == rows_ && i < W; ++i)
        if (t + i < count)
          widen_row(q + (t + i) * s_n, D_, Dp_, rows_ + i * Dp_);
        else
          memset(rows_ + i * Dp_, 0, Dp_ * sizeof(T));
      for (int64_t d = 0; d < Dp_; d += W) transpose<T>(rows + d, s_row, queries_ + d * kTile + t, kTile);
    }
  }

  // logits [n, padded][kTile] = k q^T; m becomes the largest factor * logit of each query, and m.
  template <int kVectors>
  void logits(int64_t n, Vec<T> factor, T* logits, Vec<T> (&m)[kVectors]) const {
    int64_t j = 0;
    for (; j + kKeyRows <= n; j += kKeyRows) logit_rows<kVectors>(j, kKeyRows, factor, logits, m);
    if (j < n) logit_rows<kVectors>(j, n - j, factor, logits, m);
  }

  // sink(t, d, v): elements d .. d + W of the row of query t < count of mass^T v.
  template <class Sink>
  void values(int64_t n, const T* mass, int64_t count, const Sink& sink) const {
    for (int64_t d = 0; d < Dp_; d += kPanel)
      for (int64_t t = 0; t < count; t += kOutRows)
        if (Dp_ - d >= kPanel)
          value_rows<kOutVectors>(n, mass, d, t, count, sink);
        else
          value_rows<1>(n, mass, d, t, count, sink);
  }

 private:
  template <int kVectors>
  __attribute__((always_inline)) inline void logit_rows(int64_t j, int64_t rows, Vec<T> factor, T* logits,
                                                        Vec<T> (&m)[kVectors]) const {
    Vec<T> s[kKeyRows][kVectors] = {}, most[kVectors];  // in registers: m might be where the logits go
    multiply(s, D_, keys_ + j * Dp_, Dp_, 1, queries_, kTile);
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) most[u] = m[u];
#pragma GCC unroll 16
    for (int t = 0; t < kKeyRows; ++t)
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) {
        store(logits + (j + t) * kTile + u * W, s[t][u]);
        if (t < rows) most[u] = maximum(s[t][u] * factor, most[u]);
      }
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) m[u] = most[u];
  }
  template <int kVectors, class Sink>
  __attribute__((always_inline)) inline void value_rows(int64_t n, const T* mass, int64_t d, int64_t t, int64_t count,
                                                        const Sink& sink) const {
    const T* values = values_ + d * keys_n_;
    Vec<T> before[kOutRows][kVectors];  // in memory: the sums of one chain fill the registers
    for (int64_t j = 0;;) {
      const int64_t keys = n - j < kChainKeys ? n - j : kChainKeys;
      Vec<T> acc[kOutRows][kVectors] = {};
      multiply(acc, keys, mass + j * kTile + t, 1, kTile, values + j * kVectors * W, kVectors * W);
      if (j > 0) {
#pragma GCC unroll 16
        for (int w = 0; w < kOutRows; ++w)
#pragma GCC unroll 16
          for (int u = 0; u < kVectors; ++u) acc[w][u] += before[w][u];
      }
      j += keys;
      if (j >= n) {
#pragma GCC unroll 16
        for (int w = 0; w < kOutRows; ++w)
          if (t + w < count)
#pragma GCC unroll 16
            for (int u = 0; u < kVectors; ++u) sink(t + w, d + u * W, acc[w][u]);
        return;
      }
#pragma GCC unroll 16
      for (int w = 0; w < kOutRows; ++w)
#pragma GCC unroll 16
        for (int u = 0; u < kVectors; ++u) before[w][u] = acc[w][u];
    }
  }

  const int64_t D_, Dp_, keys_n_;
  T *keys_, *values_, *queries_, *rows_;
};

template <class T>
void attention_units_of(const AttentionBatch& a, int64_t begin, int64_t end) {
  AttentionHead<T, VectorProducts<T>> head(a);
  for (int64_t unit = begin; unit < end; ++unit) head.run(unit);
}

void attention_units(const AttentionBatch& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::kDouble ? attention_units_of<double>(a, begin, end) : attention_units_of<float>(a, begin, end);
}
