// What add_merge_norm and add_topk_gather_norm do to the tokens on their way in and to the rows on their way out:
//
//   y_i = x_i + branch_scale (branch_i + branch_bias), rounded to its type
//   normed_j = (out_j - mean) / sqrt(variance + eps) * weight + bias over the C channels of out_j, as rounded
//
// A row stays in shared memory from its sum to its norm, each thread with the vectors that it wrote, so that no barrier
// is needed but in sums over a block.  Rows of single elements, which real widths never are, are read again from out.
#pragma once
#include "device.cuh"

namespace tokred {

// Some channels of the tokens [N, C] of an image.
template <typename T, int kVector>
struct Channels {
  using Loaded = Pack<T, kVector>;
  static constexpr int kLoads = 1;  // a token
  const T* x;                       // at the first of them
  int64_t s_n;
  __device__ __forceinline__ Loaded load(int i) const { return *reinterpret_cast<const Loaded*>(x + i * s_n); }
  __device__ __forceinline__ Pack<T, kVector> value(const Loaded& loaded) const { return loaded; }
};

// Vector v of a row [C], float if `wide`, else T; `none` where there is no row.
template <typename T, int kVector>
__device__ __forceinline__ Pack<float, kVector> row_vector(const void* row, bool wide, int v, float none) {
  Pack<float, kVector> values;
  if (row && wide) return static_cast<const Pack<float, kVector>*>(row)[v];
  const Pack<T, kVector> narrow = row ? static_cast<const Pack<T, kVector>*>(row)[v] : Pack<T, kVector>{};
#pragma unroll
  for (int e = 0; e < kVector; ++e) values.e[e] = row ? to_float(narrow, e) : none;
  return values;
}

// Their sums with those of a branch.
template <typename T, int kVector>
struct SumChannels {
  struct Loaded {
    Pack<T, kVector> x, branch;
  };
  static constexpr int kLoads = 2;
  Channels<T, kVector> x, branch;
  Pack<float, kVector> scale = {}, bias = {};
  __device__ __forceinline__ Loaded load(int i) const { return {x.load(i), branch.load(i)}; }
  __device__ __forceinline__ Pack<T, kVector> value(const Loaded& loaded) const {
    Pack<T, kVector> sum;
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      from_float(fmaf(scale.e[e], to_float(loaded.branch, e) + bias.e[e], to_float(loaded.x, e)), sum.e[e]);
    return sum;
  }
  __device__ __forceinline__ void read_rows(const Tail& tail, int v) {
    scale = row_vector<T, kVector>(tail.branch_scale, tail.wide, v, 1);
    bias = row_vector<T, kVector>(tail.branch_bias, tail.wide, v, -0.f);  // -0 + -0 is -0
  }
};

// Of image b of a batch and its branch, from channel c on.
template <typename T, int kVector, typename Batch>
__device__ __forceinline__ SumChannels<T, kVector> sum_channels(const Batch& g, const Tail& tail, int64_t b, int c) {
  return {{static_cast<const T*>(g.x) + b * g.s_b + c, g.s_n},
          {static_cast<const T*>(tail.branch) + b * tail.s_b + c, tail.s_n}};
}

// A sum over the threads that have a row, the same in all of them: a warp.
struct WarpSum {
  __device__ __forceinline__ float operator()(float value) const {
    for (int step = 1; step < kWarp; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
  }
};

// The block.
struct BlockSum {
  float* parts;  // shared, one a warp
  __device__ __forceinline__ float operator()(float value) const {
    value = WarpSum{}(value);
    __syncthreads();  // every thread has read the parts of the sum before
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) value += parts[w];
    return value;
  }
};

// The thread has vectors first, first + step, ... of the row: two or three, too few for loops unrolled by four.
template <typename T, int kVector, typename Sum>
__device__ __forceinline__ void normalize_row(const Pack<T, kVector>* row, Pack<T, kVector>* normed, int first,
                                              int step, int vectors, const Tail& tail, const Sum& sum) {
  const float C = float(vectors * kVector);
  float part = 0;
#pragma unroll 1
  for (int v = first; v < vectors; v += step) {
    const Pack<T, kVector> pack = row[v];
#pragma unroll
    for (int e = 0; e < kVector; ++e) part += to_float(pack, e);
  }
  const float mean = sum(part) / C;
  part = 0;
#pragma unroll 1
  for (int v = first; v < vectors; v += step) {
    const Pack<T, kVector> pack = row[v];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float apart = to_float(pack, e) - mean;
      part = fmaf(apart, apart, part);
    }
  }
  const float scale = 1 / sqrtf(sum(part) / C + tail.eps);
#pragma unroll 1
  for (int v = first; v < vectors; v += step) {
    const Pack<T, kVector> pack = row[v];
    const auto weight = row_vector<T, kVector>(tail.weight, tail.wide, v, 1);
    const auto bias = row_vector<T, kVector>(tail.bias, tail.wide, v, -0.f);
    float value[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[e] = (to_float(pack, e) - mean) * scale;
    Pack<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) from_float(fmaf(value[e], weight.e[e], bias.e[e]), result.e[e]);
    normed[v] = result;
  }
}

// The warps of a block, a row each, and its shared memory.
struct NormGrid {
  int warps;
  int64_t shared;
};

// The least limit of a block's shared memory from sm_80 on.
constexpr int64_t kNormShared = 99 << 10;

// A warp needs so many bytes. No warps: they do not fit.
inline NormGrid norm_grid(int64_t bytes) {
  const int64_t fit = bytes ? kNormShared / bytes : kWarps, warps = fit < kWarps ? fit : kWarps;
  return {int(warps), warps * bytes};
}

}  // namespace tokred
