// match_merge on the CPU: each image is matched and merged in one task, while its assignment is in the first-level
// cache.
#include "tensors.h"

namespace tokred {

std::tuple<Tensor, Tensor, Tensor> match_merge_cpu(const Tensor& x, const Tensor& metric, int64_t r, int64_t prefix,
                                                   const OptionalTensor& size) {
  check_match_merge(x, metric, prefix, size);
  const MatchArgs match = match_args("match_merge", metric, r, prefix, std::nullopt, 1.0, false);
  Tensor assign = new_int32(x, {match.B, match.N});
  const int64_t M = match.N - match.r;
  const MergeArgs merge = merge_args("match_merge", x, assign, M, size, std::nullopt);
  Tensor out = new_like(x, {merge.B, M, merge.C}), size_out = new_wide(x, {merge.B, M});
  const MatchImages to_match(match, assign);
  const MergeImages to_merge(merge, static_cast<const int32_t*>(assign.const_data_ptr()), Reduce::kMean, out, size_out);
  const Isa& kernels = isa();
  for_each_image(merge.B, [&](int64_t b) {
    const MergeImage merge_b = to_merge[b];
    MatchImage match_b = to_match[b];
    match_b.ahead = static_cast<const char*>(merge_b.x);
    match_b.ahead_bytes = merge.N * merge.s_n * int64_t(x.element_size());
    kernels.match(match_b);
    kernels.merge(merge_b);
  });
  return {out, size_out, assign};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("match_merge", TORCH_BOX(&tokred::match_merge_cpu)); }
