// add_topk_gather_norm: out_j = y_i = x_i + branch_scale (branch_i + branch_bias) where assign_i = j, for the kept
// tokens, and one more row of the others, in index order, sum_i score_i y_i, in a mean divided by sum_i score_i (sum_i
// y_i / count where that is 0); and the LayerNorm of every row.
//
// The first block of an image forms the fused row, as topk_gather.cuh does, with its warps side by side on the
// channels, so that the chain of the 58 others is 8 loads long.  A warp of the other blocks has a token: its sum goes
// to out and to shared memory, and from there through its two moments to normed.
//
// Floor, DeiT-S B=256 N=197 k=138 C=384 bf16: x and branch 77.5 MB, out and normed 55.1 MB = 30.8 us at 4.3 TB/s; the
// addition and the norm of a block that drops nothing, in one kernel, take 36.0 us.  32 warps an SM with a row of x and
// one of branch each have 48 KB in flight.
//
//   sm_90                                    registers   blocks an SM   shared memory at C = 384
//   add_topk_gather_norm_kernel<float, 4>           64              4                      22 KB
//   add_topk_gather_norm_kernel<half, 8>            60              4                      16 KB
//   add_topk_gather_norm_kernel<bfloat16, 8>        61              4                      16 KB
//   add_topk_gather_norm_kernel<*, 1>               72              3                      10 KB
#pragma once
#include "topk_gather.cuh"

namespace tokred {

// The fused row by a block. memory: the lists of its warps, their parts of a sum, and the row.
template <typename T, int kVector>
__device__ __forceinline__ void fuse_and_normalize(const GatherBatch& g, const Tail& tail, const int32_t* assign,
                                                   int64_t b, T* out_row, T* normed_row, bool staged) {
  using Vector = Pack<T, kVector>;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, vectors = g.C / kVector;
  int* lists = reinterpret_cast<int*>(shared_memory());
  float* parts = reinterpret_cast<float*>(lists + warps * kListed);
  Vector* row = reinterpret_cast<Vector*>(parts + kWarps);
  Vector* out = reinterpret_cast<Vector*>(out_row);
  const Members list{lists + warp * kListed, 0, 0};
  for (int v = threadIdx.x; v / kWarp * kWarp < vectors; v += blockDim.x) {
    const bool active = v < vectors;
    auto channels = sum_channels<T, kVector>(g, tail, b, v * kVector);
    if (active) channels.read_rows(tail, v);
    const Vector fused = fuse<T, kVector>(g, assign, g.score + b * g.N, channels, active, list);
    if (!active) continue;
    out[v] = fused;
    if (staged) row[v] = fused;
  }
  Vector* normed = reinterpret_cast<Vector*>(normed_row);
  const BlockSum sum{parts};
  if (staged)
    normalize_row<T, kVector>(row, normed, threadIdx.x, blockDim.x, vectors, tail, sum);
  else
    normalize_row<T, kVector>(out, normed, threadIdx.x, blockDim.x, vectors, tail, sum);
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kVector == 1 ? 3 : 4)
    add_topk_gather_norm_kernel(const GatherBatch g, const Tail tail, int groups, int row_bytes) {
  using Vector = Pack<T, kVector>;
  const int64_t b = blockIdx.x / unsigned(groups);
  const int group = blockIdx.x % unsigned(groups), fused = g.copied < g.M;
  const int32_t* assign = g.assign + b * g.N;
  T* out = static_cast<T*>(g.out) + b * g.M * g.C;
  T* normed = static_cast<T*>(tail.normed) + b * g.M * g.C;
  if (group < fused) {
    const int64_t at = int64_t(g.copied) * g.C;
    fuse_and_normalize<T, kFusedVector<T, kVector>>(g, tail, assign, b, out + at, normed + at, kVector > 1);
    return;
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, vectors = g.C / kVector;
  const int i = (group - fused) * int(blockDim.x / kWarp) + warp, j = i < g.N ? assign[i] : -1;
  if (j < 0 || j >= g.copied) return;
  Vector* to = reinterpret_cast<Vector*>(out + int64_t(j) * g.C);
  Vector* row = kVector == 1 ? to : reinterpret_cast<Vector*>(shared_memory() + warp * row_bytes);
  for (int v = lane; v < vectors; v += kWarp) {
    auto channels = sum_channels<T, kVector>(g, tail, b, v * kVector);
    const auto loaded = channels.load(i);  // on its way while the scale and the bias are read
    channels.read_rows(tail, v);
    const Vector sum = channels.value(loaded);
    to[v] = sum;
    if (kVector > 1) row[v] = sum;
  }
  Vector* normed_to = reinterpret_cast<Vector*>(normed + int64_t(j) * g.C);
  normalize_row<T, kVector>(row, normed_to, lane, kWarp, vectors, tail, WarpSum{});
}

template <typename T, int kVector, typename Launch>
void launch_gather_norm(const GatherBatch& g, const Tail& tail, const NormGrid& grid, int row_bytes, Launch&& launch) {
  const int groups = (g.copied < g.M) + ceil_div(g.N, grid.warps);
  launch(add_topk_gather_norm_kernel<T, kVector>, g.B * groups, grid.warps * kWarp, grid.shared, g, tail, groups,
         row_bytes);
}

// aligned: rows of all tensors start at multiples of 16 bytes.
template <typename T, typename Launch>
void launch_add_topk_gather_norm(const GatherBatch& g, const Tail& tail, bool aligned, Launch&& launch) {
  // A list a warp and the parts of a sum, which only the fused row needs.
  const int64_t more = g.copied < g.M ? kListed * sizeof(int) + kWarps * sizeof(float) : 0;
  const int64_t row_bytes = int64_t(g.C) * sizeof(T);
  const NormGrid staged = norm_grid(row_bytes + more);
  if (aligned && staged.warps > 0)
    launch_gather_norm<T, 16 / sizeof(T)>(g, tail, staged, int(row_bytes), launch);
  else
    launch_gather_norm<T, 1>(g, tail, norm_grid(more), 0, launch);
}

}  // namespace tokred
