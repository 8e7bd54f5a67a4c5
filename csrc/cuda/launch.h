// What every <op>_kernel.cu launches with. No torch in here: see batches.h.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "device.cuh"

namespace tokred {

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("tokred: ") + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

class Launcher {
 public:
  explicit Launcher(Stream stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                  Arguments... arguments) const {
    constexpr int64_t kWithoutOptIn = 48 << 10;
    if (blocks > INT_MAX)
      throw std::runtime_error("tokred: the batch needs " + std::to_string(blocks) + " blocks, more than a grid holds");
    if (shared > kWithoutOptIn)
      check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<unsigned(blocks), threads, size_t(shared), stream_>>>(arguments...);
    check_cuda(cudaGetLastError());
  }

 private:
  cudaStream_t stream_;
};

inline Device this_device() {
  int index = 0, multiprocessors = 0, shared = 0;
  check_cuda(cudaGetDevice(&index));
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return {multiprocessors, shared};
}

}  // namespace tokred
