// topk_gather: out_j = x_i where assign_i = j, for the kept tokens; and one more row of the others, in index order,
// sum_i score_i x_i, in a mean divided by sum_i score_i (sum_i x_i / count where that is 0).
//
// A warp copies a token, 16 bytes a lane.  The first warps of an image form the fused row: 4 bytes a lane and
// eight members ahead, for which there are registers; it finds them by ballots over assign (merge.cuh).
//
// Floor, DeiT-S B=256 N=197 k=138 C=384 bf16: 38.7 MB + 27.5 MB = 15.4 us at 4.3 TB/s; 32 warps an SM with a row each
// have the 24 KB in flight that this needs.  The chain of the 58 others is 8 loads long.
//
//   sm_90                           registers   blocks an SM   shared memory
//   topk_gather_kernel<float, 4>           56              4           10 KB
//   topk_gather_kernel<half, 8>            56              4
//   topk_gather_kernel<bfloat16, 8>        61              4
//   topk_gather_kernel<*, 1>               56              4
#pragma once
#include "merge.cuh"

namespace tokred {

constexpr int kMembersAhead = 8;

// sum += w x and total += w over the listed members; lanes beyond the last are not active, w null
// means 1.
template <int kVector, typename Channels>
__device__ __forceinline__ void add_members(const Members& list, const Channels& channels, bool active, const float* w,
                                            float (&sum)[kVector], float& total) {
  for (int first = 0; first < list.found; first += kMembersAhead) {
    typename Channels::Loaded part[kMembersAhead] = {};
    float w_of[kMembersAhead];
#pragma unroll
    for (int k = 0; k < kMembersAhead; ++k) {
      if (first + k >= list.found) continue;
      const int i = list.token[first + k];
      if (active) part[k] = channels.load(i);
      w_of[k] = w ? w[i] : 1;
    }
#pragma unroll
    for (int k = 0; k < kMembersAhead; ++k) {
      if (first + k >= list.found) continue;
      const auto token = channels.value(part[k]);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] = fmaf(w_of[k], to_float(token, e), sum[e]);
      total += w_of[k];
    }
  }
}

// The fused row.
template <typename T, int kVector, typename Channels>
__device__ __forceinline__ Pack<T, kVector> fuse(const GatherBatch& g, const int32_t* assign, const float* w,
                                                 const Channels& channels, bool active, Members list) {
  float sum[kVector], total;
  for (bool again = true; again;) {
    for (float& s : sum) s = 0;
    total = 0, list.next = 0;
    do {
      collect(assign, g.N, g.copied, list);
      add_members(list, channels, active, w, sum, total);
    } while (list.next < g.N);
    again = g.mean && w && total == 0;
    if (again) w = nullptr;  // the plain mean
  }
  Pack<T, kVector> result;
#pragma unroll
  for (int e = 0; e < kVector; ++e) from_float(g.mean ? sum[e] / total : sum[e], result.e[e]);
  return result;
}

// Of the fused row, a lane has 4 bytes.
template <typename T, int kVector>
constexpr int kFusedVector = kVector == 1 ? 1 : 4 / sizeof(T);

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 4)
    topk_gather_kernel(const Dependent<GatherBatch> dependent, int chunks, int groups) {
  const GatherBatch& g = dependent.wait();
  const int warp = threadIdx.x / kWarp, item = blockIdx.x % unsigned(groups) * kWarps + warp;
  const int64_t b = blockIdx.x / unsigned(groups);
  const int32_t* assign = g.assign + b * g.N;
  const T* x = static_cast<const T*>(g.x) + b * g.s_b;
  T* out = static_cast<T*>(g.out) + b * g.M * g.C;
  if (item < chunks) {
    const Members list{reinterpret_cast<int*>(shared_memory()) + warp * kListed, 0, 0};
    constexpr int kFused = kFusedVector<T, kVector>;
    const int c = (item * kWarp + int(threadIdx.x) % kWarp) * kFused;
    const Channels<T, kFused> channels{x + c, g.s_n};
    const auto fused = fuse<T, kFused>(g, assign, g.score + b * g.N, channels, c < g.C, list);
    if (c < g.C) *reinterpret_cast<Pack<T, kFused>*>(out + int64_t(g.copied) * g.C + c) = fused;
    return;
  }
  const int i = item - chunks, j = i < g.N ? assign[i] : -1;
  if (j < 0 || j >= g.copied) return;
  using Word = Pack<T, kVector>;
  copy_words(reinterpret_cast<const Word*>(x + i * g.s_n), reinterpret_cast<Word*>(out + int64_t(j) * g.C),
             threadIdx.x % kWarp, kWarp, g.C / kVector);
}

// aligned: rows of x and of out start at multiples of 16 bytes.
template <typename T, int kVector, typename Launch>
void launch_gather(const GatherBatch& g, Launch&& launch) {
  const int chunks = g.copied < g.M ? ceil_div(g.C, kWarp * kFusedVector<T, kVector>) : 0;
  const int groups = ceil_div(chunks + g.N, kWarps);
  const int64_t shared = chunks ? kWarps * kListed * int64_t(sizeof(int)) : 0;
  launch(topk_gather_kernel<T, kVector>, g.B * groups, kThreads, shared, g, chunks, groups);
}

template <typename T, typename Launch>
void launch_topk_gather(const GatherBatch& g, bool aligned, Launch&& launch) {
  if (aligned)
    launch_gather<T, 16 / sizeof(T)>(g, launch);
  else
    launch_gather<T, 1>(g, launch);
}

}  // namespace tokred
