// add_merge_norm_kernel for the types of x.
#include "add_merge_norm.cuh"
#include "launch.h"

namespace tokred {

void launch_add_merge_norm(const MergeBatch& g, const Tail& tail, Dtype dtype, bool aligned, Stream stream) {
  with_type(dtype, [&](auto zero) { launch_add_merge_norm<decltype(zero)>(g, tail, aligned, Launcher(stream)); });
}

}  // namespace tokred
