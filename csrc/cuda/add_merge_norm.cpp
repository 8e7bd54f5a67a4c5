// add_merge_norm on CUDA. The kernel is add_merge_norm.cuh, launched by add_merge_norm_kernel.cu.
#include "tensors.h"

namespace tokred {

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
  Tensor out = torch::stable::new_empty(x, {args.B, m, args.C});
  Tensor size_out = torch::stable::new_empty(x, {args.B, m}, ScalarType::Float);
  Tensor normed = torch::stable::new_empty(x, {args.B, m, args.C});
  merge_norm_into(op, args, norm, out, size_out, normed);
  return {out, size_out, normed};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("add_merge_norm", TORCH_BOX(&tokred::add_merge_norm_cuda)); }
