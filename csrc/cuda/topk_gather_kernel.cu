// topk_gather_kernel for the types of x.
#include "launch.h"
#include "topk_gather.cuh"

namespace tokred {

void launch_topk_gather(const GatherBatch& g, Dtype dtype, bool aligned, Stream stream) {
  with_type(dtype, [&](auto zero) { launch_topk_gather<decltype(zero)>(g, aligned, Launcher(stream, true)); });
}

}  // namespace tokred
