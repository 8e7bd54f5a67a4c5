// attention_scores: the first row ("cls") or the column mean ("mean") of attention's p, averaged over heads.
//
// cls_kernel     a block takes a head and reads its keys once, eight lanes a key.
// column_kernel  a block takes 64 keys of a head, its warps 16 query rows at a time; p comes from the maximum and the
//                sum that attention_kernel left of each row.
// head_mean_kernel adds the heads in order. So "cls" is two launches; "mean" two where attention_kernel is resident and
// emits the column sums itself, else three, the logits being calculated twice.
//
// Floor, DeiT-S B=256 N=197 H=6 D=64 bf16: cls keys 38.7 MB = 9 us; mean q and k 77.4 MB = 18 us, 7.6 GFLOP = 10 us.
//
//   sm_90                         registers   blocks an SM   shared memory
//   cls_kernel                      72 - 96          2 - 3
//   column_kernel<*, 64 and 128>   94 - 127              4     19 .. 67 KB
//   head_mean_kernel                     32              8
#pragma once
#include "attention.cuh"

namespace tokred {

constexpr int kColumnTiles = 4;  // 64 keys a block

// partial [B, H, N]: sums over the query rows, from the statistics that attention_kernel left of each.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, 4) column_kernel(const AttentionBatch g, const int groups) {
  using Chunk = KeyChunk<T, kWidth, kColumnTiles, false>;
  constexpr int kPitch = kRowPitch<T, kWidth>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = blockIdx.x / unsigned(groups);
  const int first_key = int(blockIdx.x % unsigned(groups)) * Chunk::kKeys;
  const Chunk chunk(shared_memory());
  T* queries = reinterpret_cast<T*>(shared_memory() + Chunk::kBytes) + warp * kQueryTile * kPitch;
  chunk.stage(g, head, first_key);
  __syncthreads();

  float columns[2 * kColumnTiles][2] = {};
  for (int64_t first = warp * kQueryTile; first < g.Nq; first += kAttentionWarps * kQueryTile) {
    RowStatistics of_row[2] = {};
    bool is_there[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first + lane / 4 + 8 * r;
      is_there[r] = row < g.Nq;
      if (is_there[r]) of_row[r] = g.rows[head * g.Nq + row];
    }
    const float highest[2] = {of_row[0].highest, of_row[1].highest};
    stage_queries<kWidth>(g, head, first, queries);
    const QueryTile<T, kWidth> tile(queries);
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float s[2][4];
      tile.logits(chunk.k + j * kKeyTile * kPitch, s);
      chunk.limit(j, s);
      chunk.exponentiate(j, g.scale, highest, s);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (is_there[e / 2 % 2]) columns[2 * j + e / 4][e % 2] += s[e / 4][e % 4] * of_row[e / 2 % 2].inverse;
    }
  }
  write_columns<kColumnTiles>(columns, reinterpret_cast<float*>(queries),
                              kQueryTile * kPitch * int(sizeof(T)) / int(sizeof(float)), g.N - first_key,
                              g.partial + head * g.N + first_key);
}

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
      s[a] = fminf(s[a], !size || size[n] > 0 ? INFINITY : -INFINITY);  // as in attention_tile.cuh
      highest = fmaxf(highest, s[a]);
      if (first == 0) p[n] = s[a];
    }
  }
  highest = block_combine(highest, room, [](float a, float b) { return fmaxf(a, b); });
  const float offset = highest == -INFINITY ? 0 : highest * g.scale;
  float sum = 0;
  for (int64_t n = threadIdx.x; n < g.N; n += kThreads) {
    const float weight = !size ? 1 : size[n] > 0 ? size[n] : 0;
    p[n] = weight * fast_exp2(fmaf(p[n], g.scale, -offset));
    sum += p[n];
  }
  sum = block_combine(sum, room, [](float a, float b) { return a + b; });
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t n = threadIdx.x; n < g.N; n += kThreads) p[n] *= inverse;
}

// scores [B, N]: partial [B, H, N] summed over heads in order and divided by count; 0 for masked keys and no count.
__global__ void __launch_bounds__(kThreads)
    head_mean_kernel(const float* partial, const float* size, float* scores, int64_t B, int H, int N, float count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= B * N) return;
  float sum = 0;
  if (count > 0 && (!size || size[i] > 0)) {
    const float* first = partial + i / N * H * N + i % N;
    for (int h = 0; h < H; ++h) sum += first[int64_t(h) * N];
    sum /= count;
  }
  scores[i] = sum;
}

// kWidth: 64 serves the heads of most models, 128 the others; attention_kernel's five would be as many kernels more.
template <typename T, int kWidth, typename Launch>
void launch_columns(const AttentionBatch& g, Launch&& launch) {
  constexpr int64_t kShared = KeyChunk<T, kWidth, kColumnTiles, false>::kBytes + query_bytes<T, kWidth>();
  const int groups = ceil_div(g.N, kColumnTiles * kKeyTile);
  launch(column_kernel<T, kWidth>, g.B * g.H * groups, kAttentionThreads, kShared, g, groups);
}

template <typename T, typename Launch>
void launch_cls(const AttentionBatch& g, Launch&& launch) {
  launch(cls_kernel<T>, g.B * g.H, kThreads, kWarps * int64_t(sizeof(float)), g);
}

template <typename Launch>
void launch_head_mean(const AttentionBatch& g, float* scores, float count, Launch&& launch) {
  launch(head_mean_kernel, ceil_div<int64_t>(g.B * g.N, kThreads), kThreads, 0, g.partial, g.size, scores, g.B, g.H,
         g.N, count);
}

// attention (out not null) and attention_scores. scratch(bytes) gives memory that outlives the kernels.
template <typename T, typename Launch, typename Scratch>
void launch_scored_attention(AttentionBatch g, Emission emit, float* scores, const Device& device, Launch&& launch,
                             Scratch&& scratch) {
  const bool mean = emit == kEmitMean, emits = emit != kEmitNone && g.N > 0, resident = is_resident<T>(g, mean);
  if (g.Nq == 0) {
    if (emits) launch_head_mean(g, scores, 0, launch);
    return;
  }
  const int64_t heads = g.B * g.H, columns = emits ? heads * g.N * int64_t(sizeof(float)) : 0;
  const int64_t rows = mean && !resident ? heads * g.Nq * int64_t(sizeof(RowStatistics)) : 0;
  if (rows + columns > 0) {
    char* memory = static_cast<char*>(scratch(rows + columns));
    if (rows) g.rows = reinterpret_cast<RowStatistics*>(memory);
    if (columns) g.partial = reinterpret_cast<float*>(memory + rows);
  }
  if (g.out || mean) launch_attention<T>(g, mean, device, launch);
  if (!emits) return;
  if (mean && !resident)
    g.D <= 64 ? launch_columns<T, 64>(g, launch) : launch_columns<T, 128>(g, launch);
  else if (!mean && !(g.out && resident))
    launch_cls<T>(g, launch);
  launch_head_mean(g, scores, mean ? float(g.H) * float(g.Nq) : float(g.H), launch);
}

}  // namespace tokred
