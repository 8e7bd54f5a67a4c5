// The CUDA kernels behind their own launch functions, on the emulator.
#pragma once
#include <memory>

#include "match_split.cuh"
#include "merge.cuh"
#include "unmerge.cuh"

namespace tokred {

constexpr Device kH200{132, 227 << 10};

struct Launcher {
  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, int64_t blocks, int threads, int64_t shared, Arguments... arguments) const {
    simt::launch(kernel, blocks, threads, shared, arguments...);
  }
};

// Returns the scratch memory, whose end holds the edges; none where one block an image does it all.
inline std::unique_ptr<char[]> emulate_match(const MatchBatch& m, const Device& device) {
  std::unique_ptr<char[]> scratch;
  launch_match(m, device, Launcher{}, [&](int64_t bytes) {
    scratch.reset(new char[size_t(bytes)]);
    memset(scratch.get(), 0xCB, size_t(bytes));
    return scratch.get();
  });
  return scratch;
}

template <typename T>
void emulate_merge(const MergeBatch& g, bool aligned) {
  launch_merge<T>(g, aligned, Launcher{});
}

template <typename Word>
void emulate_unmerge(const UnmergeBatch<Word>& u) {
  launch_unmerge(u, Launcher{});
}

}  // namespace tokred
