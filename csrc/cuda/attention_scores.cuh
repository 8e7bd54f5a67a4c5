// attention_scores: the first row ("cls") or the column mean ("mean") of attention's p, averaged over heads.
//
// attention_kernel leaves both beside out, the column sums without one too; cls_kernel the row alone: a block takes a
// head and reads its keys once, eight lanes a key. head_mean_kernel adds what they left in order: two launches.
//
// Floor, DeiT-S B=256 N=197 H=6 D=64 bf16: cls keys 38.7 MB = 9 us; mean q and k 77.4 MB = 18 us, 7.6 GFLOP = 10 us.
//
//   sm_90              registers   blocks an SM
//   cls_kernel           72 - 96          2 - 3
//   head_mean_kernel          48              5
#pragma once
#include "attention.cuh"

namespace tokred {

// f of a value of every thread of a block of kThreads, combined in a fixed order; room: shared, [kWarps].
template <typename F>
__device__ __forceinline__ float block_combine(float value, float* room, F&& f) {
  for (int step = 1; step < kWarp; step *= 2) value = f(value, __shfl_xor_sync(kAllLanes, value, step));
  __syncthreads();  // the combination before has been read
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = room[0];
  for (int w = 1; w < kWarps; ++w) value = f(value, room[w]);
  return value;
}

// partial [B, H, N]: p of query 0. A block takes a head, eight lanes a key; the logits wait in partial.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) cls_kernel(const AttentionBatch g) {
  constexpr int kPieces = 2, kKeys = kThreads / 8;  // pieces of 64 elements: D <= 128
  const int64_t head = blockIdx.x;
  const int first = threadIdx.x % 8 * 8;
  const unsigned lanes = 0xffu << threadIdx.x % kWarp / 8 * 8;
  const T* keys = key<T>(g, head, 0);
  const float* size = sizes(g, head, 0);
  float* p = g.partial + head * g.N;
  float* room = reinterpret_cast<float*>(shared_memory());

  const float sign = g.negate ? -1 : 1;
  float q[kPieces][8] = {};
#pragma unroll
  for (int c = 0; c < kPieces; ++c)
    if (first + 64 * c < g.D) {
      const Pack<T, 8> part = load_pack<8>(query<T>(g, head, 0) + first + 64 * c, g.aligned);
#pragma unroll
      for (int e = 0; e < 8; ++e) q[c][e] = sign * to_float(part, e);
    }

  float highest = -INFINITY;
  for (int64_t base = threadIdx.x / 8; base < g.N; base += kAhead * kKeys) {
    float s[kAhead] = {};
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      if (first + 64 * c >= g.D) continue;
      Pack<T, 8> part[kAhead] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (base + a * kKeys < g.N)
          part[a] = load_pack<8>(keys + (base + a * kKeys) * g.k_n + first + 64 * c, g.aligned);
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
#pragma unroll
        for (int e = 0; e < 8; ++e) s[a] = fmaf(q[c][e], to_float(part[a], e), s[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t n = base + a * kKeys;
      if (n >= g.N) continue;
      for (int step = 1; step < 8; step *= 2) s[a] += __shfl_xor_sync(lanes, s[a], step);
      s[a] = fminf(s[a], weight_of(size, n) > 0 ? INFINITY : -INFINITY);  // as in attention_tile.cuh
      highest = fmaxf(highest, s[a]);
      if (first == 0) p[n] = s[a];
    }
  }
  highest = block_combine(highest, room, [](float a, float b) { return fmaxf(a, b); });
  const float offset = highest == -INFINITY ? 0 : highest * g.scale;
  float sum = 0;
  for (int64_t n = threadIdx.x; n < g.N; n += kThreads) {
    p[n] = weight_of(size, n) * fast_exp2(fmaf(p[n], g.scale, -offset));
    sum += p[n];
  }
  sum = block_combine(sum, room, [](float a, float b) { return a + b; });
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t n = threadIdx.x; n < g.N; n += kThreads) p[n] *= inverse;
}

// scores [B, N]: partial [B, rows, N] summed over rows in order and divided by count; 0 for masked keys and no count.
__global__ void __launch_bounds__(kThreads)
    head_mean_kernel(const float* partial, const float* size, float* scores, int64_t B, int rows, int N, float count) {
  constexpr int kLoads = 16;  // in flight: few keys, many rows
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= B * N) return;
  float sum = 0;
  if (count > 0 && (!size || size[i] > 0)) {
    const float* first = partial + i / N * rows * N + i % N;
    for (int row = 0; row < rows; row += kLoads) {
      float part[kLoads] = {};
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
        if (row + k < rows) part[k] = first[int64_t(row + k) * N];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) sum += part[k];
    }
    sum /= count;
  }
  scores[i] = sum;
}

template <typename T, typename Launch>
void launch_cls(const AttentionBatch& g, Launch&& launch) {
  launch(cls_kernel<T>, g.B * g.H, kThreads, kWarps * int64_t(sizeof(float)), g);
}

// groups: rows of partial a head.
template <typename Launch>
void launch_head_mean(const AttentionBatch& g, int groups, float count, Launch&& launch) {
  launch(head_mean_kernel, ceil_div<int64_t>(g.B * g.N, kThreads), kThreads, 0, g.partial, g.size, g.scores, g.B,
         g.H * groups, g.N, count);
}

// attention (out not null) and attention_scores. scratch(bytes) gives memory that outlives the kernels.
template <typename T, typename Launch, typename Scratch>
void launch_scored_attention(AttentionBatch g, const Device& device, Launch&& launch, Scratch&& scratch) {
  if (g.N == 0) g.emit = kEmitNone;
  const bool mean = g.emit == kEmitMean;
  if (g.Nq == 0) {
    if (g.emit) launch_head_mean(g, 0, 0, launch);
    return;
  }
  const int parts = attention_parts<T>(g, device), groups = mean ? parts : 1;
  if (g.emit) g.partial = static_cast<float*>(scratch(g.B * g.H * groups * g.N * int64_t(sizeof(float))));
  if (g.out || mean) launch_attention<T>(g, parts, launch);
  if (!g.emit) return;
  if (!g.out && !mean) launch_cls<T>(g, launch);
  launch_head_mean(g, groups, mean ? float(g.H) * float(g.Nq) : float(g.H), launch);
}

}  // namespace tokred
