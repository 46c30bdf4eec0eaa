// Mean and sum of centred squares of every part of every image (long.cuh): one read of x1, before the kernels
// that work on tiles of long images.
#include "long.cuh"

namespace shvit::cuda {

namespace {

template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kPartThreads) statistics_kernel(const T* x, Sizes s, PartStatistics* parts) {
  float* scratch = ptx::shared_memory<float>();
  const Group group = whole_block();
  const int64_t of_image = statistics_parts(s), count = static_cast<int64_t>(s.P) * s.N;
  const int64_t image = blockIdx.x / of_image, part = blockIdx.x % of_image;
  const int values = static_cast<int>(min(static_cast<int64_t>(kPartValues), count - part * kPartValues));
  const T* from = x + image * s.C * s.N;
  float mine[kPartValuesEach], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPartValuesEach; ++i) {
    const int value = i * kPartThreads + group.rank;
    const int64_t index = part * kPartValues + value;
    const int64_t place = ChannelsLast ? index / s.P * s.C + index % s.P : index;
    mine[i] = value < values ? to_float(from[place]) : 0.0f;
    sum += mine[i];
  }
  const float mean = group_sum(group, sum, scratch) / static_cast<float>(values);
  float rest = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPartValuesEach; ++i) {
    const float centred = i * kPartThreads + group.rank < values ? mine[i] - mean : 0.0f;
    rest += centred;
    squares += centred * centred;
  }
  squares = group_sum(group, squares, scratch + kPartThreads / kWarp);
  rest = group_sum(group, rest, scratch + 2 * kPartThreads / kWarp);
  // The sum of large values was rounded coarsely; that of what the mean leaves is not.
  if (group.rank == 0) parts[blockIdx.x] = {mean + rest / static_cast<float>(values), squares};
}

template <bool ChannelsLast, class T>
const char* start(const void* x, const Sizes& s, PartStatistics* parts, void* stream) {
  dim3 grid;
  if (const char* error = grid_of(s.B * statistics_parts(s), grid)) return error;
  return launch(statistics_kernel<ChannelsLast, T>, grid, kPartThreads,
                3 * kPartThreads / kWarp * sizeof(float), stream, static_cast<const T*>(x), s, parts);
}

}  // namespace

const char* measure_images(const void* x, const Sizes& s, bool channels_last, PartStatistics* parts, Type type,
                           void* stream) {
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return channels_last ? start<true, T>(x, s, parts, stream) : start<false, T>(x, s, parts, stream);
  });
}

}  // namespace shvit::cuda
