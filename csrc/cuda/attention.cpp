// attention and attention_scores on CUDA. The kernels are attention.cuh and attention_scores.cuh, launched by
// attention_kernel.cu.
#include <cfloat>
#include <cmath>

#include "../check_attention.h"
#include "tensors.h"

namespace tokred {

static void attend(const char* op, const AttentionArgs& args, const Tensor* out, const Tensor& scores) {
  if (args.B == 0) return;
  AttentionBatch g;
  g.q = args.q.t.const_data_ptr(), g.q_b = args.q.s_b, g.q_h = args.q.s_h, g.q_n = args.q.s_n;
  g.k = args.k.t.const_data_ptr(), g.k_b = args.k.s_b, g.k_h = args.k.s_h, g.k_n = args.k.s_n;
  g.v = out ? args.v.t.const_data_ptr() : nullptr, g.v_b = args.v.s_b, g.v_h = args.v.s_h, g.v_n = args.v.s_n;
  g.size = floats(args.size), g.out = out ? out->mutable_data_ptr() : nullptr;
  g.partial = nullptr, g.scores = static_cast<float*>(scores.mutable_data_ptr());
  g.B = args.B, g.H = checked_int(op, "H", args.H), g.Nq = checked_int(op, "Nq", args.Nq);
  g.N = checked_int(op, "N", args.N), g.D = int(args.D);
  // A factor above 0 keeps masked logits at -inf; the sign goes to q.
  const float scale = float(std::fabs(args.scale) * 1.4426950408889634);
  g.scale = scale < FLT_MIN ? FLT_MIN : scale, g.negate = args.scale < 0;
  g.aligned = true;
  for (const Heads* t : {&args.q, &args.k, &args.v}) g.aligned &= is_aligned(t->t, {t->s_b, t->s_h, t->s_n});
  g.emit = args.scores == Scores::kNone ? kEmitNone : args.scores == Scores::kCls ? kEmitCls : kEmitMean;
  Tensor memory;
  launch_scored_attention(g, dtype_of(args.q.t), stream_of(args.q.t), scratch_into(memory, scores));
}

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& size,
                                          std::optional<double> scale, StringHandle scores) {
  const DeviceGuard guard(q.get_device_index());
  const AttentionArgs args = attention_args("attention", q, k, &v, size, scale, text(scores));
  Tensor out = empty_heads(q, args.B, args.H, args.Nq, args.D, scalar_type(q));
  Tensor emitted = new_wide(q, {args.B, args.scores == Scores::kNone ? 0 : args.N});
  attend("attention", args, &out, emitted);
  return {out, emitted};
}

Tensor attention_scores_cuda(const Tensor& q, const Tensor& k, const OptionalTensor& size, std::optional<double> scale,
                             StringHandle scores) {
  const DeviceGuard guard(q.get_device_index());
  const AttentionArgs args = attention_args("attention_scores", q, k, nullptr, size, scale, text(scores));
  Tensor emitted = new_wide(q, {args.B, args.N});
  attend("attention_scores", args, nullptr, emitted);
  return emitted;
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CUDA, m) {
  m.impl("attention", TORCH_BOX(&tokred::attention_cuda));
  m.impl("attention_scores", TORCH_BOX(&tokred::attention_scores_cuda));
}
