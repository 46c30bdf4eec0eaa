// The face of the CUDA kernels for the code that binds them: plain parameters and functions, no CUDA header, no
// PyTorch.
//
// B images, C channels, P partial channels, D = qk_dim, N tokens, O = 2 D + P. Every function starts its
// kernels on `stream` (a cudaStream_t) and returns nullptr, or what went wrong.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shvit::cuda {

enum class Type { kFloat16, kBFloat16, kFloat32 };

struct Sizes {
  int64_t B;
  int C, P, D, N;
  int O() const { return 2 * D + P; }
};

// Arithmetic of the matrix products where the tensors are float32.
struct Precision {
  bool tf32_proj, tf32_attn;
};

// The largest shared memory of a block on the current device, in bytes.
int shared_memory_limit();

// y = concat(softmax attention of the first P channels, the others), then ReLU. Images and parameters hold the
// storage type, statistics float32; what is null is absent.
struct ShsaForwardParams {
  Sizes sizes;
  Precision precision;
  bool channels_last, relu;
  bool statistics_given;  // mean and rstd are read, instead of being computed and written where not null
  float norm_eps, bn_eps, scale;
  const void *x, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;  // [P], [P], [O, P], [O]
  // Batch normalisation of the projection with these statistics [O]; none without bn_mean. The statistics of a
  // half-precision model are half precision too: converting them would cost two more launches.
  const void *bn_weight, *bn_bias, *bn_mean, *bn_var;
  bool bn_statistics_float32;  // otherwise they hold the storage type
  void* y;
  float *mean, *rstd, *row_max, *row_sum;  // [B], [B], [B, N], [B, N]
};

// From the gradient of y to that of x beyond P, of z = norm(x1), and parts of those of the (unfolded)
// projection; norm_backward and the reduction of the parts finish. Null where not needed.
struct ShsaBackwardParams {
  Sizes sizes;
  Precision precision;
  bool channels_last, x1_channels_last, relu;
  float bn_eps, scale;
  const void *dy, *x1, *y;
  const float *mean, *rstd, *row_max, *row_sum;  // as the forward saved them
  const void *norm_weight, *norm_bias, *qkv_weight, *qkv_bias, *bn_weight, *bn_bias;
  const float *bn_mean, *bn_var;
  void* dx;              // image: the channels from P on are written
  float* dz;             // [B, P, N]
  float* dweight_parts;  // [parts, O, P]: sum of d(qkv) z^T, where qkv is what attention takes
  float* dbias_parts;    // [parts, O]: sum of d(qkv)
};

// ---------------------------------------------------------------------------------------------------------------
// shsa_long.cu: any N, through q, k and v staged in a workspace of this many bytes

size_t shsa_long_forward_workspace(const Sizes& sizes, Type type);
const char* shsa_long_forward(const ShsaForwardParams& params, void* workspace, Type type, void* stream);

// shsa_long_backward.cu: the same for the gradients; `parts` depends on the sizes only.
int shsa_long_backward_parts(const Sizes& sizes);
size_t shsa_long_backward_workspace(const Sizes& sizes, Type type);
const char* shsa_long_backward(const ShsaBackwardParams& params, void* workspace, Type type, void* stream);

}  // namespace shvit::cuda
