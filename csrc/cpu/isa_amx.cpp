// The CPU kernels for x86 processors with AVX-512 and the matrix units of AMX: attention of bfloat16; the rest is
// AVX-512's.
#include "image.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#pragma GCC diagnostic ignored "-Wuninitialized"  // as in isa_avx512.cpp
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,amx-tile,amx-bf16")
#define TOKRED_AVX512
#define TOKRED_AMX

namespace tokred {

namespace avx512 {
extern const Isa kIsa;
void match_image(const MatchImage&);
void merge_image(const MergeImage&);
void attention_units(const AttentionBatch&, int64_t begin, int64_t end);
void attention_grads(const AttentionGrads&, int64_t begin, int64_t end);
void topk_image(const TopkImage&);
void topk_gather_image(const TopkGatherImage&);
void pairwise_image(const PairwiseImage&);
void knn_image(const KnnImage&);
void separation_image(const SeparationImage&);
void nearest_image(const NearestImage&);
void medoids_image(const MedoidsImage&);
}  // namespace avx512

namespace amx {

constexpr int kVectorBytes = 64;
#include "simd.h"
//
#include "tile.h"
//
#include "attention_image.h"
//
#include "attention_amx.h"

// The processor has the tiles, and Linux lets this process use them (it must be asked: they enlarge every thread's
// signal frame).
static bool supported() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return avx512::kIsa.supported() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
extern const Isa kIsa = {"amx",
                         supported,
                         avx512::match_image,
                         avx512::merge_image,
                         attention_units,
                         avx512::attention_grads,
                         avx512::topk_image,
                         avx512::topk_gather_image,
                         avx512::pairwise_image,
                         avx512::knn_image,
                         avx512::separation_image,
                         avx512::nearest_image,
                         avx512::medoids_image};

}  // namespace amx
}  // namespace tokred
#endif
