// y = concat(attention over the first P channels, the others), then ReLU: short images, in one launch.
//
// The first blocks of the grid attend (shsa_block.cuh), the others copy the channels from P on, so that the
// memory traffic of the copy hides the latency of attention.
//
// Bytes of global memory: x and y once, and W once per attending block (from L2). Per image 2 N (O P + N (D +
// P)) floating-point operations, at most 2 % of a tensor core's time of the copy: latency and bytes are the
// limits.
#include <algorithm>
#include <launch.cuh>

#include "shsa_block.cuh"

namespace shvit::cuda {

namespace {

struct Grid {
  int images, warps;      // of an attending block
  int64_t attending;      // blocks
  int64_t parts, values;  // copying blocks per image, and values that each copies
};

constexpr int64_t kCopiedBytes = 16 << 10;  // per block: enough to be worth a block, and blocks enough for all

int images_per_block(const Sizes& s) { return s.N <= kTile && s.B >= 256 ? 2 : 1; }

int warps_per_block(const Sizes& s) { return s.N <= 64 ? 4 : 8; }

template <class T>
Grid grid_of(const ShsaForwardParams& p) {
  const Sizes& s = p.sizes;
  Grid g;
  g.images = images_per_block(s);
  g.warps = warps_per_block(s);
  g.attending = (s.B + g.images - 1) / g.images;
  g.values = kCopiedBytes / sizeof(T);
  const int64_t copied = s.C == s.P ? 0 : static_cast<int64_t>(p.channels_last ? s.C : s.C - s.P) * s.N;
  g.parts = (copied + g.values - 1) / g.values;
  return g;
}

template <class T>
__device__ __forceinline__ T relu_value(T x) {
  return from_float<T>(ptx::max_nan(to_float(x), 0.0f));
}

template <class T>
__device__ __forceinline__ void relu_chunk(Chunk<T>& chunk) {
  if constexpr (sizeof(T) == 4) {
    for (T& x : chunk.values) x = relu_value(x);
  } else {
    uint32_t words[4];
    memcpy(words, &chunk, sizeof(words));
    for (uint32_t& word : words) word = ptx::relu2<T>(word);
    memcpy(&chunk, words, sizeof(words));
  }
}

// Which values of a run of an image are copied: all, or with channels_last those of the channels from P on.
struct Everything {
  __device__ bool whole(int64_t, int) const { return true; }
  __device__ bool one(int64_t) const { return true; }
};

struct FromChannel {
  int P, C;
  __device__ bool whole(int64_t i, int count) const {
    const int channel = i % C;
    return channel >= P && channel + count <= C;
  }
  __device__ bool one(int64_t i) const { return i % C >= P; }
};

// Copies values begin..end of an image.
template <class T, class Which>
__device__ void copy_values(const T* from, T* to, int64_t begin, int64_t end, bool relu, Which which) {
  constexpr int kValues = Chunk<T>::kValues, kAtOnce = 4;
  const auto copy_one = [&](int64_t i) {
    if (which.one(i)) to[i] = relu ? relu_value(from[i]) : from[i];
  };
  const auto address = reinterpret_cast<uint64_t>(from + begin);
  const bool aligned_alike = (address - reinterpret_cast<uint64_t>(to + begin)) % 16 == 0;
  // Values in front of the first 16-byte boundary; all, if the two images have none in common.
  const int64_t before =
      aligned_alike ? min(end - begin, static_cast<int64_t>(-address % 16 / sizeof(T))) : end - begin;
  const int64_t first = begin + before, last = first + (end - first) / kValues * kValues;
  for (int64_t i = begin + threadIdx.x; i < first; i += blockDim.x) copy_one(i);
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kValues;
  for (int64_t i = first + threadIdx.x * kValues; i < last; i += kAtOnce * stride) {
    Chunk<T> chunks[kAtOnce];
    bool whole[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t here = i + n * stride;
      whole[n] = here < last && which.whole(here, kValues);
      if (whole[n]) chunks[n] = load_chunk(from + here);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int64_t here = i + n * stride;
      if (whole[n]) {
        if (relu) relu_chunk(chunks[n]);
        store_chunk(to + here, chunks[n]);
      } else if (here < last) {
        for (int j = 0; j < kValues; ++j) copy_one(here + j);
      }
    }
  }
  for (int64_t i = last + threadIdx.x; i < end; i += blockDim.x) copy_one(i);
}

template <bool ChannelsLast, class T>
__device__ void copy_rest(const ShsaForwardParams& p, const Grid& grid, int64_t block) {
  const Sizes& s = p.sizes;
  const int64_t image = block / grid.parts, part = block % grid.parts;
  const int64_t size = static_cast<int64_t>(s.C) * s.N;
  const T* from = static_cast<const T*>(p.x) + image * size;
  T* to = static_cast<T*>(p.y) + image * size;
  const int64_t begin = (ChannelsLast ? 0 : static_cast<int64_t>(s.P) * s.N) + part * grid.values;
  const int64_t end = min(size, begin + grid.values);
  if (ChannelsLast) {
    copy_values(from, to, begin, end, p.relu, FromChannel{s.P, s.C});
  } else {
    copy_values(from, to, begin, end, p.relu, Everything{});
  }
}

template <class A, bool ChannelsLast>
__global__ void __launch_bounds__(256) shsa_forward_kernel(ShsaForwardParams p, Grid grid) {
  using T = typename A::T;
  const Sizes& s = p.sizes;
  if (blockIdx.x >= grid.attending) {
    copy_rest<ChannelsLast, T>(p, grid, blockIdx.x - grid.attending);
    return;
  }
  const ShortLayout layout(s, ChannelsLast, grid.images, grid.warps);
  const Group group = group_of_warps(grid.warps / grid.images);
  const ShortMemory<T> memory(layout, ptx::shared_memory<T>(), group.index);
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * grid.images + group.index;
  const bool present = wanted < s.B;
  const int64_t image = present ? wanted : s.B - 1;  // behind the end: all threads take part in the barriers
  attend<A, ChannelsLast>(p, group, layout, memory, image, present);
  __syncthreads();
  if (!present) return;
  T* y = static_cast<T*>(p.y) + image * s.C * s.N;
  if (ChannelsLast) {
    store_matrix(group, memory.z, layout.ld_z, y, s.C, s.N, s.P);
  } else {
    store_matrix(group, memory.z, layout.ld_z, y, s.N, s.P, s.N);
  }
}

template <class A, bool ChannelsLast>
const char* start(const ShsaForwardParams& p, void* stream) {
  using T = typename A::T;
  const Grid grid = grid_of<T>(p);
  const int64_t blocks = grid.attending + p.sizes.B * grid.parts;
  if (blocks > INT32_MAX) return "more images than a grid has blocks";
  const size_t bytes = ShortLayout(p.sizes, ChannelsLast, grid.images, grid.warps).bytes<T>();
  return launch(shsa_forward_kernel<A, ChannelsLast>, dim3(static_cast<unsigned>(blocks)), grid.warps * kWarp,
                bytes, stream, p, grid);
}

}  // namespace

bool shsa_forward_fits(const Sizes& s, Type type) {
  if (s.N > kMostShortTokens) return false;
  size_t bytes = 0;
  for (const bool channels_last : {false, true}) {
    const ShortLayout layout(s, channels_last, images_per_block(s), warps_per_block(s));
    bytes = std::max(bytes, type == Type::kFloat32 ? layout.bytes<float>() : layout.bytes<__half>());
  }
  return bytes <= static_cast<size_t>(shared_memory_limit());
}

const char* shsa_forward(const ShsaForwardParams& params, Type type, void* stream) {
  if (params.sizes.B == 0) return nullptr;
  return with_arithmetic(type, params.precision, [&](auto arithmetic) {
    using A = decltype(arithmetic);
    return params.channels_last ? start<A, true>(params, stream) : start<A, false>(params, stream);
  });
}

}  // namespace shvit::cuda
