// knn, separation, nearest and medoids, one image, from its distances d [N, N]. A smaller value first, then the lower
// index; NaN counts as +inf.
//
// knn         W rows at a time, one a lane: their columns pass by an ascending list of k, each inserted behind all that
//             are not larger. 5 k N^2 / W vector operations, no branch on a value.
// separation  a pass over each row with the densities beside it.
// nearest     the columns of the centres are gathered from each row, then a vectorised argmin.
// medoids     cost_i = sum over the members j of i's cluster, in index order, of w_j d_ij; the products are rounded to
//             the wide type, the sum to it once, at the end. Then one pass keeps the best member of each cluster.
//
// Floor at N = 196, float32: d is read once, 154 KB from the second-level cache, 3 us at 50 GB/s; knn with k = 5 adds
// 25 * 196 * 196 / 16 = 60 k vector operations, 13 us at 4.65 G a second. Reached on a Xeon, K = 137: knn 29 us,
// separation 13, nearest 18 (pin: 7), medoids 4. With pairwise_distance, for DeiT-S, B = 8, keep rate .7, one thread:
//
// K-Medoids   50 to 55 times as fast as its published loop over clusters; as all clusters in a matrix product, 4.3 to
//             4.5 times ("wttu" 3.4)
// DPC-KNN     3.1 to 3.4 times as fast as published

// d as it is compared.
template <class T>
inline Vec<T> ordered(Vec<T> d) {
  return d != d ? splat(T(__builtin_inf())) : d;
}
template <class T>
inline T ordered_one(T d) {
  return d != d ? T(__builtin_inf()) : d;
}

template <class T>
inline Index<T> lane_numbers() {
  Index<T> lane;
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = l;
  return lane;
}

// The first n lanes; the others are `other`.
template <class T>
inline Vec<T> load_or(const T* p, int64_t n, T other) {
  if (n >= kLanes<T>) return load(p);
  T lanes[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) lanes[l] = l < n ? p[l] : other;
  return load(lanes);
}

template <class T>
inline T smallest_lane(Vec<T> v) {
  return fold_lanes<T>(v, [](auto a, auto b) { return a < b ? a : b; });
}

template <class T>
inline const T* row_of(const DistanceView& d, int64_t i) {
  return static_cast<const T*>(d.data) + i * d.s_n;
}

// The ascending lists of kLanes rows, one a lane: column j, with values v, comes behind all that are not larger, and
// these move up by one.
template <class T>
inline void insert(Vec<T> v, int64_t j, int64_t k, Vec<T>* value, Index<T>* index) {
  Vec<T> moving = v;
  Index<T> moving_index = Index<T>{} + typename Vector<T>::integer(j);
  const int64_t length = j < k ? j : k;
  for (int64_t s = 0; s < length; ++s) {
    const Vec<T> there = value[s];
    const Index<T> there_index = index[s], larger = there > v;
    value[s] = larger ? moving : there;
    index[s] = larger ? moving_index : there_index;
    moving = larger ? there : moving;
    moving_index = larger ? there_index : moving_index;
  }
  if (j < k) value[j] = moving, index[j] = moving_index;
}

template <class T>
void knn_image_of(const KnnImage& m) {
  constexpr int W = kLanes<T>;
  const int64_t N = m.distance.N, Np = round_up(N, W), k = m.k;
  if (k == 0) return;
  Scratch scratch(Scratch::bytes<T>(W * W) + Scratch::bytes<T>(W * Np) + Scratch::bytes<Vec<T>>(k) +
                  Scratch::bytes<Index<T>>(k));
  T* edge = scratch.take<T>(W * W);  // a square of d that reaches past its end
  T* columns = scratch.take<T>(W * Np);
  Vec<T>* value = scratch.take<Vec<T>>(k);
  Index<T>* index = scratch.take<Index<T>>(k);
  T* values = static_cast<T*>(m.values);
  memset(edge, 0, W * W * sizeof(T));
  for (int64_t i = 0; i < N; i += W) {
    const int64_t lanes = N - i < W ? N - i : W;
    for (int64_t j = 0; j < N; j += W) {
      const T* square = row_of<T>(m.distance, i) + j;
      const int64_t width = N - j < W ? N - j : W;
      const bool inside = lanes == W && width == W;
      for (int64_t l = 0; l < lanes && !inside; ++l)
        memcpy(edge + l * W, square + l * m.distance.s_n, width * sizeof(T));
      transpose<T>(inside ? square : edge, inside ? m.distance.s_n : W, columns + j * W, W);
    }
    for (int64_t j = 0; j < N; ++j) insert<T>(ordered<T>(load(columns + j * W)), j, k, value, index);
    for (int64_t l = 0; l < lanes; ++l)
      for (int64_t s = 0; s < k; ++s) {
        const int64_t j = index[s][l], at = (i + l) * k + s;
        values[at] = row_of<T>(m.distance, i + l)[j];
        m.indices[at] = int32_t(j);
      }
  }
}

template <class T>
void separation_image_of(const SeparationImage& m) {
  constexpr int W = kLanes<T>;
  const int64_t N = m.distance.N, Np = round_up(N, W);
  if (N == 0) return;
  Scratch scratch(Scratch::bytes<T>(Np));
  T* density = scratch.take<T>(Np);
  int64_t densest = 0;
  for (int64_t i = 0; i < Np; ++i) {
    density[i] = i < N ? static_cast<const T*>(m.density)[i] : T(__builtin_nan(""));  // which nothing is denser than
    if (i < N && density[i] != density[i]) density[i] = T(-__builtin_inf());
    if (density[i] > density[densest]) densest = i;
  }
  const Vec<T> infinity = splat(T(__builtin_inf()));
  Vec<T> largest = -infinity;
  T* out = static_cast<T*>(m.out);
  for (int64_t i = 0; i < N; ++i) {
    const Vec<T> mine = splat(density[i]);
    Vec<T> best = infinity;
    for (int64_t from = 0; from < N; from += W) {
      const int64_t j = from + W > N && N >= W ? N - W : from;  // some columns twice, which changes no minimum
      const Index<T> column = lane_numbers<T>() + typename Vector<T>::integer(j);
      const Vec<T> d = load_or(row_of<T>(m.distance, i) + j, N - j, T(__builtin_nan(""))), other = load(density + j);
      const Index<T> denser = (other > mine) | ((other == mine) & (column < typename Vector<T>::integer(i)));
      best = denser & (d < best) ? d : best;
      largest = (d - d == 0) & (d > largest) ? d : largest;
    }
    out[i] = smallest_lane<T>(best);
  }
  out[densest] = max_lanes<T>(largest);
}

// The first of the smallest of n values; [n padded to the lanes with +inf].
template <class T>
inline int64_t argmin(const T* values, int64_t n) {
  constexpr int W = kLanes<T>;
  Index<T> lane = lane_numbers<T>(), at = lane;
  Vec<T> best = ordered<T>(load(values));
  for (int64_t c = W; c < n; c += W) {
    lane += W;
    const Vec<T> value = ordered<T>(load(values + c));
    const Index<T> better = value < best;
    best = better ? value : best;
    at = better ? lane : at;
  }
  const Index<T> none = Index<T>{} + (typename Vector<T>::integer(1) << 30);
  return min_lanes<T>(best == smallest_lane<T>(best) ? at : none);
}

template <class T>
void nearest_image_of(const NearestImage& m) {
  constexpr int W = kLanes<T>;
  const int64_t N = m.distance.N, Kp = round_up(m.K, W);
  Scratch scratch(Scratch::bytes<T>(Kp) + 2 * Scratch::bytes<int32_t>(m.K) + Scratch::bytes<int32_t>(N));
  T* picked = scratch.take<T>(Kp);
  int32_t* column = scratch.take<int32_t>(m.K);  // of the centres that there are
  int32_t* name = scratch.take<int32_t>(m.K);
  int32_t* own = scratch.take<int32_t>(N);  // the label of a token that is a centre, or -1
  for (int64_t i = 0; i < N; ++i) own[i] = -1;
  int64_t count = 0;
  for (int64_t c = 0; c < m.K; ++c) {
    const int32_t i = m.centres[c];
    if (i < 0 || i >= N) continue;
    column[count] = i, name[count++] = int32_t(c);
    if (m.pin && own[i] < 0) own[i] = int32_t(c);
  }
  for (int64_t c = 0; c < Kp; ++c) picked[c] = T(__builtin_inf());
  for (int64_t i = 0; i < N; ++i) {
    const T* d = row_of<T>(m.distance, i);
    if (own[i] >= 0 || count == 0) {
      m.label[i] = own[i];
      continue;
    }
    for (int64_t c = 0; c < count; ++c) picked[c] = d[column[c]];
    m.label[i] = name[argmin(picked, count)];
  }
}

// cost [N] of the members of one cluster, which are `member` [n] ascending and have weights w [n].
template <class T>
void cluster_costs(const DistanceView& d, const int32_t* member, const T* w, int64_t n, T* cost) {
  constexpr int kTogether = 4;  // chains of additions, as many as an addition has cycles of latency
  for (int64_t s = 0; s < n; s += kTogether) {
    const T* row[kTogether];
    double sum[kTogether] = {};
#pragma GCC unroll 16
    for (int t = 0; t < kTogether; ++t) row[t] = row_of<T>(d, member[s + t < n ? s + t : n - 1]);
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 16
      for (int t = 0; t < kTogether; ++t) {
        const T product = w[j] * row[t][member[j]];
        sum[t] += double(product);
      }
    for (int t = 0; t < kTogether && s + t < n; ++t) cost[member[s + t]] = T(sum[t]);
  }
}

template <class T>
T row_sum(const T* d, int64_t N) {
  constexpr int kSums = 8;
  double sum[kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= N; j += kSums)
#pragma GCC unroll 16
    for (int l = 0; l < kSums; ++l) sum[l] += double(d[j + l]);
  for (; j < N; ++j) sum[j % kSums] += double(d[j]);
  double total = 0;
#pragma GCC unroll 16
  for (int l = 0; l < kSums; ++l) total += sum[l];
  return T(total);
}

template <class T>
void medoids_image_of(const MedoidsImage& m) {
  const int64_t N = m.distance.N, K = m.K;
  const T* weight = static_cast<const T*>(m.weight);
  Scratch scratch(2 * Scratch::bytes<T>(N) + 2 * Scratch::bytes<int32_t>(N) + Scratch::bytes<int32_t>(K));
  T* cost = scratch.take<T>(N);
  T* w = scratch.take<T>(N);
  int32_t* next = scratch.take<int32_t>(N);  // member of the same cluster
  int32_t* member = scratch.take<int32_t>(N);
  int32_t* first = scratch.take<int32_t>(K);
  for (int64_t c = 0; c < K; ++c) first[c] = kNone;
  for (int64_t i = N - 1; i >= 0; --i) {
    const int32_t c = m.label[i];
    if (c < 0 || c >= K) continue;
    next[i] = first[c];
    first[c] = int32_t(i);
  }
  for (int64_t c = 0; c < K; ++c) {
    int64_t n = 0;
    for (int32_t i = first[c]; i != kNone; i = next[i]) {
      member[n] = i, w[n++] = weight[i];
      if (!m.textbook) cost[i] = weight[i] * row_sum(row_of<T>(m.distance, i), N);
    }
    if (m.textbook) cluster_costs(m.distance, member, w, n, cost);
    m.out[c] = n ? member[0] : m.centres[c];
    for (int64_t s = 1; s < n; ++s)
      if (ordered_one(cost[member[s]]) < ordered_one(cost[m.out[c]])) m.out[c] = member[s];
  }
}

void knn_image(const KnnImage& m) {
  m.distance.dtype == Dtype::kDouble ? knn_image_of<double>(m) : knn_image_of<float>(m);
}
void separation_image(const SeparationImage& m) {
  m.distance.dtype == Dtype::kDouble ? separation_image_of<double>(m) : separation_image_of<float>(m);
}
void nearest_image(const NearestImage& m) {
  m.distance.dtype == Dtype::kDouble ? nearest_image_of<double>(m) : nearest_image_of<float>(m);
}
void medoids_image(const MedoidsImage& m) {
  m.distance.dtype == Dtype::kDouble ? medoids_image_of<double>(m) : medoids_image_of<float>(m);
}
