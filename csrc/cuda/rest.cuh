// The channels that take no part in attention: values of the result are functions of the values of other images
// at the same place.
#pragma once

#include "tile.cuh"

namespace shvit::cuda {

// A block copies this much: enough to be worth a block, little enough to spread a few images over a device.
constexpr int kRestBytes = 16 << 10;

// Blocks per image that map_rest needs.
__host__ __device__ inline int64_t rest_blocks(const Sizes& s, bool channels_last, size_t value_bytes) {
  if (s.C == s.P) return 0;
  const int64_t bytes = static_cast<int64_t>(channels_last ? s.C : s.C - s.P) * s.N * value_bytes;
  return (bytes + kRestBytes - 1) / kRestBytes;
}

// ReLU's gradient: that of its output where the output was not below or at zero.
struct WherePositive {
  template <class T>
  __device__ T operator()(T gradient, T output) const {
    return to_float(output) <= 0.0f ? from_float<T>(0.0f) : gradient;
  }
};

struct Relu {
  template <class T>
  __device__ T operator()(T x, T) const {
    return from_float<T>(ptx::max_nan(to_float(x), 0.0f));
  }
};

struct First {
  template <class T>
  __device__ T operator()(T first, T) const {
    return first;
  }
};

struct Zero {
  template <class T>
  __device__ T operator()(T, T) const {
    return from_float<T>(0.0f);
  }
};

// to = f(first, second) in the channels from P on, by block number `block` of B * rest_blocks. A source that f
// does not look at may be null.
template <bool ChannelsLast, class T, class F>
__device__ void map_rest(const Sizes& s, int64_t block, const T* first, const T* second, T* to, F f) {
  constexpr int kValues = Chunk<T>::kValues, kAtOnce = 4, kBlockValues = kRestBytes / sizeof(T);
  const int64_t size = static_cast<int64_t>(s.C) * s.N, blocks = rest_blocks(s, ChannelsLast, sizeof(T));
  const int64_t image = block / blocks, part = block % blocks;
  const int64_t begin = (ChannelsLast ? 0 : static_cast<int64_t>(s.P) * s.N) + part * kBlockValues;
  const int count = static_cast<int>(min(size - begin, static_cast<int64_t>(kBlockValues)));
  const int first_channel = static_cast<int>(begin % s.C);  // of the run, with channels_last
  const auto run_of = [&](auto* image_tensor) {
    return image_tensor ? image_tensor + image * size + begin : nullptr;
  };
  const T *a = run_of(first), *b = run_of(second);
  T* r = run_of(to);
  const auto all_rest = [&](int i, int values) {
    const int channel = (first_channel + i) % s.C;
    return !ChannelsLast || (channel >= s.P && channel + values <= s.C);
  };
  const auto map_one = [&](int i) {
    if (all_rest(i, 1)) r[i] = f(a ? a[i] : T(), b ? b[i] : T());
  };
  const auto address = [](const T* p) { return reinterpret_cast<uint64_t>(p); };
  const bool alike = (!a || (address(a) - address(r)) % 16 == 0) && (!b || (address(b) - address(r)) % 16 == 0);
  // Values in front of the first 16-byte boundary; all, if the images have none in common.
  const int before = alike ? min(count, static_cast<int>(-address(r) % 16 / sizeof(T))) : count;
  const int last = before + (count - before) / kValues * kValues;
  const int stride = blockDim.x * kValues;
  for (int i = threadIdx.x; i < before; i += blockDim.x) map_one(i);
  for (int i = last + threadIdx.x; i < count; i += blockDim.x) map_one(i);
  for (int start = before + threadIdx.x * kValues; start < last; start += kAtOnce * stride) {
    Chunk<T> chunks_a[kAtOnce] = {}, chunks_b[kAtOnce] = {};
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = start + n * stride;
      if (a && i < last) chunks_a[n] = load_chunk(a + i);
      if (b && i < last) chunks_b[n] = load_chunk(b + i);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = start + n * stride;
      if (i >= last) break;
      if (!all_rest(i, kValues)) {
        for (int j = 0; j < kValues; ++j) map_one(i + j);
      } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j)
          chunks_a[n].values[j] = f(chunks_a[n].values[j], chunks_b[n].values[j]);
        store_chunk(r + i, chunks_a[n]);
      }
    }
  }
}

}  // namespace shvit::cuda
