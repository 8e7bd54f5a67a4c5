// add_topk_gather_norm on the CPU: one image a task. The kernel is topk_image.h, with norm_image.h.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor, Tensor> add_topk_gather_norm_cpu(const Tensor& x, const Tensor& branch, const Tensor& score,
                                                            int64_t k, const OptionalTensor& norm_weight,
                                                            const OptionalTensor& norm_bias, int64_t prefix,
                                                            const OptionalTensor& branch_scale,
                                                            const OptionalTensor& branch_bias, std::string fuse,
                                                            double eps) {
  const char* op = "add_topk_gather_norm";
  const TopkGatherArgs args = topk_gather_args(op, x, score, k, prefix, fuse);
  const NormArgs norm = norm_args(op, x, branch, norm_weight, norm_bias, branch_scale, branch_bias, eps);
  const TopkArgs& topk = args.topk;
  Tensor out = new_like(x, {topk.B, topk.M, args.C}), assign = new_int32(x, {topk.B, topk.N});
  const TopkGatherImages images(args, assign, out);
  const Tails tails(norm, x, topk.M);
  for_each_image(topk.B, [&](int64_t b) {
    TopkGatherImage image = images[b];
    image.tail = tails[b];
    isa().topk_gather(image);
  });
  return {out, assign, tails.normed};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) {
  m.impl("add_topk_gather_norm", TORCH_BOX(&tokred::add_topk_gather_norm_cpu));
}
