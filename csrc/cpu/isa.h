// The CPU kernels of one instruction set, as plain functions. isa_<name>.cpp compiles the *_image.h kernels once;
// isa.cpp chooses at run time by what the processor has.
#pragma once
#include <cstdint>

namespace tokred {

enum class Dtype : int { kFloat, kHalf, kBFloat16, kDouble };

// One image of match. Strides in elements; weight in the wide dtype (float, or double for kDouble) or null.
struct MatchImage {
  const void* metric;  // [H, N, D]
  const void* weight;  // [N]
  int32_t* assign;     // [N]
  int64_t H, N, D, r, p, s_h, s_n;
  double power;
  Dtype dtype;
  // What the caller reads next comes to the second-level cache while the multipliers are busy (match_merge at B = 8:
  // -13 %); may be null, 0.
  const char* ahead;
  int64_t ahead_bytes;
};

// One image of merge. size, weight, size_out in the wide dtype; size and weight may be null.
struct MergeImage {
  const void* x;          // [N, C]
  const int32_t* assign;  // [N]
  const void* size;       // [N]
  const void* weight;     // [N]
  void* out;              // [M, C]
  void* size_out;         // [M]
  int64_t N, M, C, s_n;
  int reduce;  // tokred::Reduce
  Dtype dtype;
};

struct Isa {
  const char* name;
  bool (*supported)();
  void (*match)(const MatchImage&);
  void (*merge)(const MergeImage&);
};

const Isa& isa();  // the one in use

}  // namespace tokred
