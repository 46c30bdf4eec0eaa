// Twin of csrc/cuda/device/ptx.cuh: every instruction of that file, with its meaning there, on a processor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace ptx {

constexpr unsigned kAllLanes = 0xffffffff;

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_host::shared_memory());
}

// ---------------------------------------------------------------------------------------------------------------
// Tensor cores: the last lane to arrive puts the fragments together, multiplies, and deals the result out.

template <class T>
float to_float(unsigned short bits);
template <>
inline float to_float<__half>(unsigned short bits) {
  return __half2float(__ushort_as_half(bits));
}
template <>
inline float to_float<__nv_bfloat16>(unsigned short bits) {
  return __bfloat162float(__ushort_as_bfloat16(bits));
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// What is common to the products: d is gathered and dealt out, a [16][K] and b [K][8] come from `operands`.
template <int K, class Operands>
void multiply(cuda_host::Lanes& lanes, Operands operands) {
  float d[16][8], a[16][K], b[K][8];
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = f.d[i];
    operands(a, b, f, g, t);
  }
  cuda_host::multiply(&d[0][0], &a[0][0], &b[0][0], K);
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) f.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine = {d, a, b};
  cuda_host::together("mma_m16n8k16", kAllLanes, &mine, [](cuda_host::Lanes& lanes) {
    multiply<16>(lanes, [](float (&a)[16][16], float (&b)[16][8], const Fragments& f, int g, int t) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = to_float<T>(f.a[i] >> (16 * half) & 0xffff);
        for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + half][g] = to_float<T>(f.b[i] >> (16 * half) & 0xffff);
      }
    });
  });
}

// The product ignores the bits of a float32 that TF32 does not have.
inline float cut_to_tf32(uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); }

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine = {d, a, b};
  cuda_host::together("mma_m16n8k8_tf32", kAllLanes, &mine, [](cuda_host::Lanes& lanes) {
    multiply<8>(lanes, [](float (&a)[16][8], float (&b)[8][8], const Fragments& f, int g, int t) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = cut_to_tf32(f.a[i]);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = cut_to_tf32(f.b[i]);
    });
  });
}

// cvt.rna: to nearest, ties away from zero.
inline uint32_t to_tf32(float x) { return isnan(x) ? 0x7fffffffu : (__float_as_uint(x) + 0x1000u) & ~0x1fffu; }

struct MatrixRow {
  uint32_t* r;
  const void* row;
};

template <int Count, bool Transposed>
void ldmatrix(const char* name, uint32_t (&r)[Count], const void* row) {
  MatrixRow mine = {r, row};
  cuda_host::together(name, kAllLanes, &mine, [](cuda_host::Lanes& lanes) {
    for (int i = 0; i < Count; ++i) {
      uint16_t matrix[8][8];
      for (int j = 0; j < 8; ++j) {
        const void* row = static_cast<const MatrixRow*>(lanes[8 * i + j])->row;
        cuda_host::read_matrix_row(8 * i + j, row, matrix[j]);
      }
      for (int l = 0; l < 32; ++l) {
        const int g = l / 4, t = l % 4;
        const uint32_t low = Transposed ? matrix[2 * t][g] : matrix[g][2 * t];
        const uint32_t high = Transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        static_cast<const MatrixRow*>(lanes[l])->r[i] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<4, false>("ldmatrix_x4", r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ldmatrix<4, true>("ldmatrix_x4_trans", r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { ldmatrix<2, false>("ldmatrix_x2", r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  ldmatrix<2, true>("ldmatrix_x2_trans", r, row);
}

// ---------------------------------------------------------------------------------------------------------------
// Asynchronous copies

template <int Bytes>
void cp_async(void* shared, const void* global, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  cuda_host::copy_async(shared, global, Bytes, valid);
}

inline void cp_async_commit() { cuda_host::copy_async_commit(); }

template <int Pending>
void cp_async_wait() {
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
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = x >> (16 * half) & 0xffff;
    const float value = to_float<T>(bits);
    result |= (isnan(value) ? 0x7fffu : value > 0 ? bits : 0) << (16 * half);
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
