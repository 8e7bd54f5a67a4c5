// add_topk_gather_norm on CUDA: topk, then sum, gather, fuse and normalise, on one stream; assign is the only thing
// handed over. The kernel is add_topk_gather_norm.cuh, launched by add_topk_gather_norm_kernel.cu.
#include "tensors.h"

namespace tokred {

static void gather_norm_into(const char* op, const TopkGatherArgs& args, const NormArgs& norm, const Tensor& assign,
                             const Tensor& out, const Tensor& normed) {
  if (assign.numel() == 0 || args.C == 0) return;
  const GatherBatch g = gather_batch(op, args, assign, out);
  const TailArgs tail = tail_args(norm, args.x, normed);
  const bool aligned = tail.aligned && is_aligned(args.x, {args.s_b, args.s_n, args.C});
  launch_add_topk_gather_norm(g, tail.tail, dtype_of(args.x), aligned, stream_of(args.x));
}

std::tuple<Tensor, Tensor, Tensor> add_topk_gather_norm_cuda(const Tensor& x, const Tensor& branch, const Tensor& score,
                                                             int64_t k, const OptionalTensor& norm_weight,
                                                             const OptionalTensor& norm_bias, int64_t prefix,
                                                             const OptionalTensor& branch_scale,
                                                             const OptionalTensor& branch_bias, std::string fuse,
                                                             double eps) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "add_topk_gather_norm";
  const TopkGatherArgs args = topk_gather_args(op, x, score, k, prefix, fuse);
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  Tensor assign = new_int32(x, {args.topk.B, args.topk.N});
  Tensor out = torch::stable::new_empty(x, {args.topk.B, args.topk.M, args.C});
  Tensor normed = torch::stable::new_empty(x, {args.topk.B, args.topk.M, args.C});
  topk_into(op, args.topk, assign);
  gather_norm_into(op, args, norm, assign, out, normed);
  return {out, assign, normed};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) {
  m.impl("add_topk_gather_norm", TORCH_BOX(&tokred::add_topk_gather_norm_cuda));
}
