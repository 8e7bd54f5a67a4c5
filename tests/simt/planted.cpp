// Bugs that the emulator must catch, and the same kernel without them. arguments: the bug, a seed.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dependent.cuh"

using namespace tokred;

enum Bug {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kOutOfBounds,
  kSharedOutOfBounds,
  kDivergent,
  kReturned,
  kWrongMask,
  kUninitialised,
  kMissingWait,
  kLoneWait,
  kEarlyRead,
  kEarlyWrite
};
static const char* const kNames[] = {"none",
                                     "missing-barrier",
                                     "missing-warp-barrier",
                                     "out-of-bounds",
                                     "shared-out-of-bounds",
                                     "divergent-barrier",
                                     "returned",
                                     "wrong-mask",
                                     "uninitialised",
                                     "missing-wait",
                                     "lone-wait",
                                     "early-read",
                                     "early-write"};

// Reverses the kThreads values of `from` through shared memory; two lanes also check each other's.
__global__ void planted_kernel(const int* from, int* to, Bug bug) {
  int* values = reinterpret_cast<int*>(shared_memory());
  const int t = threadIdx.x, last = kThreads - 1;
  if (bug != kUninitialised || t > 0) values[bug == kSharedOutOfBounds ? t + 1 : t] = from[t];
  if (bug != kMissingWarpBarrier) __syncwarp();
  const int neighbour = values[t ^ 1];
  if (bug == kReturned && t == last) return;
  if (bug == kDivergent && t < kThreads / 2)
    __syncthreads();
  else if (bug != kMissingBarrier)
    __syncthreads();
  if (bug == kWrongMask) __shfl_xor_sync(t % kWarp < 16 ? 0xffffu : 0xffff0000u, t, 16);
  to[bug == kOutOfBounds ? t + 1 : t] = values[last - t] + neighbour - from[t ^ 1];
}

// Reverses them again, in a dependent launch. No launcher would launch it so.
__global__ void dependent_kernel(const int* from, int* to, Bug bug) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  const int early = bug == kEarlyRead ? from[kThreads - 1 - t] : 0;
  if (bug == kEarlyWrite) to[t] = 0;
  if (bug != kMissingWait && (bug != kLoneWait || t == 0)) wait_for_launch_before();
  to[t] = bug == kEarlyRead ? early : from[kThreads - 1 - t];
}
static_assert(!kWaits<const int*, int*, Bug> && !kWaits<Dependent<int*>, int*> && kWaits<Dependent<int*>, int>);

int main(int, char** arguments) {
  int bug = 0;
  while (std::string(kNames[bug]) != arguments[1]) ++bug;
  simt::seed(unsigned(atoi(arguments[2])));
  int* from = new int[kThreads];
  int* middle = new int[kThreads];
  int* to = new int[kThreads];
  constexpr size_t kBytes = kThreads * sizeof(int);
  for (int i = 0; i < kThreads; ++i) from[i] = i;
  try {
    simt::launch(planted_kernel, 1, kThreads, kBytes, from, middle, Bug(bug));
    simt::launch_dependent({{middle, kBytes}, {to, kBytes}}, dependent_kernel, 2, kThreads / 2, 0, middle, to,
                           Bug(bug));
  } catch (const std::runtime_error& error) {
    puts(error.what());
    return 3;
  }
  for (int i = 0; i < kThreads; ++i)
    if (to[i] != i) {
      printf("wrong: %d at %d\n", to[i], i);
      return 2;
    }
  delete[] from;
  delete[] middle;
  delete[] to;
}
