// What attention leaves of p beside out, for head_mean_kernel: the CLS row, or the column sums of a block's query rows.
#pragma once
#include "attention_tile.cuh"

namespace tokred {

// What the column sums need of a query row: p = size exp2(s - offset) inverse, s to base 2.
struct alignas(8) RowStatistics {
  float offset, inverse;
};

// Column sums [keys] of a head: from two a lane for every 8 keys, over the lanes, then over the warps in order.
// of_warp: shared, the warp's own; the next warp's is `stride` floats on.
template <int kTiles, int kBlockWarps>
__device__ __forceinline__ void write_columns(float (&sum)[2 * kTiles][2], float* of_warp, int stride, int count,
                                              float* to) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncwarp();  // the query rows that lay here have been read
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = sum[n][e];
#pragma unroll
      for (int step = 4; step < kWarp; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (lane < 4) of_warp[8 * n + 2 * lane + e] = total;
    }
  __syncthreads();
  const float* first = of_warp - warp * stride;
  for (int j = threadIdx.x; j < count; j += kBlockWarps * kWarp) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) total += first[w * stride + j];
    to[j] = total;
  }
}

// partial of the head's row 0: from logits to p, by the warp that left them there. offset, inverse: of lane 0.
__device__ __forceinline__ void finish_row(const AttentionBatch& g, int64_t head, float offset, float inverse) {
  offset = __shfl_sync(kAllLanes, offset, 0), inverse = __shfl_sync(kAllLanes, inverse, 0);
  const float* size = sizes(g, head, 0);
  float* p = g.partial + head * g.N;
  __syncwarp();  // the logits are there
  for (int64_t first = threadIdx.x; first < g.N; first += kAhead * kWarp) {
    float s[kAhead] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (first + a * kWarp < g.N) s[a] = p[first + a * kWarp];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t n = first + a * kWarp;
      if (n < g.N) p[n] = weight_of(size, n) * fast_exp2(fmaf(s[a], g.scale, -offset)) * inverse;
    }
  }
}

// Column sums [N] of p over `count` query rows of the block whose statistics are known; the first ones are written,
// more are added. A warp takes 16 keys, the logits once more with the roles exchanged: a lane adds its two keys over
// all rows, and only four lanes meet. What a masked key gets is not read.
template <typename T, int kWidth, int kBlockWarps>
__device__ __forceinline__ void stream_columns(const AttentionBatch& g, int64_t head, int count, const T* queries,
                                               const RowStatistics* rows, T* keys, bool is_first, float* to) {
  constexpr int kPitch = kRowPitch<T, kWidth>, kKeys = kBlockWarps * kKeyTile;
  const int warp = threadIdx.x / kWarp, t = threadIdx.x % 4;
  const float* size = sizes(g, head, 0);
  for (int64_t first_key = 0; first_key < g.N; first_key += kKeys) {
    __syncthreads();  // the keys before have been read; queries and statistics are there
    stage_rows<kWidth, kBlockWarps * kWarp, kKeys>(g, key<T>(g, head, first_key), g.k_n, int(g.N - first_key), false,
                                                   keys, [](int) { return true; });
    __syncthreads();
    const int64_t first = first_key + warp * kKeyTile;
    if (first >= g.N) continue;
    const RowTile<T, kWidth> tile(keys + warp * kKeyTile * kPitch);
    float sum[2] = {};
    for (int i = 0; i < count; i += kQueryTile) {
      float s[2][4];
      tile.logits(queries + i * kPitch, s);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = i + 8 * n + 2 * t;
        const Pack<RowStatistics, 2> of = *reinterpret_cast<const Pack<RowStatistics, 2>*>(rows + row);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (row + e % 2 < count)
            sum[e / 2] += fast_exp2(fmaf(s[n][e], g.scale, -of.e[e % 2].offset)) * of.e[e % 2].inverse;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
    const int64_t n = first + threadIdx.x % kWarp / 4 + 8 * t;
    if (t < 2 && n < g.N) {
      const float total = weight_of(size, n) * (t ? sum[1] : sum[0]);
      to[n] = is_first ? total : to[n] + total;
    }
  }
  __syncthreads();  // the queries have been read
}

}  // namespace tokred
