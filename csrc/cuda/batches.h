// What a kernel gets of a batch, in plain C++, and how it is launched: the .cpp files make these of checked tensors,
// without CUDA; <op>_kernel.cu launches on a stream, without torch, whose headers nvcc would read once for each
// architecture. Strides are in elements.
#pragma once
#include <cstdint>
#include <functional>

namespace tokred {

template <typename I>
constexpr I ceil_div(I n, I by) {
  return (n + by - 1) / by;
}
template <typename I>
constexpr I round_up(I n, I to) {
  return ceil_div(n, to) * to;
}

enum class Dtype { kFloat, kHalf, kBFloat16 };

// Launches choose by these; one without a GPU (the emulator's) makes them up.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // a block's limit, opt-in
};

using Stream = void*;                                 // a cudaStream_t
using Scratch = std::function<void*(int64_t bytes)>;  // memory that outlives the kernels

struct MatchBatch {
  const void* metric;   // [B, H, N, D], inner stride 1
  const float* weight;  // [B, N] or null
  int32_t* assign;      // [B, N]
  int64_t B, s_b, s_h, s_n;
  int H, N, D, p;
  int r, r_b;  // patches that leave a, and b (one way: 0)
  float power;
  Dtype dtype;
  bool aligned;  // every row of the metric starts at a multiple of 16 bytes

  constexpr int first_a() const { return p + p % 2; }
  constexpr int first_b() const { return p + 1 - p % 2; }
  constexpr int rows_a() const { return (N - first_a() + 1) / 2; }
  constexpr int rows_b() const { return (N - first_b() + 1) / 2; }
  constexpr int rows() const { return rows_a() > rows_b() ? rows_a() : rows_b(); }
  constexpr int kept() const { return rows_a() - r; }       // of a
  constexpr int first_b_row() const { return p + kept(); }  // in assign, before the way back
  constexpr int width() const { return round_up(D, 8); }    // D with zeros
};

void launch_match(const MatchBatch& m, Stream stream, const Scratch& scratch);

enum Reduction : int { kReduceMean, kReduceSum, kReduceAmax };

struct MergeBatch {
  const void* x;               // [B, N, C], inner stride 1
  const int32_t* assign;       // [B, N]
  const float *size, *weight;  // [B, N] or null
  void* out;                   // [B, M, C]
  float* size_out;             // [B, M]
  int64_t B, s_b, s_n;
  int N, M, C;
  Reduction reduce;
};

// aligned, here and below: rows of all tensors start at multiples of 16 bytes. after_match: of the same op.
void launch_merge(const MergeBatch& g, Dtype dtype, bool aligned, Stream stream, bool after_match);

// A copy of bits, in words of 16, 4 or 2 bytes.
struct UnmergeBatch {
  const void* y;          // [B, M, words], strides in words
  const int32_t* assign;  // [B, N]
  void* x;                // [B, N, words]
  int64_t B, s_b, s_n;
  int N, M, words;
};

void launch_unmerge(const UnmergeBatch& u, int64_t word_bytes, Stream stream);

struct TopkBatch {
  const float* score;  // [B, N]
  int32_t* assign;     // [B, N]
  int64_t B;
  int N, k, p;  // k at most N - p
  int others;   // the row of the patches that are not kept; -1: dropped
};

void launch_topk(const TopkBatch& g, Stream stream);

struct GatherBatch {
  const void* x;          // [B, N, C], inner stride 1
  const float* score;     // [B, N]
  const int32_t* assign;  // [B, N]
  void* out;              // [B, M, C]
  int64_t B, s_b, s_n;
  int N, M, C;
  int copied;  // rows that are copies; row `copied`, if there is one, is the weighted sum of the others
  bool mean;   // divide it by the sum of the scores
};

void launch_topk_gather(const GatherBatch& g, Dtype dtype, bool aligned, Stream stream);

// What the add_*_norm ops have beside a batch of merge or of topk_gather.
struct Tail {
  const void* branch;         // [B, N, C], inner stride 1
  void* normed;               // [B, M, C]
  const void *weight, *bias;  // [C] or null; float if `wide`, else of the type of x
  int64_t s_b, s_n;           // of branch
  float eps;
  bool wide;
  const void *branch_scale, *branch_bias;  // [C] or null, as weight and bias
};

// g: a mean without weights of its own.
void launch_add_merge_norm(const MergeBatch& g, const Tail& tail, Dtype dtype, bool aligned, Stream stream);
void launch_add_topk_gather_norm(const GatherBatch& g, const Tail& tail, Dtype dtype, bool aligned, Stream stream);

enum Emission : int { kEmitNone, kEmitCls, kEmitMean };

struct AttentionBatch {
  const void* q;      // [B, H, Nq, D], inner stride 1
  const void* k;      // [B, H, N, D]
  const void* v;      // [B, H, N, D]
  const float* size;  // [B, N] or null
  void* out;          // [B, Nq, H, D] or null: scores alone, v is not read
  float* partial;     // [B, H, groups, N], scratch: of each head the CLS row, or the sums of the rows of each group
  float* scores;      // [B, N], not written for kEmitNone
  int64_t B, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n;
  int H, Nq, N, D;
  Emission emit;
  float scale;   // of the logits to base 2, positive
  bool negate;   // q, for a scale below 0
  bool aligned;  // every row of q, k and v starts at a multiple of 16 bytes
};

void launch_scored_attention(const AttentionBatch& g, Dtype dtype, Stream stream, const Scratch& scratch);

}  // namespace tokred
