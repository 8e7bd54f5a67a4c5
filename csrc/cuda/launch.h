// From checked tensors to launches: guard, checks, empty return, launch, launch check.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <climits>
#include <tuple>

#include "../check.h"
#include "../check_topk.h"
#include "device.cuh"

namespace tokred {

using torch::stable::accelerator::DeviceGuard;

// Launches on the current stream of the tensor's device.
class Launcher {
 public:
  explicit Launcher(const Tensor& t) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                  Arguments... arguments) const {
    constexpr int64_t kWithoutOptIn = 48 << 10;
    STD_TORCH_CHECK(blocks <= INT_MAX, "tokred: the batch needs ", blocks, " blocks, more than a grid holds");
    if (shared > kWithoutOptIn)
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<unsigned(blocks), threads, size_t(shared), stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  cudaStream_t stream_;
};

inline Device this_device() {
  int index = 0, multiprocessors = 0, shared = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return {multiprocessors, shared};
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

// TOKRED_DEBUG=1: copies assign to the host, which waits for the device.
inline void debug_assign_values(const char* op, const Tensor& assign, int64_t m) {
  if (!debug()) return;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor host = torch::stable::to(assign, std::nullopt, std::nullopt, cpu);
  check_assign_values(op, static_cast<const int32_t*>(host.const_data_ptr()), host.numel(), m);
}

// match.cu and merge.cu; match_merge.cu launches both.
void match_into(const char* op, const MatchArgs& args, const Tensor& assign);
void merge_into(const char* op, const MergeArgs& args, Reduce reduce, const Tensor& out, const Tensor& size_out);
// topk.cu, for topk_gather.cu.
void topk_into(const char* op, const TopkArgs& args, const Tensor& assign);

}  // namespace tokred
