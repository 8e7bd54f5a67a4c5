// attention, one (image, head, chunk of queries) at a time: out = p v, p_ij = size_j 2^(s_ij - m_i) / l_i with
// s = scale log2(e) q k^T, m the largest logit of a query and l the sum of its masses.
//
// Queries lie across the vector lanes: a tile of kQueryTile queries is transposed once, keys and values are read as
// rows, and maxima and sums over the keys are vertical. Per tile of queries:
//
// 1. logits [keys][kQueryTile] = k q^T in register tiles of kKeyRows x kQueryVectors; the running maximum m stays in
//    registers.
// 2. masses: 2^(s - m) size, their sum l.
// 3. by-products: the class token's row is lane 0 of the first tile; a column sum adds mass / l lane by lane.
// 4. out = mass^T v in register tiles of kOutRows x kOutVectors, times 1 / l as it is written.
//
// Up to kKeyBlock keys are packed at a time (rows without gaps, in the wide type; masked keys are left out), once per
// head where that holds them all; beyond, blocks are folded with a running (m, l, out) and the column sums take a
// second pass over the logits. Scratch: kKeyBlock (2 D + kQueryTile) floats a thread at most, whatever N is, and the
// running rows of a chunk; logits never leave the second-level cache.
//
// Floor at N = 197, H = 6, D = 64, float32: 59.6 MFLOP, 242 us of one core at 246 GFLOP/s, of which the padding of the
// last tiles makes 262; 233,000 exponentials. 605 KB of q, k, v, out.

#if defined(TOKRED_AVX512)
constexpr int kKeyRows = 12, kQueryVectors = 2, kOutRows = 8, kOutVectors = 2;  // of 32 registers
#elif defined(TOKRED_AVX2)
constexpr int kKeyRows = 6, kQueryVectors = 2, kOutRows = 4, kOutVectors = 2;  // of 16
#else
constexpr int kKeyRows = 4, kQueryVectors = 2, kOutRows = 4, kOutVectors = 2;
#endif
template <class T>
constexpr int kQueryTile = kQueryVectors * kLanes<T>;
template <class T>
constexpr int kOutTile = kOutVectors * kLanes<T>;

// Rows of E [rows][D] to T, without gaps and padded with 0 to Dp.
template <class E>
void widen_row(const E* from, int64_t D, int64_t Dp, Wide<E>* to) {
  constexpr int W = kLanes<Wide<E>>;
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d));
  if (d < D) store(to + d, load_first(from + d, D - d)), d += W;
  for (; d < Dp; d += W) store(to + d, Vec<Wide<E>>{});
}

// Keys and values of one head, and what a tile of queries leaves behind.
template <class E>
class AttentionHead {
  using T = Wide<E>;
  static constexpr int W = kLanes<T>, kTile = kQueryTile<T>;

 public:
  explicit AttentionHead(const AttentionBatch& batch)
      : a_(batch),
        Dp_(round_up(batch.D, W)),
        block_(batch.N < kKeyBlock ? batch.N : kKeyBlock),
        one_block_(batch.N <= kKeyBlock),
        rows_(one_block_ ? kTile : batch.chunk_rows),
        padded_(round_up(block_, kKeyRows)),
        scratch_(Scratch::bytes<T>(padded_ * Dp_) * 2 + Scratch::bytes<T>(block_) + Scratch::bytes<int32_t>(block_) +
                 Scratch::bytes<T>(padded_ * kTile) + Scratch::bytes<T>(Dp_ * kTile) + Scratch::bytes<T>(kTile * Dp_) +
                 Scratch::bytes<T>(batch.scores == kScoresMean ? padded_ * W : 0) +
                 Scratch::bytes<T>(round_up(rows_, kTile)) * 2 + Scratch::bytes<T>(one_block_ ? 0 : rows_ * Dp_)) {
    keys_ = scratch_.template take<T>(padded_ * Dp_);
    values_ = scratch_.template take<T>(padded_ * Dp_);
    size_ = scratch_.template take<T>(block_);
    index_ = scratch_.template take<int32_t>(block_);
    mass_ = scratch_.template take<T>(padded_ * kTile);
    queries_ = scratch_.template take<T>(Dp_ * kTile);
    widened_ = scratch_.template take<T>(kTile * Dp_);
    column_ = scratch_.template take<T>(batch.scores == kScoresMean ? padded_ * W : 0);
    highest_ = scratch_.template take<T>(round_up(rows_, kTile));
    total_ = scratch_.template take<T>(round_up(rows_, kTile));
    running_ = scratch_.template take<T>(one_block_ ? 0 : rows_ * Dp_);
  }

  // Work is numbered (image, head, chunk), the chunk fastest.
  void run(int64_t unit) {
    const int64_t chunk = unit % a_.chunks, head = unit / a_.chunks;
    b_ = head / a_.H, h_ = head % a_.H;
    first_ = chunk * a_.chunk_rows;
    last_ = first_ + a_.chunk_rows < a_.Nq ? first_ + a_.chunk_rows : a_.Nq;
    partial_ = a_.scores == kScoresNone ? nullptr : static_cast<T*>(a_.partial) + partial_row(chunk) * a_.N;
    if (partial_ && !(a_.scores == kScoresCls && chunk > 0)) memset(partial_, 0, a_.N * sizeof(T));
    if (first_ >= last_) return;
    if (one_block_) {
      if (head != packed_) pack(0, a_.N), packed_ = head;
      for (int64_t i = first_; i < last_; i += kTile) tile(i, 0, kOnly);
      if (a_.scores == kScoresMean) add_columns();
      return;
    }
    for (int64_t j = 0; j < a_.N; j += kKeyBlock) {
      pack(j, a_.N - j < kKeyBlock ? a_.N - j : kKeyBlock);
      const Place place = j == 0 ? kFirst : j + kKeyBlock < a_.N ? kMiddle : kLast;
      for (int64_t i = first_; i < last_; i += kTile) tile(i, i - first_, place);
    }
    const bool cls = a_.scores == kScoresCls && chunk == 0;
    if (!cls && a_.scores != kScoresMean) return;
    for (int64_t j = 0; j < a_.N; j += kKeyBlock) {  // the logits again, now that m and l are known
      pack(j, a_.N - j < kKeyBlock ? a_.N - j : kKeyBlock);
      for (int64_t i = first_; i < (cls ? first_ + 1 : last_); i += kTile) second_pass(i, i - first_);
      if (!cls) add_columns();
    }
  }

 private:
  enum Place { kOnly, kFirst, kMiddle, kLast };

  int64_t partial_row(int64_t chunk) const {
    return a_.scores == kScoresCls ? b_ * a_.H + h_ : (b_ * a_.H + h_) * a_.chunks + chunk;
  }

  // Keys j .. j + count that are not masked, and their values in panels of kOutTile columns.
  void pack(int64_t j, int64_t count) {
    const E* k = static_cast<const E*>(a_.k.data) + b_ * a_.k.s_b + h_ * a_.k.s_h + j * a_.k.s_n;
    const E* v = static_cast<const E*>(a_.v.data) + b_ * a_.v.s_b + h_ * a_.v.s_h + j * a_.v.s_n;
    const T* size = a_.size ? static_cast<const T*>(a_.size) + b_ * a_.N + j : nullptr;
    n_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (size && !(size[i] > 0)) continue;
      widen_row(k + i * a_.k.s_n, a_.D, Dp_, keys_ + n_ * Dp_);
      for (int64_t d = 0; a_.with_values && d < Dp_; d += kOutTile<T>) {
        const int64_t width = Dp_ - d < kOutTile<T> ? Dp_ - d : kOutTile<T>, D = a_.D - d;
        widen_row(v + i * a_.v.s_n + d, D < width ? D : width, width, values_ + d * block_ + n_ * width);
      }
      if (size) size_[n_] = size[i];
      index_[n_++] = int32_t(j + i);
    }
    memset(keys_ + n_ * Dp_, 0, (round_up(n_, kKeyRows) - n_) * Dp_ * sizeof(T));
    if (a_.scores == kScoresMean) memset(column_, 0, padded_ * W * sizeof(T));
  }

  // queries_ [Dp][kTile] = rows i .. of q, times the scale; queries beyond the last are 0.
  void load_queries(int64_t i, int64_t count) {
    const E* q = static_cast<const E*>(a_.q.data) + b_ * a_.q.s_b + h_ * a_.q.s_h + i * a_.q.s_n;
    const Vec<T> scale = splat(T(a_.scale * 1.4426950408889634));
    for (int64_t t = 0; t < round_up(count, W); ++t)
      if (t < count) {
        T* row = widened_ + t * Dp_;
        widen_row(q + t * a_.q.s_n, a_.D, Dp_, row);
        for (int64_t d = 0; d < Dp_; d += W) store(row + d, load(row + d) * scale);
      } else {
        memset(widened_ + t * Dp_, 0, Dp_ * sizeof(T));
      }
    for (int64_t d = 0; d < Dp_; d += W)
      for (int64_t t = 0; t < count; t += W) transpose<T>(widened_ + t * Dp_ + d, Dp_, queries_ + d * kTile + t, kTile);
  }

  // mass_ [n][kTile] = logits; m becomes the largest of each query and what it was.
  template <int kVectors>
  void logits(Vec<T> (&m)[kVectors]) {
    int64_t j = 0;
    for (; j + kKeyRows <= n_; j += kKeyRows) logit_rows<kVectors>(j, kKeyRows, m);
    if (j < n_) logit_rows<kVectors>(j, n_ - j, m);
  }
  template <int kVectors>
  __attribute__((always_inline)) inline void logit_rows(int64_t j, int64_t rows, Vec<T> (&m)[kVectors]) {
    Vec<T> s[kKeyRows][kVectors] = {};
    multiply(s, a_.D, keys_ + j * Dp_, Dp_, 1, queries_, kTile);
#pragma GCC unroll 16
    for (int t = 0; t < kKeyRows; ++t)
      for (int u = 0; u < kVectors; ++u) {
        store(mass_ + (j + t) * kTile + u * W, s[t][u]);
        if (t < rows) m[u] = maximum(s[t][u], m[u]);
      }
  }

  // mass_ = 2^(logit - m) size; l becomes the sum of each query.
  template <int kVectors, bool kSized>
  void masses(const Vec<T> (&m)[kVectors], Vec<T> (&l)[kVectors]) {
    for (int64_t j = 0; j < n_; ++j)
      for (int u = 0; u < kVectors; ++u) {
        T* at = mass_ + j * kTile + u * W;
        Vec<T> p = exp2_lanes(load(at) - m[u]);
        if (kSized) p *= splat(size_[j]);
        l[u] += p;
        store(at, p);
      }
  }

  void tile(int64_t i, int64_t row, Place place) {
    if (last_ - i > W)
      tile_of<kQueryVectors>(i, row, place);
    else
      tile_of<1>(i, row, place);
  }

  template <int kVectors>
  void tile_of(int64_t i, int64_t row, Place place) {
    const int64_t count = last_ - i < kTile ? last_ - i : kTile;
    const bool fresh = place == kOnly || place == kFirst;
    T *highest = highest_ + row, *total = total_ + row;
    load_queries(i, count);
    Vec<T> m[kVectors], before[kVectors], l[kVectors] = {};
    for (int u = 0; u < kVectors; ++u) m[u] = before[u] = fresh ? splat(lowest()) : load(highest + u * W);
    logits<kVectors>(m);
    if (a_.size)
      masses<kVectors, true>(m, l);
    else
      masses<kVectors, false>(m, l);
    for (int u = 0; u < kVectors; ++u) {
      if (!fresh) {
        before[u] = exp2_lanes(before[u] - m[u]);  // what the rows so far are worth now
        l[u] += load(total + u * W) * before[u];
      }
      store(highest + u * W, m[u]);
      store(total + u * W, l[u]);
    }
    T correction[kTile], share[kTile];
    const bool last = place == kOnly || place == kLast;
    for (int u = 0; u < kVectors; ++u) {
      store(correction + u * W, before[u]);
      store(share + u * W, shares(l[u], count - u * W));
    }
    if (place == kOnly) emit<kVectors>(i, share);
    if (a_.with_values) values(i, row, count, fresh ? nullptr : correction, last ? share : nullptr);
  }

  // Rows i .. of p v; with what came before, times `correction`; out gets it times `share`, else it stays in running_.
  void values(int64_t i, int64_t row, int64_t count, const T* correction, const T* share) {
    const int64_t s_n = a_.H * a_.D;
    E* out = static_cast<E*>(a_.out) + (b_ * a_.Nq + i) * s_n + h_ * a_.D;
    for (int64_t d = 0; d < Dp_; d += kOutTile<T>)
      for (int64_t t = 0; t < count; t += kOutRows)
        if (Dp_ - d >= kOutTile<T>)
          value_rows<kOutVectors>(d, t, count, row, correction, share, out, s_n);
        else
          value_rows<1>(d, t, count, row, correction, share, out, s_n);
  }
  template <int kVectors>
  __attribute__((always_inline)) inline void value_rows(int64_t d, int64_t t, int64_t count, int64_t row,
                                                        const T* correction, const T* share, E* out, int64_t s_n) {
    Vec<T> acc[kOutRows][kVectors] = {};
    multiply(acc, n_, mass_ + t, 1, kTile, values_ + d * block_, kVectors * W);
#pragma GCC unroll 16
    for (int w = 0; w < kOutRows; ++w)
      for (int u = 0; u < kVectors && t + w < count; ++u) {
        const int64_t c = d + u * W;
        T* sum = running_ + (row + t + w) * Dp_ + c;
        if (correction) acc[w][u] += load(sum) * correction[t + w];
        if (!share)
          store(sum, acc[w][u]);
        else if (c + W <= a_.D)
          store(out + (t + w) * s_n + c, acc[w][u] * share[t + w]);
        else
          store_first(out + (t + w) * s_n + c, acc[w][u] * share[t + w], a_.D - c);
      }
  }

  // 1 / l, 0 for a row without mass and for the lanes from `count` on, which hold no query.
  static Vec<T> shares(Vec<T> l, int64_t count) {
    Vec<T> share = l == 0 ? Vec<T>{} : 1 / l;
    for (int64_t lane = count < 0 ? 0 : count; lane < W; ++lane) share[lane] = 0;
    return share;
  }

  // The scores of a tile whose masses are in mass_.
  template <int kVectors>
  void emit(int64_t i, const T* share) {
    if (a_.scores == kScoresCls && i == 0)
      for (int64_t j = 0; j < n_; ++j) partial_[index_[j]] = mass_[j * kTile] * share[0];
    if (a_.scores != kScoresMean) return;
    for (int64_t j = 0; j < n_; ++j) {
      Vec<T> sum = load(column_ + j * W);
      for (int u = 0; u < kVectors; ++u) sum += load(mass_ + j * kTile + u * W) * load(share + u * W);
      store(column_ + j * W, sum);
    }
  }

  void second_pass(int64_t i, int64_t row) {
    if (last_ - i > W)
      second_pass_of<kQueryVectors>(i, row);
    else
      second_pass_of<1>(i, row);
  }
  template <int kVectors>
  void second_pass_of(int64_t i, int64_t row) {
    const int64_t count = last_ - i < kTile ? last_ - i : kTile;
    load_queries(i, count);
    Vec<T> m[kVectors], none[kVectors] = {};
    T share[kTile];
    for (int u = 0; u < kVectors; ++u) {
      m[u] = load(highest_ + row + u * W);
      store(share + u * W, shares(load(total_ + row + u * W), count - u * W));
    }
    Vec<T> seen[kVectors];
    for (int u = 0; u < kVectors; ++u) seen[u] = m[u];
    logits<kVectors>(seen);
    if (a_.size)
      masses<kVectors, true>(m, none);
    else
      masses<kVectors, false>(m, none);
    emit<kVectors>(i, share);
  }

  // partial_ += the lanes of column_, W keys at a time: a transpose makes the sums vertical.
  void add_columns() {
    T square[W * W];
    for (int64_t j = 0; j < n_; j += W) {
      transpose<T>(column_ + j * W, W, square, W);
      Vec<T> sum = load(square);
      for (int l = 1; l < W; ++l) sum += load(square + l * W);
      for (int l = 0; l < W && j + l < n_; ++l) partial_[index_[j + l]] += sum[l];
    }
    memset(column_, 0, padded_ * W * sizeof(T));
  }

  static T lowest() { return sizeof(T) == 4 ? T(-3e38) : T(-1e308); }  // finite: -inf - -inf would be NaN

  const AttentionBatch& a_;
  const int64_t Dp_, block_;
  const bool one_block_;
  const int64_t rows_, padded_;
  Scratch scratch_;
  T *keys_, *values_, *size_, *mass_, *queries_, *widened_, *column_, *highest_, *total_, *running_;
  int32_t* index_;
  T* partial_ = nullptr;
  int64_t b_ = 0, h_ = 0, first_ = 0, last_ = 0, n_ = 0, packed_ = -1;
};

template <class E>
void attention_units_of(const AttentionBatch& a, int64_t begin, int64_t end) {
  AttentionHead<E> head(a);
  for (int64_t unit = begin; unit < end; ++unit) head.run(unit);
}

void attention_units(const AttentionBatch& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::kFloat: return attention_units_of<float>(a, begin, end);
    case Dtype::kHalf: return attention_units_of<half_t>(a, begin, end);
    case Dtype::kBFloat16: return attention_units_of<bfloat16_t>(a, begin, end);
    case Dtype::kDouble: return attention_units_of<double>(a, begin, end);
  }
}
