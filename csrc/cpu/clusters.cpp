// Distances and clusters on the CPU: one image a task. The kernels are pairwise_distance_image.h and clusters_image.h.
#include "../check_clusters.h"
#include "tensors.h"

namespace tokred {

static DistanceView distance_view(const DistanceArgs& a, int64_t b) {
  return {element(a.distance, b * a.s_b), a.N, a.s_n, dtype_of(a.distance)};
}

Tensor pairwise_distance_cpu(const Tensor& x, double scale) {
  const PairwiseArgs args = pairwise_args(x);
  Tensor out = new_wide(x, {args.B, args.N, args.N});
  char* rows = static_cast<char*>(out.mutable_data_ptr());
  const int64_t image_bytes = args.N * args.N * int64_t(out.element_size());
  const Dtype dtype = dtype_of(x);
  const int64_t next_bytes = args.s_n == args.C ? args.N * args.C * int64_t(x.element_size()) : 0;
  for_each_image(args.B, [&](int64_t b) {
    const bool last = b + 1 == args.B;
    isa().pairwise_distance({element(args.x, b * args.s_b), rows + b * image_bytes, args.N, args.C, args.s_n, scale,
                             dtype, last ? nullptr : element(args.x, (b + 1) * args.s_b), last ? 0 : next_bytes});
  });
  return out;
}

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

Tensor separation_cpu(const Tensor& distance, const Tensor& density) {
  check_separation(distance, density);
  const DistanceArgs args = distance_args(distance);
  const Tensor dense = *per_token(density, wide(scalar_type(distance)));
  Tensor out = new_wide(distance, {args.B, args.N});
  char* values = static_cast<char*>(out.mutable_data_ptr());
  const int64_t image_bytes = args.N * int64_t(out.element_size());
  for_each_image(args.B, [&](int64_t b) {
    isa().separation({distance_view(args, b), element(dense, b * args.N), values + b * image_bytes});
  });
  return out;
}

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

Tensor medoids_cpu(const Tensor& distance, const Tensor& label, const Tensor& centres, const Tensor& weight,
                   StringHandle update) {
  const std::string how = text(update);
  check_medoids(distance, label, centres, weight, how);
  const DistanceArgs args = distance_args(distance);
  const Tensor labels = as_contiguous(label), before = as_contiguous(centres);
  const Tensor weights = *per_token(weight, wide(scalar_type(distance)));
  const int32_t* cluster = static_cast<const int32_t*>(labels.const_data_ptr());
  const int32_t* centre = static_cast<const int32_t*>(before.const_data_ptr());
  const int64_t K = centres.size(1);
  if (debug()) check_values("medoids", "label", cluster, args.B * args.N, "K", K);
  Tensor out = new_int32(distance, {args.B, K});
  int32_t* chosen = static_cast<int32_t*>(out.mutable_data_ptr());
  for_each_image(args.B, [&](int64_t b) {
    isa().medoids({distance_view(args, b), cluster + b * args.N, centre + b * K, element(weights, b * args.N),
                   chosen + b * K, K, how == "textbook"});
  });
  return out;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) {
  m.impl("pairwise_distance", TORCH_BOX(&tokred::pairwise_distance_cpu));
  m.impl("knn", TORCH_BOX(&tokred::knn_cpu));
  m.impl("separation", TORCH_BOX(&tokred::separation_cpu));
  m.impl("nearest", TORCH_BOX(&tokred::nearest_cpu));
  m.impl("medoids", TORCH_BOX(&tokred::medoids_cpu));
}
