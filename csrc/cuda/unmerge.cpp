// unmerge on CUDA. The kernel is unmerge.cuh, launched by unmerge_kernel.cu.
#include "tensors.h"

namespace tokred {

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
  Tensor x = torch::stable::new_empty(y, {args.B, args.N, args.C});
  if (args.B > 0 && args.N > 0 && args.C > 0) unmerge_into(args, x);
  return x;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("unmerge", TORCH_BOX(&tokred::unmerge_cuda)); }
