// What the scheduler tells counting.cpp, where that is linked.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

#ifdef SIMT_COUNTING
// Returns how many of the blocks shall run.
int64_t start_launch(const void* kernel, int64_t blocks, int threads, int64_t shared, bool dependent);
void start_block();
#else
inline int64_t start_launch(const void*, int64_t blocks, int, int64_t, bool) { return blocks; }
inline void start_block() {}
#endif

}  // namespace simt
