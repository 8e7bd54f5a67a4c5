// match, one image: s_ij = <a_i, b_j> of head-mean unit rows; edge_i = first-index max over j; the r best edges merge.
//
// 1. unit rows: a row-major, b in panels of kCols columns ([panel][D][kCols]), both padded with 0 in D, b with NaN
// columns
//    (a NaN score never wins, so the inner loop needs no mask).
// 2. tiles of kRows x kCols: D fused multiply-adds each in d order, so equal rows score bitwise equal wherever they
// sit;
//    a running (max, argmax) per lane stays in registers, the N x N scores never exist.
// 3. rank_i = #{j: s_j > s_i, or equal and j < i}: membership in the r best, stable, without a sort.
// Two ways, 2 and 3 choose r / 2 of a; the unit rows of the a that stay move together, 2 runs again over these with a
// running maximum a column, and the ranks of the columns say which b merge and in what order the others come: 1.6 times
// one way at r = 16.
//
// Floor at N = 197, H = 6, D = 64, float32: 2 * 98 * 98 * 64 = 1.23 MFLOP, 303 KB of keys read once. Scratch N * D * 4
// bytes a thread, in the second-level cache. Reached on a Xeon with AVX-512 (246 GFLOP/s peak, 1 thread), keys in L2:
// 16.8 us, of which unit rows and panels 5.8, edges 10.4 (floor 5.0; the last tiles are padded, the clock falls), rank
// .6. Eight images, keys in L3 (24 GB/s so strided, 12.6 us an image): 23 us an image, as the next one's keys come
// while the edges are computed; match_merge 44, where its bytes alone take 34.

// Rows of a tile: kRows x 2 sums, 2 columns and 1 broadcast must fit the registers (32, 16, 16).
#if defined(TOKRED_AVX512)
constexpr int kRows = 8;
#elif defined(TOKRED_AVX2)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
template <class T>
constexpr int kCols = 2 * kLanes<T>;

// unit [round_up(D, lanes)]: the mean over heads in head order, times 1 / max(norm, 1e-6). The row `ahead` elements on
// is prefetched, and the beginning of the one behind it: the runs of H * D between the strides of a fused qkv are too
// short for the hardware's prefetcher, which two lines wake (eight images: match -20 %, match_merge -2 %).
template <class E>
void unit_row(const E* head0, int64_t H, int64_t D, int64_t s_h, int64_t ahead, Wide<E>* unit) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>, kBlock = 4;  // vectors summed at a time over all heads
  const Vec<T> share = splat(T(1) / T(H));
  Vec<T> squares = {};
  for (int line = 0; line < 2; ++line) __builtin_prefetch((const char*)(head0 + 2 * ahead) + 64 * line);
  int64_t d = 0;
  for (; d + kBlock * W <= D; d += kBlock * W) {
    Vec<T> sum[kBlock];
#pragma GCC unroll 16
    for (int v = 0; v < kBlock; ++v) sum[v] = load(head0 + d + v * W);
    for (int64_t h = 1; h < H; ++h)
#pragma GCC unroll 16
      for (int v = 0; v < kBlock; ++v) {
        __builtin_prefetch(head0 + h * s_h + d + v * W + ahead);
        sum[v] += load(head0 + h * s_h + d + v * W);
      }
#pragma GCC unroll 16
    for (int v = 0; v < kBlock; ++v) {
      if (H > 1) sum[v] *= share;
      squares += sum[v] * sum[v];
      store(unit + d + v * W, sum[v]);
    }
  }
  for (; d < D; d += W) {
    const int64_t n = D - d < W ? D - d : W;
    Vec<T> sum = load_first(head0 + d, n);
    for (int64_t h = 1; h < H; ++h) sum += load_first(head0 + h * s_h + d, n);
    if (H > 1) sum *= share;
    squares += sum * sum;
    store(unit + d, sum);
  }
  const T norm = __builtin_sqrt(sum_lanes<T>(squares));
  const Vec<T> scale = splat(T(1) / (norm < T(1e-6) ? T(1e-6) : norm));
  for (d = 0; d < D; d += W) store(unit + d, load(unit + d) * scale);
}

// from [kCols][Dp] row-major -> panel [Dp][kCols].
template <class T>
void pack_panel(const T* from, int64_t Dp, T* panel) {
  constexpr int W = kLanes<T>;
  for (int64_t d = 0; d < Dp; d += W)
    for (int c = 0; c < kCols<T>; c += W) transpose<T>(from + c * Dp + d, Dp, panel + d * kCols<T> + c, kCols<T>);
}

// Fetches the lines of Ahead evenly over `steps` steps of the inner loop: in bursts they would hold up its loads.
struct Prefetch {
  Prefetch(const Ahead& a, int64_t steps)
      : at(a.data), row_end(a.data + a.row_bytes), rows(a.rows), row_bytes(a.row_bytes), stride(a.stride) {
    const int64_t halves = rows ? 2 * (steps / rows) : 0;
    pace = rows == 0 ? 0 : halves * kLine <= row_bytes ? kLine : (row_bytes + halves - 1) / halves;
  }
  [[gnu::always_inline]] inline void step() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + pace, 0, 2);
    at += 2 * pace;
    if (at >= row_end && pace) next_row();
  }

 private:
  static constexpr int64_t kLine = 64;
  void next_row() {
    row_end += stride, at = row_end - row_bytes;
    if (--rows == 0) pace = 0, at -= stride;
  }
  const char *at, *row_end;
  int64_t rows, row_bytes, stride, pace;
};

template <class T>
struct Edges {
  T* a;                 // unit rows [na padded to kRows][Dp]
  const T* b;           // panels [nb / kCols][Dp][kCols]
  T* weight_a;          // [na padded] or null
  const T* weight_b;    // [nb padded]
  T* best;              // [na]; of the way back [nb padded to the lanes]
  int32_t *dst, *rank;  // as best
  int64_t na, nb, Dp;
  double power;
  Prefetch ahead;  // MatchImage::ahead
};

// (max((s + 1) / 2, 0)^power * weight_i) * weight_j
template <class T>
Vec<T> weighted(Vec<T> score, double power, T weight_i, Vec<T> weight_j) {
  Vec<T> base = (score + 1) * T(0.5);
  base = base < 0 ? Vec<T>{} : base;
  if (power != 1)
    for (int l = 0; l < kLanes<T>; ++l) base[l] = pow(base[l], T(power));
  return base * weight_i * weight_j;
}

// The running (max, argmax) of kRows rows, one a lane.
template <class T>
struct Best {
  Vec<T> score[kRows];
  Index<T> column[kRows];
};

// sum: the scores of rows i .. i + kRows and kVectors vectors of columns from j on. Always inline: in registers.
template <int kVectors, class T>
[[gnu::always_inline]] inline void scores(Edges<T>& e, int64_t i, int64_t j, Vec<T> (&sum)[kRows][kVectors]) {
  constexpr int W = kLanes<T>;
  const T *a = e.a + i * e.Dp, *b = e.b + j * e.Dp;
  Prefetch ahead = e.ahead;
  for (int64_t d = 0; d < e.Dp; ++d) {
    ahead.step();
    Vec<T> column[kVectors];
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) column[u] = load(b + d * kCols<T> + u * W);
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
      const Vec<T> row = splat(a[t * e.Dp + d]);
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) sum[t][u] += row * column[u];
    }
  }
  e.ahead = ahead;
  if (!e.weight_a) return;
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u)
      sum[t][u] = weighted<T>(sum[t][u], e.power, e.weight_a[i + t], load(e.weight_b + j + u * W));
}

template <int kVectors, class T>
inline void tile(Edges<T>& e, int64_t i, int64_t j, Best<T>& best) {
  Vec<T> score[kRows][kVectors] = {};
  scores<kVectors>(e, i, j, score);
  Index<T> lane;
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = typename Vector<T>::integer(j + l);
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 16
    for (int u = 0; u < kVectors; ++u) {
      const Index<T> better = score[t][u] > best.score[t];
      best.score[t] = better ? score[t][u] : best.score[t];
      best.column[t] = better ? lane + u * kLanes<T> : best.column[t];
    }
}

// The best partner of rows i .. i + kRows.
template <class T>
void best_edges(Edges<T>& e, int64_t i) {
  constexpr int W = kLanes<T>;
  Best<T> best;
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t) best.score[t] = splat(T(-__builtin_inf())), best.column[t] = Index<T>{};
  for (int64_t j = 0; j < e.nb; j += kCols<T>)
    if (e.nb - j > W)
      tile<2>(e, i, j, best);
    else
      tile<1>(e, i, j, best);
  for (int t = 0; t < kRows && i + t < e.na; ++t) {
    const T score = max_lanes<T>(best.score[t]);
    // Lanes that do not hold the maximum take part with a column beyond every other.
    const Index<T> none = Index<T>{} + (typename Vector<T>::integer(1) << 30);
    e.best[i + t] = score;
    e.dst[i + t] = int32_t(min_lanes<T>(best.score[t] == score ? best.column[t] : none));
  }
}

// The best row of each column of kVectors vectors from j on.
template <int kVectors, class T>
void best_back_edges(Edges<T>& e, int64_t j) {
  constexpr int W = kLanes<T>;
  Vec<T> best[kVectors];
  Index<T> row[kVectors] = {};
#pragma GCC unroll 16
  for (int u = 0; u < kVectors; ++u) best[u] = splat(T(-__builtin_inf()));
  for (int64_t i = 0; i < e.na; i += kRows) {
    Vec<T> score[kRows][kVectors] = {};
    scores<kVectors>(e, i, j, score);
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 16
      for (int u = 0; u < kVectors; ++u) {
        const Index<T> better = score[t][u] > best[u];
        best[u] = better ? score[t][u] : best[u];
        row[u] = better ? Index<T>{} + typename Vector<T>::integer(i + t) : row[u];
      }
  }
#pragma GCC unroll 16
  for (int u = 0; u < kVectors; ++u) {
    store(e.best + j + u * W, best[u]);
    for (int l = 0; l < W; ++l) e.dst[j + u * W + l] = int32_t(row[u][l]);
  }
}

// rank_i = #{j: s_j > s_i, or equal and j < i} for i < n, one i a lane; s [n padded to the lanes with NaN or
// -infinity], which never counts, rank padded too.
template <class T>
void rank_all(const T* s, int64_t n, int32_t* rank) {
  constexpr int W = kLanes<T>;
  Index<T> lane;
  for (int l = 0; l < W; ++l) lane[l] = l;
  for (int64_t i = 0; i < n; i += W) {
    const Vec<T> mine = load(s + i);
    Index<T> count = {};  // minus 1 for each comparison that holds
    for (int64_t j = 0; j < i; ++j) count += splat(s[j]) >= mine;
    for (int l = 0; l < W; ++l) {
      const Vec<T> other = splat(s[i + l]);
      count += (other > mine) | ((other == mine) & (lane > l));
    }
    for (int64_t j = i + W; j < n; ++j) count += splat(s[j]) > mine;
    for (int l = 0; l < W; ++l) rank[i + l] = int32_t(-count[l]);
  }
}

// The way back, from b to the a that stayed: assign holds the rows of the first way, those of b from first_b on.
template <class T>
void match_back(const MatchImage& m, Edges<T>& e, int64_t first_b) {
  constexpr int W = kLanes<T>;
  const int64_t a0 = m.p + m.p % 2, kept = first_b - m.p, rows = round_up(kept, kRows), r_b = m.r - m.r / 2;
  for (int64_t i = 0; i < e.na; ++i) {
    const int64_t to = m.assign[a0 + 2 * i] - m.p;
    if (to >= kept || to == i) continue;
    __builtin_memcpy(e.a + to * e.Dp, e.a + i * e.Dp, e.Dp * sizeof(T));
    if (e.weight_a) e.weight_a[to] = e.weight_a[i];
  }
  // NaN is never the best.
  for (int64_t k = kept * e.Dp; k < rows * e.Dp; ++k) e.a[k] = T(__builtin_nan(""));
  if (e.weight_a)
    for (int64_t i = kept; i < rows; ++i) e.weight_a[i] = T(__builtin_nan(""));
  e.na = kept;
  for (int64_t j = 0; j < e.nb; j += kCols<T>)
    if (e.nb - j > W)
      best_back_edges<2>(e, j);
    else
      best_back_edges<1>(e, j);
  rank_all(e.best, e.nb, e.rank);
  for (int64_t j = 0; j < e.nb; ++j) e.dst[j] = int32_t(e.rank[j] < r_b ? m.p + e.dst[j] : first_b + e.rank[j] - r_b);
  for (int64_t n = m.p; n < m.N; ++n)
    if (m.assign[n] >= first_b) m.assign[n] = e.dst[m.assign[n] - first_b];
}

template <class E>
void match_image_of(const MatchImage& m) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>;
  if (m.r == 0) {
    for (int64_t n = 0; n < m.N; ++n) m.assign[n] = int32_t(n);
    return;
  }
  const int64_t a0 = m.p + m.p % 2, b0 = m.p + 1 - m.p % 2;
  const int64_t na = (m.N - a0 + 1) / 2, nb = (m.N - b0 + 1) / 2;
  const int64_t Dp = round_up(m.D, W), na_pad = round_up(na, W), nb_pad = round_up(nb, kCols<T>);
  const int64_t a_rows = round_up(na, kRows), weights = m.weight ? a_rows + nb_pad : 0;
  const int64_t edges = m.two_way && nb_pad > na_pad ? nb_pad : na_pad;
  Scratch scratch(Scratch::bytes<T>(a_rows * Dp) + Scratch::bytes<T>(nb_pad * Dp) + Scratch::bytes<T>(kCols<T> * Dp) +
                  Scratch::bytes<T>(edges) + 2 * Scratch::bytes<int32_t>(edges) + Scratch::bytes<T>(weights));
  T* a = scratch.take<T>(a_rows * Dp);
  T* b = scratch.take<T>(nb_pad * Dp);
  T* rows = scratch.take<T>(kCols<T> * Dp);
  T* best = scratch.take<T>(edges);
  int32_t* dst = scratch.take<int32_t>(edges);
  int32_t* rank = scratch.take<int32_t>(edges);
  T* weight_a = scratch.take<T>(weights);
  T* weight_b = weight_a + a_rows;

  const E* metric = static_cast<const E*>(m.metric);
  for (int64_t i = 0; i < na; ++i) unit_row(metric + (a0 + 2 * i) * m.s_n, m.H, m.D, m.s_h, 2 * m.s_n, a + i * Dp);
  for (int64_t k = na * Dp; k < a_rows * Dp; ++k) a[k] = 0;
  for (int64_t j = 0; j < nb_pad; j += kCols<T>) {
    for (int64_t c = 0; c < kCols<T>; ++c) {
      if (j + c < nb)
        unit_row(metric + (b0 + 2 * (j + c)) * m.s_n, m.H, m.D, m.s_h, 2 * m.s_n, rows + c * Dp);
      else
        for (int64_t d = 0; d < Dp; ++d) rows[c * Dp + d] = T(__builtin_nan(""));
    }
    pack_panel(rows, Dp, b + j * Dp);
  }
  if (m.weight) {
    const T* weight = static_cast<const T*>(m.weight);
    for (int64_t i = 0; i < a_rows; ++i) weight_a[i] = i < na ? weight[a0 + 2 * i] : 0;
    for (int64_t j = 0; j < nb_pad; ++j) weight_b[j] = j < nb ? weight[b0 + 2 * j] : T(__builtin_nan(""));
  }

  const Prefetch ahead(m.ahead, a_rows / kRows * (nb_pad / kCols<T>)*Dp);
  Edges<T> e = {a, b, m.weight ? weight_a : nullptr, weight_b, best, dst, rank, na, nb, Dp, m.power, ahead};
  for (int64_t i = 0; i < na; i += kRows) best_edges(e, i);
  for (int64_t i = na; i < na_pad; ++i) best[i] = T(__builtin_nan(""));

  const int64_t r_a = m.two_way ? m.r / 2 : m.r;
  int32_t kept = int32_t(m.p);
  const int32_t first_b = int32_t(m.p + na - r_a);
  for (int64_t n = 0; n < m.p; ++n) m.assign[n] = int32_t(n);
  rank_all(best, na, rank);
  for (int64_t i = 0; i < na; ++i) m.assign[a0 + 2 * i] = rank[i] < r_a ? first_b + dst[i] : kept++;
  for (int64_t j = 0; j < nb; ++j) m.assign[b0 + 2 * j] = first_b + int32_t(j);
  if (m.two_way) match_back(m, e, first_b);
}

void match_image(const MatchImage& m) {
  switch (m.dtype) {
    case Dtype::kFloat: return match_image_of<float>(m);
    case Dtype::kHalf: return match_image_of<half_t>(m);
    case Dtype::kBFloat16: return match_image_of<bfloat16_t>(m);
    case Dtype::kDouble: return match_image_of<double>(m);
  }
}
