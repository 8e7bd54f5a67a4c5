// nearest on the CPU: one image a task. The kernel is clusters_image.h.
#include "tensors.h"

namespace tokred {

Tensor nearest_cpu(const Tensor& distance, const Tensor& centres, bool pin) {
  check_nearest(distance, centres);
  const DistanceArgs args = distance_args(distance);
  const Tensor contiguous = as_contiguous(centres);
  const int32_t* centre = static_cast<const int32_t*>(contiguous.const_data_ptr());
  const int64_t K = centres.size(1);
  if (debug()) check_values("nearest", "centres", centre, args.B * K, "N", args.N);
  Tensor out = new_int32(distance, {args.B, args.N});
  int32_t* label = static_cast<int32_t*>(out.mutable_data_ptr());
  for_each_image(
      args.B, [&](int64_t b) { isa().nearest({distance_view(args, b), centre + b * K, label + b * args.N, K, pin}); });
  return out;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("nearest", TORCH_BOX(&tokred::nearest_cpu)); }
