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

#include "rest.cuh"
#include "shsa_block.cuh"

namespace shvit::cuda {

namespace {

int images_per_block(const Sizes& s) { return s.N <= kTile && s.B >= 128 ? 2 : 1; }

int warps_per_block(const Sizes& s) { return s.N <= kFewTokens ? 4 : 8; }

template <class T, bool ChannelsLast, bool Few>
__global__ void __launch_bounds__(Few ? 128 : 256, Few && sizeof(T) == 2 ? 4 : 1)
    shsa_forward_kernel(ShsaForwardParams p, ShortLayout layout, int attending) {
  const Sizes& s = p.sizes;
  if (static_cast<int>(blockIdx.x) >= attending) {
    const T *x = static_cast<const T*>(p.x), *nothing = nullptr;
    T* y = static_cast<T*>(p.y);
    const int64_t block = static_cast<int>(blockIdx.x) - attending;
    if (p.relu) {
      map_rest<ChannelsLast>(s, block, x, nothing, y, Relu());
    } else {
      map_rest<ChannelsLast>(s, block, x, nothing, y, First());
    }
    return;
  }
  const Group group = group_of_warps(layout.warps / layout.images);
  const ShortMemory<T> memory(s, layout, ptx::shared_memory<T>(), group.index);
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * layout.images + group.index;
  const bool present = wanted < s.B;
  const int64_t image = present ? wanted : s.B - 1;  // behind the end: all threads take part in the barriers
  attend<ChannelsLast, Few, 0, 0>(p, group, layout, memory, image, present, [] {});
  __syncthreads();
  if (!present) return;
  T* y = static_cast<T*>(p.y) + image * s.C * s.N;
  if (ChannelsLast) {
    store_matrix(group, memory.z, layout.ld_z, y, s.C, s.N, s.P);
  } else {
    store_matrix(group, memory.z, layout.ld_z, y, s.N, s.P, s.N);
  }
}

template <class T, bool ChannelsLast, bool Few>
const char* start(const ShsaForwardParams& p, void* stream) {
  const Sizes& s = p.sizes;
  const ShortLayout layout(s, ChannelsLast, images_per_block(s), warps_per_block(s));
  const int64_t attending = (s.B + layout.images - 1) / layout.images;
  const int64_t blocks = attending + s.B * rest_blocks(s, ChannelsLast, sizeof(T));
  if (blocks > INT32_MAX) return "more images than a grid has blocks";
  return launch(shsa_forward_kernel<T, ChannelsLast, Few>, dim3(static_cast<unsigned>(blocks)),
                layout.warps * kWarp, layout.bytes<T>(s), stream, p, layout, static_cast<int>(attending));
}

}  // namespace

bool shsa_forward_fits(const Sizes& s, Type type) {
  if (s.N > kMostShortTokens) return false;
  size_t bytes = 0;
  for (const bool channels_last : {false, true}) {
    const ShortLayout layout(s, channels_last, images_per_block(s), warps_per_block(s));
    bytes = std::max(bytes, type == Type::kFloat32 ? layout.bytes<float>(s) : layout.bytes<__half>(s));
  }
  return bytes <= static_cast<size_t>(shared_memory_limit());
}

const char* shsa_forward(const ShsaForwardParams& params, Type type, void* stream) {
  if (params.sizes.B == 0) return nullptr;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto start_with = params.sizes.N <= kFewTokens
                                ? (params.channels_last ? start<T, true, true> : start<T, false, true>)
                                : (params.channels_last ? start<T, true, false> : start<T, false, false>);
    return start_with(params, stream);
  });
}

}  // namespace shvit::cuda
