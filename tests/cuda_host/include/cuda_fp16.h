// Stand-in for CUDA's header: conversions only, as under PyTorch's build flags (__CUDA_NO_HALF_OPERATORS__,
// ...). All round to nearest, ties to even.
#pragma once

#include <cuda_runtime.h>

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

__forceinline__ float __half2float(__half h) {
  const unsigned magnitude = (h.bits & 0x7fffu) << 13, sign = (h.bits & 0x8000u) << 16;
  // The exponent's bias differs by 112; the product is exact, subnormal values included.
  const float value = cuda_host::bits<float>(magnitude) * 0x1p112f;
  const unsigned special = cuda_host::bits<unsigned>(value) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
  return cuda_host::bits<float>(special | sign);
}

__forceinline__ __half __float2half_rn(float f) {
  const unsigned bits = cuda_host::bits<unsigned>(f), magnitude = bits & 0x7fffffffu,
                 sign = bits >> 16 & 0x8000u;
  unsigned result;
  if (magnitude > 0x7f800000u) {
    return {0x7fff};  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00;  // from 65520 on nearer to infinity than to 65504
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded by the addition.
    result = cuda_host::bits<unsigned>(cuda_host::bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<unsigned short>(result | sign)};
}

inline __half __float2half(float f) { return __float2half_rn(f); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
inline __half2 __float2half2_rn(float f) { return __floats2half2_rn(f, f); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline bool __hisnan(__half h) { return (h.bits & 0x7fff) > 0x7c00; }
