// merge_kernel for the types of x.
#include "launch.h"
#include "merge.cuh"

namespace tokred {

void launch_merge(const MergeBatch& g, Dtype dtype, bool aligned, Stream stream, bool after_match) {
  with_type(dtype, [&](auto zero) { launch_merge<decltype(zero)>(g, aligned, Launcher(stream, after_match)); });
}

}  // namespace tokred
