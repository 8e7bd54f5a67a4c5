// match by several blocks an image: any N and D, the same scores bit for bit (D <= 128), and no N x N matrix.
//
//   unit_kernel    32 tokens a block: the unit rows, [B, P, width] float32 in scratch
//   edge_kernel    a block a tile of 16 kTile x 16 kTile scores; atomicMax of the 64-bit (score, column) keys, whose
//                  result does not depend on the order
//   select_kernel  a block an image: the r-th best key by bisection over its bits, then assign as in match.cuh
//
// Beyond D = 128 (kDeep) each piece of 64 elements is summed by itself: one chain of many roundings near 1 would break
// the bound of 1e-6 (error at most 4.3e-7 up to D = 2048).
//
// Floor, N = 16384, D = 64, one image: 8192^2 D FMA = 254k clocks on 132 SMs = 150 us; scratch 4 N D + 4 N bytes.
//
//   sm_90                  registers   blocks an SM   shared memory
//   unit_kernel                   64              4               -
//   edge_kernel<7>               128              2           61 KB
//   edge_kernel<5, deep>         128              2           44 KB
//   select_kernel                 32              2           384 B
#pragma once
#include "match.cuh"

namespace tokred {

constexpr int kSelectThreads = 1024;
constexpr int kEdgeTile = 7, kDeepTile = 5;  // the largest without spills on sm_80

struct MatchScratch {
  float* unit;     // [B, P, width]
  uint64_t* keys;  // [B, Na]: score and column of the best edge
};

__host__ __device__ inline int64_t unit_bytes(const MatchBatch& m) {
  return m.B * (m.N - m.p) * m.width() * int64_t(sizeof(float));
}

__global__ void __launch_bounds__(kThreads) unit_kernel(const MatchBatch m, const MatchScratch scratch, int groups) {
  const int64_t b = blockIdx.x / groups;
  const int P = m.N - m.p, i = blockIdx.x % groups * (kThreads / 8) + threadIdx.x / 8;
  if (i >= P) return;
  with_dtype(m.dtype, [&](auto* type) {
    auto* image = static_cast<decltype(type)>(m.metric) + b * m.s_b;
    unit_row(m, image + (m.p + i) * m.s_n, scratch.unit + (b * P + i) * m.width(), kChunk);
  });
  const int a = m.p + i - m.first_a();
  if (threadIdx.x % 8 == 0 && a >= 0 && a % 2 == 0) scratch.keys[b * m.rows_a() + a / 2] = 0;
}

// Piece c of unit rows first, first + 2, ... (from the first patch of image b), `count` of them and then zeros.
template <int kSide>
__device__ __forceinline__ void stage_piece(const float* unit, int width, int first, int count, int c, float* to) {
  constexpr int kWords = kChunk / 4;
  for (int w = threadIdx.x; w < kSide * kWords; w += kThreads) {
    const int i = w / kWords, d = c * kChunk + w % kWords * 4;
    float4 word = make_float4(0, 0, 0, 0);
    if (i < count && d < width) word = *reinterpret_cast<const float4*>(unit + int64_t(first + 2 * i) * width + d);
    *reinterpret_cast<float4*>(to + i * kPitch + w % kWords * 4) = word;
  }
}

template <int kTile, bool kDeep>
__global__ void __launch_bounds__(kThreads, 2)
    edge_kernel(const MatchBatch m, const MatchScratch scratch, int tiles_a, int tiles_b) {
  constexpr int kSide = 16 * kTile;
  const int64_t b = blockIdx.x / unsigned(tiles_a * tiles_b);
  const int tile = blockIdx.x % unsigned(tiles_a * tiles_b), i0 = tile / tiles_b * kSide, j0 = tile % tiles_b * kSide;
  const int na = m.rows_a(), nb = m.rows_b(), width = m.width();
  const float* unit = scratch.unit + b * (m.N - m.p) * width;
  float *a_rows = reinterpret_cast<float*>(shared_memory()), *b_rows = a_rows + kSide * kPitch;
  float acc[kTile][kTile] = {}, total[kDeep ? kTile : 1][kTile] = {};
  for (int c = 0; c * kChunk < width; ++c) {
    __syncthreads();
    stage_piece<kSide>(unit, width, m.first_a() - m.p + 2 * i0, na - i0, c, a_rows);
    stage_piece<kSide>(unit, width, m.first_b() - m.p + 2 * j0, nb - j0, c, b_rows);
    __syncthreads();
    add_products(a_rows, b_rows, min(kChunk, width - c * kChunk), acc);
    if constexpr (kDeep) {
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) total[i][j] += acc[i][j], acc[i][j] = 0;
    }
  }
  BestEdges<kTile> best;
  if constexpr (kDeep)
    best.take(m, b, total, i0, j0);
  else
    best.take(m, b, acc, i0, j0);
  unsigned long long* keys = reinterpret_cast<unsigned long long*>(scratch.keys + b * na);
  best.reduce(i0, na, [&](int i, uint64_t key) { atomicMax(keys + i, static_cast<unsigned long long>(key)); });
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const MatchBatch m, const MatchScratch scratch) {
  constexpr int kBits = 64;
  const int64_t b = blockIdx.x;
  const int na = m.rows_a();
  const uint64_t* keys = scratch.keys + b * na;
  int* better_of_bit = reinterpret_cast<int*>(shared_memory());  // [kBits], a counter a step: one barrier each
  if (threadIdx.x < kBits) better_of_bit[threadIdx.x] = 0;
  __syncthreads();
  uint64_t threshold = 0;  // the largest with at least r keys not below it
  for (int bit = kBits - 1; bit >= 0; --bit) {
    const uint64_t candidate = threshold | uint64_t(1) << bit;
    int better = 0;
    for (int i = threadIdx.x; i < na; i += kSelectThreads) better += with_index(keys[i], i) >= candidate;
    for (int lane = 1; lane < kWarp; lane *= 2) better += __shfl_xor_sync(kAllLanes, better, lane);
    if (threadIdx.x % kWarp == 0) atomicAdd(better_of_bit + bit, better);
    __syncthreads();
    better = better_of_bit[bit];
    if (better >= m.r) threshold = candidate;
    if (better == m.r) break;
  }
  write_assign(
      m, b, better_of_bit + kBits, [&](int i) { return with_index(keys[i], i) >= threshold; },
      [&](int i) { return key_index(keys[i]); });
}

// Launches what suits the shape. scratch(bytes) gives memory that outlives the kernels.
template <typename Launch, typename Scratch>
void launch_match(const MatchBatch& m, const Device& device, Launch&& launch, Scratch&& scratch) {
  const int rows = m.rows_a() > m.rows_b() ? m.rows_a() : m.rows_b();
  // The smallest tile of at least 4 that walks the rows in as many steps as the largest, 7, would.
  const int tile = rows <= 64 ? 4 : ceil_div(rows, 16 * ceil_div(rows, 16 * 7));
  const int64_t shared = m.r == 0 ? 0 : MatchShared(m, 16 * tile).bytes;
  // One block an image reads the keys once; from 128 rows on its products take longer than a launch (by arithmetic, not
  // measured), so it must find company on at least half of the multiprocessors.
  const bool one_block = rows <= 320 && m.width() <= 2 * kChunk && shared <= device.shared_bytes &&
                         (rows <= 128 || 2 * m.B >= device.multiprocessors);
  if (one_block || m.r == 0) {
    switch (tile) {
      case 4: return launch(match_kernel<4>, m.B, kThreads, shared, m);
      case 5: return launch(match_kernel<5>, m.B, kThreads, shared, m);
      case 6: return launch(match_kernel<6>, m.B, kThreads, shared, m);
      default: return launch(match_kernel<7>, m.B, kThreads, shared, m);
    }
  }
  const int64_t unit = unit_bytes(m);
  char* memory = static_cast<char*>(scratch(unit + m.B * m.rows_a() * int64_t(sizeof(uint64_t))));
  const MatchScratch s{reinterpret_cast<float*>(memory), reinterpret_cast<uint64_t*>(memory + unit)};
  const int groups = ceil_div(m.N - m.p, kThreads / 8);
  launch(unit_kernel, m.B * groups, kThreads, 0, m, s, groups);
  const bool deep = m.width() > 2 * kChunk;
  const int side = 16 * (deep ? kDeepTile : kEdgeTile), tiles_a = ceil_div(m.rows_a(), side),
            tiles_b = ceil_div(m.rows_b(), side);
  const int64_t blocks = m.B * tiles_a * tiles_b, tile_bytes = 2 * side * kPitch * int64_t(sizeof(float));
  if (deep)
    launch(edge_kernel<kDeepTile, true>, blocks, kThreads, tile_bytes, m, s, tiles_a, tiles_b);
  else
    launch(edge_kernel<kEdgeTile, false>, blocks, kThreads, tile_bytes, m, s, tiles_a, tiles_b);
  launch(select_kernel, m.B, kSelectThreads, (64 + kSelectThreads / kWarp) * int64_t(sizeof(int)), m, s);
}

}  // namespace tokred
