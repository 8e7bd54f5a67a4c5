// Argument checks of topk, topk_gather and add_topk_gather_norm; see check.h.
#pragma once
#include "check.h"

namespace tokred {

struct TopkArgs {
  Tensor score;           // [B, N] contiguous, wide dtype
  int64_t B, N, M, k, p;  // k at most N - p
  int32_t others;         // the row of the patches that are not kept; -1: dropped
};

inline void check_topk(const char* op, const Tensor& score, int64_t k, int64_t prefix) {
  check_floating(op, "score", score);
  if (score.dim() != 2) fail(op, "score", "[B, N]", show_shape(score));
  check_prefix(op, prefix, score.size(1));
  if (k < 0) fail(op, "k", "at least 0", std::to_string(k));
}

// For checked arguments.
inline TopkArgs topk_args(const Tensor& score, int64_t k, int64_t prefix, bool fuse, ScalarType dtype) {
  TopkArgs a;
  a.B = score.size(0), a.N = score.size(1), a.p = prefix, a.k = std::min(k, a.N - prefix);
  fuse &= a.k < a.N - prefix;
  a.M = prefix + a.k + fuse;
  a.others = fuse ? int32_t(prefix + a.k) : -1;
  a.score = *per_token(score, dtype);
  return a;
}

struct TopkGatherArgs {
  Tensor x;  // [B, N, C]
  TopkArgs topk;
  int64_t C, s_b, s_n;
  int64_t copied;  // rows of out that are copies; row `copied`, if there is one, is the weighted sum of the others
  bool mean;       // the sum is to be divided by that of the scores
};

inline TopkGatherArgs topk_gather_args(const char* op, const Tensor& x, const Tensor& score, int64_t k, int64_t prefix,
                                       const std::string& fuse) {
  check_rank3(op, "x", x, "[B, N, C]");
  check_per_token(op, "score", score, x.size(0), x.size(1), x);
  check_prefix(op, prefix, x.size(1));
  if (k < 0) fail(op, "k", "at least 0", std::to_string(k));
  TopkGatherArgs a;
  if (fuse != "none" && fuse != "sum" && fuse != "mean")
    fail(op, "fuse", "\"none\", \"sum\" or \"mean\"", "\"" + fuse + "\"");
  a.topk = topk_args(score, k, prefix, fuse != "none", wide(scalar_type(x)));
  a.x = inner_contiguous(x);
  a.C = x.size(2), a.s_b = a.x.stride(0), a.s_n = a.x.stride(1);
  // A token alone in a mean is a copy too: w x / w would round.
  const bool alone = fuse == "mean" && a.topk.N - a.topk.others == 1;
  a.copied = a.topk.others < 0 || alone ? a.topk.M : a.topk.others;
  a.mean = fuse == "mean" && a.copied < a.topk.M;
  return a;
}

}  // namespace tokred
