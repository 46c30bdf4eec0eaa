// Products of float32 on tensor cores, nearly exact: each operand is the sum of two TF32 values, and of the
// four products of these only that of the two small ones is left out. What is lost is a few times 2^-24 of a
// product of entries, at three instructions for one.
#pragma once

#include "tile.cuh"

namespace shvit::cuda {

struct SplitTf32 {
  using Value = float;
  static constexpr int kStep = Tf32::kStep;
  struct Left {
    uint32_t high[4], low[4];
  };
  struct Right {
    uint32_t high[4], low[4];  // [half][2]
  };

  template <class Fragment>
  static __device__ __forceinline__ Fragment split(const float (&values)[4]) {
    Fragment f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.high[i] = ptx::to_tf32(values[i]);
      f.low[i] = ptx::to_tf32(values[i] - __uint_as_float(f.high[i]));
    }
    return f;
  }

  // The places of Tf32.
  template <class Matrix>
  static __device__ __forceinline__ Left left(Matrix m, int i, int k) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    return split<Left>({m.at(i + g, k + 2 * t), m.at(i + g + 8, k + 2 * t), m.at(i + g, k + 2 * t + 1),
                        m.at(i + g + 8, k + 2 * t + 1)});
  }
  template <class Matrix>
  static __device__ __forceinline__ Right right(Matrix m, int i, int k) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    return split<Right>({m.at(i + g, k + 2 * t), m.at(i + g, k + 2 * t + 1), m.at(i + g + 8, k + 2 * t),
                         m.at(i + g + 8, k + 2 * t + 1)});
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Left& a, const Right& b, int half) {
    const uint32_t high[2] = {b.high[2 * half], b.high[2 * half + 1]};
    const uint32_t low[2] = {b.low[2 * half], b.low[2 * half + 1]};
    // Tensor cores cut the bits that a sum has no place for, always downwards: no long sums there.
    float part[4] = {};
    ptx::mma_m16n8k8_tf32(part, a.low, high);
    ptx::mma_m16n8k8_tf32(part, a.high, low);
    ptx::mma_m16n8k8_tf32(part, a.high, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
};

// For sums that have to be those of float32 where the tensors are of 16 bits; float32 tensors take no risk.
template <class T>
using NearlyExact = std::conditional_t<sizeof(T) == 2, SplitTf32, Float>;

// product, but sums of 32 terms are made apart before they are added: errors then grow with the root of their
// number, not of all terms.
template <class Op, int Pairs, class LeftMatrix, class RightMatrix>
__device__ __forceinline__ void add_product(Sums<Pairs>& sums, LeftMatrix left, int row, RightMatrix right,
                                            int column, int depth, int pairs) {
  constexpr int kTerms = 32;
#pragma unroll 1
  for (int first = 0; first < depth; first += kTerms) {
    Sums<Pairs> part;
    clear<Pairs>(part);
    product<Op, Pairs>(part, left.from(first), row, right.from(first), column, min(kTerms, depth - first),
                       pairs);
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] += part[j][i];
  }
}

}  // namespace shvit::cuda
