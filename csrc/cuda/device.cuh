// What every kernel needs of the device. Without nvcc, tests/simt stands in for the hardware and the same code runs on
// the host.
#pragma once
#include <cstdint>
#ifndef __CUDACC__
#include "simt.h"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "batches.h"

namespace tokred {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kAhead = 4;  // 16-byte loads a thread has in flight
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
using simt::shared_memory;
#endif

// Calls f with a zero of the type.
template <typename F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat: return f(float{});
    case Dtype::kHalf: return f(__half{});
    case Dtype::kBFloat16: return f(__nv_bfloat16{});
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Loaded and stored as 16-byte words where it is that long.
template <typename T, int kLength>
struct alignas(kLength * sizeof(T) < 16 ? kLength * sizeof(T) : 16) Pack {
  T e[kLength];
};

template <typename T, int kLength>
__device__ __forceinline__ float to_float(const Pack<T, kLength>& pack, int i) {
  return to_float(pack.e[i]);
}
// By halves of a word: else nvcc gives each element a register of its own, and merge spills.
__device__ __forceinline__ float to_float(const Pack<__nv_bfloat16, 8>& pack, int i) {
  const unsigned pair = reinterpret_cast<const unsigned*>(&pack)[i / 2];
  return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
}
__device__ __forceinline__ float to_float(const Pack<__half, 8>& pack, int i) {
  const __half2 pair = reinterpret_cast<const __half2*>(&pack)[i / 2];
  return i % 2 ? __high2float(pair) : __low2float(pair);
}

// The sum over the block, in every thread. counts: shared, an int a warp, not in use by the call before.
__device__ __forceinline__ int block_sum(int value, int* counts) {
  const int lane = threadIdx.x % kWarp;
  for (int step = 1; step < kWarp; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (lane == 0) counts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = lane < int(blockDim.x) / kWarp ? counts[lane] : 0;
  for (int step = 1; step < kWarp; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Words first, first + step, ... of a row.
template <typename Word>
__device__ __forceinline__ void copy_words(const Word* from, Word* to, int first, int step, int words) {
  for (; first < words; first += kAhead * step) {
    Word part[kAhead];  // all loads, then all stores: the compiler must not assume that to is not from
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + k * step < words) part[k] = from[first + k * step];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + k * step < words) to[first + k * step] = part[k];
  }
}

}  // namespace tokred
