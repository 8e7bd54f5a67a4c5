// The kernels of match, whose type is a run-time value.
#include "launch.h"
#include "match_split.cuh"

namespace tokred {

void launch_match(const MatchBatch& m, Stream stream, const Scratch& scratch) {
  launch_match(m, this_device(), Launcher(stream), scratch);
}

}  // namespace tokred
