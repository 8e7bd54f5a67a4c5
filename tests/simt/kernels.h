// The CUDA kernels behind their own launch functions, on the emulator.
#pragma once
#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>

#include "add_merge_norm.cuh"
#include "add_topk_gather_norm.cuh"
#include "attention_scores.cuh"
#include "match_split.cuh"
#include "merge.cuh"
#include "topk.cuh"
#include "topk_gather.cuh"
#include "unmerge.cuh"

namespace tokred {

// Refuses more shared memory than the device has, as the driver would; 99 KB is the least of any from sm_80 on.
struct Launcher {
  int64_t shared_limit = 99 << 10;

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, int64_t blocks, int threads, int64_t shared, Arguments... arguments) const {
    if (shared > shared_limit) throw std::runtime_error("a launch with too much shared memory");
    simt::launch(kernel, blocks, threads, shared, arguments...);
  }
};

// As cudaMalloc aligns memory: else a count of sectors depends on where malloc found room.
constexpr std::align_val_t kAlignment{256};
struct Free {
  void operator()(char* memory) const { operator delete[](memory, kAlignment); }
};
using ScratchMemory = std::unique_ptr<char[], Free>;

// Of exactly this size, so that a sanitizer sees what lies beyond, and full of garbage.
inline ScratchMemory scratch_memory(int64_t bytes) {
  ScratchMemory memory(new (kAlignment) char[size_t(bytes)]);
  memset(memory.get(), 0xCB, size_t(bytes));
  simt::device_memory(memory.get(), size_t(bytes));
  return memory;
}

// Returns the scratch memory, which begins with the edges; none where one block an image does it all.
inline ScratchMemory emulate_match(const MatchBatch& m, const Device& device) {
  ScratchMemory scratch;
  launch_match(m, device, Launcher{std::max(device.shared_bytes, Launcher{}.shared_limit)}, [&](int64_t bytes) {
    scratch = scratch_memory(bytes);
    return scratch.get();
  });
  return scratch;
}

template <typename T>
void emulate_merge(const MergeBatch& g, bool aligned) {
  launch_merge<T>(g, aligned, Launcher{});
}

template <typename Word>
void emulate_unmerge(const UnmergeBatch& u) {
  launch_unmerge<Word>(u, Launcher{});
}

// Returns how much scratch memory it took.
template <typename T>
int64_t emulate_attention(const AttentionBatch& g, const Device& device) {
  ScratchMemory scratch;
  int64_t taken = 0;
  launch_scored_attention<T>(g, device, Launcher{}, [&](int64_t bytes) -> void* {
    scratch = scratch_memory(bytes);
    taken += bytes;
    return scratch.get();
  });
  return taken;
}

inline void emulate_topk(const TopkBatch& g) { launch_topk(g, Launcher{}); }

template <typename T>
void emulate_gather(const GatherBatch& g, bool aligned) {
  launch_topk_gather<T>(g, aligned, Launcher{});
}

template <typename T>
void emulate_merge_norm(const MergeBatch& g, const Tail& tail, bool aligned) {
  launch_add_merge_norm<T>(g, tail, aligned, Launcher{});
}

template <typename T>
void emulate_gather_norm(const GatherBatch& g, const Tail& tail, bool aligned) {
  launch_add_topk_gather_norm<T>(g, tail, aligned, Launcher{});
}

}  // namespace tokred
