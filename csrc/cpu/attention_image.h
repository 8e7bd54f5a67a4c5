// attention, one (image, head, chunk of queries) at a time: out = p v, p_ij = size_j 2^(f s_ij - m_i) / l_i with
// s = q k^T, f = scale log2(e), m the largest f s of a query and l the sum of its masses.
//
// Queries lie across the vector lanes: a tile of kQueryTile queries is transposed once, keys and values are read as
// rows, and maxima and sums over the keys are vertical. Per tile of queries:
//
// 1. logits [keys][kQueryTile] = k q^T, and m.
// 2. masses: 2^(f s - m) size, and their sum l.
// 3. by-products: the class token's row is lane 0 of the first tile; a column sum adds the lanes of mass / l.
// 4. out = mass^T v, times 1 / l as it is written.
//
// Products (1 and 4) are a class of their own: attention_vector.h, attention_amx.h. Only reading rows and writing those
// of out depends on the type in memory, so one class serves float32 and what is widened to it. Up to kKeyBlock keys are
// packed at a time (rows without gaps, masked keys left out), once per head where that holds them all; beyond, blocks
// are folded with a running (m, l, out), and the scores take a second pass over the logits. Scratch of a thread: a
// block's keys, values and logits, and the running rows of a chunk, whatever N is; logits never leave the second-level
// cache.
//
// Floor at N = 197, H = 6, D = 64, float32: 59.6 MFLOP, 242 us of one core at 246 GFLOP/s, 262 with the last tiles
// padded; 233,000 exponentials, 35 us; 605 KB of q, k, v, out. The loop of multiply alone, all in the first-level
// cache, runs at 180 to 196 GFLOP/s. Reached with AVX-512: 438 us, the products at 175 to 184; torch's SDPA without
// sizes 595 (MKL's products run at 155 to 183 there).

// Rows of E [D] to the wide type, padded with 0 to Dp.
template <class E>
void widen_row(const E* from, int64_t D, int64_t Dp, Wide<E>* to) {
  constexpr int W = kLanes<Wide<E>>;
  int64_t d = 0;
  for (; d + W <= D; d += W) store(to + d, load(from + d));
  if (d < D) store(to + d, load_first(from + d, D - d)), d += W;
  for (; d < Dp; d += W) store(to + d, Vec<Wide<E>>{});
}

// Lanes d .. of a row of D, from vectors that may reach beyond.
template <class E>
inline void store_up_to(E* row, int64_t d, Vec<Wide<E>> v, int64_t D) {
  if (d + kLanes<Wide<E>> <= D)
    store(row + d, v);
  else if (d < D)
    store_first(row + d, v, D - d);
}

// The rows of one head, from row n on.
template <class E>
const E* rows_of(const HeadsView& view, int64_t b, int64_t h, int64_t n) {
  return static_cast<const E*>(view.data) + b * view.s_b + h * view.s_h + n * view.s_n;
}

// Where a maximum begins: finite, because -inf - -inf is NaN.
template <class T>
constexpr T lowest() {
  return sizeof(T) == 4 ? T(-1e38) : T(-1e308);
}

// All ones in the lanes below `count`. The others hold no query: whatever they computed must not reach a sum.
template <class T>
Index<T> lanes_below(int64_t count) {
  Index<T> lanes;
  for (int l = 0; l < kLanes<T>; ++l) lanes[l] = l < count ? -1 : 0;
  return lanes;
}

// 1 / l, 0 for a row without mass.
template <class T>
Vec<T> shares(Vec<T> l) {
  return l == 0 ? Vec<T>{} : 1 / l;
}

template <class T, class Products>
class AttentionHead {
  static constexpr int W = kLanes<T>, kTile = kQueryTile<T>;

 public:
  explicit AttentionHead(const AttentionBatch& batch)
      : a_(batch),
        Dp_(round_up(batch.D, W)),
        one_block_(batch.N <= kKeyBlock),
        block_(one_block_ ? batch.N : kKeyBlock),
        rows_(one_block_ ? kTile : batch.chunk_rows),
        columns_(batch.scores == kScoresMean ? block_ : 0),
        factor_(splat(T(batch.scale * kLog2E))),
        scratch_(Products::bytes(batch, block_) + Scratch::bytes<T>(block_) + Scratch::bytes<int32_t>(block_) +
                 Scratch::bytes<T>(Products::padded_rows(block_) * kTile) + Scratch::bytes<T>(columns_) +
                 Scratch::bytes<T>(rows_) * 2 + Scratch::bytes<T>(one_block_ ? 0 : rows_ * Dp_) +
                 Scratch::bytes<T>(kTile * Dp_)),
        products_(batch, block_, scratch_),
        size_(scratch_.template take<T>(block_)),
        index_(scratch_.template take<int32_t>(block_)),
        mass_(scratch_.template take<T>(Products::padded_rows(block_) * kTile)),
        column_(scratch_.template take<T>(columns_)),
        highest_(scratch_.template take<T>(rows_)),
        total_(scratch_.template take<T>(rows_)),
        running_(scratch_.template take<T>(one_block_ ? 0 : rows_ * Dp_)),
        staged_(scratch_.template take<T>(kTile * Dp_)) {}

  // Work is numbered (image, head, chunk), the chunk fastest.
  void run(int64_t unit) {
    const int64_t chunk = unit % a_.chunks, head = unit / a_.chunks;
    b_ = head / a_.H, h_ = head % a_.H;
    first_ = chunk * a_.chunk_rows;
    last_ = first_ + a_.chunk_rows < a_.Nq ? first_ + a_.chunk_rows : a_.Nq;
    const bool mean = a_.scores == kScoresMean, cls = a_.scores == kScoresCls && chunk == 0;
    if (mean || cls) {
      partial_ = static_cast<T*>(a_.partial) + (mean ? unit : head) * a_.N;
      memset(partial_, 0, a_.N * sizeof(T));
    }
    memset(column_, 0, columns_ * sizeof(T));
    if (one_block_) {
      if (head != packed_) {
        pack(0);
        next_head(head + 1);
      }
      packed_ = head;
      for (int64_t i = first_; i < last_; i += kTile) tile(i, 0, true, true);
      if (mean) add_columns();
      return;
    }
    for (int64_t j = 0; j < a_.N; j += kKeyBlock) {
      pack(j);
      for (int64_t i = first_; i < last_; i += kTile) tile(i, i - first_, j == 0, j + kKeyBlock >= a_.N);
    }
    if (mean || cls)
      for (int64_t j = 0; j < a_.N; j += kKeyBlock) {  // the logits again, now that m and l are known
        pack(j);
        for (int64_t i = first_; i < (cls ? first_ + 1 : last_) && i < last_; i += kTile) emit_again(i, i - first_);
        if (mean) add_columns();
      }
  }

 private:
  // The keys from j on that are not masked, and their values.
  void pack(int64_t j) {
    Products::typed(a_.dtype, [&](auto zero) { pack_of<decltype(zero)>(j); });
  }
  template <class E>
  void pack_of(int64_t j) {
    const int64_t count = a_.N - j < block_ ? a_.N - j : block_;
    const E *k = rows_of<E>(a_.k, b_, h_, j), *v = rows_of<E>(a_.v, b_, h_, j);
    const T* size = a_.size ? static_cast<const T*>(a_.size) + b_ * a_.N + j : nullptr;
    n_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (size && !(size[i] > 0)) continue;
      products_.add_key(n_, k + i * a_.k.s_n);
      if (a_.with_values) products_.add_value(n_, v + i * a_.v.s_n);
      if (size) size_[n_] = size[i];
      index_[n_++] = int32_t(j + i);
    }
    products_.finish(n_);
  }

  // The rows of the next head wait in the third-level cache, in runs of D that the hardware does not prefetch.
  void next_head(int64_t head) {
    const int64_t b = head / a_.H, h = head % a_.H;
    ahead_ = b < a_.B ? 0 : a_.N;
    Products::typed(a_.dtype, [&](auto zero) {
      using E = decltype(zero);
      const HeadsView* views[3] = {&a_.k, &a_.v, &a_.q};
      for (int t = 0; t < 3; ++t) {
        next_[t] = reinterpret_cast<const char*>(rows_of<E>(*views[t], b, h, 0));
        next_bytes_[t] = views[t]->s_n * int64_t(sizeof(E));
      }
      row_bytes_ = a_.D * int64_t(sizeof(E));
    });
  }
  void prefetch_ahead() {
    if (ahead_ >= a_.N) return;
    for (int t = 0; t < 3; ++t)
      for (int64_t d = 0; d < row_bytes_; d += 64) __builtin_prefetch(next_[t] + ahead_ * next_bytes_[t] + d, 0, 2);
    ++ahead_;
  }

  void set_queries(int64_t i, int64_t count) {
    Products::typed(
        a_.dtype, [&](auto zero) { products_.set_queries(rows_of<decltype(zero)>(a_.q, b_, h_, i), a_.q.s_n, count); });
  }

  void tile(int64_t i, int64_t row, bool first, bool last) {
    if (last_ - i <= W) return tile_of<1>(i, row, first, last);
    if (last_ - i <= 2 * W) return tile_of<2>(i, row, first, last);
    return tile_of<kQueryVectors>(i, row, first, last);
  }

  // Queries i .. against the packed keys, the first and last block of them or one between; their running rows are
  // highest_, total_, running_ from `row` on.
  template <int kVectors>
  void tile_of(int64_t i, int64_t row, bool first, bool last) {
    const int64_t count = last_ - i < kTile ? last_ - i : kTile;
    set_queries(i, count);
    Vec<T> m[kVectors], before[kVectors], l[kVectors] = {};
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) m[u] = before[u] = first ? splat(lowest<T>()) : load(highest_ + row + u * W);
    products_.template logits<kVectors>(n_, factor_, mass_, m);
    masses<kVectors>(m, l);
    T correction[kTile], share[kTile];
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) {
      if (!first) {
        before[u] = exp2_lanes(before[u] - m[u]);  // what the rows so far are worth now
        l[u] += load(total_ + row + u * W) * before[u];
      }
      store(highest_ + row + u * W, m[u]);
      store(total_ + row + u * W, l[u]);
      store(correction + u * W, before[u]);
      store(share + u * W, shares<T>(l[u]));
    }
    if (one_block_) emit<kVectors>(i, count, share);
    if (a_.with_values) values(i, count, row, first, last, correction, share);
  }

  // The rows of queries i .. from their masses: into out, in staged_ on the way where they are to be narrowed, or,
  // before the last block, into running_.
  void values(int64_t i, int64_t count, int64_t row, bool first, bool last, const T* correction, const T* share) {
    const bool direct = a_.D == Dp_ && (a_.dtype == Dtype::kFloat || a_.dtype == Dtype::kDouble);
    const int64_t at = ((b_ * a_.Nq + i) * a_.H + h_) * a_.D, s_out = a_.H * a_.D, s_to = last && direct ? s_out : Dp_;
    T* running = running_ + row * Dp_;
    T* to = !last ? running : direct ? static_cast<T*>(a_.out) + at : staged_;
    products_.values(n_, mass_, count, [&](int64_t t, int64_t d, Vec<T> sum) __attribute__((always_inline)) {
      if (!first) sum += load(running + t * Dp_ + d) * correction[t];
      store(to + t * s_to + d, last ? sum * share[t] : sum);
    });
    if (!last || direct) return;
    Products::typed(a_.dtype, [&](auto zero) {
      auto* out = static_cast<decltype(zero)*>(a_.out) + at;
      for (int64_t t = 0; t < count; ++t)
        for (int64_t d = 0; d < a_.D; d += W) store_up_to(out + t * s_out, d, load(staged_ + t * Dp_ + d), a_.D);
    });
  }

  // mass_ = 2^(factor logit - m) size; l becomes the sum of each query. This and emit are calls, each a tile's: inlined
  // into tile_of and emit_again_of, they would be compiled twice.
  template <int kVectors>
  void masses(const Vec<T> (&m)[kVectors], Vec<T> (&l)[kVectors]) {
    if (a_.size)
      masses_of<kVectors, true>(m, l);
    else
      masses_of<kVectors, false>(m, l);
  }
  template <int kVectors, bool kSized>
  __attribute__((noinline)) void masses_of(const Vec<T> (&highest)[kVectors], Vec<T> (&l)[kVectors]) {
    Vec<T> m[kVectors];
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) m[u] = highest[u];
    T* mass = mass_;
    const T* size = size_;
    const int64_t n = n_;
    // In two levels: one chain of sums over hundreds of keys would err by several roundings.
    for (int64_t start = 0; start < n; start += kSumKeys) {
      const int64_t end = start + kSumKeys < n ? start + kSumKeys : n;
      Vec<T> part[kVectors] = {};
      for (int64_t j = start; j < end; ++j) {
        if (j % 2 == 0) prefetch_ahead();
#pragma GCC unroll 16
        for (int u = 0; u < kVectors; ++u) {
          T* at = mass + j * kTile + u * W;
          Vec<T> p = exp2_lanes(load(at) * factor_ - m[u]);
          if (kSized) p *= splat(size[j]);
          part[u] += p;
          store(at, p);
        }
      }
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) l[u] += part[u];
    }
  }

  // The scores of a tile whose masses are in mass_.
  template <int kVectors>
  __attribute__((noinline)) void emit(int64_t i, int64_t count, const T* share) {
    if (a_.scores == kScoresCls && i == 0)
      for (int64_t j = 0; j < n_; ++j) partial_[index_[j]] = mass_[j * kTile] * share[0];
    if (a_.scores != kScoresMean) return;
    if (count == kVectors * W)
      add_masses<kVectors, true>(count, share);
    else
      add_masses<kVectors, false>(count, share);
  }
  // column_ += mass_ share, the lanes of W keys summed at a time; kAll: every lane holds a query.
  template <int kVectors, bool kAll>
  void add_masses(int64_t count, const T* share) {
    Vec<T> of[kVectors];
    Index<T> held[kVectors];
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) {
      held[u] = lanes_below<T>(count - u * W);
      of[u] = held[u] ? load(share + u * W) : Vec<T>{};
    }
    const auto key = [&](const T* mass) __attribute__((always_inline)) {
      Vec<T> sum = {};
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) {
        const Vec<T> p = load(mass + u * W);
        sum += (kAll ? p : held[u] ? p : Vec<T>{}) * of[u];
      }
      return sum;
    };
    const T* mass = mass_;
    T* column = column_;
    int64_t j = 0;
    for (; j + W <= n_; j += W, mass += W * kTile) {
      Vec<T> sums[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) sums[r] = key(mass + r * kTile);
      store(column + j, load(column + j) + sum_rows<T>(sums));
    }
    for (; j < n_; ++j, mass += kTile) column[j] += sum_lanes<T>(key(mass));
  }

  void emit_again(int64_t i, int64_t row) {
    if (last_ - i <= W)
      emit_again_of<1>(i, row);
    else if (last_ - i <= 2 * W)
      emit_again_of<2>(i, row);
    else
      emit_again_of<kQueryVectors>(i, row);
  }
  template <int kVectors>
  void emit_again_of(int64_t i, int64_t row) {
    const int64_t count = last_ - i < kTile ? last_ - i : kTile;
    set_queries(i, count);
    Vec<T> m[kVectors], seen[kVectors], none[kVectors] = {};
    T share[kTile];
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) {
      m[u] = seen[u] = load(highest_ + row + u * W);
      store(share + u * W, shares<T>(load(total_ + row + u * W)));
    }
    products_.template logits<kVectors>(n_, factor_, mass_, seen);
    masses<kVectors>(m, none);
    emit<kVectors>(i, count, share);
  }

  // partial_ += column_, each key where it stood before the masked ones were left out.
  void add_columns() {
    for (int64_t j = 0; j < n_; ++j) partial_[index_[j]] += column_[j];
    memset(column_, 0, columns_ * sizeof(T));
  }

  const AttentionBatch& a_;
  const int64_t Dp_;
  const bool one_block_;
  const int64_t block_, rows_, columns_;
  const Vec<T> factor_;
  Scratch scratch_;
  Products products_;
  T* size_;
  int32_t* index_;
  T *mass_, *column_, *highest_, *total_, *running_, *staged_;
  T* partial_ = nullptr;
  const char* next_[3];
  int64_t next_bytes_[3], row_bytes_ = 0;
  int64_t ahead_ = 1 << 30;
  int64_t b_ = 0, h_ = 0, first_ = 0, last_ = 0, n_ = 0, packed_ = -1;
};
