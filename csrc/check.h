// Argument checks of every op, shared by the CPU and the CUDA kernels; tokred_kernels/_check.py says the same in
// Python. Each failure is one std::runtime_error `op: argument must be EXPECTED, got ACTUAL`, thrown before any work is
// done. The structs are what a kernel needs of its checked arguments: inner stride 1, the other strides in elements.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "empty.h"
#include "text.h"

namespace tokred {

using OptionalTensor = std::optional<Tensor>;

template <class Sizes>
std::string show(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

inline std::string show_shape(const Tensor& t) { return show(t.sizes()); }

inline std::string show_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

[[noreturn]] inline void fail(const char* op, const char* argument, const std::string& expected,
                              const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// t.scalar_type() asks torch for one code after another, up to float32 seven; here they are asked for once.
inline ScalarType scalar_type(const Tensor& t) {
  struct Known {
    int32_t code;
    ScalarType type;
  };
  static const Known known[] = {{aoti_torch_dtype_float32(), ScalarType::Float},
                                {aoti_torch_dtype_int32(), ScalarType::Int},
                                {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
                                {aoti_torch_dtype_float16(), ScalarType::Half},
                                {aoti_torch_dtype_float64(), ScalarType::Double}};
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  for (const Known& one : known)
    if (one.code == code) return one.type;
  return t.scalar_type();
}

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  if (!is_floating(scalar_type(t)))
    fail(op, argument, "float32, float16, bfloat16 or float64", show_dtype(scalar_type(t)));
  // The GPU kernels have no float64 form: gradcheck runs on the CPU.
  if (scalar_type(t) == ScalarType::Double && t.is_cuda())
    fail(op, argument, "float32, float16 or bfloat16 on a CUDA device", "float64");
}

inline void check_shape(const char* op, const char* argument, const Tensor& t, const char* letters, Shape shape) {
  const auto sizes = t.sizes();
  if (!std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()))
    fail(op, argument, std::string(letters) + " = " + show(shape), show_shape(t));
}

inline std::string show_device(const Tensor& t) {
  return t.is_cpu() ? "cpu" : (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  if (device_of(t) != device_of(x)) fail(op, argument, "on " + show_device(x), show_device(t));
}

inline void check_per_token(const char* op, const char* argument, const OptionalTensor& t, int64_t B, int64_t N,
                            const Tensor& x) {
  if (!t) return;
  if (!is_floating(scalar_type(*t)))
    fail(op, argument, "float32, float16, bfloat16 or float64", show_dtype(scalar_type(*t)));
  check_shape(op, argument, *t, "[B, N]", {B, N});
  check_device(op, argument, *t, x);
}

// assign, label, centres: int32.
inline void check_rows(const char* op, const char* argument, const Tensor& t, const char* letters, Shape shape,
                       const Tensor& x) {
  if (scalar_type(t) != ScalarType::Int)
    fail(op, argument, letters + (" = " + show(shape)), show_dtype(scalar_type(t)) + " " + show_shape(t));
  check_shape(op, argument, t, letters, shape);
  check_device(op, argument, t, x);
}

inline void check_assign(const char* op, const Tensor& assign, int64_t B, int64_t N, const Tensor& x) {
  check_rows(op, "assign", assign, "int32 [B, N]", {B, N}, x);
}

inline void check_rank3(const char* op, const char* argument, const Tensor& t, const char* letters) {
  check_floating(op, argument, t);
  if (t.dim() != 3) fail(op, argument, letters, show_shape(t));
}

inline void check_prefix(const char* op, int64_t prefix, int64_t N) {
  if (prefix < 0 || prefix > N)
    fail(op, "prefix", "in [0, N] = [0, " + std::to_string(N) + "]", std::to_string(prefix));
}

// Sums, norms and scores of a tensor of this dtype.
inline ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where that will do: the dispatcher's own look at it takes a microsecond.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The tensor itself, or one contiguous copy where the innermost stride is not 1.
inline Tensor inner_contiguous(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}

// size, weight: contiguous, in the wide dtype; no copy in the steady state, where they are float32 already.
inline OptionalTensor per_token(const OptionalTensor& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return as_contiguous(scalar_type(*t) == dtype ? *t : torch::stable::to(*t, dtype));
}

inline Tensor new_int32(const Tensor& like, Shape shape) { return empty(like, shape, ScalarType::Int); }
inline Tensor new_like(const Tensor& x, Shape shape) { return empty(x, shape, scalar_type(x)); }
inline Tensor new_wide(const Tensor& x, Shape shape) { return empty(x, shape, wide(scalar_type(x))); }

struct MatchArgs {
  Tensor metric;          // [B, H, N, D] or [B, N, D] with H = 1
  OptionalTensor weight;  // [B, N]
  int64_t B, H, N, D, r, p;
  int64_t s_b, s_h, s_n;
  double power;
  bool two_way;
};

inline void check_metric(const char* op, const Tensor& metric) {
  check_floating(op, "metric", metric);
  if (metric.dim() != 3 && metric.dim() != 4) fail(op, "metric", "[B, N, D] or [B, H, N, D]", show_shape(metric));
  if (metric.dim() == 4 && metric.size(1) == 0) fail(op, "metric", "[B, H, N, D] with H > 0", show_shape(metric));
}

inline MatchArgs match_args(const char* op, const Tensor& given, int64_t r, int64_t prefix,
                            const OptionalTensor& weight, double power, bool two_way) {
  check_metric(op, given);
  MatchArgs a;
  const int64_t dims = given.dim();
  a.B = given.size(0), a.H = dims == 4 ? given.size(1) : 1, a.N = given.size(dims - 2), a.D = given.size(dims - 1);
  check_prefix(op, prefix, a.N);
  check_per_token(op, "weight", weight, a.B, a.N, given);
  a.metric = inner_contiguous(given);
  a.s_b = a.metric.stride(0), a.s_h = dims == 4 ? a.metric.stride(1) : 0, a.s_n = a.metric.stride(dims - 2);
  a.p = prefix, a.r = std::max<int64_t>(0, std::min(r, (a.N - prefix) / 2));
  a.weight = per_token(weight, wide(scalar_type(given)));
  a.power = power, a.two_way = two_way;
  return a;
}

struct MergeArgs {
  Tensor x;                     // [B, N, C]
  Tensor assign;                // [B, N] contiguous int32
  OptionalTensor size, weight;  // [B, N] contiguous, wide dtype
  int64_t B, N, M, C;
  int64_t s_b, s_n;
};

enum class Reduce { kMean, kSum, kAmax };

inline Reduce parse_reduce(const std::string& name) {
  if (name == "mean") return Reduce::kMean;
  if (name == "sum") return Reduce::kSum;
  if (name == "amax") return Reduce::kAmax;
  fail("merge", "reduce", "\"mean\", \"sum\" or \"amax\"", "\"" + name + "\"");
}

inline MergeArgs merge_args(const char* op, const Tensor& x, const Tensor& assign, int64_t m,
                            const OptionalTensor& size, const OptionalTensor& weight) {
  check_rank3(op, "x", x, "[B, N, C]");
  MergeArgs a;
  a.B = x.size(0), a.N = x.size(1), a.C = x.size(2), a.M = m;
  check_assign(op, assign, a.B, a.N, x);
  if (m < 0) fail(op, "m", "at least 0", std::to_string(m));
  check_per_token(op, "size", size, a.B, a.N, x);
  check_per_token(op, "weight", weight, a.B, a.N, x);
  a.x = inner_contiguous(x);
  a.s_b = a.x.stride(0), a.s_n = a.x.stride(1);
  a.assign = as_contiguous(assign);
  a.size = per_token(size, wide(scalar_type(x))), a.weight = per_token(weight, wide(scalar_type(x)));
  return a;
}

// Of an add_*_norm op: what it adds to the tokens and how it normalises the rows. x is checked already.
struct NormArgs {
  Tensor branch;                             // [B, N, C]
  OptionalTensor weight, bias;               // [C] contiguous, any floating dtype
  OptionalTensor branch_scale, branch_bias;  // the same
  int64_t s_b, s_n;
  double eps;
};

inline NormArgs norm_args(const char* op, const Tensor& x, const Tensor& branch, const OptionalTensor& norm_weight,
                          const OptionalTensor& norm_bias, const OptionalTensor& branch_scale,
                          const OptionalTensor& branch_bias, double eps) {
  if (scalar_type(branch) != scalar_type(x))
    fail(op, "branch", show_dtype(scalar_type(x)) + " as x", show_dtype(scalar_type(branch)));
  check_shape(op, "branch", branch, "[B, N, C]", {x.size(0), x.size(1), x.size(2)});
  check_device(op, "branch", branch, x);
  const auto row = [&](const char* argument, const OptionalTensor& t) {
    if (!t) return t;
    check_floating(op, argument, *t);
    check_shape(op, argument, *t, "[C]", {x.size(2)});
    check_device(op, argument, *t, x);
    return OptionalTensor(as_contiguous(*t));
  };
  NormArgs a;
  a.weight = row("norm_weight", norm_weight), a.bias = row("norm_bias", norm_bias);
  a.branch_scale = row("branch_scale", branch_scale), a.branch_bias = row("branch_bias", branch_bias);
  a.branch = inner_contiguous(branch);
  a.s_b = a.branch.stride(0), a.s_n = a.branch.stride(1);
  a.eps = eps;
  return a;
}

struct UnmergeArgs {
  Tensor y;       // [B, M, C]
  Tensor assign;  // [B, N] contiguous int32
  int64_t B, N, M, C;
  int64_t s_b, s_n;
};

inline UnmergeArgs unmerge_args(const Tensor& y, const Tensor& assign) {
  const char* op = "unmerge";
  check_rank3(op, "y", y, "[B, M, C]");
  if (assign.dim() != 2) fail(op, "assign", "int32 [B, N]", show_shape(assign));
  UnmergeArgs a;
  a.B = y.size(0), a.M = y.size(1), a.C = y.size(2), a.N = assign.size(1);
  check_assign(op, assign, a.B, a.N, y);
  a.y = inner_contiguous(y);
  a.s_b = a.y.stride(0), a.s_n = a.y.stride(1);
  a.assign = as_contiguous(assign);
  return a;
}

// match_merge's own checks; match_args and merge_args then find nothing wrong.
inline void check_match_merge(const Tensor& x, const Tensor& metric, int64_t prefix, const OptionalTensor& size) {
  const char* op = "match_merge";
  check_rank3(op, "x", x, "[B, N, C]");
  check_metric(op, metric);
  const int64_t B = x.size(0), N = x.size(1), D = metric.size(metric.dim() - 1);
  if (metric.dim() == 3)
    check_shape(op, "metric", metric, "[B, N, D]", {B, N, D});
  else
    check_shape(op, "metric", metric, "[B, H, N, D]", {B, metric.size(1), N, D});
  check_device(op, "metric", metric, x);
  check_prefix(op, prefix, N);
  check_per_token(op, "size", size, B, N, x);
}

// TOKRED_DEBUG=1: an index that is neither a row nor -1 is an error; otherwise it means dropped, or no centre.
inline bool debug() {
  static const bool on = [] {
    const char* value = std::getenv("TOKRED_DEBUG");
    return value && std::string(value) == "1";
  }();
  return on;
}

inline void check_values(const char* op, const char* argument, const int32_t* values, int64_t count,
                         const std::string& letter, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < -1 || values[i] >= end)
      fail(op, argument, "in [-1, " + letter + ") = [-1, " + std::to_string(end) + ") under TOKRED_DEBUG=1",
           std::to_string(values[i]));
}

inline void check_assign_values(const char* op, const int32_t* assign, int64_t count, int64_t m) {
  check_values(op, "assign", assign, count, "m", m);
}

}  // namespace tokred
