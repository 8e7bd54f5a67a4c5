// match by several blocks an image: any N and D, the same scores bit for bit (D <= 128), and no N x N matrix.
//
//   unit_kernel    32 tokens a block: the unit rows, [B, P, width] float32 in scratch
//   edge_kernel    a block 16 kTile rows a against a segment of the rows b: the segment's best (score, column) keys,
//                  [B, segments, Na]; there are only as many segments as it takes to fill the device
//   select_kernel  a block an image: the best key over the segments, the r-th best of these by bisection over its bits,
//                  then assign as in match.cuh
// and, two ways,
//   edge_kernel    again, of the b against the a that stayed
//   follow_kernel  kThreads tokens a block: those in a row of b count the better edges for the row's own
//
// Beyond D = 128 (kDeep) each piece of 64 elements is summed by itself: one chain of many roundings near 1 would break
// the bound of 1e-6 (error at most 4.3e-7 up to D = 2048).
//
// Floor, N = 16384, D = 64, one image: 8192^2 D FMA = 254k clocks on 132 SMs = 150 us; scratch 4 N D bytes and
// 8 Na a segment.
//
//   sm_90                  registers   blocks an SM   shared memory
//   unit_kernel                   61              4               -
//   edge_kernel<5>               128              2           44 KB
//   edge_kernel<4, deep>         128              2           35 KB
//   select_kernel                 32              2           256 B
//   follow_kernel                 32              8            2 KB
#pragma once
#include "match.cuh"

namespace tokred {

constexpr int kSelectThreads = 1024;
// The largest without spills on any architecture; deep, with two sets of sums, and 98 rows fill 2 tiles of 64 better.
constexpr int kEdgeTile = 5, kDeepTile = 4;

struct MatchScratch {
  float* unit;     // [B, P, width]
  uint64_t* keys;  // [B, segments, rows]: score and column of the best edge
  int* kept;       // [B, Na - r]: which a stayed; null one way
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

// Piece c of the unit rows of a side, and then zeros. unit: of the image.
template <int kSide>
__device__ __forceinline__ void stage_piece(const float* unit, int width, const Side& side, int c, float* to) {
  constexpr int kWords = kChunk / 4;
  for (int w = threadIdx.x; w < kSide * kWords; w += kThreads) {
    const int i = w / kWords, d = c * kChunk + w % kWords * 4;
    float4 word = make_float4(0, 0, 0, 0);
    if (i < side.count && d < width) word = *reinterpret_cast<const float4*>(unit + int64_t(side.patch(i)) * width + d);
    *reinterpret_cast<float4*>(to + i * kPitch + w % kWords * 4) = word;
  }
}

template <int kTile, bool kDeep>
__global__ void __launch_bounds__(kThreads, 2)
    edge_kernel(const MatchBatch m, const MatchScratch scratch, bool back, int row_tiles, int segment) {
  constexpr int kSide = 16 * kTile;
  const int64_t b = blockIdx.x / unsigned(row_tiles * scratch.segments);
  const int item = blockIdx.x % unsigned(row_tiles * scratch.segments);
  const int i0 = item / scratch.segments * kSide, s = item % scratch.segments, width = m.width();
  const Side rows = back ? side_b(m) : side_a(m);
  const Side columns = back ? side_kept(m, scratch.kept + b * m.kept()) : side_b(m);
  const int end = min(columns.count, (s + 1) * segment);
  const float* unit = scratch.unit + b * (m.N - m.p) * width;
  float *tile_rows = reinterpret_cast<float*>(shared_memory()), *column_rows = tile_rows + kSide * kPitch;
  BestEdges<kTile> best;
  for (int j0 = s * segment; j0 < end; j0 += kSide) {
    float acc[kTile][kTile] = {}, total[kDeep ? kTile : 1][kTile] = {};
    for (int c = 0; c * kChunk < width; ++c) {
      __syncthreads();
      if (width > kChunk || j0 == s * segment)  // a single piece of the rows stays
        stage_piece<kSide>(unit, width, rows.from(i0), c, tile_rows);
      stage_piece<kSide>(unit, width, columns.from(j0), c, column_rows);
      __syncthreads();
      add_products(tile_rows, column_rows, min(kChunk, width - c * kChunk), acc);
      if constexpr (kDeep) {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
#pragma unroll
          for (int j = 0; j < kTile; ++j) total[i][j] += acc[i][j], acc[i][j] = 0;
      }
    }
    if constexpr (kDeep)
      best.take(m, b, back, rows, columns, total, i0, j0);
    else
      best.take(m, b, back, rows, columns, acc, i0, j0);
  }
  uint64_t* keys = scratch.keys + (b * scratch.segments + s) * rows.count;
  best.reduce(i0, rows.count, [&](int i, uint64_t key) { keys[i] = key; });
}

// The best edge of row i over all segments.
__device__ __forceinline__ uint64_t best_key(const uint64_t* keys, int rows, int segments, int i) {
  uint64_t best = keys[i];
  for (int s = 1; s < segments; ++s) {
    const uint64_t other = keys[int64_t(s) * rows + i];
    best = other > best ? other : best;
  }
  return best;
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const MatchBatch m, const MatchScratch scratch) {
  const int64_t b = blockIdx.x;
  const int na = m.rows_a();
  uint64_t* keys = scratch.keys + b * scratch.segments * na;
  for (int i = threadIdx.x; i < na; i += kSelectThreads)  // below too, thread t reads keys t, t + kSelectThreads, ...
    keys[i] = best_key(keys, na, scratch.segments, i);
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
      m, b, counts, scratch.kept ? scratch.kept + b * m.kept() : nullptr,
      [&](int i) { return with_index(keys[i], i) >= threshold; }, [&](int i) { return key_index(keys[i]); });
}

// Token n in the row of b_j goes where b_j does: what it is now depends on its own entry of assign alone.
__global__ void __launch_bounds__(kThreads) follow_kernel(const MatchBatch m, const MatchScratch scratch, int groups) {
  const int64_t b = blockIdx.x / groups;
  const int n = m.p + blockIdx.x % groups * kThreads + threadIdx.x, nb = m.rows_b();
  int32_t* row = m.assign + b * m.N + n;
  const uint64_t* keys = scratch.keys + b * scratch.segments * nb;
  const int j = n < m.N ? *row - m.first_b_row() : -1;
  const uint64_t edge = j < 0 ? 0 : best_key(keys, nb, scratch.segments, j), mine = with_index(edge, j);
  uint64_t* others = reinterpret_cast<uint64_t*>(shared_memory());  // [kThreads]
  int before = 0;
  for (int base = 0; base < nb; base += kThreads) {
    const int other = base + threadIdx.x;
    __syncthreads();
    if (other < nb) others[threadIdx.x] = with_index(best_key(keys, nb, scratch.segments, other), other);
    __syncthreads();
    for (int o = 0; o < min(kThreads, nb - base); ++o) before += others[o] > mine;
  }
  if (j >= 0) *row = before < m.r_b ? m.p + key_index(edge) : m.first_b_row() + before - m.r_b;
}

// A block for each tile of rows and each segment of the columns, of which there are as many as fill the device.
struct EdgeGrid {
  int row_tiles, segment, segments;

  EdgeGrid(const Device& device, int side, int64_t B, int rows, int columns) : row_tiles(ceil_div(rows, side)) {
    const int tiles = ceil_div(columns, side);
    // Two blocks a multiprocessor run at once.
    const int64_t wanted = ceil_div(int64_t(2) * device.multiprocessors, B * row_tiles);
    const int each = ceil_div(tiles, wanted < tiles ? int(wanted) : tiles);
    segment = each * side, segments = ceil_div(tiles, each);
  }
};

// Several blocks an image.
template <typename Launch, typename Scratch>
void launch_split(const MatchBatch& m, const Device& device, Launch&& launch, Scratch&& scratch) {
  const bool deep = m.width() > 2 * kChunk, two_way = m.r_b > 0;
  const int side = 16 * (deep ? kDeepTile : kEdgeTile);
  const EdgeGrid grid(device, side, m.B, m.rows_a(), m.rows_b());
  const EdgeGrid back = two_way ? EdgeGrid(device, side, m.B, m.rows_b(), m.kept()) : grid;
  const int64_t unit = unit_bytes(m), tile_bytes = 2 * side * kPitch * int64_t(sizeof(float));
  const int segments = back.segments > grid.segments ? back.segments : grid.segments;
  const int64_t keys = m.B * segments * m.rows() * int64_t(sizeof(uint64_t));
  const int64_t kept = two_way ? m.B * m.kept() * int64_t(sizeof(int)) : 0;
  char* memory = static_cast<char*>(scratch(unit + keys + kept));
  MatchScratch s{reinterpret_cast<float*>(memory), reinterpret_cast<uint64_t*>(memory + unit),
                 two_way ? reinterpret_cast<int*>(memory + unit + keys) : nullptr, grid.segments};
  const int unit_groups = ceil_div(m.N - m.p, kThreads / 8), groups = ceil_div(m.N - m.p, kThreads);
  const auto edges = deep ? edge_kernel<kDeepTile, true> : edge_kernel<kEdgeTile, false>;
  launch(unit_kernel, m.B * unit_groups, kThreads, 0, m, s, unit_groups);
  launch(edges, m.B * grid.row_tiles * grid.segments, kThreads, tile_bytes, m, s, false, grid.row_tiles, grid.segment);
  launch(select_kernel, m.B, kSelectThreads, 2 * kWarp * int64_t(sizeof(int)), m, s);
  if (!two_way) return;
  s.segments = back.segments;
  launch(edges, m.B * back.row_tiles * back.segments, kThreads, tile_bytes, m, s, true, back.row_tiles, back.segment);
  launch(follow_kernel, m.B * groups, kThreads, kThreads * int64_t(sizeof(uint64_t)), m, s, groups);
}

// Launches what suits the shape. scratch(bytes) gives memory that outlives the kernels.
template <typename Launch, typename Scratch>
void launch_match(const MatchBatch& m, const Device& device, Launch&& launch, Scratch&& scratch) {
  const int rows = m.rows();
  // The smallest tile of at least 4 that walks the rows in as many steps as the largest, 7, would.
  const int tile = rows <= 64 ? 4 : ceil_div(rows, 16 * ceil_div(rows, 16 * 7));
  const bool identity = m.r + m.r_b == 0;
  const int64_t shared = identity ? 0 : MatchShared(m, 16 * tile).bytes;
  // One block an image reads the keys once; from 128 rows on its products take longer than a launch (by arithmetic, not
  // measured), so it must find company on at least half of the multiprocessors.
  const bool one_block = rows <= 320 && m.width() <= 2 * kChunk && shared <= device.shared_bytes &&
                         (rows <= 128 || 2 * m.B >= device.multiprocessors);
  if (one_block || identity) {
    switch (tile) {
      case 4: return launch(match_kernel<4>, m.B, kThreads, shared, m);
      case 5: return launch(match_kernel<5>, m.B, kThreads, shared, m);
      case 6: return launch(match_kernel<6>, m.B, kThreads, shared, m);
      default: return launch(match_kernel<7>, m.B, kThreads, shared, m);
    }
  }
  launch_split(m, device, launch, scratch);
}

}  // namespace tokred
