// The projection's rows as kernels hold them on chip: queries, keys and values, each padded to a multiple of 16
// rows, and the batch normalisation behind it as a factor and an offset per row.
#pragma once

#include "tile.cuh"

namespace shvit::cuda {

// The projection's output that row o of the padded projection holds, or -1 in the padding.
__device__ __forceinline__ int projected_channel(const Sizes& s, int o) {
  const int D = padded(s.D);
  if (o < D) return o < s.D ? o : -1;
  o -= D;
  if (o < D) return o < s.D ? s.D + o : -1;
  o -= D;
  return o < s.P ? 2 * s.D + o : -1;
}

// A value of a parameter [O] or [P]; `otherwise` where the parameter is absent.
template <class T>
__device__ __forceinline__ float parameter(const void* values, int i, float otherwise) {
  return values ? to_float(static_cast<const T*>(values)[i]) : otherwise;
}

// Of shared memory: factor and offset of the padded projection's rows, weight and bias of the norm.
struct Vectors {
  float *factor, *offset, *norm_weight, *norm_bias;

  static __host__ __device__ int floats(const Sizes& s) { return 4 * padded(s.D) + 4 * padded(s.P); }
  __device__ Vectors(const Sizes& s, float* base)
      : factor(base),
        offset(factor + 2 * padded(s.D) + padded(s.P)),
        norm_weight(offset + 2 * padded(s.D) + padded(s.P)),
        norm_bias(norm_weight + padded(s.P)) {}
};

template <class T>
__device__ void load_vectors(const ShsaForwardParams& p, const Vectors& v) {
  const int rows = 2 * padded(p.sizes.D) + padded(p.sizes.P);
  for (int o = threadIdx.x; o < rows; o += blockDim.x) {
    const int channel = projected_channel(p.sizes, o);
    float factor = 1.0f, offset = 0.0f;
    if (channel >= 0) {
      offset = parameter<T>(p.qkv_bias, channel, 0.0f);
      if (p.bn_mean) {
        const bool wide = p.bn_statistics_float32;
        const float mean =
            wide ? parameter<float>(p.bn_mean, channel, 0.0f) : parameter<T>(p.bn_mean, channel, 0.0f);
        const float variance =
            wide ? parameter<float>(p.bn_var, channel, 0.0f) : parameter<T>(p.bn_var, channel, 0.0f);
        factor = parameter<T>(p.bn_weight, channel, 1.0f) * __frsqrt_rn(variance + p.bn_eps);
        offset = (offset - mean) * factor + parameter<T>(p.bn_bias, channel, 0.0f);
      }
    }
    v.factor[o] = factor;
    v.offset[o] = offset;
  }
  if (p.norm_weight) {
    for (int c = threadIdx.x; c < p.sizes.P; c += blockDim.x) {
      v.norm_weight[c] = parameter<T>(p.norm_weight, c, 1.0f);
      v.norm_bias[c] = parameter<T>(p.norm_bias, c, 0.0f);
    }
  }
}

}  // namespace shvit::cuda
