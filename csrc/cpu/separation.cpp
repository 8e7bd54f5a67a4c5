// separation on the CPU: one image a task. The kernel is clusters_image.h.
#include "tensors.h"

namespace tokred {

Tensor separation_cpu(const Tensor& distance, const Tensor& density) {
  check_separation(distance, density);
  const DistanceArgs args = distance_args(distance);
  const Tensor dense = *per_token(density, wide(distance.scalar_type()));
  Tensor out = new_wide(distance, {args.B, args.N});
  char* values = static_cast<char*>(out.mutable_data_ptr());
  const int64_t image_bytes = args.N * int64_t(out.element_size());
  for_each_image(args.B, [&](int64_t b) {
    isa().separation({distance_view(args, b), element(dense, b * args.N), values + b * image_bytes});
  });
  return out;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("separation", TORCH_BOX(&tokred::separation_cpu)); }
