// merge: out_j = sum w_i x_i / sum w_i (mean), sum w_i x_i (sum) or max x_i (amax) over assign_i = j, in index order.
//
// A warp takes an output row: it finds the members by ballots over assign, 256 tokens a step, and keeps them in a list
// in shared memory; then each lane adds up 16 bytes of channels, four members ahead.  A single member, the usual case,
// is copied.  Where there are few output rows (everything merged into one token) the warps share a row by channels.
// Scanning is N M / 32 warp steps, less than the N^2 D / 128 of match at any N.
//
// Floor, DeiT-S B=256 N=197 -> 184 C=384 bf16: 38.7 MB + 36.2 MB = 17.4 us at 4.3 TB/s; 32 warps an SM with a row each
// have the 24 KB in flight that this needs.
//
//   sm_90                     registers   blocks an SM   shared memory
//   merge_kernel<float, 4>           56              4           10 KB
//   merge_kernel<half, 8>            64              4
//   merge_kernel<bfloat16, 8>        64              4
//   merge_kernel<*, 1>               64              4
#pragma once
#include "dependent.cuh"
#include "norm.cuh"

namespace tokred {

constexpr int kScan = 8 * kWarp;  // tokens a step; 197 in one
constexpr int kListed = kScan + 2 * kWarp;

// The list of a warp's members and how far assign has been read.
struct Members {
  int* token;  // shared, [kListed]
  int found, next;
};

// Fills the list from token `next` on, as far as it can be sure not to overflow.
__device__ __forceinline__ void collect(const int32_t* assign, int N, int j, Members& list) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // every lane has read the old list
  list.found = 0;
  while (list.next < N && list.found + kScan <= kListed) {
    int row[kScan / kWarp];
#pragma unroll
    for (int k = 0; k < kScan / kWarp; ++k) {
      const int n = list.next + k * kWarp + lane;
      row[k] = n < N ? assign[n] : -1;
    }
#pragma unroll
    for (int k = 0; k < kScan / kWarp; ++k) {
      const unsigned hits = __ballot_sync(kAllLanes, row[k] == j);
      if (row[k] == j) list.token[list.found + __popc(hits & ((1u << lane) - 1))] = list.next + k * kWarp + lane;
      list.found += __popc(hits);
    }
    list.next += kScan;
  }
  __syncwarp();
}

// The sums over the members of a row, for kVector channels.
template <int kVector>
struct RowSum {
  float value[kVector] = {}, weight = 0, size = 0;
  int count = 0;

  // Adds the listed members; lanes beyond the last channel are not active, w null or `plain` means 1.
  template <typename Channels>
  __device__ __forceinline__ void add(const Members& list, const Channels& channels, bool active, const float* w,
                                      bool plain, const float* sizes, bool amax) {
    constexpr int kTokens = kAhead / Channels::kLoads;
    for (int first = 0; first < list.found; first += kTokens) {
      typename Channels::Loaded part[kTokens] = {};
      float w_of[kTokens];
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (first + k >= list.found) continue;
        const int i = list.token[first + k];
        if (active) part[k] = channels.load(i);
        w_of[k] = w && !plain ? w[i] : 1;
      }
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (first + k >= list.found) continue;
        const auto token = channels.value(part[k]);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const float v = to_float(token, e);
          if (!amax)
            value[e] = fmaf(w_of[k], v, value[e]);
          else if (count == 0 || v > value[e] || v != v)  // NaN wins, the first of equal ones stays
            value[e] = v;
        }
        size += sizes == w && !plain ? w_of[k] : sizes ? sizes[list.token[first + k]] : 1;
        weight += w_of[k], ++count;
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ Pack<T, kVector> result(bool mean) const {
    const float by = mean && count ? weight : 1;
    Pack<T, kVector> values;
#pragma unroll
    for (int e = 0; e < kVector; ++e) from_float(value[e] / by, values.e[e]);
    return values;
  }
};

// All members of row j. Where the weights of a mean sum to 0, it is the plain mean.
template <int kVector, typename Channels>
__device__ __forceinline__ RowSum<kVector> sum_members(const Channels& channels, const int32_t* assign, int N, int j,
                                                       Members& list, bool whole, bool active, const float* w,
                                                       const float* size, Reduction reduce) {
  RowSum<kVector> sum;
  for (bool plain = false, again = true; again; plain = true) {
    sum = {};
    if (!whole) list.next = 0;
    do {
      if (!whole) collect(assign, N, j, list);
      sum.add(list, channels, active, w, plain, size, reduce == kReduceAmax);
    } while (list.next < N);
    again = reduce == kReduceMean && w && !plain && sum.count && sum.weight == 0;
  }
  return sum;
}

// `slices` warps share an output row, `groups` blocks serve an image.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 4)
    merge_kernel(const Dependent<MergeBatch> dependent, int slices, int groups) {
  const MergeBatch& g = dependent.wait();
  using Vector = Pack<T, kVector>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t b = blockIdx.x / unsigned(groups);
  const int item = blockIdx.x % unsigned(groups) * kWarps + warp, j = item / slices;
  if (j >= g.M) return;
  const int slice = item % slices, vectors = g.C / kVector, chunks = g.C ? ceil_div(vectors, kWarp) : 1;
  const int32_t* assign = g.assign + b * g.N;
  const float* size = g.size ? g.size + b * g.N : nullptr;
  const float* weight = g.weight ? g.weight + b * g.N : nullptr;
  const float* w = g.reduce == kReduceMean && !weight ? size : weight;  // null: 1
  const T* x = static_cast<const T*>(g.x) + b * g.s_b;
  T* out = static_cast<T*>(g.out) + (b * g.M + j) * g.C;

  Members list{reinterpret_cast<int*>(shared_memory()) + warp * kListed, 0, 0};
  collect(assign, g.N, j, list);
  const bool whole = list.next >= g.N;  // and it stays so: the list need not be made again for each chunk

  if (whole && list.found == 1 && g.reduce != kReduceSum) {
    const int i = list.token[0];
    copy_words(reinterpret_cast<const Vector*>(x + i * g.s_n), reinterpret_cast<Vector*>(out), slice * kWarp + lane,
               slices * kWarp, vectors);
    if (slice == 0 && lane == 0) g.size_out[b * g.M + j] = size ? size[i] : 1;
    return;
  }

  for (int chunk = slice; chunk < chunks; chunk += slices) {
    const int v = chunk * kWarp + lane;
    const bool active = v < vectors;
    const Channels<T, kVector> channels{x + v * kVector, g.s_n};
    const RowSum<kVector> sum = sum_members<kVector>(channels, assign, g.N, j, list, whole, active, w, size, g.reduce);
    if (chunk == 0 && lane == 0) g.size_out[b * g.M + j] = sum.size;
    if (active) reinterpret_cast<Vector*>(out)[v] = sum.template result<T>(g.reduce == kReduceMean);
  }
}

// aligned: rows of x and of out start at multiples of 16 bytes.
template <typename T, typename Launch>
void launch_merge(const MergeBatch& g, bool aligned, Launch&& launch) {
  constexpr int kVector = 16 / sizeof(T);
  // 4096 warps fill a device of 128 multiprocessors; with fewer rows the chunks of a row go to different warps.
  constexpr int64_t kEnough = 4096;
  const int chunks = ceil_div(ceil_div(g.C, aligned ? kVector : 1), kWarp);
  const int64_t spare = kEnough / (g.B * g.M);
  const int slices = spare < 1 || chunks == 0 ? 1 : spare < chunks ? int(spare) : chunks;
  const int groups = ceil_div(g.M * slices, kWarps);
  constexpr int64_t kShared = kWarps * kListed * sizeof(int);
  if (aligned)
    launch(merge_kernel<T, kVector>, g.B * groups, kThreads, kShared, g, slices, groups);
  else
    launch(merge_kernel<T, 1>, g.B * groups, kThreads, kShared, g, slices, groups);
}

}  // namespace tokred
