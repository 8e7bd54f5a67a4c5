// Everything an instruction set's file needs before its target options are switched on.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <new>

#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tokred {

[[noreturn]] inline void throw_out_of_memory(int64_t) { throw std::bad_alloc(); }
inline float half_to_float(uint16_t bits) { return c10::detail::fp16_ieee_to_fp32_value(bits); }
inline uint16_t float_to_half(float value) { return c10::detail::fp16_ieee_from_fp32_value(value); }
constexpr int kReduceSum = 1, kReduceAmax = 2;                   // tokred::Reduce
constexpr int kScoresNone = 0, kScoresCls = 1, kScoresMean = 2;  // tokred::Scores
// With D = 64, float32 keys, values and logits of a block take 410 KB; N = 577 (384 px) is one block.
constexpr int64_t kKeyBlock = 640;
constexpr int64_t kSumKeys = 32, kChainKeys = 256;  // in one chain of sums: masses, and masses times values

}  // namespace tokred
