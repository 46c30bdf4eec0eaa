// Small kernels for the tests of the harness; the product is that of tile-sized matrices.
#include <launch.cuh>
#include <ptx.cuh>

namespace {

// y[b] = x[b] y, 16 x 16 matrices, b one per warp.
template <class T>
__global__ void __launch_bounds__(64) product(const T* x, const T* w, float* y) {
  T* a = ptx::shared_memory<T>() + threadIdx.x / 32 * 512;
  T* b = a + 256;
  const int lane = threadIdx.x % 32, image = blockIdx.x * 2 + threadIdx.x / 32;
  ptx::cp_async<16>(a + lane * 8, x + image * 256 + lane * 8);
  ptx::cp_async<16>(b + lane * 8, w + lane * 8);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  ptx::ldmatrix_x4(left, a + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4_trans(right, b + lane % 16 * 16 + lane / 16 * 8);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    ptx::mma_m16n8k16<T>(d, left, {right[2 * half], right[2 * half + 1]});
    for (int i = 0; i < 4; ++i)
      y[image * 256 + (lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* product_half(const void* x, const void* w,
                                                                           float* y, int images) {
  return shvit::launch(product<__half>, dim3(images / 2), 64, 2048, nullptr, static_cast<const __half*>(x),
                       static_cast<const __half*>(w), y);
}
