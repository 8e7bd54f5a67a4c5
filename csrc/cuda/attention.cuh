// attention: out = p v,  p_ij = size_j exp(s_ij) / sum_j size_j exp(s_ij),  s = scale q k^T; with p's first row or its
// column sums as by-products.
//
// attention_kernel: a block takes a head; each of its four or eight warps has 16 query rows, whose logits,
// probabilities and out stay in registers, and meets keys and values in shared memory.
//   resident  all keys are one chunk, read once for every query row of the head. p is exact before it is used, so the
//             CLS row and the column sums (in registers, then over the warps in order) cost no further pass.
//   streamed  chunks of 64 keys (float32: 32) with a running maximum and sum; a block has 128 query rows (64 where
//             heads are wider than 64 or float32) and finds the keys of its head in L2. The CLS row waits in memory as
//             logits; the column sums need the logits of a block's rows once more, when their maximum and sum are
//             known.
// p is rounded to the inputs' dtype for p v alone, when it is already normalised: sizes of 1e6 do not overflow float16.
// No atomics; every sum has one order, whatever the batch.
//
// Floor, DeiT-S B=256 N=197 H=6 D=64 bf16: q, k, v and out 154.8 MB = 36 us at 4.3 TB/s, partial 1.2 MB more; 15.3
// GFLOP = 19 us at 790 TFLOP/s, 17.0 with the 208 keys of 13 tiles.
// Streamed, B=8 N=1024: 25.2 MB = 6 us, 12.9 GFLOP = 16 us, with column sums 3.1 MB more and 19.3 GFLOP = 24 us. But
// every warp reads all keys and values from shared memory, 805 MB = 28 us at 128 bytes a cycle, with column sums 1.2 GB
// = 42.
//
//   sm_90, half precision          registers   blocks an SM   shared memory
//   <*, 64, 7, resident>                 115              4           41 KB
//   <*, 64, 7, resident, mean>     144 - 146              3
//   <*, 64, 13, resident>                163              3           69 KB
//   <*, 64, 13, resident, mean>    230 - 234              2
//   <*, 64, 16, resident>                207              2           83 KB
//   <*, 32, 4>, eight warps              102              2           22 KB
//   <*, 64, 4>, eight warps              125              2           38 KB
//   <*, 80 and 96, 4>              138 - 148              3   34 and 40 KB
//   <*, 128, 4>                          174              2           52 KB
//   <float, 32 and 64, 2>          111 - 128              4   19 and 35 KB
//   <float, 80 and 96, 2>          155 - 166              3   43 and 51 KB
//   <float, 128, 2>                      200              2           67 KB
#pragma once
#include <algorithm>

#include "attention_emit.cuh"

namespace tokred {

// Resident kernels come for few sizes: that of a vision transformer's heads, and chunks of 7, 13 and 16 key tiles (112,
// 208, 256 keys) of which the last ones may be absent. The column sums of 16 would not fit into registers.
constexpr int kResidentWidth = 64;
__host__ __device__ constexpr int resident_tiles(int N) { return N <= 112 ? 7 : N <= 208 ? 13 : 16; }
__host__ __device__ constexpr int least_tiles(int tiles) { return tiles == 7 ? 1 : tiles == 13 ? 8 : 14; }

template <typename T>
bool is_resident(const AttentionBatch& g) {
  const int most = g.emit == kEmitMean ? 208 : 256;
  return sizeof(T) == 2 && g.D <= kResidentWidth && g.D > kResidentWidth / 2 && g.N <= most;
}

// Key tiles of a chunk of the others: float32 rows are twice as long.
template <typename T>
constexpr int kStreamTiles = sizeof(T) == 2 ? 4 : 2;

// Warps of a block. Eight halve how often the streamed keys and values cross L2, and the rows of partial; wider heads
// and float32 have no registers for two such blocks.
template <typename T>
__host__ __device__ constexpr int attention_warps(int width, bool resident) {
  return !resident && sizeof(T) == 2 && width <= 64 ? 8 : 4;
}

// Blocks a multiprocessor of sm_90 holds by shared memory and by registers without spilling.
template <typename T>
__host__ __device__ constexpr int attention_blocks(int width, int tiles, bool resident, bool mean) {
  if (resident) return tiles == 7 ? (mean ? 3 : 4) : tiles == 13 ? (mean ? 2 : 3) : 2;
  const int of_four = width <= 64 ? 4 : width <= 96 ? 3 : 2;
  return of_four * 4 / attention_warps<T>(width, resident);
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

// kResident: all keys are one chunk, staged once for every query row of the block. kMean: resident, with column sums.
template <typename T, int kWidth, int kTiles, bool kResident, bool kMean>
__global__ void __launch_bounds__(attention_warps<T>(kWidth, kResident) * kWarp,
                                  attention_blocks<T>(kWidth, kTiles, kResident, kMean))
    attention_kernel(const AttentionBatch g, const int parts) {
  constexpr int kBlockWarps = attention_warps<T>(kWidth, kResident), kRows = kBlockWarps * kQueryTile;
  using Chunk = KeyChunk<T, kWidth, kTiles, kBlockWarps * kWarp>;
  constexpr int kPitch = kRowPitch<T, kWidth>, kLeast = kResident ? least_tiles(kTiles) : 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = blockIdx.x / unsigned(parts);
  const unsigned part = blockIdx.x % unsigned(parts);
  const Chunk chunk(shared_memory());
  T* of_block = reinterpret_cast<T*>(shared_memory() + Chunk::kBytes);
  T* queries = of_block + warp * kQueryTile * kPitch;
  float columns[kMean ? 2 * kTiles : 1][2] = {};
  if constexpr (kResident) {
    chunk.stage(g, head, 0);
    __syncthreads();
  }

  for (unsigned base = part * kRows; base < unsigned(g.Nq); base += parts * kRows) {
    const int64_t first = base + warp * kQueryTile;
    if (kResident && first >= g.Nq) break;
    stage_queries<kWidth>(g, head, first, queries);
    const bool has_cls = !kMean && g.emit == kEmitCls && first == 0;
    // Of the lane's rows, g and g + 8: the highest logit yet, to base 2, and a finite stand-in for a highest of -inf.
    float highest[2] = {-INFINITY, -INFINITY}, offset[2] = {}, sum[2] = {}, inverse[2] = {};
    float out[kWidth / 8][4] = {};

    for (unsigned first_key = 0; first_key == 0 || (!kResident && first_key < unsigned(g.N));
         first_key += Chunk::kKeys) {
      if constexpr (!kResident) {
        __syncthreads();
        chunk.stage(g, head, int(first_key));
        __syncthreads();
        if (first >= g.Nq) continue;
      }
      const RowTile<T, kWidth> tile(queries);
      const int left = g.N - int(first_key);
      const auto is_there = [&](int j) { return j < kLeast || j * kKeyTile < left; };
      float s[kTiles][2][4], top[2] = {-INFINITY, -INFINITY}, added[2] = {}, kept[2];
      const auto emit_cls = [&] {
        if (!has_cls || lane >= 4) return;
        float* to = g.partial + head * g.N + first_key;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int key = j * kKeyTile + e / 2 * 8 + 2 * lane + e % 2;
            if (key < left) to[key] = s[j][e / 2][e % 2];
          }
      };
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (!is_there(j)) continue;
        tile.logits(chunk.k + j * kKeyTile * kPitch, s[j]);
        chunk.limit(j, s[j]);
#pragma unroll
        for (int e = 0; e < 8; ++e) top[e / 2 % 2] = fmaxf(top[e / 2 % 2], s[j][e / 4][e % 4]);
      }
      if (!kResident) emit_cls();  // logits, of which finish_row makes p
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
      if (kResident) emit_cls();
      __syncwarp();  // tensor cores need the whole warp at once
      if (!g.out) continue;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (is_there(j)) tile.add_values(s[j], chunk.v + j * kKeyTile * kPitch, out);
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first + lane / 4 + 8 * r;
      if (row < g.Nq && g.out) write_row<kWidth, T>(g, head, row, r, out);
    }
    if constexpr (!kResident) {
      if (has_cls) finish_row(g, head, offset[0], inverse[0]);
      if (g.emit == kEmitMean) {
        RowStatistics* rows = reinterpret_cast<RowStatistics*>(of_block + kRows * kPitch);
        if (lane % 4 == 0)
#pragma unroll
          for (int r = 0; r < 2; ++r) rows[warp * kQueryTile + lane / 4 + 8 * r] = {offset[r], inverse[r]};
        static_assert(kBlockWarps <= 2 * kTiles, "keys where the chunk and its values were");
        stream_columns<T, kWidth, kBlockWarps>(g, head, min(kRows, g.Nq - int(base)), of_block, rows, chunk.k,
                                               base == part * kRows, g.partial + (head * parts + part) * g.N);
      }
    }
  }
  if constexpr (kMean)
    write_columns<kTiles, kBlockWarps>(columns, reinterpret_cast<float*>(queries),
                                       kQueryTile * kPitch * int(sizeof(T)) / int(sizeof(float)), g.N,
                                       g.partial + head * g.N);
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
  constexpr int kBlockWarps = attention_warps<T>(kWidth, kResident), kRows = kBlockWarps * kQueryTile;
  constexpr int64_t kRowBytes = kRowPitch<T, kWidth> * sizeof(T) + (kResident ? 0 : sizeof(RowStatistics));
  constexpr int64_t kShared = KeyChunk<T, kWidth, kTiles, kBlockWarps * kWarp>::kBytes + kRows * kRowBytes;
  launch(attention_kernel<T, kWidth, kTiles, kResident, kMean>, g.B * g.H * parts, kBlockWarps * kWarp, kShared, g,
         parts);
}

// Blocks that share the query rows of a head. For column sums each has a row of partial: at most as many as 1,024 rows
// need, and nothing that depends on the batch or the device, or their order would, and so their last bit.
template <typename T>
int attention_parts(const AttentionBatch& g, const Device& device) {
  const bool mean = g.emit == kEmitMean, resident = is_resident<T>(g);
  const int tiles = ceil_div(g.Nq, kQueryTile * attention_warps<T>(g.D, resident));
  if (!resident) return mean ? std::min(tiles, ceil_div(std::min(g.N, 1024), 64)) : tiles;
  // Few heads share the keys of each between blocks.
  return mean ? 1 : int(std::min(ceil_div(int64_t(3) * device.multiprocessors, g.B * g.H), int64_t(tiles)));
}

template <typename T, typename Launch>
void launch_attention(const AttentionBatch& g, int parts, Launch&& launch) {
  if constexpr (sizeof(T) == 2)
    if (is_resident<T>(g)) {
      const bool mean = g.emit == kEmitMean;
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
    launch_attention_kernel<T, width.value, kStreamTiles<T>, false, false>(g, parts, launch);
  });
}

}  // namespace tokred
