// Group normalisation with one group of an image's first P channels, in shared memory.
#pragma once

#include "tile.cuh"

namespace shvit::cuda {

// x1 lies in memory as the images do; of one channel or one token there is only one order.
inline const char* check_format(bool channels_last, bool x1_channels_last, const Sizes& s) {
  const bool alike = channels_last == x1_channels_last || s.P == 1 || s.N == 1;
  return alike ? nullptr : "x1 must have the memory format of the gradient";
}

struct Statistics {
  float mean, rstd;
};

// Mean and reciprocal deviation of `count` rows of `columns` values, by two passes over shared memory: the
// variance is summed from centred values. All threads of the block must call it, each group on its own matrix;
// `scratch` holds two floats per warp of the block.
template <class T>
__device__ Statistics image_statistics(const Group& group, const T* tile, int ld, int count, int columns,
                                       float eps, float* scratch) {
  constexpr int kValues = Chunk<T>::kValues;
  const float scale = 1.0f / (static_cast<float>(count) * static_cast<float>(columns));
  float sum = 0.0f;
  for_each_entry(group, count, columns, kValues, [&](int row, int column) {
    const Chunk<T> chunk = load_chunk(tile + row * ld + column);  // the padding is zeros
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; i += 2) part += to_float(chunk.values[i]) + to_float(chunk.values[i + 1]);
    sum += part;
  });
  const float mean = group_sum(group, sum, scratch) * scale;
  float squares = 0.0f;
  for_each_entry(group, count, columns, kValues, [&](int row, int column) {
    const Chunk<T> chunk = load_chunk(tile + row * ld + column);
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float centred = to_float(chunk.values[i]) - mean;
      part += column + i < columns ? centred * centred : 0.0f;
    }
    squares += part;
  });
  const float variance = group_sum(group, squares, scratch + blockDim.x / kWarp) * scale;
  return {mean, __frsqrt_rn(variance + eps)};
}

// z = (x - mean) * rstd * weight + bias in place; the padding stays zero. `weight` and `bias` (null: none) are
// of the channels, which are the rows or the columns of the matrix.
template <bool ChannelsAreRows, class T>
__device__ void normalise(const Group& group, T* tile, int ld, int count, int columns, Statistics statistics,
                          const float* weight, const float* bias) {
  constexpr int kValues = Chunk<T>::kValues;
  for_each_entry(group, count, columns, kValues, [&](int row, int column) {
    Chunk<T> chunk = load_chunk(tile + row * ld + column);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (column + i < columns) {
        const int channel = ChannelsAreRows ? row : column + i;
        const float shift = bias ? bias[channel] : 0.0f;
        const float z =
            (to_float(chunk.values[i]) - statistics.mean) * (statistics.rstd * weight[channel]) + shift;
        chunk.values[i] = from_float<T>(z);
      }
    }
    store_chunk(tile + row * ld + column, chunk);
  });
}

}  // namespace shvit::cuda
