// match by several blocks an image: any N and D, the same scores bit for bit (D <= 128), and no N x N matrix.
//
//   unit_kernel    32 tokens a block: the unit rows, [B, P, width] float32 in scratch
//   edge_kernel    a block 16 kTile rows a against a segment of the rows b: the segment's best (score, column) keys,
//                  [B, segments, Na]; there are only as many segments as it takes to fill the device
//   select_kernel  a block an image: the best key over the segments, the r-th best of these by bisection over its bits,
//                  then assign as in match.cuh
//
// Beyond D = 128 (kDeep) each piece of 64 elements is summed by itself: one chain of many roundings near 1 would break
// the bound of 1e-6 (error at most 4.3e-7 up to D = 2048).
//
// Floor, N = 16384, D = 64, one image: 8192^2 D FMA = 254k clocks on 132 SMs = 150 us; scratch 4 N D bytes and
// 8 Na a segment.
//
//   sm_90                  registers   blocks an SM   shared memory
//   unit_kernel                   60              4               -
//   edge_kernel<5>               128              2           44 KB
//   edge_kernel<5, deep>         128              2           44 KB
//   select_kernel                 32              2           256 B
#pragma once
#include "match.cuh"

namespace tokred {

constexpr int kSelectThreads = 1024;
constexpr int kEdgeTile = 5;  // the largest without spills on sm_80, deep or not

struct MatchScratch {
  float* unit;     // [B, P, width]
  uint64_t* keys;  // [B, segments, Na]: score and column of the best edge
  int segments;
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
    edge_kernel(const MatchBatch m, const MatchScratch scratch, int tiles_a, int segment) {
  constexpr int kSide = 16 * kTile;
  const int64_t b = blockIdx.x / unsigned(tiles_a * scratch.segments);
  const int item = blockIdx.x % unsigned(tiles_a * scratch.segments);
  const int i0 = item / scratch.segments * kSide, s = item % scratch.segments;
  const int na = m.rows_a(), nb = m.rows_b(), width = m.width(), end = min(nb, (s + 1) * segment);
  const float* unit = scratch.unit + b * (m.N - m.p) * width;
  float *a_rows = reinterpret_cast<float*>(shared_memory()), *b_rows = a_rows + kSide * kPitch;
  BestEdges<kTile> best;
  for (int j0 = s * segment; j0 < end; j0 += kSide) {
    float acc[kTile][kTile] = {}, total[kDeep ? kTile : 1][kTile] = {};
    for (int c = 0; c * kChunk < width; ++c) {
      __syncthreads();
      if (width > kChunk || j0 == s * segment)  // a single piece of a stays
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
    if constexpr (kDeep)
      best.take(m, b, total, i0, j0);
    else
      best.take(m, b, acc, i0, j0);
  }
  uint64_t* keys = scratch.keys + (b * scratch.segments + s) * na;
  best.reduce(i0, na, [&](int i, uint64_t key) { keys[i] = key; });
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const MatchBatch m, const MatchScratch scratch) {
  const int64_t b = blockIdx.x;
  const int na = m.rows_a();
  uint64_t* keys = scratch.keys + b * scratch.segments * na;
  for (int i = threadIdx.x; i < na; i += kSelectThreads) {  // below too, thread t reads keys t, t + kSelectThreads, ...
    uint64_t best = keys[i];
    for (int s = 1; s < scratch.segments; ++s) {
      const uint64_t other = keys[int64_t(s) * na + i];
      best = other > best ? other : best;
    }
    keys[i] = best;
  }
  int* counts = reinterpret_cast<int*>(shared_memory());  // [2, kWarp]: one barrier a step
  uint64_t threshold = 0;                                 // the largest with at least r keys not below it
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t candidate = threshold | uint64_t(1) << bit;
    int better = 0;
    for (int i = threadIdx.x; i < na; i += kSelectThreads) better += with_index(keys[i], i) >= candidate;
    better = block_sum(better, counts + bit % 2 * kWarp);
    if (better >= m.r) threshold = candidate;
    if (better == m.r) break;
  }
  __syncthreads();
  write_assign(
      m, b, counts, [&](int i) { return with_index(keys[i], i) >= threshold; },
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
  const bool deep = m.width() > 2 * kChunk;
  const int side = 16 * kEdgeTile, tiles_a = ceil_div(m.rows_a(), side), tiles_b = ceil_div(m.rows_b(), side);
  // Two blocks a multiprocessor run at once.
  const int64_t wanted = ceil_div(int64_t(2) * device.multiprocessors, m.B * tiles_a);
  const int tiles = ceil_div(tiles_b, wanted < tiles_b ? int(wanted) : tiles_b), segments = ceil_div(tiles_b, tiles);
  const int64_t unit = unit_bytes(m), keys = m.B * segments * m.rows_a() * int64_t(sizeof(uint64_t));
  char* memory = static_cast<char*>(scratch(unit + keys));
  const MatchScratch s{reinterpret_cast<float*>(memory), reinterpret_cast<uint64_t*>(memory + unit), segments};
  const int groups = ceil_div(m.N - m.p, kThreads / 8);
  launch(unit_kernel, m.B * groups, kThreads, 0, m, s, groups);
  const int64_t blocks = m.B * tiles_a * segments, tile_bytes = 2 * side * kPitch * int64_t(sizeof(float));
  if (deep)
    launch(edge_kernel<kEdgeTile, true>, blocks, kThreads, tile_bytes, m, s, tiles_a, tiles * side);
  else
    launch(edge_kernel<kEdgeTile, false>, blocks, kThreads, tile_bytes, m, s, tiles_a, tiles * side);
  launch(select_kernel, m.B, kSelectThreads, 2 * kWarp * int64_t(sizeof(int)), m, s);
}

}  // namespace tokred
