// What a warp multiplies with: tensor core products m16n8k16 of half-precision tiles in shared memory, float32 sums;
// and m16n8k8 of TF32, floats of 10 bits.
//
// Lane 4 g + t holds of
//   a, 16 x 16, four words:   rows g, g + 8, g, g + 8; columns 2t, 2t + 1, the last two words 8 columns on
//   b, 16 x 8, two words:     rows 2t, 2t + 1, then 8 rows on; column g
//   c, 16 x 8, four floats:   row g, columns 2t and 2t + 1; then row g + 8
// so that the c of two neighbouring tiles, rounded, is an a: q k^T feeds p v without leaving the registers. Of TF32
//   a, 16 x 8, four words:    rows g, g + 8, g, g + 8; column t, the last two words 4 columns on
//   b, 8 x 8, two words:      row t, then t + 4; column g
// and the 16 bytes of a row of load_matrices are four of them.
#pragma once
#include <type_traits>

#include "device.cuh"
#ifndef __CUDACC__
#include "mma.h"
#endif

namespace tokred {

constexpr unsigned kTf32 = 0xffffe000;  // the bits of a float that TF32 has

#ifdef __CUDACC__

// Four 8 x 8 matrices; lane 8 i + r gives the address of row r of matrix i. kTransposed: as columns.
template <bool kTransposed, typename T>
__device__ __forceinline__ void load_matrices(const T* row, unsigned (&m)[4]) {
  const unsigned at = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}

#define TOKRED_MMA(shape, type)                           \
  "mma.sync.aligned." shape ".row.col.f32." type "." type \
  ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"

// c += a b; T says what the words hold, float TF32.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, float>)
    asm(TOKRED_MMA("m16n8k8", "tf32")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (std::is_same_v<T, __half>)
    asm(TOKRED_MMA("m16n8k16", "f16")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm(TOKRED_MMA("m16n8k16", "bf16")
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#undef TOKRED_MMA

// Two floats rounded to nearest even, the first in the lower half of the word.
template <typename T>
__device__ __forceinline__ unsigned round_pair(float low, float high) {
  unsigned word;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// 2^x to two units in the last place, 0 below 2^-126: exp2f would take three instructions more to keep those.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace tokred
