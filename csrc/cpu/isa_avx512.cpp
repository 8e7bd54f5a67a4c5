// The CPU kernels for x86 processors with AVX-512 F, BW, DQ and VL: 64-byte vectors.
#include "image.h"

#if defined(__x86_64__)
#include <immintrin.h>
// GCC 12's own intrinsics read an undefined pass-through on purpose (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define TOKRED_AVX512

namespace tokred::avx512 {

constexpr int kVectorBytes = 64;
#include "simd.h"
//
#include "norm_image.h"
//
#include "match_image.h"
#include "merge_image.h"
#include "tile.h"
#include "topk_image.h"
//
#include "clusters_image.h"
#include "pairwise_distance_image.h"
//
#include "attention_image.h"
//
#include "attention_vector.h"
//
#include "attention_backward_image.h"

static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
extern const Isa kIsa = {"avx512",         supported,     match_image,       merge_image,    attention_units,
                         attention_grads,  topk_image,    topk_gather_image, pairwise_image, knn_image,
                         separation_image, nearest_image, medoids_image};

}  // namespace tokred::avx512
#endif
