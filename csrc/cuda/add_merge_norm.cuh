// add_merge_norm: out_j = the mean of y_i = x_i + branch_scale (branch_i + branch_bias) over assign_i = j, in index
// order, and its LayerNorm.
//
// A warp takes an output row: it finds the members as merge.cuh does and adds up 16 bytes of channels a lane, or copies
// a single member; the row goes to out and to shared memory, and from there through its two moments to normed.
//
// Floor, DeiT-S B=256 N=197 -> 184 C=384 bf16: x and branch 77.5 MB, out and normed 72.4 MB = 34.9 us at 4.3 TB/s; the
// addition and the norm of a block that does not merge, in one kernel, take 36.0 us.  24 warps an SM with a row of x
// and one of branch each have 36 KB in flight.
//
//   sm_90                              registers   blocks an SM   shared memory at C = 384
//   add_merge_norm_kernel<float, 4>           72              3                      22 KB
//   add_merge_norm_kernel<half, 8>            80              3                      16 KB
//   add_merge_norm_kernel<bfloat16, 8>        80              3                      16 KB
//   add_merge_norm_kernel<*, 1>          70 - 72              3                      10 KB
#pragma once
#include "merge.cuh"

namespace tokred {

// g: a mean without weights of its own.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 3)
    add_merge_norm_kernel(const MergeBatch g, const Tail tail, int groups, int row_bytes) {
  using Vector = Pack<T, kVector>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t b = blockIdx.x / unsigned(groups);
  const int j = blockIdx.x % unsigned(groups) * warps + warp;
  if (j >= g.M) return;
  const int vectors = g.C / kVector, chunks = g.C ? ceil_div(vectors, kWarp) : 1;
  const int32_t* assign = g.assign + b * g.N;
  const float* size = g.size ? g.size + b * g.N : nullptr;
  const int64_t at = (b * g.M + j) * g.C;
  Vector* out = reinterpret_cast<Vector*>(static_cast<T*>(g.out) + at);
  unsigned char* memory = shared_memory() + warp * (kListed * sizeof(int) + row_bytes);
  Vector* row = kVector == 1 ? out : reinterpret_cast<Vector*>(memory + kListed * sizeof(int));

  Members list{reinterpret_cast<int*>(memory), 0, 0};
  collect(assign, g.N, j, list);
  const bool whole = list.next >= g.N, single = whole && list.found == 1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int v = chunk * kWarp + lane;
    const bool active = v < vectors;
    auto channels = sum_channels<T, kVector>(g, tail, b, v * kVector);
    typename decltype(channels)::Loaded only = {};  // on its way while the scale and the bias are read
    if (single && active) only = channels.load(list.token[0]);
    if (active) channels.read_rows(tail, v);
    Vector result;
    float total = 0;
    if (single) {
      result = channels.value(only);
      total = size ? size[list.token[0]] : 1;
    } else {
      const auto sum = sum_members<kVector>(channels, assign, g.N, j, list, whole, active, size, size, kReduceMean);
      result = sum.template result<T>(true);
      total = sum.size;
    }
    if (chunk == 0 && lane == 0) g.size_out[b * g.M + j] = total;
    if (!active) continue;
    out[v] = result;
    if (kVector > 1) row[v] = result;
  }
  Vector* normed = reinterpret_cast<Vector*>(static_cast<T*>(tail.normed) + at);
  normalize_row<T, kVector>(row, normed, lane, kWarp, vectors, tail, WarpSum{});
}

template <typename T, int kVector, typename Launch>
void launch_merge_norm(const MergeBatch& g, const Tail& tail, const NormGrid& grid, int row_bytes, Launch&& launch) {
  const int groups = ceil_div(g.M, grid.warps);
  launch(add_merge_norm_kernel<T, kVector>, g.B * groups, grid.warps * kWarp, grid.shared, g, tail, groups, row_bytes);
}

// aligned: rows of all tensors start at multiples of 16 bytes.
template <typename T, typename Launch>
void launch_add_merge_norm(const MergeBatch& g, const Tail& tail, bool aligned, Launch&& launch) {
  constexpr int64_t kList = kListed * sizeof(int);
  const int64_t row_bytes = int64_t(g.C) * sizeof(T);
  const NormGrid staged = norm_grid(row_bytes + kList);
  if (aligned && staged.warps > 0)
    launch_merge_norm<T, 16 / sizeof(T)>(g, tail, staged, int(row_bytes), launch);
  else
    launch_merge_norm<T, 1>(g, tail, norm_grid(kList), 0, launch);
}

}  // namespace tokred
