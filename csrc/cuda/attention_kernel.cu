// The kernels of attention and attention_scores for the types of q.
#include "attention_scores.cuh"
#include "launch.h"

namespace tokred {

void launch_scored_attention(const AttentionBatch& g, Dtype dtype, Stream stream, const Scratch& scratch) {
  with_type(dtype,
            [&](auto zero) { launch_scored_attention<decltype(zero)>(g, this_device(), Launcher(stream), scratch); });
}

}  // namespace tokred
