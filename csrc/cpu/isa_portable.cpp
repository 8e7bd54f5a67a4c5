// The CPU kernels for any processor: 16-byte vectors, SSE2 or NEON or whatever the compiler makes of them.
#include <torch/headeronly/util/Half.h>

#include "image.h"

namespace tokred::portable {

inline float half_to_float(uint16_t bits) { return c10::detail::fp16_ieee_to_fp32_value(bits); }
inline uint16_t float_to_half(float value) { return c10::detail::fp16_ieee_from_fp32_value(value); }
constexpr int kVectorBytes = 16;
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

static bool supported() { return true; }
extern const Isa kIsa = {"portable",       supported,     match_image,       merge_image,    attention_units,
                         attention_grads,  topk_image,    topk_gather_image, pairwise_image, knn_image,
                         separation_image, nearest_image, medoids_image};

}  // namespace tokred::portable
