// topk on the CPU: one image a task. The kernel is topk_image.h.
#include "tensors.h"

namespace tokred {

Tensor topk_cpu(const Tensor& score, int64_t k, int64_t prefix, bool fuse) {
  check_topk("topk", score, k, prefix);
  const TopkArgs args = topk_args(score, k, prefix, fuse, wide(score.scalar_type()));
  Tensor assign = new_int32(score, {args.B, args.N});
  const TopkImages images(args, assign);
  for_each_image(args.B, [&](int64_t b) { isa().topk(images[b]); });
  return assign;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("topk", TORCH_BOX(&tokred::topk_cpu)); }
