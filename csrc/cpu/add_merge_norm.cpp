// add_merge_norm on the CPU: one image a task. The kernel is merge_image.h, with norm_image.h.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor, Tensor> add_merge_norm_cpu(const Tensor& x, const Tensor& branch, const Tensor& assign,
                                                      int64_t m, const OptionalTensor& norm_weight,
                                                      const OptionalTensor& norm_bias, const OptionalTensor& size,
                                                      const OptionalTensor& branch_scale,
                                                      const OptionalTensor& branch_bias, double eps) {
  const char* op = "add_merge_norm";
  const MergeArgs args = merge_args(op, x, assign, m, size, std::nullopt);
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  const int32_t* rows = static_cast<const int32_t*>(args.assign.const_data_ptr());
  if (debug()) check_assign_values(op, rows, args.B * args.N, m);
  Tensor out = new_like(x, {args.B, m, args.C}), size_out = new_wide(x, {args.B, m});
  const MergeImages images(args, rows, Reduce::kMean, out, size_out);
  const Tails tails(norm, x, m);
  for_each_image(args.B, [&](int64_t b) {
    MergeImage image = images[b];
    image.tail = tails[b];
    isa().merge(image);
  });
  return {out, size_out, tails.normed};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("add_merge_norm", TORCH_BOX(&tokred::add_merge_norm_cpu)); }
