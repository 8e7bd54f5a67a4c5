// knn on the CPU: one image a task. The kernel is clusters_image.h.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor> knn_cpu(const Tensor& distance, int64_t k) {
  check_knn(distance, k);
  const DistanceArgs args = distance_args(distance);
  k = std::min(k, args.N);
  Tensor values = new_wide(distance, {args.B, args.N, k}), indices = new_int32(distance, {args.B, args.N, k});
  char* value = static_cast<char*>(values.mutable_data_ptr());
  int32_t* index = static_cast<int32_t*>(indices.mutable_data_ptr());
  const int64_t count = args.N * k, bytes = count * int64_t(values.element_size());
  for_each_image(args.B,
                 [&](int64_t b) { isa().knn({distance_view(args, b), value + b * bytes, index + b * count, k}); });
  return {values, indices};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("knn", TORCH_BOX(&tokred::knn_cpu)); }
