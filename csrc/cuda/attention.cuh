// attention: out = p v,  p_ij = size_j exp(s_ij) / sum_j size_j exp(s_ij),  s = scale q k^T; with p's first row or its
// column sums as by-products.
//
// attention_kernel: a block takes a head; each of its four warps has 16 query rows, whose logits, probabilities and out
// stay in registers, and meets keys and values in shared memory.
//   resident  all keys are one chunk, read once for every query row of the head. p is exact before it is used, so the
//             CLS row and the column sums (in registers, then over the warps in order) cost no further pass.
//   streamed  chunks of 64 keys (float32: 32) with a running maximum and sum; a block has 64 query rows and finds the
//             keys of its head in L2. The scores are attention_scores.cuh's.
// p is rounded to the inputs' dtype for p v alone, when it is already normalised: sizes of 1e6 do not overflow float16.
// No atomics; every sum has one order, whatever the batch.
//
// Floor, DeiT-S B=256 N=197 H=6 D=64 bf16: q, k, v and out 154.8 MB = 36 us at 4.3 TB/s, partial 1.2 MB more; 15.3
// GFLOP = 19 us at 790 TFLOP/s, 17.0 with the 208 keys of 13 tiles.
//
//   sm_90, half precision          registers   blocks an SM   shared memory
//   <*, 64, 7, resident>                 115              4           41 KB
//   <*, 64, 7, resident, mean>     144 - 146              3
//   <*, 64, 13, resident>                163              3           69 KB
//   <*, 64, 13, resident, mean>    230 - 234              2
//   <*, 64, 16, resident>                207              2           83 KB
//   <*, 32, 4>                           104              4           16 KB
//   <*, 64, 4>                     114 - 120              4           28 KB
//   <*, 80 and 96, 4>              130 - 168              3   34 and 40 KB
//   <*, 128, 4>                          168              3           52 KB
//   float32, <float, 32, 2>              128              4           18 KB
//   <float, 64 .. 128, 2>          144 - 168              3    34 .. 66 KB
#pragma once
#include "attention_tile.cuh"

namespace tokred {

// Resident kernels come for few sizes: that of a vision transformer's heads, and chunks of 7, 13 and 16 key tiles (112,
// 208, 256 keys) of which the last ones may be absent. The column sums of 16 would not fit into registers.
constexpr int kResidentWidth = 64;
__host__ __device__ constexpr int resident_tiles(int N) { return N <= 112 ? 7 : N <= 208 ? 13 : 16; }
__host__ __device__ constexpr int least_tiles(int tiles) { return tiles == 7 ? 1 : tiles == 13 ? 8 : 14; }

template <typename T>
bool is_resident(const AttentionBatch& g, bool mean) {
  return sizeof(T) == 2 && g.D <= kResidentWidth && g.D > kResidentWidth / 2 && g.N <= (mean ? 208 : 256);
}

// Key tiles of a chunk of the others: float32 rows are twice as long.
template <typename T>
constexpr int kStreamTiles = sizeof(T) == 2 ? 4 : 2;

// Blocks a multiprocessor of sm_90 holds by shared memory and by registers without spilling.
template <typename T>
__host__ __device__ constexpr int attention_blocks(int width, int tiles, bool resident, bool mean) {
  if (resident) return tiles == 7 ? (mean ? 3 : 4) : tiles == 13 ? (mean ? 2 : 3) : 2;
  return width <= (sizeof(T) == 2 ? 64 : 32) ? 4 : width <= 96 ? 3 : 2;
}

// Columns 8 d + 2 t and the next of an output row, which for r = 1 are the lower half of the accumulators.
template <int kWidth, typename T>
__device__ __forceinline__ void write_row(const AttentionBatch& g, int64_t head, int64_t row, int r,
                                          const float (&out)[kWidth / 8][4]) {
  T* to = result<T>(g, head, row) + threadIdx.x % 4 * 2;
#pragma unroll
  for (int d = 0; d < kWidth / 8; ++d) {
    Pack<T, 2> pair;
    from_float(out[d][2 * r], pair.e[0]), from_float(out[d][2 * r + 1], pair.e[1]);
    if (8 * d < g.D) *reinterpret_cast<Pack<T, 2>*>(to + 8 * d) = pair;
  }
}

// kResident: all keys are one chunk, staged once for every query row of the block. kMean: partial gets column sums.
template <typename T, int kWidth, int kTiles, bool kResident, bool kMean>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks<T>(kWidth, kTiles, kResident, kMean))
    attention_kernel(const AttentionBatch g, const int parts) {
  using Chunk = KeyChunk<T, kWidth, kTiles, true>;
  constexpr int kPitch = kRowPitch<T, kWidth>, kLeast = kResident ? least_tiles(kTiles) : 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = blockIdx.x / unsigned(parts);
  const Chunk chunk(shared_memory());
  T* queries = reinterpret_cast<T*>(shared_memory() + Chunk::kBytes) + warp * kQueryTile * kPitch;
  float columns[kMean ? 2 * kTiles : 1][2] = {};
  if constexpr (kResident) {
    chunk.stage(g, head, 0);
    __syncthreads();
  }

  constexpr unsigned kRows = kAttentionWarps * kQueryTile;
  for (unsigned base = blockIdx.x % unsigned(parts) * kRows; base < unsigned(g.Nq); base += parts * kRows) {
    const int64_t first = base + warp * kQueryTile;
    if (kResident && first >= g.Nq) break;
    stage_queries<kWidth>(g, head, first, queries);
    // Of the lane's rows, g and g + 8: the highest logit yet, to base 2, and a finite stand-in for a highest of -inf.
    float highest[2] = {-INFINITY, -INFINITY}, offset[2], sum[2] = {}, inverse[2];
    float out[kWidth / 8][4] = {};

    for (unsigned first_key = 0; first_key == 0 || (!kResident && first_key < unsigned(g.N));
         first_key += Chunk::kKeys) {
      if constexpr (!kResident) {
        __syncthreads();
        chunk.stage(g, head, int(first_key));
        __syncthreads();
      }
      const QueryTile<T, kWidth> tile(queries);
      const int left = g.N - int(first_key);
      const auto is_there = [&](int j) { return j < kLeast || j * kKeyTile < left; };
      float s[kTiles][2][4], top[2] = {-INFINITY, -INFINITY}, added[2] = {}, kept[2];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (!is_there(j)) continue;
        tile.logits(chunk.k + j * kKeyTile * kPitch, s[j]);
        chunk.limit(j, s[j]);
#pragma unroll
        for (int e = 0; e < 8; ++e) top[e / 2 % 2] = fmaxf(top[e / 2 % 2], s[j][e / 4][e % 4]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
        top[r] = fmaxf(highest[r], top[r] * g.scale);
        offset[r] = top[r] == -INFINITY ? 0 : top[r];
        kept[r] = sum[r] * fast_exp2(highest[r] - offset[r]);
        highest[r] = top[r];
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (!is_there(j)) continue;
        chunk.exponentiate(j, g.scale, offset, s[j]);
#pragma unroll
        for (int e = 0; e < 8; ++e) added[e / 2 % 2] += s[j][e / 4][e % 4];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        added[r] += __shfl_xor_sync(kAllLanes, added[r], 1);
        added[r] += __shfl_xor_sync(kAllLanes, added[r], 2);
        sum[r] = kept[r] + added[r];
        inverse[r] = sum[r] == 0 ? 0 : 1 / sum[r];
        kept[r] *= inverse[r];
      }
      if constexpr (!kResident) {
#pragma unroll
        for (int d = 0; d < kWidth / 8; ++d)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[d][e] *= kept[e / 2];
      }
      // out is kept normalised: no p above 1 is rounded to half, whatever the sizes.
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (!is_there(j)) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) s[j][e / 4][e % 4] *= inverse[e / 2 % 2];
        if constexpr (kMean) {
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (first + lane / 4 + e / 2 % 2 * 8 < g.Nq) columns[2 * j + e / 4][e % 2] += s[j][e / 4][e % 4];
        }
      }
      if (kResident && !kMean && g.partial && first == 0 && lane < 4) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = j * kKeyTile + e / 2 * 8 + 2 * lane + e % 2;
            if (key < g.N) g.partial[head * g.N + key] = s[j][e / 2][e % 2];
          }
      }
      __syncwarp();  // tensor cores need the whole warp at once
      if (!g.out) continue;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (is_there(j)) tile.add_values(s[j], chunk.v + j * kKeyTile * kPitch, out);
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first + lane / 4 + 8 * r;
      if (row < g.Nq && !kResident && g.rows && lane % 4 == 0) g.rows[head * g.Nq + row] = {offset[r], inverse[r]};
      if (row < g.Nq && g.out) write_row<kWidth, T>(g, head, row, r, out);
    }
  }
  if constexpr (kMean)
    write_columns<kTiles>(columns, reinterpret_cast<float*>(queries),
                          kQueryTile * kPitch * int(sizeof(T)) / int(sizeof(float)), g.N, g.partial + head * g.N);
}

// f(std::integral_constant): the kernel width that holds D.
template <typename F>
void with_width(int D, F&& f) {
  if (D <= 32) return f(std::integral_constant<int, 32>{});
  if (D <= 64) return f(std::integral_constant<int, 64>{});
  if (D <= 80) return f(std::integral_constant<int, 80>{});
  if (D <= 96) return f(std::integral_constant<int, 96>{});
  return f(std::integral_constant<int, 128>{});
}

template <typename T, int kWidth, int kTiles, bool kResident, bool kMean, typename Launch>
void launch_attention_kernel(const AttentionBatch& g, int parts, Launch&& launch) {
  constexpr int64_t kShared = KeyChunk<T, kWidth, kTiles, true>::kBytes + query_bytes<T, kWidth>();
  launch(attention_kernel<T, kWidth, kTiles, kResident, kMean>, g.B * g.H * parts, kAttentionThreads, kShared, g,
         parts);
}

// mean: partial gets the column sums where the kernel is resident; else rows, if not null, gets what they need.
template <typename T, typename Launch>
void launch_attention(const AttentionBatch& g, bool mean, const Device& device, Launch&& launch) {
  const int tiles = int(ceil_div<int64_t>(g.Nq, kAttentionWarps * kQueryTile));
  if constexpr (sizeof(T) == 2)
    if (is_resident<T>(g, mean)) {
      // Few heads share the query rows of each between blocks. Not for column sums: their order, and so their last bit,
      // would depend on the batch.
      const int64_t wanted = mean ? 1 : ceil_div(int64_t(3) * device.multiprocessors, g.B * g.H);
      const int parts = wanted < tiles ? int(wanted) : tiles;
      switch (resident_tiles(g.N)) {
        case 7:
          return mean ? launch_attention_kernel<T, kResidentWidth, 7, true, true>(g, parts, launch)
                      : launch_attention_kernel<T, kResidentWidth, 7, true, false>(g, parts, launch);
        case 13:
          return mean ? launch_attention_kernel<T, kResidentWidth, 13, true, true>(g, parts, launch)
                      : launch_attention_kernel<T, kResidentWidth, 13, true, false>(g, parts, launch);
        default: return launch_attention_kernel<T, kResidentWidth, 16, true, false>(g, parts, launch);
      }
    }
  with_width(g.D, [&](auto width) {
    launch_attention_kernel<T, width.value, kStreamTiles<T>, false, false>(g, tiles, launch);
  });
}

}  // namespace tokred
