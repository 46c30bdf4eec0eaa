// Twin of csrc/cuda/device/ptx.cuh: every instruction of that file, with its meaning there, on a processor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace ptx {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_host::shared_memory());
}

// ---------------------------------------------------------------------------------------------------------------
// Tensor cores

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_host::mma_float16(d, a, b);
}
template <>
__forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  cuda_host::mma_bfloat16(d, a, b);
}

__forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_host::mma_tf32(d, a, b);
}

// cvt.rna: to nearest, ties away from zero.
inline uint32_t to_tf32(float x) { return isnan(x) ? 0x7fffffffu : (__float_as_uint(x) + 0x1000u) & ~0x1fffu; }

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  cuda_host::load_matrices<4, false>(r, row);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  cuda_host::load_matrices<4, true>(r, row);
}
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  cuda_host::load_matrices<2, false>(r, row);
}
__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  cuda_host::load_matrices<2, true>(r, row);
}

// ---------------------------------------------------------------------------------------------------------------
// Asynchronous copies

template <int Bytes>
__forceinline__ void cp_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  cuda_host::copy_async(shared, global, Bytes, valid);
}

__forceinline__ void cp_async_commit() { cuda_host::copy_async_commit(); }

template <int Pending>
__forceinline__ void cp_async_wait() {
  cuda_host::copy_async_wait(Pending);
}

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic

inline float max_nan(float a, float b) {
  return isnan(a) || isnan(b) ? __uint_as_float(0x7fffffff) : max(a, b);
}

template <class T>
uint32_t relu2(uint32_t x) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t bits = x >> shift & 0xffff, magnitude = bits & 0x7fff;
    const bool nan = magnitude > (std::is_same_v<T, __half> ? 0x7c00 : 0x7f80);
    result |= (nan ? 0x7fff : bits == magnitude ? bits : 0) << shift;
  }
  return result;
}

inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? 0 : x; }

inline float exp2_approx(float x) { return flush_subnormal(exp2f(x)); }

// ---------------------------------------------------------------------------------------------------------------
// Programmatic dependent launch: here a kernel starts when the one in front has ended.

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace ptx
