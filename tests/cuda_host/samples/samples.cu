// Small kernels for the tests of the harness, right and deliberately broken.
#include <launch.cuh>
#include <ptx.cuh>

#define SAMPLE extern "C" __attribute__((visibility("default")))

namespace {

// What is wrong with a kernel.
enum Broken {
  kNothing,
  // sum_rows
  kNoBarrierBeforeRead,
  kNoBarrierBeforeWrite,
  kOneColumnTooMany,
  kOneRowTooMany,
  kPastSharedMemory,
  kAbsentLane,
  kDivergentBarrier,
  kDifferentOperations,
  kMisaligned,
  kPastArray,
  kEveryBlockWrites,
  kReadsWhatBlocksWrite,
  // product
  kNoWait,
  kNoWarpBarrier,
  kWrongRows,
  kMisalignedRows,
  kMisalignedCopy,
  kRowsOutOfSharedMemory,
  kWriteUnderCopy,
};

constexpr unsigned kAll = 0xffffffff;

// y[r] = the sum over columns of x[r], one row after another by all threads of a block, 64 rows for each block.
__global__ void __launch_bounds__(128)
    sum_rows(const float* x, float* y, int rows, int columns, Broken broken) {
  float* partial = ptx::shared_memory<float>();  // one per warp
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int end = min(rows, static_cast<int>(blockIdx.x + 1) * 64) + (broken == kOneRowTooMany);
  for (int row = blockIdx.x * 64; row < end; ++row) {
    float sum = 0;
    for (int c = thread; c < columns + (broken == kOneColumnTooMany); c += blockDim.x)
      sum += x[row * columns + c];
    if (broken == kAbsentLane && lane == 31) continue;
    if (broken == kDifferentOperations && lane == 7) __ballot_sync(kAll, 1);
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
    if (broken == kPastSharedMemory) partial[warp + 1] = sum;
    if (lane == 0) partial[warp] = sum;
    if (broken == kMisaligned && lane == 0) sum = reinterpret_cast<const float2*>(partial + 1)->x;
    if (broken != kNoBarrierBeforeRead && !(broken == kDivergentBarrier && warp == 2)) __syncthreads();
    if (thread == 0) {
      float copies[4];
      for (int w = 0; w < 4 + (broken == kPastArray); ++w) copies[w] = partial[w % 4];
      const float total = (copies[0] + copies[1]) + (copies[2] + copies[3]);
      y[broken == kEveryBlockWrites ? 0 : row] = total;
      if (broken == kReadsWhatBlocksWrite && row > 0) y[row] += y[row - 1];
    }
    if (broken != kNoBarrierBeforeWrite) __syncthreads();
  }
}

struct Product {
  const void *a, *b;  // [images][16][16], [16][16]
  float* d;           // [images][16][16]
  Broken broken;
};

// d = a b: a warp for each image.
template <class T>
__global__ void __launch_bounds__(64) product(Product p) {
  constexpr int kSize = 256;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, image = blockIdx.x * 2 + warp;
  T* a = ptx::shared_memory<T>() + 2 * kSize * warp;
  T* b = a + kSize;
  const T* global_a = static_cast<const T*>(p.a) + image * kSize + (p.broken == kMisalignedCopy);
  ptx::cp_async<16>(a + lane * 8, global_a + lane * 8);
  ptx::cp_async_commit();
  const T* global_b = static_cast<const T*>(p.b);
  ptx::cp_async<8>(b + lane * 8, global_b + lane * 8);
  ptx::cp_async<4>(b + lane * 8 + 4, global_b + lane * 8 + 4);
  ptx::cp_async<4>(b + lane * 8 + 6, global_b + lane * 8 + 6);
  ptx::cp_async_commit();
  if (p.broken == kWriteUnderCopy) a[lane * 8] = a[lane * 8 + 1];
  if (p.broken == kNoWait) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
  if (p.broken != kNoWarpBarrier) __syncwarp();
  uint32_t left[4], right[4];
  const int row = p.broken == kWrongRows ? lane / 2 : lane % 16;
  const T* rows = a + row * 16 + lane / 16 * 8;
  if (p.broken == kMisalignedRows) ++rows;
  if (p.broken == kRowsOutOfSharedMemory) rows += 2 * kSize;
  ptx::ldmatrix_x4(left, rows);
  ptx::ldmatrix_x4_trans(right, b + lane % 16 * 16 + lane / 16 * 8);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    ptx::mma_m16n8k16<T>(d, left, {right[2 * half], right[2 * half + 1]});
    for (int i = 0; i < 4; ++i)
      p.d[image * kSize + (lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

// d = a b with a [16][8] and b [8][8] of float32 as it is, one warp.
__global__ void product_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) right[i] = __float_as_uint(b[(t + i * 4) * 8 + g]);
  float sums[4] = {};
  ptx::mma_m16n8k8_tf32(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// Two 8 x 8 matrices to y[2][8][8], as ldmatrix deals them out.
__global__ void load_two(const uint32_t* x, uint32_t* y, bool transposed) {
  auto* matrices = ptx::shared_memory<uint32_t>();
  matrices[threadIdx.x] = x[threadIdx.x];
  matrices[threadIdx.x + 32] = x[threadIdx.x + 32];
  __syncwarp();
  uint32_t r[2];
  const uint32_t* row = matrices + threadIdx.x % 16 * 4;
  transposed ? ptx::ldmatrix_x2_trans(r, row) : ptx::ldmatrix_x2(r, row);
  for (int i = 0; i < 2; ++i) y[i * 32 + threadIdx.x] = r[i];
}

// The first `valid` bytes of each 16 of x, and zeros.
__global__ void copy_some(const uint4* x, uint4* y, int valid) {
  auto* copies = ptx::shared_memory<uint4>();
  ptx::cp_async<16>(copies + threadIdx.x, x + threadIdx.x, valid);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  y[threadIdx.x] = copies[threadIdx.x];
}

// What each lane gets, in rows of y[...][32].
__global__ void exchange(int* y) {
  const int lane = threadIdx.x;
  int row = 0;
  const auto put = [&](int value) { y[row++ * 32 + lane] = value; };
  put(__shfl_sync(kAll, lane, 5));
  put(__shfl_sync(kAll, lane, lane + 1, 8));
  put(__shfl_xor_sync(kAll, lane, 3));
  put(__shfl_down_sync(kAll, lane, 2));
  put(__shfl_down_sync(kAll, lane, 1, 4));
  put(__shfl_up_sync(kAll, lane, 4));
  put(__ballot_sync(kAll, lane % 3 == 0));
  put(__any_sync(kAll, lane == 9));
  put(__any_sync(kAll, lane == 32));
  put(__all_sync(kAll, lane < 32));
  put(__all_sync(kAll, lane != 9));
  put(lane < 8 ? __shfl_xor_sync(0x000000ff, lane, 1) : __shfl_xor_sync(0xffffff00, lane, 2));
}

template <class T>
const char* run_product(const Product& p, int images) {
  return shvit::launch(product<T>, dim3(images / 2), 64, 2048, nullptr, p);
}

}  // namespace

SAMPLE const char* sample_sum_rows(const float* x, float* y, int rows, int columns, int broken) {
  return shvit::launch(sum_rows, dim3((rows + 63) / 64), 128, 16, nullptr, x, y, rows, columns,
                       static_cast<Broken>(broken));
}

SAMPLE const char* sample_product_float16(const void* a, const void* b, float* d, int images, int broken) {
  return run_product<__half>({a, b, d, static_cast<Broken>(broken)}, images);
}

SAMPLE const char* sample_product_bfloat16(const void* a, const void* b, float* d, int images, int broken) {
  return run_product<__nv_bfloat16>({a, b, d, static_cast<Broken>(broken)}, images);
}

SAMPLE const char* sample_product_tf32(const float* a, const float* b, float* d) {
  return shvit::launch(product_tf32, dim3(1), 32, 0, nullptr, a, b, d);
}

SAMPLE const char* sample_load_two(const uint32_t* x, uint32_t* y, bool transposed) {
  return shvit::launch(load_two, dim3(1), 32, 256, nullptr, x, y, transposed);
}

SAMPLE const char* sample_copy_some(const uint4* x, uint4* y, int valid) {
  return shvit::launch(copy_some, dim3(1), 32, 512, nullptr, x, y, valid);
}

SAMPLE const char* sample_exchange(int* y) { return shvit::launch(exchange, dim3(1), 32, 0, nullptr, y); }

SAMPLE const char* sample_launch(unsigned blocks, int threads, size_t shared_bytes) {
  return shvit::launch(exchange, dim3(blocks), threads, shared_bytes, nullptr, nullptr);
}

// Conversions and arithmetic of one value

SAMPLE unsigned short sample_to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }
SAMPLE float sample_from_float16(unsigned short x) { return __half2float(__ushort_as_half(x)); }
SAMPLE unsigned short sample_to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
SAMPLE float sample_from_bfloat16(unsigned short x) { return __bfloat162float(__ushort_as_bfloat16(x)); }
SAMPLE uint32_t sample_to_tf32(float x) { return ptx::to_tf32(x); }
SAMPLE uint32_t sample_relu2_float16(uint32_t x) { return ptx::relu2<__half>(x); }
SAMPLE uint32_t sample_relu2_bfloat16(uint32_t x) { return ptx::relu2<__nv_bfloat16>(x); }
SAMPLE float sample_max_nan(float a, float b) { return ptx::max_nan(a, b); }
SAMPLE float sample_exp2_approx(float x) { return ptx::exp2_approx(x); }
