// Running statistics of a batch normalisation, in one launch: PyTorch's own operators take four to six.
#include <launch.cuh>

#include "tile.cuh"

namespace shvit::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
__device__ void move(void* running, int o, float share, float aim) {
  T& value = static_cast<T*>(running)[o];
  const float old = to_float(value);
  // From the nearer end, so that a share of one leaves nothing of a large old value.
  value = from_float<T>(share < 0.5f ? old + share * (aim - old) : aim - (1 - share) * (aim - old));
}

template <class T>
__global__ void __launch_bounds__(kThreads) update_kernel(RunningStatisticsParams p) {
  const int64_t batches = *p.num_batches_tracked + 1;
  __syncthreads();
  if (threadIdx.x == 0) *p.num_batches_tracked = batches;
  if (p.count == 0) return;
  const float share = p.averages ? 1.0f / static_cast<float>(batches) : p.momentum;
  for (int o = threadIdx.x; o < p.O; o += kThreads) {
    move<T>(p.running_mean, o, share, p.mean[o]);
    move<T>(p.running_var, o, share, p.variance[o] * p.unbiased);
  }
}

}  // namespace

const char* update_running_statistics(const RunningStatisticsParams& params, Type type, void* stream) {
  return with_type(type, [&](auto value) {
    return launch(update_kernel<decltype(value)>, dim3(1), kThreads, 0, stream, params);
  });
}

}  // namespace shvit::cuda
