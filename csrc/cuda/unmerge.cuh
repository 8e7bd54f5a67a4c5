// unmerge: x_i = y[assign_i], 0 where assign_i is no row.  A copy of bits: a thread a word of 16 bytes (or one element
// where rows are not aligned), a block some 2048 words of neighbouring tokens.
//
// Floor: (M + N) C element bytes and 4 N; DeiT-S B=256 184 -> 197 C=384 bf16: 75 MB = 17.4 us at 4.3 TB/s.
//
//   sm_90                   registers   blocks an SM   shared memory
//   unmerge_kernel<uint4>          32              8               -
//   unmerge_kernel<uint32>         32              8
//   unmerge_kernel<uint16>         32              8
#pragma once
#include "device.cuh"

namespace tokred {

template <typename Word>
__global__ void __launch_bounds__(kThreads) unmerge_kernel(const UnmergeBatch u, int tokens, int groups) {
  const int64_t b = blockIdx.x / unsigned(groups);
  const int first = blockIdx.x % unsigned(groups) * tokens, count = min(tokens, u.N - first);
  const int32_t* assign = u.assign + b * u.N + first;
  const Word* y = static_cast<const Word*>(u.y) + b * u.s_b;
  Word* x = static_cast<Word*>(u.x) + (b * u.N + first) * u.words;
  const int words = count * u.words;
  for (int start = threadIdx.x; start < words; start += kAhead * kThreads) {
    Word part[kAhead] = {};  // all loads, then all stores: the compiler must not assume that x is not y
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int w = start + k * kThreads, i = w / u.words, j = w < words ? assign[i] : -1;
      if (j >= 0 && j < u.M) part[k] = y[j * u.s_n + (w - i * u.words)];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (start + k * kThreads < words) x[start + k * kThreads] = part[k];
  }
}

template <typename Word, typename Launch>
void launch_unmerge(const UnmergeBatch& u, Launch&& launch) {
  constexpr int kBlockWords = 2048;
  const int tokens = u.words < kBlockWords ? ceil_div(kBlockWords, u.words) : 1, groups = ceil_div(u.N, tokens);
  launch(unmerge_kernel<Word>, u.B * groups, kThreads, 0, u, tokens, groups);
}

}  // namespace tokred
