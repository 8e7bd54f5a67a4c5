// Token merging on CUDA. Each kernel is <op>.cuh, launched by <op>_kernel.cu; match_merge is match, then merge, on one
// stream: assign is the only thing handed over.
#include "tensors.h"

namespace tokred {

static void match_into(const char* op, const MatchArgs& args, const Tensor& assign) {
  if (args.B == 0 || args.N == 0) return;
  MatchBatch m;
  m.metric = args.metric.const_data_ptr(), m.weight = floats(args.weight);
  m.assign = static_cast<int32_t*>(assign.mutable_data_ptr());
  m.B = args.B, m.s_b = args.s_b, m.s_h = args.s_h, m.s_n = args.s_n;
  m.H = checked_int(op, "H", args.H), m.N = checked_int(op, "N", args.N), m.D = checked_int(op, "D", args.D);
  m.r = int(args.two_way ? args.r / 2 : args.r), m.r_b = int(args.r) - m.r;
  m.p = int(args.p), m.power = float(args.power);
  m.dtype = dtype_of(args.metric), m.aligned = is_aligned(args.metric, {args.s_b, args.s_h, args.s_n});
  Tensor memory;
  launch_match(m, stream_of(assign), scratch_into(memory, assign));
}

Tensor match_cuda(const Tensor& metric, int64_t r, int64_t prefix, const OptionalTensor& weight, double power,
                  bool two_way) {
  const DeviceGuard guard(metric.get_device_index());
  const MatchArgs args = match_args("match", metric, r, prefix, weight, power, two_way);
  Tensor assign = new_int32(metric, {args.B, args.N});
  match_into("match", args, assign);
  return assign;
}

static MergeBatch merge_batch(const char* op, const MergeArgs& args, Reduce reduce, const Tensor& out,
                              const Tensor& size_out) {
  MergeBatch g;
  g.x = args.x.const_data_ptr(), g.assign = static_cast<const int32_t*>(args.assign.const_data_ptr());
  g.size = floats(args.size), g.weight = floats(args.weight);
  g.out = out.mutable_data_ptr(), g.size_out = static_cast<float*>(size_out.mutable_data_ptr());
  g.B = args.B, g.s_b = args.s_b, g.s_n = args.s_n;
  g.N = checked_int(op, "N", args.N), g.M = checked_int(op, "m", args.M), g.C = checked_int(op, "C", args.C);
  switch (reduce) {
    case Reduce::kMean: g.reduce = kReduceMean; break;
    case Reduce::kSum: g.reduce = kReduceSum; break;
    case Reduce::kAmax:
      g.reduce = kReduceAmax;
      g.weight = nullptr;
      break;
  }
  return g;
}

static void merge_into(const char* op, const MergeArgs& args, Reduce reduce, const Tensor& out, const Tensor& size_out,
                       bool after_match) {
  if (args.B == 0 || args.M == 0) return;
  const MergeBatch g = merge_batch(op, args, reduce, out, size_out);
  const bool aligned = is_aligned(args.x, {args.s_b, args.s_n, args.C});
  launch_merge(g, dtype_of(args.x), aligned, stream_of(args.x), after_match);
}

std::tuple<Tensor, Tensor> merge_cuda(const Tensor& x, const Tensor& assign, int64_t m, const OptionalTensor& size,
                                      const OptionalTensor& weight, StringHandle reduce) {
  const DeviceGuard guard(x.get_device_index());
  const Reduce how = parse_reduce(text(reduce));
  const MergeArgs args = merge_args("merge", x, assign, m, size, weight);
  debug_assign_values("merge", args.assign, m);
  Tensor out = new_like(x, {args.B, m, args.C});
  Tensor size_out = new_wide(x, {args.B, m});
  merge_into("merge", args, how, out, size_out, false);
  return {out, size_out};
}

std::tuple<Tensor, Tensor, Tensor> match_merge_cuda(const Tensor& x, const Tensor& metric, int64_t r, int64_t prefix,
                                                    const OptionalTensor& size) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "match_merge";
  check_match_merge(x, metric, prefix, size);
  const MatchArgs match = match_args(op, metric, r, prefix, std::nullopt, 1.0, false);
  Tensor assign = new_int32(x, {match.B, match.N});
  const int64_t M = match.N - match.r;
  const MergeArgs merge = merge_args(op, x, assign, M, size, std::nullopt);
  Tensor out = new_like(x, {merge.B, M, merge.C});
  Tensor size_out = new_wide(x, {merge.B, M});
  match_into(op, match, assign);
  merge_into(op, merge, Reduce::kMean, out, size_out, true);
  return {out, size_out, assign};
}

static void merge_norm_into(const char* op, const MergeArgs& args, const NormArgs& norm, const Tensor& out,
                            const Tensor& size_out, const Tensor& normed) {
  if (args.B == 0 || args.M == 0) return;
  const MergeBatch g = merge_batch(op, args, Reduce::kMean, out, size_out);
  const TailArgs tail = tail_args(norm, args.x, normed);
  const bool aligned = tail.aligned && is_aligned(args.x, {args.s_b, args.s_n, args.C});
  launch_add_merge_norm(g, tail.tail, dtype_of(args.x), aligned, stream_of(args.x));
}

std::tuple<Tensor, Tensor, Tensor> add_merge_norm_cuda(const Tensor& x, const Tensor& branch, const Tensor& assign,
                                                       int64_t m, const OptionalTensor& norm_weight,
                                                       const OptionalTensor& norm_bias, const OptionalTensor& size,
                                                       const OptionalTensor& branch_scale,
                                                       const OptionalTensor& branch_bias, double eps) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "add_merge_norm";
  const MergeArgs args = merge_args(op, x, assign, m, size, std::nullopt);
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  debug_assign_values(op, args.assign, m);
  Tensor out = new_like(x, {args.B, m, args.C});
  Tensor size_out = new_wide(x, {args.B, m});
  Tensor normed = new_like(x, {args.B, m, args.C});
  merge_norm_into(op, args, norm, out, size_out, normed);
  return {out, size_out, normed};
}

static void unmerge_into(const UnmergeArgs& args, const Tensor& x) {
  const int64_t element = int64_t(x.element_size());
  const int64_t word = is_aligned(args.y, {args.s_b, args.s_n, args.C}) ? 16 : element, per = word / element;
  UnmergeBatch u;
  u.y = args.y.const_data_ptr(), u.x = x.mutable_data_ptr();
  u.assign = static_cast<const int32_t*>(args.assign.const_data_ptr());
  u.B = args.B, u.s_b = args.s_b / per, u.s_n = args.s_n / per;
  u.N = checked_int("unmerge", "N", args.N), u.M = checked_int("unmerge", "M", args.M);
  u.words = checked_int("unmerge", "C", args.C / per);
  launch_unmerge(u, word, stream_of(x));
}

Tensor unmerge_cuda(const Tensor& y, const Tensor& assign) {
  const DeviceGuard guard(y.get_device_index());
  const UnmergeArgs args = unmerge_args(y, assign);
  debug_assign_values("unmerge", args.assign, args.M);
  Tensor x = new_like(y, {args.B, args.N, args.C});
  if (args.B > 0 && args.N > 0 && args.C > 0) unmerge_into(args, x);
  return x;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) {
  m.impl("match", TORCH_BOX(&tokred::match_cuda));
  m.impl("merge", TORCH_BOX(&tokred::merge_cuda));
  m.impl("match_merge", TORCH_BOX(&tokred::match_merge_cuda));
  m.impl("add_merge_norm", TORCH_BOX(&tokred::add_merge_norm_cuda));
  m.impl("unmerge", TORCH_BOX(&tokred::unmerge_cuda));
}
