// What add_merge_norm and add_topk_gather_norm do to the tokens on their way in and to the rows on their way out:
//
//   y_i = x_i + branch_scale (branch_i + branch_bias), rounded to its type, wherever merge or topk_gather read x_i
//   normed_j = (out_j - mean) / sqrt(variance + eps) * weight + bias over the C channels of out_j, as rounded, while
//   the row is in the first-level cache: 8 C operations, no memory but normed
//
// y itself is never in memory.

// What is added to the tokens: nothing, a branch, or one with a scale or a bias.
enum Add : int { kNothing, kPlain, kScaled };

// Tokens [N, C] with that.
template <Add kAdd, class E>
struct Tokens {
  using T = Wide<E>;

  Tokens(const void* x, int64_t s_n, const Tail& tail)
      : x(static_cast<const E*>(x)),
        branch(static_cast<const E*>(tail.branch)),
        scale(static_cast<const T*>(tail.branch_scale)),
        bias(static_cast<const T*>(tail.branch_bias)),
        s_n(s_n),
        branch_s_n(tail.s_n) {}

  // Channels c .. of token i, n of them in the second form.
  Vec<T> at(int64_t i, int64_t c) const {
    const Vec<T> value = load(x + i * s_n + c);
    if (kAdd == kNothing) return value;
    Vec<T> more = load(branch + i * branch_s_n + c);
    if (kAdd == kScaled && bias) more += load(bias + c);
    if (kAdd == kScaled && scale) more *= load(scale + c);
    return rounded(value + more);
  }
  Vec<T> at(int64_t i, int64_t c, int64_t n) const {
    const Vec<T> value = load_first(x + i * s_n + c, n);
    if (kAdd == kNothing) return value;
    Vec<T> more = load_first(branch + i * branch_s_n + c, n);
    if (kAdd == kScaled && bias) more += load_first(bias + c, n);
    if (kAdd == kScaled && scale) more *= load_first(scale + c, n);
    return rounded(value + more);
  }
  void copy(int64_t i, int64_t C, E* out) const {
    constexpr int W = kLanes<T>;
    if (kAdd == kNothing) {
      memcpy(out, x + i * s_n, C * sizeof(E));
      return;
    }
    int64_t c = 0;
    for (; c + W <= C; c += W) store(out + c, at(i, c));
    if (c < C) store_first(out + c, at(i, c, C - c), C - c);
  }

 private:
  const E *x, *branch;    // branch, scale and bias are not looked at without kAdd
  const T *scale, *bias;  // [C] or null
  int64_t s_n, branch_s_n;

  static Vec<T> rounded(Vec<T> value) {
    if constexpr (sizeof(E) == sizeof(T)) return value;
    E narrow[kLanes<T>];
    store(narrow, value);
    return load(narrow);
  }
};

// sum_c (row_c - from)^kPower / C; added up in kChains times the lanes, which are added up pairwise: one chain would
// wait for each addition, and that was a third of add_merge_norm.
template <int kPower, class E>
Wide<E> moment(const E* row, int64_t C, Wide<E> from) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>, kChains = 4;
  const auto powered = [&](auto value) {
    const auto apart = value - from;
    return kPower == 2 ? apart * apart : apart;
  };
  Vec<T> chain[kChains] = {};
  int64_t c = 0;
  for (; c + kChains * W <= C; c += kChains * W)
#pragma GCC unroll 16
    for (int k = 0; k < kChains; ++k) chain[k] += powered(load(row + c + k * W));
  for (; c + W <= C; c += W) chain[0] += powered(load(row + c));
  T sum = sum_lanes<T>((chain[0] + chain[1]) + (chain[2] + chain[3]));
  for (const Vec<T> last = load_first(row + c, C - c); c < C; ++c) sum += powered(last[c % W]);
  return sum / C;
}

template <class E>
void normalize_row(const E* row, int64_t C, const Tail& tail, E* normed) {
  using T = Wide<E>;
  constexpr int W = kLanes<T>;
  const int64_t whole = C / W * W, rest = C - whole;
  const T mean = moment<1>(row, C, T(0)), variance = moment<2>(row, C, mean);
  const T scale = 1 / __builtin_sqrt(variance + T(tail.eps));
  const T* weight = static_cast<const T*>(tail.weight);
  const T* bias = static_cast<const T*>(tail.bias);
  for (int64_t c = 0; c < whole; c += W) {
    Vec<T> v = (load(row + c) - mean) * scale;
    if (weight) v *= load(weight + c);
    if (bias) v += load(bias + c);
    store(normed + c, v);
  }
  if (rest == 0) return;
  Vec<T> v = (load_first(row + whole, rest) - mean) * scale;
  if (weight) v *= load_first(weight + whole, rest);
  if (bias) v += load_first(bias + whole, rest);
  store_first(normed + whole, v, rest);
}
