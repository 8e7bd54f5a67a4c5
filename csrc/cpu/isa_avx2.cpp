// The CPU kernels for x86 processors with AVX2, FMA and F16C: 32-byte vectors.
#include "image.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define TOKRED_AVX2

namespace tokred::avx2 {

constexpr int kVectorBytes = 32;
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
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
extern const Isa kIsa = {"avx2",           supported,     match_image,       merge_image,    attention_units,
                         attention_grads,  topk_image,    topk_gather_image, pairwise_image, knn_image,
                         separation_image, nearest_image, medoids_image};

}  // namespace tokred::avx2
#endif
