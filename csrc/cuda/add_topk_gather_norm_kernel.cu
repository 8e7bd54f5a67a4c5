// add_topk_gather_norm_kernel for the types of x.
#include "add_topk_gather_norm.cuh"
#include "launch.h"

namespace tokred {

void launch_add_topk_gather_norm(const GatherBatch& g, const Tail& tail, Dtype dtype, bool aligned, Stream stream) {
  with_type(dtype, [&](auto zero) { launch_add_topk_gather_norm<decltype(zero)>(g, tail, aligned, Launcher(stream)); });
}

}  // namespace tokred
