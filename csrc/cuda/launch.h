// What every <op>_kernel.cu launches with. No torch in here: see batches.h.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "dependent.cuh"

namespace tokred {

inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported once: not by torch's next check too
  throw std::runtime_error(std::string("tokred: ") + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

// Whether the code of the kernel that the current device has loaded contains the wait. ptxVersion is that of the
// intermediate code it was made of, whatever it was assembled for.
inline bool is_made_to_wait(const void* kernel) {
  thread_local std::map<std::pair<int, const void*>, bool> known;  // asking is a dozen calls of the driver
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  const auto [found, is_new] = known.try_emplace({device, kernel}, false);
  if (is_new) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    found->second = attributes.ptxVersion >= 90;
  }
  return found->second;
}

// Launches kernels of one op on a stream. Those that must wait may begin before the launch before has ended, from the
// second on; the first too where `after_ours`: another launcher of the op was before it.
class Launcher {
 public:
  explicit Launcher(Stream stream, bool after_ours = false)
      : stream_(static_cast<cudaStream_t>(stream)), after_ours_(after_ours) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, Arguments... arguments) {
    constexpr int64_t kWithoutOptIn = 48 << 10;
    if (blocks > INT_MAX)
      throw std::runtime_error("tokred: the batch needs " + std::to_string(blocks) + " blocks, more than a grid holds");
    if (shared > kWithoutOptIn)
      check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    cudaLaunchAttribute begins_early;
    begins_early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    begins_early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = unsigned(blocks), config.blockDim = unsigned(threads);
    config.dynamicSmemBytes = size_t(shared), config.stream = stream_, config.attrs = &begins_early;
    if constexpr (kWaits<Parameters...>)
      config.numAttrs = after_ours_ && is_made_to_wait(reinterpret_cast<const void*>(kernel));
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...));
    after_ours_ = true;
  }

 private:
  cudaStream_t stream_;
  bool after_ours_;
};

inline Device this_device() {
  int index = 0, multiprocessors = 0, shared = 0;
  check_cuda(cudaGetDevice(&index));
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return {multiprocessors, shared};
}

}  // namespace tokred
