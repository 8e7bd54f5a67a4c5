// medoids on the CPU: one image a task. The kernel is clusters_image.h.
#include "tensors.h"

namespace tokred {

Tensor medoids_cpu(const Tensor& distance, const Tensor& label, const Tensor& centres, const Tensor& weight,
                   std::string update) {
  check_medoids(distance, label, centres, weight, update);
  const DistanceArgs args = distance_args(distance);
  const Tensor labels = as_contiguous(label), before = as_contiguous(centres);
  const Tensor weights = *per_token(weight, wide(distance.scalar_type()));
  const int32_t* cluster = static_cast<const int32_t*>(labels.const_data_ptr());
  const int32_t* centre = static_cast<const int32_t*>(before.const_data_ptr());
  const int64_t K = centres.size(1);
  if (debug()) check_values("medoids", "label", cluster, args.B * args.N, "K", K);
  Tensor out = new_int32(distance, {args.B, K});
  int32_t* chosen = static_cast<int32_t*>(out.mutable_data_ptr());
  for_each_image(args.B, [&](int64_t b) {
    isa().medoids({distance_view(args, b), cluster + b * args.N, centre + b * K, element(weights, b * args.N),
                   chosen + b * K, K, update == "textbook"});
  });
  return out;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("medoids", TORCH_BOX(&tokred::medoids_cpu)); }
