// Argument checks of attention, attention_scores and attention_backward, as in check.h.
#pragma once
#include <cmath>

#include "check.h"

namespace tokred {

enum class Scores { kNone, kCls, kMean };

// [B, H, rows, D] with inner stride 1; the other strides in elements.
struct Heads {
  Tensor t;
  int64_t s_b, s_h, s_n;
};

inline Heads heads_of(const Tensor& given) {
  const Tensor t = inner_contiguous(given);
  return {t, t.stride(0), t.stride(1), t.stride(2)};
}

struct AttentionArgs {
  Heads q, k, v;        // v is k where the op takes none
  OptionalTensor size;  // [B, N] contiguous, wide dtype
  int64_t B, H, Nq, N, D;
  double scale;
  Scores scores;
};

constexpr int64_t kMaxWidth = 128;

inline Scores parse_scores(const char* op, const std::string& name, bool none_allowed) {
  if (name == "none" && none_allowed) return Scores::kNone;
  if (name == "cls") return Scores::kCls;
  if (name == "mean") return Scores::kMean;
  fail(op, "scores", none_allowed ? "\"none\", \"cls\" or \"mean\"" : "\"cls\" or \"mean\"", "\"" + name + "\"");
}

// A tensor that must be [B, H, rows, D] in the dtype and on the device of q.
inline void check_like_q(const char* op, const char* argument, const Tensor& t, const Tensor& q, int64_t rows) {
  if (scalar_type(t) != scalar_type(q))
    fail(op, argument, show_dtype(scalar_type(q)) + " as q", show_dtype(scalar_type(t)));
  check_shape(op, argument, t, "[B, H, N, D]", {q.size(0), q.size(1), rows, q.size(3)});
  check_device(op, argument, t, q);
}

inline AttentionArgs attention_args(const char* op, const Tensor& q, const Tensor& k, const Tensor* v,
                                    const OptionalTensor& size, std::optional<double> scale,
                                    const std::string& scores) {
  check_floating(op, "q", q);
  if (q.dim() != 4) fail(op, "q", "[B, H, Nq, D]", show_shape(q));
  const int64_t D = q.size(3);
  if (q.size(1) == 0 || D % 8 != 0 || D > kMaxWidth)
    fail(op, "q", "[B, H, Nq, D] with H > 0 and D a multiple of 8 up to " + std::to_string(kMaxWidth), show_shape(q));
  if (k.dim() != 4) fail(op, "k", "[B, H, N, D]", show_shape(k));
  AttentionArgs a;
  a.B = q.size(0), a.H = q.size(1), a.Nq = q.size(2), a.N = k.size(2), a.D = D;
  check_like_q(op, "k", k, q, a.N);
  if (v) check_like_q(op, "v", *v, q, a.N);
  check_per_token(op, "size", size, a.B, a.N, q);
  a.scores = parse_scores(op, scores, op != std::string("attention_scores"));
  a.q = heads_of(q), a.k = heads_of(k), a.v = v ? heads_of(*v) : a.k;
  a.size = per_token(size, wide(scalar_type(q)));
  a.scale = scale ? *scale : D ? 1 / std::sqrt(double(D)) : 1.0;
  return a;
}

inline void check_attention_grads(const AttentionArgs& a, const Tensor& q, const OptionalTensor& grad_out,
                                  const OptionalTensor& grad_scores, const Tensor& out) {
  const char* op = "attention_backward";
  if (grad_out) check_like_q(op, "grad_out", *grad_out, q, a.Nq);
  check_like_q(op, "out", out, q, a.Nq);
  if (!grad_scores) return;
  if (!is_floating(scalar_type(*grad_scores)))
    fail(op, "grad_scores", "float32, float16, bfloat16 or float64", show_dtype(scalar_type(*grad_scores)));
  check_shape(op, "grad_scores", *grad_scores, "[B, N]", {a.B, a.scores == Scores::kNone ? 0 : a.N});
  check_device(op, "grad_scores", *grad_scores, q);
}

}  // namespace tokred
