// match: the bipartite matching of tokens.  s_ij = <a_i, b_j> over unit rows of the head mean, edge_i = the best s_ij
// (ties: lowest j), the r best edges (ties: lowest i) merge.  Two ways, then every b looks for its best among the a
// that stayed, and the ranks of these edges say which r_b of the b merge and in what order the others come.
//
// match_kernel: one block an image.  Eight lanes normalise a row; then the block is 16 x 16 threads with kTile x kTile
// scores each, which keep a running (score, column) and never write a score; the rank of an edge is the number of
// better ones; assign is written by a ballot scan.  The rows b stay in shared memory where a multiprocessor still holds
// two blocks; else they pass through it, a tile at a time, and are normalised again for every tile of rows a.
// match_split.cuh serves what is larger, and few images.
// The way back does the same with the sides exchanged: a product has no order, so its scores are the same bit for bit.
//
// Products are float32 FMA, one chain over ascending d for every pair, so equal rows score bitwise equal wherever they
// sit; error at most 4.8e-7 for D <= 128 (tests/test_simt.py holds it to 1e-6).  Three TF32 or six bf16 tensor core
// products would at best be 1.6x faster by arithmetic, but how their accumulator truncates is not documented.
//
// Floor, DeiT-S B=256 N=197 H=6 D=64 bf16 on 132 SMs: keys 38.7 MB once = 9 us, 4 N bytes out; 4850 FMA clocks an image
// = 5.7 us (two images an SM, 1.7 GHz).  B=132 N=1024, an image an SM: keys 104 MB once = 24 us, three times that from
// L2, beside 131k FMA clocks = 77 us, to which normalising again adds a tenth.
//
//   sm_90           registers   blocks an SM   shared memory at D = 64
//   match_kernel<4>       120              2   resident, 272 bytes a row: 62 KB for N = 197, 108 KB for N = 577
//   match_kernel<5>       128              2   else 544 bytes a row of a tile: 67 KB for N = 1024
//   match_kernel<6>       128              2   and 12 bytes an edge; two ways, 4 bytes an edge more
//   match_kernel<7>       128              2
#pragma once
#include "dependent.cuh"

namespace tokred {

// Unit rows are kept in pieces of kChunk elements. kPitch: 16 lanes reading 16 bytes of consecutive rows meet no bank
// twice (17 words of 16 bytes).
constexpr int kChunk = 64, kPitch = kChunk + 4;
constexpr float kNormFloor = 1e-6f;

// One side of an image's edges: patches first, first + 2, ..., or the listed ones of these.
struct Side {
  int first, count;
  bool listed = false;
  const int* list = nullptr;

  __device__ __forceinline__ int patch(int i) const { return first + 2 * (listed ? list[i] : i); }
};
__device__ __forceinline__ Side side_a(const MatchBatch& m) { return {m.p % 2, m.rows_a()}; }
__device__ __forceinline__ Side side_b(const MatchBatch& m) { return {1 - m.p % 2, m.rows_b()}; }
__device__ __forceinline__ Side side_kept(const MatchBatch& m, const int* kept) {
  return {m.p % 2, m.kept(), true, kept};
}

// Order of scores as unsigned integers; -0 ties with +0.
__device__ __forceinline__ uint64_t edge_key(float score, int index) {
  unsigned bits = __float_as_uint(score + 0.0f);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | ~unsigned(index);  // larger: a higher score, then a lower index
}
__device__ __forceinline__ int key_index(uint64_t key) { return int(~unsigned(key)); }
__device__ __forceinline__ uint64_t with_index(uint64_t key, int index) { return key >> 32 << 32 | ~unsigned(index); }

// Elements 0 .. 7 of the sum over heads, in head order; zero past `left`.
template <typename T>
__device__ __forceinline__ void add_heads(const MatchBatch& m, const T* row, int left, float (&sum)[8]) {
  for (int h = 0; h < m.H; h += kAhead) {
    Pack<T, 8> part[kAhead] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const T* from = row + (h + k) * m.s_h;
      if (h + k >= m.H) continue;
      if (m.aligned && left >= 8)
        part[k] = *reinterpret_cast<const Pack<T, 8>*>(from);
      else
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < left) part[k].e[e] = from[e];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += to_float(part[k], e);
  }
}

// 1 / norm from the squares of eight neighbouring lanes.
__device__ __forceinline__ float unit_scale(float square) {
  const unsigned lanes = 0xffu << threadIdx.x % kWarp / 8 * 8;
  for (int lane = 1; lane < 8; lane *= 2) square += __shfl_xor_sync(lanes, square, lane);
  return 1.0f / fmaxf(sqrtf(square), kNormFloor);
}

// One row to unit length by eight neighbouring lanes; null is a row of zeros. Piece c goes to to + c * stride.
template <typename T>
__device__ __forceinline__ void unit_row(const MatchBatch& m, const T* row, float* to, int stride) {
  const int first = threadIdx.x % 8 * 8, width = m.width();
  const float per_head = 1.0f / m.H;
  float square = 0;
  for (int d = first; d < width; d += kChunk) {
    float mean[8] = {};
    if (row) add_heads(m, row + d, m.D - d, mean);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      mean[e] *= per_head;
      square = fmaf(mean[e], mean[e], square);
    }
    float4* words = reinterpret_cast<float4*>(to + d / kChunk * stride + first);
    words[0] = make_float4(mean[0], mean[1], mean[2], mean[3]);
    words[1] = make_float4(mean[4], mean[5], mean[6], mean[7]);
  }
  const float scale = unit_scale(square);
  for (int d = first; d < width; d += kChunk) {
    float4* words = reinterpret_cast<float4*>(to + d / kChunk * stride + first);
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float4 v = words[w];
      words[w] = make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
    }
  }
}

// Calls f with a null pointer of the metric's type. The dtype is a run-time value: staging is bound by memory, and
// three copies of the product loop would not be.
template <typename F>
__device__ __forceinline__ void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat: return f(static_cast<const float*>(nullptr));
    case Dtype::kHalf: return f(static_cast<const __half*>(nullptr));
    case Dtype::kBFloat16: return f(static_cast<const __nv_bfloat16*>(nullptr));
  }
}

// Patches patch(0), patch(1), ... of image b, `count` of them and then zeros, as a tile of kSide unit rows.
template <int kSide, typename Patch>
__device__ __forceinline__ void stage(const MatchBatch& m, int64_t b, Patch&& patch, int count, float* to) {
  with_dtype(m.dtype, [&](auto* type) {
    auto* image = static_cast<decltype(type)>(m.metric) + b * m.s_b + m.p * m.s_n;
    for (int i = threadIdx.x / 8; i < kSide; i += kThreads / 8)
      unit_row(m, i < count ? image + patch(i) * m.s_n : nullptr, to + i * kPitch, kSide * kPitch);
  });
}

// acc[i][j] += <a row (y + 16 i), b row (x + 16 j)> for thread (x, y) of the 16 x 16, d ascending.
template <int kTile>
__device__ __forceinline__ void add_products(const float* a, const float* b, int depth, float (&acc)[kTile][kTile]) {
  a += threadIdx.x / 16 * kPitch;
  b += threadIdx.x % 16 * kPitch;
  for (int d = 0; d < depth; d += 4) {
    float4 x[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) x[i] = *reinterpret_cast<const float4*>(a + 16 * i * kPitch + d);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const float4 y = *reinterpret_cast<const float4*>(b + 16 * j * kPitch + d);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        acc[i][j] = fmaf(x[i].x, y.x, acc[i][j]);
        acc[i][j] = fmaf(x[i].y, y.y, acc[i][j]);
        acc[i][j] = fmaf(x[i].z, y.z, acc[i][j]);
        acc[i][j] = fmaf(x[i].w, y.w, acc[i][j]);
      }
    }
  }
}

// The best edge of each of a thread's kTile rows so far. NaN never wins, so it counts as -inf; a row of nothing else
// keeps (-inf, column 0).
template <int kTile>
struct BestEdges {
  float score[kTile];
  int column[kTile];

  __device__ __forceinline__ BestEdges() {
#pragma unroll
    for (int i = 0; i < kTile; ++i) score[i] = -INFINITY, column[i] = 0;
  }

  // The scores of rows from i0 and columns from j0 on; columns ascend, so the first of equal ones stays. back: the
  // columns are a, whose weight comes first.
  __device__ __forceinline__ void take(const MatchBatch& m, int64_t b, bool back, const Side& rows, const Side& columns,
                                       const float (&acc)[kTile][kTile], int i0, int j0) {
    const float* weight = m.weight ? m.weight + b * m.N + m.p : nullptr;
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const int at = j0 + threadIdx.x % 16 + 16 * j;
      if (at >= columns.count) continue;
      const float column_weight = weight ? weight[columns.patch(at)] : 1;
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        float s = acc[i][j];
        if (weight) {
          const int row = i0 + threadIdx.x / 16 + 16 * i;
          s = (s + 1) / 2;
          s = s < 0 ? 0 : s;                                                   // NaN stays
          if (m.power != 1) s = m.power == 0 ? 1 : exp2f(m.power * log2f(s));  // powf inlined 64 times would spill
          const float row_weight = row < rows.count ? weight[rows.patch(row)] : 0;
          s = back ? s * column_weight * row_weight : s * row_weight * column_weight;
        }
        if (s > score[i]) score[i] = s, column[i] = at;
      }
    }
  }

  // f(row, key) once for each of the block's rows from i0 on; the key holds score and column.
  template <typename F>
  __device__ __forceinline__ void reduce(int i0, int rows, F&& f) const {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      uint64_t key = edge_key(score[i], column[i]);
      for (int lane = 1; lane < 16; lane *= 2) {
        const uint64_t other = __shfl_xor_sync(kAllLanes, key, lane);
        key = other > key ? other : key;
      }
      const int row = i0 + threadIdx.x / 16 + 16 * i;
      if (threadIdx.x % 16 == 0 && row < rows) f(row, key);
    }
  }
};

// Rows out: prefix, kept a ascending, b ascending; gone(i) says whether a_i merges, into(i) the column it merges into.
// kept_of_warp: shared, an int a warp. kept_list [Na - r] or null: which a these are.
template <typename Gone, typename Into>
__device__ __forceinline__ void write_assign(const MatchBatch& m, int64_t b, int* kept_of_warp, int* kept_list,
                                             Gone&& gone, Into&& into) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, na = m.rows_a(), first_b_row = m.first_b_row();
  int32_t* assign = m.assign + b * m.N;
  int row = m.p;  // of the first kept a of this round
  for (int base = 0; base < na; base += blockDim.x) {
    const int i = base + threadIdx.x;
    const bool merges = i < na && gone(i);
    const unsigned kept = __ballot_sync(kAllLanes, i < na && !merges);
    if (lane == 0) kept_of_warp[warp] = __popc(kept);
    __syncthreads();
    int mine = row + __popc(kept & ((1u << lane) - 1));
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
      if (w < warp) mine += kept_of_warp[w];
      row += kept_of_warp[w];
    }
    if (i < na) assign[m.first_a() + 2 * i] = merges ? first_b_row + into(i) : mine;
    if (kept_list && i < na && !merges) kept_list[mine - m.p] = i;
    __syncthreads();
  }
  for (int j = threadIdx.x; j < m.rows_b(); j += blockDim.x) assign[m.first_b() + 2 * j] = first_b_row + j;
  for (int n = threadIdx.x; n < m.p; n += blockDim.x) assign[n] = n;
}

// Floats of a tile of `side` unit rows.
constexpr int tile_floats(const MatchBatch& m, int side) { return ceil_div(m.width(), kChunk) * side * kPitch; }

// f(row, key) with the best edge of each of the rows i0 .. i1 into the columns j0 .. j1; the key holds its score and
// column. room: shared, a tile of rows, then all tiles of columns if they are resident, else one at a time.
template <int kTile, typename F>
__device__ __forceinline__ void find_edges(const MatchBatch& m, int64_t b, bool back, const Side& rows,
                                           const Side& columns, int i0, int i1, int j0, int j1, bool resident,
                                           float* room, F&& f) {
  constexpr int kSide = 16 * kTile;
  const int width = m.width(), tile = tile_floats(m, kSide);
  for (int i = i0; i < i1; i += kSide) {
    BestEdges<kTile> best;
    for (int j = j0 - kSide; j < j1; j += kSide) {
      const bool is_row = j < j0;  // first the rows: one call, one copy of its code
      float* column_rows = room + (resident ? (j - j0) / kSide + 1 : 1) * tile;
      __syncthreads();
      if (is_row || !resident || i == i0)
        stage<kSide>(
            m, b, [&](int n) { return is_row ? rows.patch(i + n) : columns.patch(j + n); }, is_row ? i1 - i : j1 - j,
            is_row ? room : column_rows);
      if (is_row) continue;
      __syncthreads();
      float acc[kTile][kTile] = {};
      for (int c = 0; c * kChunk < width; ++c)
        add_products(room + c * kSide * kPitch, column_rows + c * kSide * kPitch, min(kChunk, width - c * kChunk), acc);
      best.take(m, b, back, rows, columns, acc, i, j);
    }
    best.reduce(i, i1, f);
  }
}

// Shared memory of match_kernel, in bytes from its start: a tile of rows a and all or one of rows b, then per row a a
// key and a column, and, two ways, the kept a. The way back has b for a, and the kept a for b.
struct MatchShared {
  int64_t key, column, count, kept, bytes;

  __host__ __device__ MatchShared(const MatchBatch& m, int side, bool resident) {
    const int64_t rows = m.r_b ? m.rows() : m.rows_a();
    const int tiles = 1 + (resident ? ceil_div(m.r_b ? m.rows() : m.rows_b(), side) : 1);
    key = tiles * tile_floats(m, side) * int64_t(sizeof(float));
    column = key + rows * int64_t(sizeof(uint64_t));
    count = column + rows * int64_t(sizeof(int));
    kept = count + kWarps * int64_t(sizeof(int));
    bytes = kept + (m.r_b ? m.rows_a() * int64_t(sizeof(int)) : 0);
  }
};

template <int kTile>
__global__ void __launch_bounds__(kThreads, 2) match_kernel(const MatchBatch m, bool resident) {
  let_next_launch_begin();
  const int64_t b = blockIdx.x;
  int32_t* assign = m.assign + b * m.N;
  if (m.r + m.r_b == 0) {
    for (int n = threadIdx.x; n < m.N; n += kThreads) assign[n] = n;
    return;
  }
  const MatchShared at(m, 16 * kTile, resident);
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory() + at.key);
  int* into = reinterpret_cast<int*>(shared_memory() + at.column);
  int* kept = reinterpret_cast<int*>(shared_memory() + at.kept);  // only two ways
  auto rank = [&](int i, int rows) {
    const uint64_t mine = keys[i];
    int before = 0;
    for (int other = 0; other < rows; ++other) before += keys[other] > mine;
    return before;
  };

#pragma unroll 1
  for (bool back = false;; back = true) {  // one copy of the products for both ways
    const Side rows = back ? side_b(m) : side_a(m);
    Side columns = back ? side_kept(m, kept) : side_b(m);
    columns.list = kept;  // both ways, so that it is known to be in shared memory
    find_edges<kTile>(m, b, back, rows, columns, 0, rows.count, 0, columns.count, resident,
                      reinterpret_cast<float*>(shared_memory()), [&](int i, uint64_t key) {
                        keys[i] = with_index(key, i);
                        into[i] = key_index(key);
                      });
    __syncthreads();
    if (back) break;
    write_assign(
        m, b, reinterpret_cast<int*>(shared_memory() + at.count), m.r_b ? kept : nullptr,
        [&](int i) { return rank(i, m.rows_a()) < m.r; }, [&](int i) { return into[i]; });
    if (m.r_b == 0) return;
  }
  for (int n = m.p + threadIdx.x; n < m.N; n += kThreads) {
    const int j = assign[n] - m.first_b_row();
    if (j < 0) continue;
    const int before = rank(j, m.rows_b());
    assign[n] = before < m.r_b ? m.p + into[j] : m.first_b_row() + before - m.r_b;
  }
}

}  // namespace tokred
