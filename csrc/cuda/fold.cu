// Sums of the parts that the backward kernels leave, in the order of the parts; and the backward of folding
// batch normalisation with its batch statistics into the projection.
//
// A block sums neighbouring columns by kSlices warps, each over a slice of the parts, so that reading them is
// one round of loads: a launch's latency, not bytes, is the limit (parts lie in L2).
#include <algorithm>
#include <launch.cuh>

#include "projection.cuh"

namespace shvit::cuda {

namespace {

constexpr int kSlices = 8, kThreads = kSlices * kWarp;

struct Slice {
  int begin, end;
  __device__ Slice(int count, int index) {
    const int each = (count + kSlices - 1) / kSlices;
    begin = min(index * each, count);
    end = min(begin + each, count);
  }
};

// Of this lane's column, the sum over all rows: f(row) is its value in a row, each warp takes a slice of the
// rows. All threads of the block must call it, and again only after a barrier; warp 0 gets the result.
// `scratch`: kThreads.
template <class F>
__device__ float column_sum(int rows, float* scratch, F f) {
  const Slice slice(rows, warp_index());
  float sum = 0.0f;
#pragma unroll 8
  for (int row = slice.begin; row < slice.end; ++row) sum += f(row);
  scratch[threadIdx.x] = sum;
  __syncthreads();
  sum = 0.0f;
  if (warp_index() == 0)
    for (int i = 0; i < kSlices; ++i) sum += scratch[i * kWarp + lane_index()];
  return sum;
}

__device__ void put(const Output& output, int64_t i, float value) {
  switch (output.type) {
    case Type::kFloat16:
      static_cast<__half*>(output.data)[i] = from_float<__half>(value);
      break;
    case Type::kBFloat16:
      static_cast<__nv_bfloat16*>(output.data)[i] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(output.data)[i] = value;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Reductions

struct Reductions {
  Reduction all[kMostReductions];
  int64_t first_block[kMostReductions + 1];
};

__global__ void __launch_bounds__(kThreads) reduce_kernel(Reductions reductions) {
  int which = 0;
  while (blockIdx.x >= reductions.first_block[which + 1]) ++which;
  const Reduction& r = reductions.all[which];
  const int64_t column = (blockIdx.x - reductions.first_block[which]) * kWarp + lane_index();
  const bool inside = column < r.count;
  const float sum = column_sum(r.count_of_parts, ptx::shared_memory<float>(),
                               [&](int part) { return inside ? r.parts[part * r.stride + column] : 0.0f; });
  if (warp_index() == 0 && inside) put(r.total, column, sum);
}

// ---------------------------------------------------------------------------------------------------------------
// Fold backward. With f = gamma / sqrt(s2 + eps), dW' and db' the gradients of what attention takes, f (W z -
// m) + beta:
//
//     df = sum_p dW' W - m db'   dm = -f db'   ds2 = -df f / (2 (s2 + eps))
//     dW = f dW' + dm mean(z)^T + 2 ds2 W cov   dgamma = df / sqrt(s2 + eps)   dbeta = db'
//     dmean = W^T dm   dcov = W^T diag(ds2) W

// A block has a row of W: everything but dmean and dcov, for which it leaves dm and ds2 of its row.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_rows_kernel(FoldBackwardParams p) {
  float* scratch = ptx::shared_memory<float>();
  float *dw = scratch + kThreads, *product = dw + p.P;
  const Group block = whole_block();
  const int o = blockIdx.x;
  const T* w = static_cast<const T*>(p.weight) + static_cast<int64_t>(o) * p.P;
  for (int first = 0; first < p.P; first += kWarp) {
    const int column = first + lane_index();
    const bool inside = column < p.P;
    const float sum = column_sum(p.parts, scratch, [&](int part) {
      return inside ? p.dweight_parts[(static_cast<int64_t>(part) * p.O + o) * p.P + column] : 0.0f;
    });
    if (warp_index() == 0 && inside) dw[column] = sum;
    __syncthreads();
    if (!p.dweight.data) continue;
    const float row = column_sum(
        p.P, scratch, [&](int i) { return inside ? to_float(w[i]) * p.z_cov[i * p.P + column] : 0.0f; });
    if (warp_index() == 0 && inside) product[column] = row;
    __syncthreads();
  }
  float dbias = 0.0f, along = 0.0f;
  for (int part = threadIdx.x; part < p.parts; part += kThreads)
    dbias += p.dbias_parts[static_cast<int64_t>(part) * p.O + o];
  for (int i = threadIdx.x; i < p.P; i += kThreads) along += to_float(w[i]) * dw[i];
  dbias = group_sum(block, dbias, scratch);
  along = group_sum(block, along, scratch + kSlices);

  const float variance = p.bn_var[o], rstd = __frsqrt_rn(variance + p.bn_eps);
  const float factor = parameter<T>(p.bn_weight, o, 1.0f) * rstd;
  const float dfactor = along - p.bn_mean[o] * dbias, dmean = -factor * dbias;
  // The statistics clamp negative rounding noise to zero, where no gradient passes.
  const float dvariance = variance > 0.0f ? -0.5f * dfactor * factor * rstd * rstd : 0.0f;
  if (p.dweight.data)
    for (int i = threadIdx.x; i < p.P; i += kThreads)
      put(p.dweight, static_cast<int64_t>(o) * p.P + i,
          factor * dw[i] + dmean * p.z_mean[i] + 2.0f * dvariance * product[i]);
  if (threadIdx.x > 0) return;
  if (p.dbn_weight.data) put(p.dbn_weight, o, dfactor * rstd);
  if (p.dbn_bias.data) put(p.dbn_bias, o, dbias);
  p.workspace[o] = dmean;
  p.workspace[p.O + o] = dvariance;
}

// A block has a row of dcov, and its entry of dmean.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_moments_kernel(FoldBackwardParams p) {
  float* scratch = ptx::shared_memory<float>();
  const int row = blockIdx.x;
  const T* weight = static_cast<const T*>(p.weight);
  for (int first = 0; first < p.P; first += kWarp) {
    const int column = first + lane_index();
    const bool inside = column < p.P;
    const float sum = column_sum(p.O, scratch, [&](int o) {
      const T* w = weight + static_cast<int64_t>(o) * p.P;
      return inside ? to_float(w[row]) * p.workspace[p.O + o] * to_float(w[column]) : 0.0f;
    });
    if (warp_index() == 0 && inside) p.dz_cov[row * p.P + column] = sum;
    __syncthreads();
  }
  float sum = 0.0f;
  for (int o = threadIdx.x; o < p.O; o += kThreads)
    sum += to_float(weight[static_cast<int64_t>(o) * p.P + row]) * p.workspace[o];
  sum = group_sum(whole_block(), sum, scratch);
  if (threadIdx.x == 0) p.dz_mean[row] = sum;
}

template <class T>
const char* start(const FoldBackwardParams& p, void* stream) {
  constexpr size_t kScratch = kThreads * sizeof(float);
  const char* error =
      launch(fold_rows_kernel<T>, dim3(p.O), kThreads, kScratch + 2 * p.P * sizeof(float), stream, p);
  if (error || !p.dz_cov) return error;
  return launch(fold_moments_kernel<T>, dim3(p.P), kThreads, kScratch, stream, p);
}

}  // namespace

const char* reduce(const Reduction* reductions, int count, void* stream) {
  Reductions all = {};
  for (int i = 0; i < count; ++i) {
    all.all[i] = reductions[i];
    all.first_block[i + 1] = all.first_block[i] + (reductions[i].count + kWarp - 1) / kWarp;
  }
  if (all.first_block[count] == 0) return nullptr;
  return launch(reduce_kernel, dim3(static_cast<unsigned>(all.first_block[count])), kThreads,
                kThreads * sizeof(float), stream, all);
}

const char* fold_backward(const FoldBackwardParams& params, Type type, void* stream) {
  switch (type) {
    case Type::kFloat16:
      return start<__half>(params, stream);
    case Type::kBFloat16:
      return start<__nv_bfloat16>(params, stream);
    default:
      return start<float>(params, stream);
  }
}

}  // namespace shvit::cuda
