// match on the CPU: one image a task. The kernel is match_image.h.
#include "tensors.h"

namespace tokred {

Tensor match_cpu(const Tensor& metric, int64_t r, int64_t prefix, const OptionalTensor& weight, double power,
                 bool two_way) {
  const MatchArgs args = match_args("match", metric, r, prefix, weight, power, two_way);
  Tensor assign = new_int32(metric, {args.B, args.N});
  const MatchImages images(args, assign);
  for_each_image(args.B, [&](int64_t b) { isa().match(images[b]); });
  return assign;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("match", TORCH_BOX(&tokred::match_cpu)); }
