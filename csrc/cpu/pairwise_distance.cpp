// pairwise_distance on the CPU: one image a task. The kernel is pairwise_distance_image.h.
#include "tensors.h"

namespace tokred {

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

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) { m.impl("pairwise_distance", TORCH_BOX(&tokred::pairwise_distance_cpu)); }
