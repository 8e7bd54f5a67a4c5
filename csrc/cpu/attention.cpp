// attention, its scores and its gradient on the CPU: units of (image, head, chunk of queries) over the threads, so that
// one image uses them all; then the scores are added up over heads and chunks, in that order.
#include "../check_attention.h"
#include "tensors.h"

namespace tokred {

// Chunks of whole query tiles of every instruction set, and at most one a 64 keys up to 1,024, so that the column sums
// [B, H, chunks, N] stay small.
constexpr int64_t kChunk = 96;
static int64_t chunk_rows(const AttentionArgs& a) {
  const int64_t most = std::max<int64_t>(1, (std::min<int64_t>(a.N, 1024) + 63) / 64);
  return std::max<int64_t>(1, (a.Nq + kChunk * most - 1) / (kChunk * most)) * kChunk;
}

// scores_j = sum over `parts` rows of partial / divisor
template <class T>
static void add_partial(const T* partial, int64_t parts, int64_t N, T divisor, T* scores) {
  for (int64_t j = 0; j < N; ++j) scores[j] = 0;
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t j = 0; j < N; ++j) scores[j] += partial[part * N + j];
  for (int64_t j = 0; j < N; ++j) scores[j] /= divisor;
}

static HeadsView view(const Heads& heads) { return {heads.t.const_data_ptr(), heads.s_b, heads.s_h, heads.s_n}; }

static AttentionBatch batch_of(const AttentionArgs& a) {
  AttentionBatch batch{view(a.q), view(a.k), view(a.v)};
  batch.size = element(a.size, 0);
  batch.B = a.B, batch.H = a.H, batch.Nq = a.Nq, batch.N = a.N, batch.D = a.D;
  batch.chunk_rows = chunk_rows(a);
  batch.chunks = std::max<int64_t>(1, (a.Nq + batch.chunk_rows - 1) / batch.chunk_rows);
  batch.scale = a.scale, batch.scores = static_cast<int>(a.scores), batch.dtype = dtype_of(a.q.t);
  return batch;
}

// Returns the scores; out [B, H, Nq, D], stored [B, Nq, H, D], may be null.
static Tensor run(const AttentionArgs& a, void* out) {
  AttentionBatch batch = batch_of(a);
  batch.out = out, batch.with_values = out != nullptr;
  const bool mean = a.scores == Scores::kMean, emits = a.scores != Scores::kNone;
  const int64_t parts = emits ? a.H * (mean ? batch.chunks : 1) : 0;
  Tensor scores = new_wide(a.q.t, {a.B, emits ? a.N : 0});
  Tensor partial = emits ? new_wide(a.q.t, {a.B, parts, a.N}) : scores;
  batch.partial = partial.mutable_data_ptr();
  const Isa& kernels = isa();
  if (a.B > 0)
    torch::stable::parallel_for(0, a.B * a.H * batch.chunks, 1,
                                [&](int64_t begin, int64_t end) { kernels.attention(batch, begin, end); });
  if (!emits) return scores;
  const double divisor = double(a.H) * (mean ? std::max<int64_t>(a.Nq, 1) : 1);
  for_each_image(a.B, [&](int64_t b) {
    if (batch.dtype == Dtype::kDouble)
      add_partial(static_cast<const double*>(partial.const_data_ptr()) + b * parts * a.N, parts, a.N, divisor,
                  static_cast<double*>(scores.mutable_data_ptr()) + b * a.N);
    else
      add_partial(static_cast<const float*>(partial.const_data_ptr()) + b * parts * a.N, parts, a.N, float(divisor),
                  static_cast<float*>(scores.mutable_data_ptr()) + b * a.N);
  });
  return scores;
}

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& size,
                                         std::optional<double> scale, StringHandle scores) {
  const AttentionArgs a = attention_args("attention", q, k, &v, size, scale, text(scores));
  Tensor out = empty_heads(q, a.B, a.H, a.Nq, a.D, scalar_type(q));
  Tensor emitted = run(a, out.mutable_data_ptr());
  return {out, emitted};
}

Tensor attention_scores_cpu(const Tensor& q, const Tensor& k, const OptionalTensor& size, std::optional<double> scale,
                            StringHandle scores) {
  AttentionArgs a = attention_args("attention_scores", q, k, nullptr, size, scale, text(scores));
  if (a.scores == Scores::kCls) a.Nq = std::min<int64_t>(a.Nq, 1);
  return run(a, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const OptionalTensor& grad_out,
                                                          const OptionalTensor& grad_scores, const Tensor& q,
                                                          const Tensor& k, const Tensor& v, const Tensor& out,
                                                          const OptionalTensor& size, std::optional<double> scale,
                                                          StringHandle scores) {
  const AttentionArgs a = attention_args("attention_backward", q, k, &v, size, scale, text(scores));
  check_attention_grads(a, q, grad_out, grad_scores, out);
  const ScalarType dtype = scalar_type(q);
  Tensor grad_q = empty_heads(q, a.B, a.H, a.Nq, a.D, dtype);
  Tensor grad_k = empty_heads(q, a.B, a.H, a.N, a.D, dtype), grad_v = empty_heads(q, a.B, a.H, a.N, a.D, dtype);
  AttentionGrads g{batch_of(a)};
  std::optional<Heads> grads;
  if (grad_out) grads = heads_of(*grad_out), g.grad_out = view(*grads);
  const OptionalTensor emitted = a.scores == Scores::kNone ? std::nullopt : per_token(grad_scores, wide(dtype));
  g.grad_scores = element(emitted, 0);
  g.grad_q = grad_q.mutable_data_ptr(), g.grad_k = grad_k.mutable_data_ptr(), g.grad_v = grad_v.mutable_data_ptr();
  const Isa& kernels = isa();
  if (a.B > 0)
    torch::stable::parallel_for(0, a.B * a.H, 1,
                                [&](int64_t begin, int64_t end) { kernels.attention_grads(g, begin, end); });
  return {grad_q, grad_k, grad_v};
}

}  // namespace tokred

STABLE_TORCH_LIBRARY_IMPL(tokred, CPU, m) {
  m.impl("attention", TORCH_BOX(&tokred::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&tokred::attention_backward_cpu));
  m.impl("attention_scores", TORCH_BOX(&tokred::attention_scores_cpu));
}
