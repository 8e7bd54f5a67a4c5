// Argument checks of pairwise_distance, knn, separation, nearest and medoids, as in check.h.
#pragma once
#include "check.h"

namespace tokred {

struct PairwiseArgs {
  Tensor x;  // [B, N, C]
  int64_t B, N, C, s_b, s_n;
};

inline PairwiseArgs pairwise_args(const Tensor& given) {
  check_rank3("pairwise_distance", "x", given, "[B, N, C]");
  const Tensor x = inner_contiguous(given);
  return {x, x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1)};
}

inline void check_distance(const char* op, const Tensor& distance) {
  check_floating(op, "distance", distance);
  if (distance.dim() != 3 || distance.size(1) != distance.size(2))
    fail(op, "distance", "[B, N, N]", show_shape(distance));
}

struct DistanceArgs {
  Tensor distance;  // [B, N, N] in the wide dtype
  int64_t B, N, s_b, s_n;
};

// For a checked distance.
inline DistanceArgs distance_args(const Tensor& given) {
  const ScalarType dtype = wide(scalar_type(given));
  const Tensor d = inner_contiguous(scalar_type(given) == dtype ? given : torch::stable::to(given, dtype));
  return {d, d.size(0), d.size(1), d.stride(0), d.stride(1)};
}

inline void check_knn(const Tensor& distance, int64_t k) {
  check_distance("knn", distance);
  if (k < 0) fail("knn", "k", "at least 0", std::to_string(k));
}

inline void check_separation(const Tensor& distance, const Tensor& density) {
  check_distance("separation", distance);
  check_per_token("separation", "density", density, distance.size(0), distance.size(1), distance);
}

inline void check_centres(const char* op, const Tensor& centres, const Tensor& distance) {
  if (centres.dim() != 2) fail(op, "centres", "int32 [B, K]", show_shape(centres));
  check_rows(op, "centres", centres, "int32 [B, K]", {distance.size(0), centres.size(1)}, distance);
}

inline void check_nearest(const Tensor& distance, const Tensor& centres) {
  check_distance("nearest", distance);
  check_centres("nearest", centres, distance);
}

inline void check_medoids(const Tensor& distance, const Tensor& label, const Tensor& centres, const Tensor& weight,
                          const std::string& update) {
  const char* op = "medoids";
  check_distance(op, distance);
  const int64_t B = distance.size(0), N = distance.size(1);
  check_rows(op, "label", label, "int32 [B, N]", {B, N}, distance);
  check_centres(op, centres, distance);
  check_per_token(op, "weight", weight, B, N, distance);
  if (update != "textbook" && update != "wttu") fail(op, "update", "\"textbook\" or \"wttu\"", "\"" + update + "\"");
}

}  // namespace tokred
