// topk_gather on the CPU: each image is selected and gathered in one task. The kernel is topk_image.h.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor> topk_gather_cpu(const Tensor& x, const Tensor& score, int64_t k, int64_t prefix,
                                           std::string fuse) {
  const TopkGatherArgs args = topk_gather_args("topk_gather", x, score, k, prefix, fuse);
  const TopkArgs& topk = args.topk;
  Tensor out = new_like(x, {topk.B, topk.M, args.C}), assign = new_int32(x, {topk.B, topk.N});
  const TopkGatherImages images(args, assign, out);
  for_each_image(topk.B, [&](int64_t b) { isa().topk_gather(images[b]); });
  return {out, assign};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("topk_gather", TORCH_BOX(&tokred::topk_gather_cpu)); }
