// Programmatic dependent launch, from 9.0 on: a grid whose blocks may begin before the launch before it on the stream
// has ended, so that their launch is over by then. Within an op, so that both launches are ours: match and its own
// kernels, then merge; topk, then topk_gather.
//
// The rule: such a kernel gets its batch as a Dependent, and every thread waits before anything else.  There is no
// other way to a pointer, so nothing is read that is not yet written, and nothing is written that an earlier kernel may
// still read.  A grid that waits ends after the one before it has ended, so by induction after all that came before:
// whatever follows it on the stream finds the order of ordinary launches.
//
// The kernel before lets it begin at once: the next grid begins when every block of this one has said so or has ended,
// all of them are resident by then, and what waits takes the place of none.  This publishes nothing, only the wait
// does.
//
// Machine code made of intermediate code for 8.0 has neither instruction; launch.h asks what is loaded before it
// launches so.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace tokred {

#ifdef __CUDACC__
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
#else
using simt::wait_for_launch_before;
inline void let_next_launch_begin() {}
#endif

template <typename Batch>
class Dependent {
 public:
  Dependent(const Batch& batch) : batch_(batch) {}
  __device__ __forceinline__ const Batch& wait() const {
    wait_for_launch_before();
    return batch_;
  }

 private:
  Batch batch_;
};

// Whether a kernel with these parameters must wait to get at any pointer.
template <typename... Parameters>
constexpr bool kWaits = false;
template <typename Batch, typename... Numbers>
constexpr bool kWaits<Dependent<Batch>, Numbers...> = (std::is_arithmetic_v<Numbers> && ...);

}  // namespace tokred
