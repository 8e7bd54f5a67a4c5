// unmerge_kernel for words of 16 bytes and for single elements.
#include "launch.h"
#include "unmerge.cuh"

namespace tokred {

void launch_unmerge(const UnmergeBatch& u, int64_t word_bytes, Stream stream) {
  Launcher launch(stream);
  switch (word_bytes) {
    case 16: return launch_unmerge<uint4>(u, launch);
    case 4: return launch_unmerge<uint32_t>(u, launch);
    default: return launch_unmerge<uint16_t>(u, launch);
  }
}

}  // namespace tokred
