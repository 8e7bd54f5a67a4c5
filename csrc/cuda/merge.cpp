// merge on CUDA. The kernel is merge.cuh, launched by merge_kernel.cu.
#include "tensors.h"

namespace tokred {

MergeBatch merge_batch(const char* op, const MergeArgs& args, Reduce reduce, const Tensor& out,
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

void merge_into(const char* op, const MergeArgs& args, Reduce reduce, const Tensor& out, const Tensor& size_out) {
  if (args.B == 0 || args.M == 0) return;
  const MergeBatch g = merge_batch(op, args, reduce, out, size_out);
  const bool aligned = is_aligned(args.x, {args.s_b, args.s_n, args.C});
  launch_merge(g, dtype_of(args.x), aligned, stream_of(args.x));
}

std::tuple<Tensor, Tensor> merge_cuda(const Tensor& x, const Tensor& assign, int64_t m, const OptionalTensor& size,
                                      const OptionalTensor& weight, std::string reduce) {
  const DeviceGuard guard(x.get_device_index());
  const MergeArgs args = merge_args("merge", x, assign, m, size, weight);
  const Reduce how = parse_reduce(reduce);
  debug_assign_values("merge", args.assign, m);
  Tensor out = torch::stable::new_empty(x, {args.B, m, args.C});
  Tensor size_out = torch::stable::new_empty(x, {args.B, m}, ScalarType::Float);
  merge_into("merge", args, how, out, size_out);
  return {out, size_out};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("merge", TORCH_BOX(&tokred::merge_cuda)); }
