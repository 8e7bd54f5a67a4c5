// Every kernel over a few small cases with exactly sized buffers, so that sanitizers see every access beside them.
// Prints a hash of each case's outputs: it must not depend on the flavour or on the schedule.
#include <cstdio>
#include <cstdlib>

#include "buffers.h"
#include "kernels.h"

using namespace tokred;

template <typename T>
static void match(Dtype dtype, int B, int H, int N, int D, int r, int p, bool weighted, int64_t shared, int r_b = 0) {
  Buffer<T> metric = normal<T>(size_t(B) * N * H * D);  // [B, N, H, D]
  Buffer<float> weight = normal<float>(size_t(B) * N);
  Buffer<int32_t> assign(size_t(B) * N);
  MatchBatch m{metric,
               weighted ? weight.data.get() : nullptr,
               assign,
               B,
               int64_t(N) * H * D,
               D,
               int64_t(H) * D,
               H,
               N,
               D,
               p,
               r,
               r_b,
               2.0f,
               dtype,
               D * sizeof(T) % 16 == 0};
  emulate_match(m, {1, shared});
  printf("match N=%d D=%d r=%d+%d: %08x\n", N, D, r, r_b, hash(assign));
}

template <typename T>
static void merge(int B, int N, int M, int C, Reduction reduce, bool weighted, int spread) {
  Buffer<T> x = normal<T>(size_t(B) * N * C), out(size_t(B) * M * C);
  Buffer<float> size = normal<float>(size_t(B) * N), weight = normal<float>(size_t(B) * N);
  Buffer<float> size_out(size_t(B) * M);
  Buffer<int32_t> assign(size_t(B) * N);
  for (int i = 0; i < B * N; ++i) assign[i] = int(random_bits() % (M + spread)) - spread / 2;  // some are no row
  MergeBatch g{x, assign, size,  weighted ? weight.data.get() : nullptr, out, size_out, B, int64_t(N) * C, C, N,
               M, C,      reduce};
  emulate_merge<T>(g, C * sizeof(T) % 16 == 0, true);
  printf("merge N=%d M=%d C=%d: %08x\n", N, M, C, hash(size_out, hash(out)));
}

template <typename Word>
static void unmerge(int B, int N, int M, int words) {
  Buffer<Word> y(size_t(B) * M * words), x(size_t(B) * N * words);
  for (size_t i = 0; i < y.count * sizeof(Word); ++i) reinterpret_cast<char*>(y.data.get())[i] = char(random_bits());
  Buffer<int32_t> assign(size_t(B) * N);
  for (int i = 0; i < B * N; ++i) assign[i] = int(random_bits() % (M + 2)) - 1;
  emulate_unmerge<Word>(UnmergeBatch{y, assign, x, B, int64_t(M) * words, words, N, M, words});
  printf("unmerge N=%d words=%d: %08x\n", N, words, hash(x));
}

static void topk(int B, int N, int k, int p, int others, int levels) {
  Buffer<float> score = normal<float>(size_t(B) * N);
  for (size_t i = 0; i < score.count; ++i) score[i] = floorf(score[i] * levels);  // ties
  Buffer<int32_t> assign(size_t(B) * N);
  emulate_topk({score, assign, B, N, k, p, others});
  printf("topk N=%d k=%d: %08x\n", N, k, hash(assign));
}

// Rows below `copied` have a member each, the rest are one more row: the last.
template <typename T>
static void gather(int B, int N, int copied, int C, bool mean) {
  Buffer<T> x = normal<T>(size_t(B) * N * C), out(size_t(B) * (copied + 1) * C);
  Buffer<float> score = normal<float>(size_t(B) * N);
  Buffer<int32_t> assign(size_t(B) * N);
  for (int i = 0; i < B * N; ++i) assign[i] = std::min(i % N, copied);
  const GatherBatch g{x, score, assign, out, B, int64_t(N) * C, C, N, copied + 1, C, copied, mean};
  emulate_gather<T>(g, C * sizeof(T) % 16 == 0);
  printf("gather N=%d C=%d: %08x\n", N, C, hash(out));
}

// The norm's weight is of the type of x, its bias is not there; rows as in merge.
template <typename T>
static void merge_norm(int B, int N, int M, int C, bool wide) {
  Buffer<T> x = normal<T>(size_t(B) * N * C), branch = normal<T>(size_t(B) * N * C), weight = normal<T>(C);
  Buffer<float> bias = normal<float>(C), size = normal<float>(size_t(B) * N), size_out(size_t(B) * M);
  Buffer<T> out(size_t(B) * M * C), normed(size_t(B) * M * C);
  Buffer<int32_t> assign(size_t(B) * N);
  for (int i = 0; i < B * N; ++i) assign[i] = int(random_bits() % (M + 2)) - 1;  // some are no row
  const MergeBatch g{x, assign, size, nullptr, out, size_out, B, int64_t(N) * C, C, N, M, C, kReduceMean};
  const void* none = nullptr;
  const Tail tail{branch, normed, wide ? none : weight.data.get(), wide ? bias.data.get() : none, int64_t(N) * C, C,
                  1e-5f,  wide};
  emulate_merge_norm<T>(g, tail, C * sizeof(T) % 16 == 0);
  printf("merge_norm N=%d C=%d: %08x\n", N, C, hash(size_out, hash(out, hash(normed))));
}

template <typename T>
static void gather_norm(int B, int N, int copied, int C, bool mean) {
  Buffer<T> x = normal<T>(size_t(B) * N * C), branch = normal<T>(size_t(B) * N * C), weight = normal<T>(C);
  Buffer<float> score = normal<float>(size_t(B) * N);
  Buffer<T> out(size_t(B) * (copied + 1) * C), normed(size_t(B) * (copied + 1) * C);
  Buffer<int32_t> assign(size_t(B) * N);
  for (int i = 0; i < B * N; ++i) assign[i] = std::min(i % N, copied);
  const GatherBatch g{x, score, assign, out, B, int64_t(N) * C, C, N, copied + 1, C, copied, mean};
  const Tail tail{branch, normed, weight, nullptr, int64_t(N) * C, C, 1e-5f, false};
  emulate_gather_norm<T>(g, tail, C * sizeof(T) % 16 == 0);
  printf("gather_norm N=%d C=%d: %08x\n", N, C, hash(out, hash(normed)));
}

int main(int, char** arguments) {
  simt::seed(unsigned(atoi(arguments[1])));
  // Of a device: one with room for all rows b, one without, and one that needs several blocks an image.
  constexpr int64_t kMuch = 512 << 10, kLittle = 99 << 10, kNone = 0;
  match<float>(Dtype::kFloat, 2, 1, 31, 5, 9, 0, false, kMuch);
  match<__half>(Dtype::kHalf, 1, 3, 50, 16, 9, 1, true, kMuch);
  match<__nv_bfloat16>(Dtype::kBFloat16, 1, 2, 150, 72, 40, 5, false, kMuch);
  match<float>(Dtype::kFloat, 1, 1, 500, 4, 200, 2, false, kMuch);
  match<float>(Dtype::kFloat, 1, 1, 300, 4, 60, 1, false, kLittle, 30);
  match<float>(Dtype::kFloat, 2, 2, 41, 12, 0, 1, false, kMuch);
  match<float>(Dtype::kFloat, 1, 2, 290, 12, 77, 1, true, kNone);
  match<__half>(Dtype::kHalf, 2, 1, 45, 136, 20, 2, false, kNone);
  match<float>(Dtype::kFloat, 2, 1, 31, 5, 4, 0, false, kMuch, 5);
  match<__half>(Dtype::kHalf, 1, 3, 50, 16, 0, 1, true, kMuch, 1);
  match<__nv_bfloat16>(Dtype::kBFloat16, 1, 2, 140, 72, 36, 5, false, kMuch, 36);
  match<float>(Dtype::kFloat, 1, 2, 190, 12, 38, 1, true, kNone, 39);
  match<__half>(Dtype::kHalf, 2, 1, 45, 136, 10, 2, false, kNone, 10);
  merge<float>(2, 23, 11, 24, kReduceMean, false, 4);
  merge<float>(1, 40, 1, 7, kReduceSum, true, 0);
  merge<__half>(2, 23, 11, 264, kReduceMean, true, 0);
  merge<__nv_bfloat16>(1, 700, 2, 40, kReduceMean, false, 1);
  merge<__nv_bfloat16>(1, 23, 9, 13, kReduceAmax, false, 2);
  merge<float>(1, 9, 40, 0, kReduceMean, false, 0);
  unmerge<uint4>(2, 23, 11, 3);
  unmerge<uint32_t>(1, 70, 11, 41);
  unmerge<uint16_t>(2, 5, 11, 2100);
  topk(2, 50, 20, 1, -1, 3);
  topk(1, 1030, 500, 2, 502, 2);
  topk(2, 33, 33, 0, -1, 1);
  gather<float>(2, 19, 9, 24, true);
  gather<__half>(1, 259, 2, 72, false);
  gather<__nv_bfloat16>(1, 23, 9, 13, true);
  merge_norm<float>(2, 23, 11, 24, false);
  merge_norm<__half>(1, 300, 9, 264, true);
  merge_norm<__nv_bfloat16>(1, 23, 9, 13, true);
  merge_norm<float>(1, 7, 3, 25600, false);
  gather_norm<float>(2, 19, 9, 24, true);
  gather_norm<__half>(1, 259, 2, 72, false);
  gather_norm<__nv_bfloat16>(1, 23, 9, 13, true);
}
