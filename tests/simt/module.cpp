// The emulated kernels for Python: pointers and integers, as csrc/cuda/*.cpp passes them. ops.py wraps
// them with tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace tokred;

template <typename T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The edges of several blocks an image: their keys, [B * Na].
static std::vector<uint64_t> match(uintptr_t metric, uintptr_t weight, uintptr_t assign, int64_t B, int H, int N, int D,
                                   int64_t s_b, int64_t s_h, int64_t s_n, int r, int r_b, int p, float power, int dtype,
                                   bool aligned, int multiprocessors, int64_t shared_bytes) {
  MatchBatch m;
  m.metric = pointer<void>(metric), m.weight = pointer<float>(weight), m.assign = pointer<int32_t>(assign);
  m.B = B, m.H = H, m.N = N, m.D = D, m.s_b = s_b, m.s_h = s_h, m.s_n = s_n, m.r = r;
  m.r_b = r_b, m.p = p, m.power = power;
  m.dtype = static_cast<Dtype>(dtype), m.aligned = aligned;
  const auto scratch = emulate_match(m, {multiprocessors, shared_bytes});
  if (!scratch) return {};
  const uint64_t* keys = reinterpret_cast<const uint64_t*>(scratch.get());
  return {keys, keys + m.B * m.rows_a()};
}

// branch, normed, norm_weight, norm_bias, branch_scale, branch_bias, the strides [b, n] of branch, whether the four
// rows are float32, eps; or nothing.
using TailArgs = std::optional<
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, bool, float>>;

static Tail tail_of(const TailArgs& args) {
  const auto [branch, normed, weight, bias, scale, shift, s_b, s_n, wide, eps] = *args;
  return {pointer<void>(branch), pointer<void>(normed), pointer<void>(weight), pointer<void>(bias), s_b, s_n, eps, wide,
          pointer<void>(scale),  pointer<void>(shift)};
}

static void merge(uintptr_t x, uintptr_t assign, uintptr_t size, uintptr_t weight, uintptr_t out, uintptr_t size_out,
                  int64_t B, int N, int M, int C, int64_t s_b, int64_t s_n, int reduce, int dtype, bool aligned,
                  bool after_match, const TailArgs& tail) {
  MergeBatch g;
  g.x = pointer<void>(x), g.assign = pointer<int32_t>(assign), g.size = pointer<float>(size);
  g.weight = pointer<float>(weight), g.out = pointer<void>(out), g.size_out = pointer<float>(size_out);
  g.B = B, g.N = N, g.M = M, g.C = C, g.s_b = s_b, g.s_n = s_n, g.reduce = static_cast<Reduction>(reduce);
  with_type(static_cast<Dtype>(dtype), [&](auto zero) {
    using T = decltype(zero);
    tail ? emulate_merge_norm<T>(g, tail_of(tail), aligned) : emulate_merge<T>(g, aligned, after_match);
  });
}

template <typename Word>
static void unmerge(uintptr_t y, uintptr_t assign, uintptr_t x, int64_t B, int N, int M, int words, int64_t s_b,
                    int64_t s_n) {
  emulate_unmerge<Word>({pointer<void>(y), pointer<int32_t>(assign), pointer<void>(x), B, s_b, s_n, N, M, words});
}

// Strides in elements: of q, k and v, each [b, h, n]. Returns the bytes of scratch memory.
static int64_t attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t size, uintptr_t out, uintptr_t scores,
                         int64_t B, int H, int Nq, int N, int D, const std::vector<int64_t>& strides, float scale,
                         bool negate, int emit, int dtype, bool aligned, int multiprocessors) {
  AttentionBatch g;
  g.q = pointer<void>(q), g.k = pointer<void>(k), g.v = pointer<void>(v), g.size = pointer<float>(size);
  g.out = pointer<void>(out), g.partial = nullptr, g.scores = pointer<float>(scores), g.B = B;
  g.q_b = strides[0], g.q_h = strides[1], g.q_n = strides[2], g.k_b = strides[3], g.k_h = strides[4];
  g.k_n = strides[5], g.v_b = strides[6], g.v_h = strides[7], g.v_n = strides[8];
  g.H = H, g.Nq = Nq, g.N = N, g.D = D, g.emit = static_cast<Emission>(emit);
  g.scale = scale, g.negate = negate, g.aligned = aligned;
  const Device device{multiprocessors, 0};
  int64_t taken = 0;
  with_type(static_cast<Dtype>(dtype), [&](auto zero) { taken = emulate_attention<decltype(zero)>(g, device); });
  return taken;
}

static void topk(uintptr_t score, uintptr_t assign, int64_t B, int N, int k, int p, int others) {
  emulate_topk({pointer<float>(score), pointer<int32_t>(assign), B, N, k, p, others});
}

static void gather(uintptr_t x, uintptr_t score, uintptr_t assign, uintptr_t out, int64_t B, int N, int M, int C,
                   int64_t s_b, int64_t s_n, int copied, bool mean, int dtype, bool aligned, const TailArgs& tail) {
  GatherBatch g;
  g.x = pointer<void>(x), g.score = pointer<float>(score), g.assign = pointer<int32_t>(assign);
  g.out = pointer<void>(out), g.B = B, g.s_b = s_b, g.s_n = s_n, g.N = N, g.M = M, g.C = C, g.copied = copied;
  g.mean = mean;
  with_type(static_cast<Dtype>(dtype), [&](auto zero) {
    using T = decltype(zero);
    tail ? emulate_gather_norm<T>(g, tail_of(tail), aligned) : emulate_gather<T>(g, aligned);
  });
}

// A name each: pybind11 gives a module of a name it knows again.
#if defined(SIMT_COUNTING)
#define SIMT_MODULE simt_counting
#else
#define SIMT_MODULE simt_kernels
#endif
PYBIND11_MODULE(SIMT_MODULE, m) {
  m.def("seed", &simt::seed);
  m.def("match", &match);
  m.def("merge", &merge);
  m.def("attention", &attention);
  m.def("topk", &topk);
  m.def("gather", &gather);
  m.def("unmerge_16", &unmerge<uint4>);
  m.def("unmerge_4", &unmerge<uint32_t>);
  m.def("unmerge_2", &unmerge<uint16_t>);
}
