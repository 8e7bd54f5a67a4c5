// topk_gather on CUDA: topk, then gather and fuse, on one stream; assign is the only thing handed over. The kernel is
// topk_gather.cuh, launched by topk_gather_kernel.cu.
#include "tensors.h"

namespace tokred {

GatherBatch gather_batch(const char* op, const TopkGatherArgs& args, const Tensor& assign, const Tensor& out) {
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
                                            std::string fuse) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "topk_gather";
  const TopkGatherArgs args = topk_gather_args(op, x, score, k, prefix, fuse);
  Tensor assign = new_int32(x, {args.topk.B, args.topk.N});
  Tensor out = torch::stable::new_empty(x, {args.topk.B, args.topk.M, args.C});
  topk_into(op, args.topk, assign);
  gather_into(op, args, assign, out);
  return {out, assign};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("topk_gather", TORCH_BOX(&tokred::topk_gather_cuda)); }
