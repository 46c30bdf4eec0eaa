// The warp's operations on matrices: the last lane to arrive puts the fragments together, and deals the result
// out.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <runtime.h>

namespace cuda_host {

namespace {

constexpr unsigned kAllLanes = 0xffffffff;

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// Reads a [16][K] and b [K][8] from the fragment of the lane with g = lane / 4 and t = lane % 4.
template <int K>
using Operands = void (*)(float (&a)[16][K], float (&b)[K][8], const Fragments& f, int g, int t);

// Sums are float32: they start at d and add the products, which are exact, in the order of rising k.
template <int K, Operands<K> operands>
void multiply(Lanes& lanes) {
  float d[16][8], a[16][K], b[K][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = f.d[i];
    operands(a, b, f, g, t);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < kWarp; ++l) {
    const auto& f = *static_cast<const Fragments*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) f.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template <float (*to_float)(unsigned short bits)>
void half_operands(float (&a)[16][16], float (&b)[16][8], const Fragments& f, int g, int t) {
  for (int high = 0; high < 2; ++high) {
    for (int i = 0; i < 4; ++i)
      a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + high] = to_float(f.a[i] >> (16 * high) & 0xffff);
    for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + high][g] = to_float(f.b[i] >> (16 * high) & 0xffff);
  }
}

inline float float16(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
inline float bfloat16(unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }

// The product ignores the bits of a float32 that TF32 does not have.
inline float tf32(uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); }

void tf32_operands(float (&a)[16][8], float (&b)[8][8], const Fragments& f, int g, int t) {
  for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(f.a[i]);
  for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = tf32(f.b[i]);
}

struct Row {
  uint32_t* r;
  const void* row;
};

template <int count, bool transposed>
void load(Lanes& lanes) {
  for (int i = 0; i < count; ++i) {
    uint16_t matrix[8][8];
    for (int j = 0; j < 8; ++j) {
      const int l = 8 * i + j;
      read_matrix_row(l, static_cast<const Row*>(lanes[l])->row, matrix[j]);
    }
    for (int l = 0; l < kWarp; ++l) {
      const int g = l / 4, t = l % 4;
      const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<const Row*>(lanes[l])->r[i] = low | high << 16;
    }
  }
}

}  // namespace

void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine = {d, a, b};
  together("mma", kAllLanes, &mine, multiply<16, half_operands<float16>>, __builtin_return_address(0));
}

void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine = {d, a, b};
  together("mma", kAllLanes, &mine, multiply<16, half_operands<bfloat16>>, __builtin_return_address(0));
}

void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine = {d, a, b};
  together("mma", kAllLanes, &mine, multiply<8, tf32_operands>, __builtin_return_address(0));
}

template <int count, bool transposed>
void load_matrices(uint32_t (&r)[count], const void* row) {
  Row mine = {r, row};
  together("ldmatrix", kAllLanes, &mine, load<count, transposed>, __builtin_return_address(0));
}

template void load_matrices<4, false>(uint32_t (&r)[4], const void* row);
template void load_matrices<4, true>(uint32_t (&r)[4], const void* row);
template void load_matrices<2, false>(uint32_t (&r)[2], const void* row);
template void load_matrices<2, true>(uint32_t (&r)[2], const void* row);

}  // namespace cuda_host
