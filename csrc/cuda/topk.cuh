// topk: the k patches with the best scores keep their order, the others are dropped or share one more row.
//
// topk_kernel: one block an image, a thread a patch (beyond 1024, every 1024th).  The k-th largest key by bisection on
// its bits: a count over the block for each, at most 32, fewer where a count is k; then assign by a ballot scan, which
// keeps the first of the keys equal to it.  A thread's first key stays in a register, further ones are read again from
// the first-level cache, so nothing limits N.
//
// Floor, DeiT-S B=256 N=197: scores and assign, 8 N bytes an image, 0.4 MB = 0.1 us; a count is one barrier and 10
// shuffles, some 150 clocks, so all of them 2.8 us at 1.7 GHz, with seven blocks of 224 threads on an SM.
//
//   sm_90          registers   blocks an SM   shared memory
//   topk_kernel           32              2           256 B
#pragma once
#include "dependent.cuh"

namespace tokred {

constexpr int kTopkThreads = 1024;

// Order of scores as unsigned integers above 0; -0 ties with +0, NaN with -inf.
__device__ __forceinline__ unsigned score_key(float score) {
  const unsigned bits = __float_as_uint(score != score ? -INFINITY : score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__global__ void __launch_bounds__(kTopkThreads) topk_kernel(const TopkBatch g) {
  let_next_launch_begin();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, threads = blockDim.x, P = g.N - g.p;
  const float* score = g.score + blockIdx.x * int64_t(g.N) + g.p;
  int32_t* assign = g.assign + blockIdx.x * int64_t(g.N);
  for (int n = threadIdx.x; n < (g.k == P ? g.N : g.p); n += threads) assign[n] = n;
  if (g.k == P) return;
  int* counts = reinterpret_cast<int*>(shared_memory());  // [2, kWarp]: one barrier a step
  const unsigned first = threadIdx.x < P ? score_key(score[threadIdx.x]) : 0;

  unsigned found = 0;  // bits of the k-th largest key
  int above = 0;       // keys that are larger than it and all it may still become
  for (int bit = 31; bit >= 0; --bit) {
    const unsigned candidate = found | 1u << bit;
    int count = first >= candidate;
    for (int i = threadIdx.x + threads; i < P; i += threads) count += score_key(score[i]) >= candidate;
    count = block_sum(count, counts + bit % 2 * kWarp);
    if (count >= g.k)
      found = candidate;
    else
      above = count;
    if (count == g.k) break;
  }

  const int wanted = g.k - above;  // of the keys equal to `found`; at least all of them where the count was k
  int larger = 0, equal = 0;       // keys of the rounds before
  for (int base = 0; base < P; base += threads) {
    const int i = base + threadIdx.x;
    const unsigned key = base == 0 ? first : i < P ? score_key(score[i]) : 0;
    const unsigned is_larger = __ballot_sync(kAllLanes, key > found), is_equal = __ballot_sync(kAllLanes, key == found);
    __syncthreads();
    if (lane == 0) counts[warp] = __popc(is_larger), counts[kWarp + warp] = __popc(is_equal);
    __syncthreads();
    const unsigned lower = (1u << lane) - 1;
    int larger_before = larger + __popc(is_larger & lower), equal_before = equal + __popc(is_equal & lower);
    for (int w = 0; w < threads / kWarp; ++w) {
      if (w < warp) larger_before += counts[w], equal_before += counts[kWarp + w];
      larger += counts[w], equal += counts[kWarp + w];
    }
    const bool kept = key > found || (key == found && equal_before < wanted);
    if (i < P) assign[g.p + i] = kept ? g.p + larger_before + min(equal_before, wanted) : g.others;
  }
}

template <typename Launch>
void launch_topk(const TopkBatch& g, Launch&& launch) {
  const int P = g.N - g.p, threads = P > kTopkThreads ? kTopkThreads : P > 0 ? round_up(P, kWarp) : kWarp;
  launch(topk_kernel, g.B, threads, 2 * kWarp * int64_t(sizeof(int)), g);
}

}  // namespace tokred
