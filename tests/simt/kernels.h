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

// As that of launch.h. Refuses more shared memory than the device has, as the driver would; 99 KB is the least of any
// from sm_80 on.
struct Launcher {
  int64_t shared_limit = 99 << 10;
  std::vector<simt::Memory> written = {};  // by the op
  bool after_ours = false;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, Arguments... arguments) {
    if (shared > shared_limit) throw std::runtime_error("a launch with too much shared memory");
    if (kWaits<Parameters...> && after_ours)
      simt::launch_dependent(written, kernel, blocks, threads, shared, arguments...);
    else
      simt::launch(kernel, blocks, threads, shared, arguments...);
    after_ours = true;
  }
};

template <typename T>
simt::Memory memory(const T* first, int64_t count) {
  return {const_cast<T*>(first), size_t(count) * sizeof(T)};
}

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
  Launcher launch{std::max(device.shared_bytes, Launcher{}.shared_limit), {memory(m.assign, m.B * m.N)}};
  launch_match(m, device, launch, [&](int64_t bytes) {
    scratch = scratch_memory(bytes);
    launch.written.push_back(memory(scratch.get(), bytes));
    return scratch.get();
  });
  return scratch;
}

template <typename T>
void emulate_merge(const MergeBatch& g, bool aligned, bool after_match) {
  Launcher launch{Launcher{}.shared_limit, {memory(g.assign, g.B * g.N), memory(g.size_out, g.B * g.M)}, after_match};
  launch.written.push_back(memory(static_cast<const T*>(g.out), g.B * g.M * g.C));
  launch_merge<T>(g, aligned, launch);
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
  Launcher launch{Launcher{}.shared_limit, {memory(g.assign, g.B * g.N)}, true};
  launch.written.push_back(memory(static_cast<const T*>(g.out), g.B * g.M * g.C));
  launch_topk_gather<T>(g, aligned, launch);
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
