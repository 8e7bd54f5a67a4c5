// CUDA on the host, for tests: enough of the language for csrc/cuda/*.cuh to compile unchanged with a C++ compiler and
// run under sanitizers. A fiber is a CUDA thread; blocks run one after another; fibers switch at barriers, shuffles and
// ballots only, in an order that a seed permutes.
//
// A dependent launch begins before the one before it has run: memory that either writes is poison to a block until all
// of its threads wait for that launch.
//
// Found here: barriers that not every thread reaches, or at different lines; shuffles from lanes outside the mask;
// shared memory read before it is written (it is poisoned before every block); threads that do not wait for the launch
// before, or read or write too early. ThreadSanitizer sees every fiber as a thread, so it finds missing barriers;
// AddressSanitizer knows the exact bounds of shared memory.
// Not found: races between blocks, weak memory order, bank conflicts, speed.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// One dimension: the kernels use no other.
struct Dimension {
  unsigned x;
};
extern Dimension threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

void seed(unsigned value);  // 0: threads in order
unsigned char* shared_memory();
struct Memory {
  void* first;
  size_t bytes;
};
// dependent: what this launch and the one before it write; null where it is an ordinary launch.
void run(const void* kernel, int64_t blocks, int threads, int64_t shared, const std::function<void()>& thread,
         const std::vector<Memory>* dependent);
// Memory that counting.cpp shall watch.
void device_memory(const void* first, size_t bytes);

struct Site {
  const char* file;
  int line;
};
void block_barrier(Site site);
void wait_for_launch_before(Site site = {__builtin_FILE(), __builtin_LINE()});
// Waits for the lanes of the mask at the same site; returns what lane `source` of the warp gave.
uint64_t exchange(unsigned mask, uint64_t value, int source, Site site);
// orders: memory too, as __syncwarp does.
unsigned ballot(unsigned mask, bool vote, bool orders, Site site);
struct Words {
  unsigned word[6];
};
// Waits for the whole warp at the same site; returns what every lane gave, to be read before the next gather.
const Words* gather(const Words& mine, Site site);
int lane();

// Throws std::runtime_error where the hardware would hang or be undefined.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, Arguments... arguments) {
  run(reinterpret_cast<const void*>(kernel), blocks, threads, shared, [&] { kernel(arguments...); }, nullptr);
}
template <typename Kernel, typename... Arguments>
void launch_dependent(const std::vector<Memory>& written, Kernel kernel, int64_t blocks, int threads, int64_t shared,
                      Arguments... arguments) {
  run(reinterpret_cast<const void*>(kernel), blocks, threads, shared, [&] { kernel(arguments...); }, &written);
}

}  // namespace simt

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::block_barrier({file, line});
}
inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::ballot(mask, false, true, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return simt::ballot(mask, vote, false, {file, line});
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = simt::exchange(mask, bits, lane % 32, {file, line});
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, simt::lane() ^ lanes, file, line);
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int min(int a, int b) { return a < b ? a : b; }
