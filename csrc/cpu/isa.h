// The CPU kernels of one instruction set, as plain functions. isa_<name>.cpp compiles the *_image.h kernels once;
// isa.cpp chooses at run time by what the processor has.
#pragma once
#include <cstdint>

namespace tokred {

enum class Dtype : int { kFloat, kHalf, kBFloat16, kDouble };

// What the caller reads next: rows of row_bytes, stride bytes apart. It comes to the second-level cache while the
// multipliers are busy. No rows: nothing.
struct Ahead {
  const char* data;
  int64_t rows, row_bytes, stride;
};

// One image of match. Strides in elements; weight in the wide dtype (float, or double for kDouble) or null.
struct MatchImage {
  const void* metric;  // [H, N, D]
  const void* weight;  // [N]
  int32_t* assign;     // [N]
  int64_t H, N, D, r, p, s_h, s_n;
  double power;
  bool two_way;
  Dtype dtype;
  Ahead ahead;  // the next image's metric, or x in match_merge
};

// What the add_*_norm ops do to one image beside merge or topk_gather: the tokens are x + branch_scale (branch +
// branch_bias), and each row of out is normalised too. All null without it.
struct Tail {
  const void* branch;  // [N, C]
  int64_t s_n;
  void* normed;                            // [M, C]
  const void *weight, *bias;               // [C] wide, or null
  const void *branch_scale, *branch_bias;  // the same
  double eps;
};

// One image of merge. size, weight, size_out in the wide dtype; size and weight may be null.
struct MergeImage {
  const void* x;          // [N, C]
  const int32_t* assign;  // [N]
  const void* size;       // [N]
  const void* weight;     // [N]
  void* out;              // [M, C]
  void* size_out;         // [M]
  int64_t N, M, C, s_n;
  int reduce;  // tokred::Reduce
  Dtype dtype;
  Tail tail;
};

// [B, H, rows, D]: strides in elements, inner stride 1.
struct HeadsView {
  const void* data;
  int64_t s_b, s_h, s_n;
};

// attention of a whole batch, in units of (image, head, chunk of queries). size in the wide dtype, or null.
struct AttentionBatch {
  HeadsView q, k, v;
  const void* size;  // [B, N]
  void* out;         // [B, Nq, H, D]
  void* partial;     // wide: [B, H, N] for the class token's row, [B, H, chunks, N] for column sums
  int64_t B, H, Nq, N, D;
  int64_t chunks, chunk_rows;  // of queries; the same for any number of threads, so that sums are
  double scale;
  int scores;  // tokred::Scores
  bool with_values;
  Dtype dtype;
};

// One image of topk. score in its wide dtype.
struct TopkImage {
  const void* score;  // [N]
  int32_t* assign;    // [N]
  int64_t N, k, p;    // k at most N - p
  int32_t others;     // the row of the patches that are not kept; -1: dropped
  Dtype dtype;        // kFloat or kDouble
};

// One image of topk_gather: rows below `copied` are copies, row `copied` < M the weighted sum of the others.
struct TopkGatherImage {
  TopkImage topk;
  const void* x;  // [N, C]
  void* out;      // [M, C]
  int64_t M, C, s_n, copied;
  bool mean;  // of the fused row: divide it by the sum of its scores
  Dtype dtype;
  Tail tail;
};

// One image of pairwise_distance.
struct PairwiseImage {
  const void* x;  // [N, C]
  void* out;      // [N, N] wide
  int64_t N, C, s_n;
  double scale;
  Dtype dtype;
  // The next image, in one piece. Its tiles have more steps than lines, a line a step: 2 % faster than Ahead's pace.
  const char* ahead;
  int64_t ahead_bytes;
};

// The distances of an image, in their wide dtype.
struct DistanceView {
  const void* data;  // [N, N]
  int64_t N, s_n;
  Dtype dtype;  // kFloat or kDouble
};

// One image of knn; k at most N.
struct KnnImage {
  DistanceView distance;
  void* values;      // [N, k] wide
  int32_t* indices;  // [N, k]
  int64_t k;
};

// One image of separation.
struct SeparationImage {
  DistanceView distance;
  const void* density;  // [N] wide
  void* out;            // [N] wide
};

// One image of nearest.
struct NearestImage {
  DistanceView distance;
  const int32_t* centres;  // [K]
  int32_t* label;          // [N]
  int64_t K;
  bool pin;
};

// One image of medoids.
struct MedoidsImage {
  DistanceView distance;
  const int32_t *label, *centres;  // [N], [K]
  const void* weight;              // [N] wide
  int32_t* out;                    // [K]
  int64_t K;
  bool textbook;  // else wttu
};

// The gradients of a whole batch, in units of (image, head). grad_out and grad_scores may be null: 0.
struct AttentionGrads {
  AttentionBatch forward;
  HeadsView grad_out;       // [B, H, Nq, D]
  const void* grad_scores;  // [B, N] wide
  void* grad_q;             // [B, Nq, H, D]
  void *grad_k, *grad_v;    // [B, N, H, D]
};

struct Isa {
  const char* name;
  bool (*supported)();
  void (*match)(const MatchImage&);
  void (*merge)(const MergeImage&);
  void (*attention)(const AttentionBatch&, int64_t begin, int64_t end);        // units
  void (*attention_grads)(const AttentionGrads&, int64_t begin, int64_t end);  // units
  void (*topk)(const TopkImage&);
  void (*topk_gather)(const TopkGatherImage&);
  void (*pairwise_distance)(const PairwiseImage&);
  void (*knn)(const KnnImage&);
  void (*separation)(const SeparationImage&);
  void (*nearest)(const NearestImage&);
  void (*medoids)(const MedoidsImage&);
};

const Isa& isa();  // the one in use

}  // namespace tokred
