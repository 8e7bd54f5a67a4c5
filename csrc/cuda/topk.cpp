// topk on CUDA. The kernel is topk.cuh, launched by topk_kernel.cu.
#include "tensors.h"

namespace tokred {

void topk_into(const char* op, const TopkArgs& args, const Tensor& assign) {
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

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("topk", TORCH_BOX(&tokred::topk_cuda)); }
