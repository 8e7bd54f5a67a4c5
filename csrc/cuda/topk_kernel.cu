// topk_kernel.
#include "launch.h"
#include "topk.cuh"

namespace tokred {

void launch_topk(const TopkBatch& g, Stream stream) { launch_topk(g, Launcher(stream)); }

}  // namespace tokred
