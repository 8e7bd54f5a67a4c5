// match by several blocks an image: any N and D, the same scores bit for bit (D <= 128), and no N x N matrix.
//
//   edge_kernel    a block 16 kTile rows a against a segment of the rows b, a tile at a time, both normalised on their
//                  way to shared memory: the segment's best (score, column) keys, [B, segments, Na]; there are only as
//                  many segments as it takes to fill the device
//   select_kernel  a block an image: the best key over the segments, the r-th best of these by bisection over its bits,
//                  then assign as in match.cuh
// and, two ways,
//   edge_kernel    again, of the b against the a that stayed
//   follow_kernel  kThreads tokens a block: those in a row of b count the better edges for the row's own
//
// Beyond D = 128 (kDeep) each piece of 64 elements is summed by itself: one chain of many roundings near 1 would break
// the bound of 1e-6 (error at most 4.3e-7 up to D = 2048). The rows are then read for their norms and again for every
// piece.
//
// Floor, B=8 N=1024 H=6 D=64 bf16 on 132 SMs: keys 6.3 MB once = 1.5 us; 7.9k FMA clocks = 4.7 us.  Predicted 11 us:
// each of 7 tiles of rows a finds the rows b in L2, 35 MB = 6.4 us, in part beside the products; then a launch that is
// hidden in part (dependent.cuh), and some 40 counts over a block.  Unit rows kept in scratch would halve what comes
// from L2, for a launch and 1.7 times the bytes of memory.
//
//   sm_90                  registers   blocks an SM   shared memory
//   edge_kernel<5>               128              2   44 KB, beyond D = 64 87 KB
//   edge_kernel<4, deep>         116              2           35 KB
//   select_kernel                 32              2           256 B
//   follow_kernel                 32              8            2 KB
#pragma once
#include "match.cuh"

namespace tokred {

constexpr int kSelectThreads = 1024;
// The largest without spills on any architecture; deep, with two sets of sums, and 98 rows fill 2 tiles of 64 better.
constexpr int kEdgeTile = 5, kDeepTile = 4;

struct SplitBatch {
  MatchBatch match;
  uint64_t* keys;  // [B, segments, rows]: score and column of the best edge
  int* kept;       // [B, Na - r]: which a stayed; null one way
  int segments;
};

// The scale to unit length of each row of a tile, to shared memory.
template <int kSide, typename Patch>
__device__ __forceinline__ void stage_scales(const MatchBatch& m, int64_t b, Patch&& patch, int count, float* scales) {
  const int first = threadIdx.x % 8 * 8;
  const float per_head = 1.0f / m.H;
  with_dtype(m.dtype, [&](auto* type) {
    auto* image = static_cast<decltype(type)>(m.metric) + b * m.s_b + m.p * m.s_n;
    for (int i = threadIdx.x / 8; i < kSide; i += kThreads / 8) {
      float square = 0;
      for (int d = first; i < count && d < m.width(); d += kChunk) {
        float mean[8] = {};
        add_heads(m, image + patch(i) * m.s_n + d, m.D - d, mean);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          mean[e] *= per_head;
          square = fmaf(mean[e], mean[e], square);
        }
      }
      const float scale = unit_scale(square);
      if (first == 0) scales[i] = scale;
    }
  });
}

// Piece c of these unit rows, and then zeros.
template <int kSide, typename Patch>
__device__ __forceinline__ void stage_piece(const MatchBatch& m, int64_t b, Patch&& patch, int count, int c,
                                            const float* scales, float* to) {
  const int first = threadIdx.x % 8 * 8, d = c * kChunk + first;
  const float per_head = 1.0f / m.H;
  with_dtype(m.dtype, [&](auto* type) {
    auto* image = static_cast<decltype(type)>(m.metric) + b * m.s_b + m.p * m.s_n;
    for (int i = threadIdx.x / 8; i < kSide; i += kThreads / 8) {
      float mean[8] = {};
      if (i < count && d < m.width()) add_heads(m, image + patch(i) * m.s_n + d, m.D - d, mean);
#pragma unroll
      for (int e = 0; e < 8; ++e) mean[e] = mean[e] * per_head * scales[i];
      float4* words = reinterpret_cast<float4*>(to + i * kPitch + first);
      words[0] = make_float4(mean[0], mean[1], mean[2], mean[3]);
      words[1] = make_float4(mean[4], mean[5], mean[6], mean[7]);
    }
  });
}

// find_edges of one tile of rows beyond D = 128, a piece of 64 elements at a time. room: shared, a tile of kSide
// pieces and scales for each side.
template <int kTile, typename F>
__device__ __forceinline__ void find_deep_edges(const MatchBatch& m, int64_t b, bool back, const Side& rows,
                                                const Side& columns, int i0, int j0, int j1, float* room, F&& f) {
  constexpr int kSide = 16 * kTile, kPiece = kSide * kPitch;
  BestEdges<kTile> best;
  for (int j = j0; j < j1; j += kSide) {
    float acc[kTile][kTile] = {}, total[kTile][kTile] = {};
    for (int c = -1; c * kChunk < m.width(); ++c) {  // first the scales
      __syncthreads();
#pragma unroll 1
      for (int s = c < 0 && j > j0 ? 1 : 0; s < 2; ++s) {  // rows, columns
        const auto patch = [&](int n) { return s == 0 ? rows.patch(i0 + n) : columns.patch(j + n); };
        const int count = s == 0 ? rows.count - i0 : j1 - j;
        float* scales = room + 2 * kPiece + s * kSide;
        if (c < 0)
          stage_scales<kSide>(m, b, patch, count, scales);
        else
          stage_piece<kSide>(m, b, patch, count, c, scales, room + s * kPiece);
      }
      if (c < 0) continue;
      __syncthreads();
      add_products(room, room + kPiece, min(kChunk, m.width() - c * kChunk), acc);
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int k = 0; k < kTile; ++k) total[i][k] += acc[i][k], acc[i][k] = 0;
    }
    best.take(m, b, back, rows, columns, total, i0, j);
  }
  best.reduce(i0, rows.count, f);
}

template <int kTile, bool kDeep>
__global__ void __launch_bounds__(kThreads, 2)
    edge_kernel(const Dependent<SplitBatch> dependent, bool back, int row_tiles, int segment) {
  const SplitBatch& split = dependent.wait();
  let_next_launch_begin();
  const MatchBatch& m = split.match;
  constexpr int kSide = 16 * kTile;
  const int64_t b = blockIdx.x / unsigned(row_tiles * split.segments);
  const int item = blockIdx.x % unsigned(row_tiles * split.segments), s = item % split.segments;
  const Side rows = back ? side_b(m) : side_a(m);
  const Side columns = back ? side_kept(m, split.kept + b * m.kept()) : side_b(m);
  const int i0 = item / split.segments * kSide, j0 = s * segment, end = min(columns.count, j0 + segment);
  uint64_t* keys = split.keys + (b * split.segments + s) * rows.count;
  const auto write = [&](int i, uint64_t key) { keys[i] = key; };
  float* room = reinterpret_cast<float*>(shared_memory());
  if constexpr (kDeep)
    find_deep_edges<kTile>(m, b, back, rows, columns, i0, j0, end, room, write);
  else
    find_edges<kTile>(m, b, back, rows, columns, i0, min(rows.count, i0 + kSide), j0, end, false, room, write);
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

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const Dependent<SplitBatch> dependent) {
  const SplitBatch& split = dependent.wait();
  let_next_launch_begin();
  const MatchBatch& m = split.match;
  const int64_t b = blockIdx.x;
  const int na = m.rows_a();
  uint64_t* keys = split.keys + b * split.segments * na;
  for (int i = threadIdx.x; i < na; i += kSelectThreads)  // below too, thread t reads keys t, t + kSelectThreads, ...
    keys[i] = best_key(keys, na, split.segments, i);
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
      m, b, counts, split.kept ? split.kept + b * m.kept() : nullptr,
      [&](int i) { return with_index(keys[i], i) >= threshold; }, [&](int i) { return key_index(keys[i]); });
}

// Token n in the row of b_j goes where b_j does: what it is now depends on its own entry of assign alone.
__global__ void __launch_bounds__(kThreads) follow_kernel(const Dependent<SplitBatch> dependent, int groups) {
  const SplitBatch& split = dependent.wait();
  const MatchBatch& m = split.match;
  const int64_t b = blockIdx.x / groups;
  const int n = m.p + blockIdx.x % groups * kThreads + threadIdx.x, nb = m.rows_b();
  int32_t* row = m.assign + b * m.N + n;
  const uint64_t* keys = split.keys + b * split.segments * nb;
  const int j = n < m.N ? *row - m.first_b_row() : -1;
  const uint64_t edge = j < 0 ? 0 : best_key(keys, nb, split.segments, j), mine = with_index(edge, j);
  uint64_t* others = reinterpret_cast<uint64_t*>(shared_memory());  // [kThreads]
  int before = 0;
  for (int base = 0; base < nb; base += kThreads) {
    const int other = base + threadIdx.x;
    __syncthreads();
    if (other < nb) others[threadIdx.x] = with_index(best_key(keys, nb, split.segments, other), other);
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
  const int64_t floats = 2 * (deep ? side * (kPitch + 1) : tile_floats(m, side));
  const int64_t shared = floats * int64_t(sizeof(float));
  const int segments = back.segments > grid.segments ? back.segments : grid.segments;
  const int64_t keys = m.B * segments * m.rows() * int64_t(sizeof(uint64_t));
  const int64_t kept = two_way ? m.B * m.kept() * int64_t(sizeof(int)) : 0;
  char* memory = static_cast<char*>(scratch(keys + kept));
  SplitBatch s{m, reinterpret_cast<uint64_t*>(memory), two_way ? reinterpret_cast<int*>(memory + keys) : nullptr,
               grid.segments};
  const auto edges = deep ? edge_kernel<kDeepTile, true> : edge_kernel<kEdgeTile, false>;
  launch(edges, m.B * grid.row_tiles * grid.segments, kThreads, shared, s, false, grid.row_tiles, grid.segment);
  launch(select_kernel, m.B, kSelectThreads, 2 * kWarp * int64_t(sizeof(int)), s);
  if (!two_way) return;
  const int groups = ceil_div(m.N - m.p, kThreads);
  s.segments = back.segments;
  launch(edges, m.B * back.row_tiles * back.segments, kThreads, shared, s, true, back.row_tiles, back.segment);
  launch(follow_kernel, m.B * groups, kThreads, kThreads * int64_t(sizeof(uint64_t)), s, groups);
}

// Launches what suits the shape. scratch(bytes) gives memory that outlives the kernels.
template <typename Launch, typename Scratch>
void launch_match(const MatchBatch& m, const Device& device, Launch&& launch, Scratch&& scratch) {
  const int rows = m.rows();
  // The smallest tile of at least 4 that walks the rows in as many steps as the largest, 7, would.
  const int tile = rows <= 64 ? 4 : ceil_div(rows, 16 * ceil_div(rows, 16 * 7));
  const bool identity = m.r + m.r_b == 0;
  // Rows b are resident where a multiprocessor still holds two blocks; each takes 1 KB more.
  const int64_t all = MatchShared(m, 16 * tile, true).bytes, system = 1024;
  const bool resident = 2 * (all + system) <= device.shared_bytes + system;
  const int64_t shared = identity ? 0 : resident ? all : MatchShared(m, 16 * tile, false).bytes;
  // One block an image reads the keys once, or once a tile of rows a. From 128 rows on its products take longer than a
  // launch (by arithmetic, not measured), so three quarters of the multiprocessors must have one.
  const bool one_block = rows <= 512 && m.width() <= 2 * kChunk && shared <= device.shared_bytes &&
                         (rows <= 128 || 4 * m.B >= 3 * int64_t(device.multiprocessors));
  if (one_block || identity) {
    switch (tile) {
      case 4: return launch(match_kernel<4>, m.B, kThreads, shared, m, resident);
      case 5: return launch(match_kernel<5>, m.B, kThreads, shared, m, resident);
      case 6: return launch(match_kernel<6>, m.B, kThreads, shared, m, resident);
      default: return launch(match_kernel<7>, m.B, kThreads, shared, m, resident);
    }
  }
  launch_split(m, device, launch, scratch);
}

}  // namespace tokred
