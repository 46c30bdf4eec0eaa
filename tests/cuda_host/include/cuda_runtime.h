// Stand-in for CUDA's header: the part of CUDA C++ that the kernels use.
#pragma once

#include <runtime.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// The runtime changes these when it changes threads; to the thread that reads them they are constants.
extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const dim3 blockDim;
extern const dim3 gridDim;
constexpr int warpSize = cuda_host::kWarp;

// ---------------------------------------------------------------------------------------------------------------
// Barriers, shuffles, votes

__forceinline__ void __syncthreads() { cuda_host::sync_threads(); }

__forceinline__ void __syncwarp(unsigned mask = 0xffffffff) { cuda_host::sync_warp(mask); }

namespace cuda_host {

template <class T>
struct Shuffle {
  T value, result;
  int source;  // the lane to read from
};

template <class T>
__forceinline__ T shuffle(const char* operation, unsigned mask, T value, int source) {
  Shuffle<T> mine = {value, value, source};
  together(operation, mask, &mine, [](Lanes& lanes) {
    for (int l = 0; l < kWarp; ++l) {
      if (lanes[l] == nullptr) continue;
      auto& reader = *static_cast<Shuffle<T>*>(lanes[l]);
      if (lanes[reader.source] == nullptr)
        fail("lane %d reads from lane %d, which is not in the mask of its shuffle", l, reader.source);
      reader.result = static_cast<Shuffle<T>*>(lanes[reader.source])->value;
    }
  });
  return mine.result;
}

struct Vote {
  bool predicate;
  unsigned ballot;
};

__forceinline__ unsigned vote(const char* operation, unsigned mask, bool predicate) {
  Vote mine = {predicate, 0};
  together(operation, mask, &mine, [](Lanes& lanes) {
    unsigned ballot = 0;
    for (int l = 0; l < kWarp; ++l)
      if (lanes[l] != nullptr && static_cast<Vote*>(lanes[l])->predicate) ballot |= 1u << l;
    for (void* lane : lanes)
      if (lane != nullptr) static_cast<Vote*>(lane)->ballot = ballot;
  });
  return mine.ballot;
}

}  // namespace cuda_host

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int segment = cuda_host::lane() & ~(width - 1);
  return cuda_host::shuffle("__shfl_sync", mask, value, segment + (source & (width - 1)));
}

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  const int me = cuda_host::lane(), source = me ^ lanes;
  const bool beyond = source >= (me & ~(width - 1)) + width;
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, beyond ? me : source);
}

template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int me = cuda_host::lane(), source = me + static_cast<int>(delta);
  const bool beyond = source >= (me & ~(width - 1)) + width;
  return cuda_host::shuffle("__shfl_down_sync", mask, value, beyond ? me : source);
}

template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int me = cuda_host::lane(), source = me - static_cast<int>(delta);
  const bool beyond = source < (me & ~(width - 1));
  return cuda_host::shuffle("__shfl_up_sync", mask, value, beyond ? me : source);
}

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_host::vote("__ballot_sync", mask, predicate != 0);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return cuda_host::vote("__any_sync", mask, predicate != 0) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return cuda_host::vote("__all_sync", mask, predicate != 0) == mask;
}

// ---------------------------------------------------------------------------------------------------------------
// Loads and stores with cache hints

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
__forceinline__ void __stcg(T* p, T value) {
  *p = value;
}

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic

namespace cuda_host {

template <class To, class From>
__forceinline__ To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace cuda_host

__forceinline__ float __uint_as_float(unsigned x) { return cuda_host::bits<float>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return cuda_host::bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_host::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_host::bits<int>(x); }

#define CUDA_HOST_MIN_MAX(type)                             \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
CUDA_HOST_MIN_MAX(int)
CUDA_HOST_MIN_MAX(unsigned)
CUDA_HOST_MIN_MAX(long)
CUDA_HOST_MIN_MAX(unsigned long)
CUDA_HOST_MIN_MAX(long long)
CUDA_HOST_MIN_MAX(unsigned long long)
#undef CUDA_HOST_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

using std::isfinite;
using std::isinf;
using std::isnan;

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+m"(product));  // never fused with a sum
  return product;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---------------------------------------------------------------------------------------------------------------
// The host's side

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount)
    *value = 4;
  else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *value = static_cast<int>(cuda_host::shared_memory_limit());
  else
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
