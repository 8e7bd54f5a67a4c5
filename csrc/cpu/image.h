// Everything an instruction set's file needs before its target options are switched on.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <cstdint>
#include <new>

#include "isa.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tokred {

[[noreturn]] inline void throw_out_of_memory(int64_t) { throw std::bad_alloc(); }
constexpr int kReduceSum = 1, kReduceAmax = 2;                   // tokred::Reduce
constexpr int kScoresNone = 0, kScoresCls = 1, kScoresMean = 2;  // tokred::Scores
// With D = 64, float32 keys, values and logits of a block take 410 KB; N = 577 (384 px) is one block.
constexpr int64_t kKeyBlock = 640;
constexpr int64_t kSumKeys = 32, kChainKeys = 256;  // in one chain of sums: masses, and masses times values

}  // namespace tokred
