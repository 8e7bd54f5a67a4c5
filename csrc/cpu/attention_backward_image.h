// attention_backward, one (image, head) at a time: p recomputed, dp = dout v^T + g, ds = p (dp - sum_j p dp),
// dq = scale ds k, dk = scale ds^T q, dv = p^T dout, with g the gradient that reaches p through the emitted scores.
//
// Queries lie across the vector lanes, as in attention_image.h: a tile of kQueryTile queries holds p^T and dp^T
// [keys][kQueryTile], so sums over keys are vertical, and dk and dv are added up in scratch over the tiles, in order.
// Masked keys are left out and get gradient 0. Scratch of a thread: keys (4 D + 2 kQueryTile) numbers, never N x N.
//
// Floor at N = 197, H = 6, D = 64, float32: five products, 149 MFLOP, 606 us of one core at 246 GFLOP/s. Reached with
// AVX-512, at 205 GFLOP/s that day: 1,300 us.

template <class T>
class AttentionGradHead {
  static constexpr int W = kLanes<T>, kTile = kQueryTile<T>;

 public:
  explicit AttentionGradHead(const AttentionGrads& grads)
      : g_(grads),
        a_(grads.forward),
        Dp_(round_up(a_.D, W)),
        padded_(round_up(a_.N, kKeyRows)),
        factor_(splat(T(a_.scale * kLog2E))),
        scratch_(Scratch::bytes<T>(padded_ * Dp_) * 4 + Scratch::bytes<T>(padded_ * kTile) * 2 +
                 Scratch::bytes<T>(Dp_ * kTile) * 4 + Scratch::bytes<T>(a_.N) * 2 + Scratch::bytes<int32_t>(a_.N)),
        keys_(scratch_.template take<T>(padded_ * Dp_)),
        values_(scratch_.template take<T>(padded_ * Dp_)),
        grad_keys_(scratch_.template take<T>(padded_ * Dp_)),
        grad_values_(scratch_.template take<T>(padded_ * Dp_)),
        p_(scratch_.template take<T>(padded_ * kTile)),
        ds_(scratch_.template take<T>(padded_ * kTile)),
        query_rows_(scratch_.template take<T>(Dp_ * kTile)),
        queries_(scratch_.template take<T>(Dp_ * kTile)),
        out_rows_(scratch_.template take<T>(Dp_ * kTile)),
        outs_(scratch_.template take<T>(Dp_ * kTile)),
        size_(scratch_.template take<T>(a_.N)),
        emitted_(scratch_.template take<T>(a_.N)),
        index_(scratch_.template take<int32_t>(a_.N)) {}

  void run(int64_t head) {
    b_ = head / a_.H, h_ = head % a_.H;
    with_type<T>(a_.dtype, [&](auto zero) { pack<decltype(zero)>(); });
    for (int64_t i = 0; i < a_.Nq; i += kTile) tile(i);
    with_type<T>(a_.dtype, [&](auto zero) {
      using E = decltype(zero);
      write_rows(grad_keys_, T(a_.scale), static_cast<E*>(g_.grad_k));
      write_rows(grad_values_, T(1), static_cast<E*>(g_.grad_v));
    });
  }

 private:
  template <class E>
  void pack() {
    const E *k = rows_of<E>(a_.k, b_, h_, 0), *v = rows_of<E>(a_.v, b_, h_, 0);
    const T* size = a_.size ? static_cast<const T*>(a_.size) + b_ * a_.N : nullptr;
    const T* emitted = g_.grad_scores ? static_cast<const T*>(g_.grad_scores) + b_ * a_.N : nullptr;
    const T share = T(1) / (T(a_.H) * T(a_.scores == kScoresMean ? a_.Nq : 1));
    n_ = 0;
    for (int64_t j = 0; j < a_.N; ++j) {
      if (size && !(size[j] > 0)) continue;
      widen_row(k + j * a_.k.s_n, a_.D, Dp_, keys_ + n_ * Dp_);
      widen_row(v + j * a_.v.s_n, a_.D, Dp_, values_ + n_ * Dp_);
      size_[n_] = size ? size[j] : T(1);
      emitted_[n_] = emitted ? emitted[j] * share : T(0);
      index_[n_++] = int32_t(j);
    }
    const int64_t rest = (round_up(n_, kKeyRows) - n_) * Dp_ * int64_t(sizeof(T));
    memset(keys_ + n_ * Dp_, 0, rest);
    memset(values_ + n_ * Dp_, 0, rest);
    memset(grad_keys_, 0, padded_ * Dp_ * sizeof(T));
    memset(grad_values_, 0, padded_ * Dp_ * sizeof(T));
  }

  // rows [kTile][Dp], 0 from `count` on, and columns [Dp][kTile]; all 0 without a source.
  void load_rows(const HeadsView& view, int64_t i, int64_t count, T* rows, T* columns) {
    if (!view.data) count = 0;
    with_type<T>(a_.dtype, [&](auto zero) {
      for (int64_t t = 0; t < count; ++t)
        widen_row(rows_of<decltype(zero)>(view, b_, h_, i + t), a_.D, Dp_, rows + t * Dp_);
    });
    memset(rows + count * Dp_, 0, (kTile - count) * Dp_ * sizeof(T));
    for (int64_t d = 0; d < Dp_; d += W)
      for (int64_t t = 0; t < kTile; t += W) transpose<T>(rows + t * Dp_ + d, Dp_, columns + d * kTile + t, kTile);
  }

  // to [n, padded][kTile] = rows [n][Dp] times columns [Dp][kTile].
  void product(const T* rows, const T* columns, T* to) {
    for (int64_t j = 0; j < n_; j += kKeyRows) {
      Vec<T> s[kKeyRows][kQueryVectors] = {};
      multiply(s, a_.D, rows + j * Dp_, Dp_, 1, columns, kTile);
#pragma GCC unroll 16
      for (int t = 0; t < kKeyRows; ++t)
#pragma GCC unroll 16
        for (int u = 0; u < kQueryVectors; ++u) store(to + (j + t) * kTile + u * W, s[t][u]);
    }
  }

  // to [n, padded][Dp] += lanes [n][kTile] times rows [kTile][Dp].
  void add_product(const T* lanes, const T* rows, T* to) {
    for (int64_t d = 0; d < Dp_; d += kOutTile<T>)
      for (int64_t j = 0; j < n_; j += kKeyRows)
        if (Dp_ - d >= kOutTile<T>)
          add_product_rows<kOutVectors>(lanes, rows, to, d, j);
        else
          add_product_rows<1>(lanes, rows, to, d, j);
  }
  template <int kVectors>
  __attribute__((always_inline)) inline void add_product_rows(const T* lanes, const T* rows, T* to, int64_t d,
                                                              int64_t j) {
    Vec<T> s[kKeyRows][kVectors];
#pragma GCC unroll 16
    for (int t = 0; t < kKeyRows; ++t)
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) s[t][u] = load(to + (j + t) * Dp_ + d + u * W);
    multiply(s, kTile, lanes + j * kTile, kTile, 1, rows + d, Dp_);
#pragma GCC unroll 16
    for (int t = 0; t < kKeyRows; ++t)
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) store(to + (j + t) * Dp_ + d + u * W, s[t][u]);
  }

  void tile(int64_t i) {
    const int64_t count = a_.Nq - i < kTile ? a_.Nq - i : kTile;
    load_rows(a_.q, i, count, query_rows_, queries_);
    load_rows(g_.grad_out, i, count, out_rows_, outs_);
    product(keys_, queries_, p_);
    product(values_, outs_, ds_);
    for (int u = 0; u < kQueryVectors; ++u) held_[u] = lanes_below<T>(count - u * W);
    probabilities();
    logit_grads(i);
    const int64_t rest = round_up(n_, kKeyRows) - n_;
    memset(p_ + n_ * kTile, 0, rest * kTile * sizeof(T));
    memset(ds_ + n_ * kTile, 0, rest * kTile * sizeof(T));
    add_product(p_, out_rows_, grad_values_);
    add_product(ds_, query_rows_, grad_keys_);
    query_grads(i, count);
  }

  // p_: logits to probabilities, 0 in the lanes without a query.
  void probabilities() {
    Vec<T> m[kQueryVectors], l[kQueryVectors] = {};
#pragma GCC unroll 16
    for (int u = 0; u < kQueryVectors; ++u) m[u] = splat(lowest<T>());
    for (int64_t j = 0; j < n_; ++j)
#pragma GCC unroll 16
      for (int u = 0; u < kQueryVectors; ++u) m[u] = maximum(load(p_ + j * kTile + u * W) * factor_, m[u]);
    for (int64_t j = 0; j < n_; ++j)
#pragma GCC unroll 16
      for (int u = 0; u < kQueryVectors; ++u) {
        T* at = p_ + j * kTile + u * W;
        const Vec<T> mass = exp2_lanes(load(at) * factor_ - m[u]) * splat(size_[j]);
        l[u] += mass;
        store(at, mass);
      }
    Index<T> held[kQueryVectors];
#pragma GCC unroll 16
    for (int u = 0; u < kQueryVectors; ++u) l[u] = shares<T>(l[u]), held[u] = held_[u];
    for (int64_t j = 0; j < n_; ++j)
#pragma GCC unroll 16
      for (int u = 0; u < kQueryVectors; ++u) {
        T* at = p_ + j * kTile + u * W;
        store(at, held[u] ? load(at) * l[u] : Vec<T>{});
      }
  }

  // ds_: dout v^T to ds.
  void logit_grads(int64_t i) {
    Vec<T> mean[kQueryVectors] = {}, reached[kQueryVectors];  // which lanes the scores came from
    Index<T> held[kQueryVectors];
#pragma GCC unroll 16
    for (int u = 0; u < kQueryVectors; ++u) held[u] = held_[u];
#pragma GCC unroll 16
    for (int u = 0; u < kQueryVectors; ++u) reached[u] = splat(T(a_.scores == kScoresMean));
    if (i == 0) reached[0][0] = 1;
    for (int64_t j = 0; j < n_; ++j)
#pragma GCC unroll 16
      for (int u = 0; u < kQueryVectors; ++u) {
        T* at = ds_ + j * kTile + u * W;
        const Vec<T> dp = load(at) + reached[u] * splat(emitted_[j]);
        mean[u] += load(p_ + j * kTile + u * W) * dp;
        store(at, dp);
      }
    for (int64_t j = 0; j < n_; ++j)
#pragma GCC unroll 16
      for (int u = 0; u < kQueryVectors; ++u) {
        T* at = ds_ + j * kTile + u * W;
        store(at, held[u] ? load(p_ + j * kTile + u * W) * (load(at) - mean[u]) : Vec<T>{});
      }
  }

  // dq of queries i ..
  void query_grads(int64_t i, int64_t count) {
    for (int64_t d = 0; d < Dp_; d += kOutTile<T>)
      for (int64_t t = 0; t < count; t += kOutRows)
        if (Dp_ - d >= kOutTile<T>)
          query_rows<kOutVectors>(i, d, t, count);
        else
          query_rows<1>(i, d, t, count);
  }
  template <int kVectors>
  __attribute__((always_inline)) inline void query_rows(int64_t i, int64_t d, int64_t t, int64_t count) {
    Vec<T> acc[kOutRows][kVectors] = {};
    multiply(acc, n_, ds_ + t, 1, kTile, keys_ + d, Dp_);
    T rows[kOutRows * kVectors * W];  // no call, and so no spill, between the sums and this
#pragma GCC unroll 16
    for (int w = 0; w < kOutRows; ++w)
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) store(rows + (w * kVectors + u) * W, acc[w][u] * splat(T(a_.scale)));
    with_type<T>(a_.dtype, [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(g_.grad_q) + ((b_ * a_.Nq + i + t) * a_.H + h_) * a_.D;
      for (int64_t w = 0; w < kOutRows && t + w < count; ++w)
#pragma GCC unroll 16
        for (int u = 0; u < kVectors; ++u)
          store_up_to(to + w * a_.H * a_.D, d + u * W, load(rows + (w * kVectors + u) * W), a_.D);
    });
  }

  // grad [B, N, H, D] from the kept rows of one head; masked keys get 0.
  template <class E>
  void write_rows(const T* rows, T scale, E* grad) {
    E* to = grad + (b_ * a_.N * a_.H + h_) * a_.D;
    int64_t next = 0;
    for (int64_t j = 0; j < a_.N; ++j) {
      E* row = to + j * a_.H * a_.D;
      if (next == n_ || index_[next] != j) {
        memset(row, 0, a_.D * sizeof(E));
        continue;
      }
      for (int64_t d = 0; d < Dp_; d += W) store_up_to(row, d, load(rows + next * Dp_ + d) * splat(scale), a_.D);
      ++next;
    }
  }

  const AttentionGrads& g_;
  const AttentionBatch& a_;
  const int64_t Dp_, padded_;
  const Vec<T> factor_;
  Scratch scratch_;
  T *keys_, *values_, *grad_keys_, *grad_values_, *p_, *ds_, *query_rows_, *queries_, *out_rows_, *outs_, *size_;
  T* emitted_;
  int32_t* index_;
  Index<T> held_[kQueryVectors] = {};  // the lanes of this tile that hold a query
  int64_t b_ = 0, h_ = 0, n_ = 0;
};

template <class T>
void attention_grads_of(const AttentionGrads& g, int64_t begin, int64_t end) {
  AttentionGradHead<T> head(g);
  for (int64_t one = begin; one < end; ++one) head.run(one);
}

void attention_grads(const AttentionGrads& g, int64_t begin, int64_t end) {
  const bool twice = g.forward.dtype == Dtype::kDouble;
  twice ? attention_grads_of<double>(g, begin, end) : attention_grads_of<float>(g, begin, end);
}
