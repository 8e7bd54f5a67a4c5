// float16 in software, round to nearest even: stands in for CUDA's header.
#pragma once
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent     ? ldexpf(float(mantissa | 1024), exponent - 25)
                           : ldexpf(float(mantissa), -24);
  return x.bits >> 15 ? -f : f;
}
inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  f = fabsf(f);
  if (f != f) return {0x7fff};
  if (f >= 65520) return {uint16_t(sign | 0x7c00)};                          // rounds past the largest, 65504
  if (f < 0x1p-14f) return {uint16_t(sign | int(nearbyintf(f * 0x1p24f)))};  // subnormal; 1024 is the first normal
  int exponent;
  const float mantissa = frexpf(f, &exponent) * 2048;  // in [1024, 2048)
  return {uint16_t(sign | ((exponent + 13) * 1024 + int(nearbyintf(mantissa))))};
}

struct __half2 {
  __half x, y;
};
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
