// From checked tensors to the plain batches that the kernels take: guard, checks, empty return, launch.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include <climits>
#include <tuple>

#include "../check.h"
#include "batches.h"

namespace tokred {

using torch::stable::accelerator::DeviceGuard;

// The current one of the tensor's device.
inline Stream stream_of(const Tensor& t) {
  Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

inline Dtype dtype_of(const Tensor& t) {
  switch (scalar_type(t)) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: return Dtype::kFloat;
  }
}

inline int checked_int(const char* op, const char* what, int64_t n) {
  if (n >= INT_MAX) fail(op, what, "below 2^31 - 1 on a CUDA device", std::to_string(n));
  return int(n);
}

// Whether every row begins at a multiple of 16 bytes.
inline bool is_aligned(const Tensor& t, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t stride : strides) aligned &= stride * int64_t(t.element_size()) % 16 == 0;
  return aligned;
}

inline const float* floats(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Scratch for one launch function; the stream keeps its memory until the kernels are done.
inline Scratch scratch_into(Tensor& memory, const Tensor& like) {
  return [&](int64_t bytes) {
    memory = empty(like, {bytes}, ScalarType::Byte);
    return memory.mutable_data_ptr();
  };
}

// The tail of an add_*_norm op, and whether it can be read and written in 16-byte words. It keeps what it points to.
struct TailArgs {
  Tail tail;
  bool aligned;
  OptionalTensor weight, bias, branch_scale, branch_bias;
};

inline TailArgs tail_args(const NormArgs& args, const Tensor& x, const Tensor& normed) {
  TailArgs a{{}, true, args.weight, args.bias, args.branch_scale, args.branch_bias};
  OptionalTensor* const rows[] = {&a.weight, &a.bias, &a.branch_scale, &a.branch_bias};
  const void** const pointers[] = {&a.tail.weight, &a.tail.bias, &a.tail.branch_scale, &a.tail.branch_bias};
  // As they are where all are of the type of x, which is the usual model: no copy.
  for (const OptionalTensor* row : rows) a.tail.wide |= *row && scalar_type(**row) != scalar_type(x);
  for (int i = 0; i < 4; ++i) {
    OptionalTensor& row = *rows[i];
    if (a.tail.wide) row = per_token(row, ScalarType::Float);
    a.aligned &= !row || is_aligned(*row, {});
    *pointers[i] = row ? row->const_data_ptr() : nullptr;
  }
  a.tail.branch = args.branch.const_data_ptr(), a.tail.normed = normed.mutable_data_ptr();
  a.tail.s_b = args.s_b, a.tail.s_n = args.s_n, a.tail.eps = float(args.eps);
  a.aligned &= is_aligned(args.branch, {args.s_b, args.s_n});
  return a;
}

// TOKRED_DEBUG=1: copies assign to the host, which waits for the device.
inline void debug_assign_values(const char* op, const Tensor& assign, int64_t m) {
  if (!debug()) return;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor host = torch::stable::to(assign, std::nullopt, std::nullopt, cpu);
  check_assign_values(op, static_cast<const int32_t*>(host.const_data_ptr()), host.numel(), m);
}

}  // namespace tokred
