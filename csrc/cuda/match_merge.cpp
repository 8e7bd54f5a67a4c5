// match_merge on CUDA: match, then merge, on one stream; assign is the only thing handed over.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor, Tensor> match_merge_cuda(const Tensor& x, const Tensor& metric, int64_t r, int64_t prefix,
                                                    const OptionalTensor& size) {
  const DeviceGuard guard(x.get_device_index());
  const char* op = "match_merge";
  check_match_merge(x, metric, prefix, size);
  const MatchArgs match = match_args(op, metric, r, prefix, std::nullopt, 1.0, false);
  Tensor assign = new_int32(x, {match.B, match.N});
  const int64_t M = match.N - match.r;
  const MergeArgs merge = merge_args(op, x, assign, M, size, std::nullopt);
  Tensor out = torch::stable::new_empty(x, {merge.B, M, merge.C});
  Tensor size_out = torch::stable::new_empty(x, {merge.B, M}, ScalarType::Float);
  match_into(op, match, assign);
  merge_into(op, merge, Reduce::kMean, out, size_out);
  return {out, size_out, assign};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) { m.impl("match_merge", TORCH_BOX(&tokred::match_merge_cuda)); }
