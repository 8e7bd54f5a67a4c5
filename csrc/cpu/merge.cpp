// merge on the CPU: one image a task. The kernel is merge_image.h.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor> merge_cpu(const Tensor& x, const Tensor& assign, int64_t m, const OptionalTensor& size,
                                     const OptionalTensor& weight, std::string reduce) {
  const MergeArgs args = merge_args("merge", x, assign, m, size, weight);
  const Reduce how = parse_reduce(reduce);
  const int32_t* rows = static_cast<const int32_t*>(args.assign.const_data_ptr());
  if (debug()) check_assign_values("merge", rows, args.B * args.N, m);
  Tensor out = new_like(x, {args.B, m, args.C}), size_out = new_wide(x, {args.B, m});
  const MergeImages images(args, rows, how, out, size_out);
  for_each_image(args.B, [&](int64_t b) { isa().merge(images[b]); });
  return {out, size_out};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("merge", TORCH_BOX(&tokred::merge_cpu)); }
