// Token selection on CUDA: topk, then gather, fuse and normalise, on one stream; assign is the only thing handed over.
// Each kernel is <op>.cuh, launched by <op>_kernel.cu.
#include "../check_topk.h"
#include "tensors.h"

namespace tokred {

static void topk_into(const char* op, const TopkArgs& args, const Tensor& assign) {
  if (args.B == 0 || args.N == 0) return;
  TopkBatch g;
  g.score = static_cast<const float*>(args.score.const_data_ptr());
  g.assign = static_cast<int32_t*>(assign.mutable_data_ptr());
  g.B = args.B, g.N = checked_int(op, "N", args.N);
  g.k = int(args.k), g.p = int(args.p), g.others = args.others;
  launch_topk(g, stream_of(assign));
}

Tensor topk_cuda(const Tensor& score, int64_t k, int64_t prefix, bool fuse) {
  const DeviceGuard guard(score.get_device_index());
  check_topk("topk", score, k, prefix);
  const TopkArgs args = topk_args(score, k, prefix, fuse, ScalarType::Float);
  Tensor assign = new_int32(score, {args.B, args.N});
  topk_into("topk", args, assign);
  return assign;
}

static GatherBatch gather_batch(const char* op, const TopkGatherArgs& args, const Tensor& assign, const Tensor& out) {
  const TopkArgs& topk = args.topk;
  GatherBatch g;
  g.x = args.x.const_data_ptr(), g.score = static_cast<const float*>(topk.score.const_data_ptr());
  g.assign = static_cast<const int32_t*>(assign.const_data_ptr()), g.out = out.mutable_data_ptr();
  g.B = topk.B, g.s_b = args.s_b, g.s_n = args.s_n;
  g.N = checked_int(op, "N", topk.N), g.M = int(topk.M), g.C = checked_int(op, "C", args.C);
  g.copied = int(args.copied), g.mean = args.mean;
  return g;
}

static void gather_into(const char* op, const TopkGatherArgs& args, const Tensor& assign, const Tensor& out) {
  if (assign.numel() == 0 || args.C == 0) return;
  const GatherBatch g = gather_batch(op, args, assign, out);
  const bool aligned = is_aligned(args.x, {args.s_b, args.s_n, args.C});
  launch_topk_gather(g, dtype_of(args.x), aligned, stream_of(args.x));
}

std::tuple<Tensor, Tensor> topk_gather_cuda(const Tensor& x, const Tensor& score, int64_t k, int64_t prefix,
                                            StringHandle fuse) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "topk_gather";
  const TopkGatherArgs args = topk_gather_args(op, x, score, k, prefix, text(fuse));
  Tensor assign = new_int32(x, {args.topk.B, args.topk.N});
  Tensor out = new_like(x, {args.topk.B, args.topk.M, args.C});
  topk_into(op, args.topk, assign);
  gather_into(op, args, assign, out);
  return {out, assign};
}

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
                                                             const OptionalTensor& branch_bias, StringHandle fuse,
                                                             double eps) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "add_topk_gather_norm";
  const TopkGatherArgs args = topk_gather_args(op, x, score, k, prefix, text(fuse));
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  Tensor assign = new_int32(x, {args.topk.B, args.topk.N});
  Tensor out = new_like(x, {args.topk.B, args.topk.M, args.C});
  Tensor normed = new_like(x, {args.topk.B, args.topk.M, args.C});
  topk_into(op, args.topk, assign);
  gather_norm_into(op, args, norm, assign, out, normed);
  return {out, assign, normed};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) {
  m.impl("topk", TORCH_BOX(&tokred::topk_cuda));
  m.impl("topk_gather", TORCH_BOX(&tokred::topk_gather_cuda));
  m.impl("add_topk_gather_norm", TORCH_BOX(&tokred::add_topk_gather_norm_cuda));
}
