// What add_merge_norm and add_topk_gather_norm do to the tokens on their way in and to the rows on their way out:
//
//   y_i = x_i + branch_i, rounded to its type
//   normed_j = (out_j - mean) / sqrt(variance + eps) * weight + bias over the C channels of out_j, as rounded
//
// A row stays in shared memory from its sum to its norm, each thread with the vectors that it wrote, so that no barrier
// is needed but in sums over a block.  Rows of single elements, which real widths never are, are read again from out.
#pragma once
#include "device.cuh"

namespace tokred {

// Tokens [N, C] of an image.
template <typename Type>
struct Tokens {
  using T = Type;
  const T* x;
  int64_t s_n;
  template <int kVector>
  __device__ __forceinline__ Pack<T, kVector> at(int i, int c) const {
    return *reinterpret_cast<const Pack<T, kVector>*>(x + i * s_n + c);
  }
};

// Their sums with a branch.
template <typename Type>
struct SumTokens {
  using T = Type;
  Tokens<T> x, branch;
  template <int kVector>
  __device__ __forceinline__ Pack<T, kVector> at(int i, int c) const {
    const Pack<T, kVector> a = x.template at<kVector>(i, c), b = branch.template at<kVector>(i, c);
    Pack<T, kVector> sum;
#pragma unroll
    for (int e = 0; e < kVector; ++e) from_float(to_float(a, e) + to_float(b, e), sum.e[e]);
    return sum;
  }
};

template <typename T>
__device__ __forceinline__ SumTokens<T> sum_tokens(const void* x, int64_t s_b, int64_t s_n, const Tail& tail,
                                                   int64_t b) {
  return {{static_cast<const T*>(x) + b * s_b, s_n}, {static_cast<const T*>(tail.branch) + b * tail.s_b, tail.s_n}};
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

template <typename T, int kVector>
__device__ __forceinline__ Pack<float, kVector> affine_of(const void* row, bool wide, int v) {
  if (wide) return static_cast<const Pack<float, kVector>*>(row)[v];
  const Pack<T, kVector> narrow = static_cast<const Pack<T, kVector>*>(row)[v];
  Pack<float, kVector> values;
#pragma unroll
  for (int e = 0; e < kVector; ++e) values.e[e] = to_float(narrow, e);
  return values;
}

// The thread has vectors first, first + step, ... of the row.
template <typename T, int kVector, typename Sum>
__device__ __forceinline__ void normalize_row(const Pack<T, kVector>* row, Pack<T, kVector>* normed, int first,
                                              int step, int vectors, const Tail& tail, const Sum& sum) {
  const float C = float(vectors * kVector);
  float part = 0;
  for (int v = first; v < vectors; v += step) {
    const Pack<T, kVector> pack = row[v];
#pragma unroll
    for (int e = 0; e < kVector; ++e) part += to_float(pack, e);
  }
  const float mean = sum(part) / C;
  part = 0;
  for (int v = first; v < vectors; v += step) {
    const Pack<T, kVector> pack = row[v];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float apart = to_float(pack, e) - mean;
      part = fmaf(apart, apart, part);
    }
  }
  const float scale = 1 / sqrtf(sum(part) / C + tail.eps);
  for (int v = first; v < vectors; v += step) {
    const Pack<T, kVector> pack = row[v];
    float value[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) value[e] = (to_float(pack, e) - mean) * scale;
    if (tail.weight) {
      const Pack<float, kVector> weight = affine_of<T, kVector>(tail.weight, tail.wide, v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) value[e] *= weight.e[e];
    }
    if (tail.bias) {
      const Pack<float, kVector> bias = affine_of<T, kVector>(tail.bias, tail.wide, v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) value[e] += bias.e[e];
    }
    Pack<T, kVector> result;
#pragma unroll
    for (int e = 0; e < kVector; ++e) from_float(value[e], result.e[e]);
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
