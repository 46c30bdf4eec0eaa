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

// The largest P and D that the kernels take.
constexpr int kMostPartialChannels = 256, kMostQueryWidth = 128;

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
  // [B], [B], [B, N], [B, N]. With logits l = scale * q^T k, row_max = max l and row_sum = sum exp(l -
  // row_max).
  float *mean, *rstd, *row_max, *row_sum;
};

// shsa_forward.cu: short images, in one launch. Whether they fit into a block of the current device.
bool shsa_forward_fits(const Sizes& sizes, Type type);
const char* shsa_forward(const ShsaForwardParams& params, Type type, void* stream);

// shsa_mixer.cu: y = x + proj_weight shsa(x) + proj_bias. Of `attention`, which relu is part of, y is the
// result; the statistics are not saved.
struct ShsaMixerParams {
  ShsaForwardParams attention;
  const void *proj_weight, *proj_bias;  // [C, C], [C] or null
  void* workspace;
};
size_t shsa_mixer_workspace(const ShsaMixerParams& params, Type type);
const char* shsa_mixer(const ShsaMixerParams& params, Type type, void* stream);

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
// shsa_backward.cu: short images. Whether they fit into a block of the current device; and the parts of the
// sums.

bool shsa_backward_fits(const Sizes& sizes, Type type);
int shsa_backward_parts(const Sizes& sizes);
const char* shsa_backward(const ShsaBackwardParams& params, Type type, void* stream);

// moments.cu: mean and covariance of z = norm(x1) over all tokens, and of them the mean and variance of the
// projection weight z. D is 0 where there is no weight.
struct MomentsParams {
  Sizes sizes;
  bool channels_last;
  float norm_eps;
  const void *x, *norm_weight, *norm_bias, *weight;  // [P], [P], [O, P]
  void* x1;                                          // a copy of the first P channels, in x's format, or null
  float *image_mean, *image_rstd, *z_mean, *z_cov;   // [B], [B], [P], [P, P]
  float *bn_mean, *bn_var;                           // [O], null without weight
  void* workspace;
};
size_t moments_workspace(const Sizes& sizes);
const char* moments(const MomentsParams& params, Type type, void* stream);

// norm_backward.cu: from the gradient of z, dz + (dz_mean + (dz_cov + dz_cov^T) (z - z_mean)) / (B N), to those
// of x1 and of the norm's parameters. Either summand may be absent (null). Without norm it only is converted.
struct NormBackwardParams {
  Sizes sizes;  // D is 0
  bool channels_last, x1_channels_last;
  bool clear_rest;        // dx beyond P becomes zero, instead of being left alone
  bool dz_cov_symmetric;  // saves a launch
  const void *x1, *norm_weight, *norm_bias;
  const float *mean, *rstd;                // [B], of the images
  const float* dz;                         // [B, P, N]
  const float *dz_mean, *dz_cov, *z_mean;  // [P], [P, P], [P]
  void* dx;                                // image [B, C, N], or null
  float* dnorm_parts;                      // [parts, 2, P]: dnorm_weight and dnorm_bias; null without norm
  void* workspace;
};
int norm_backward_parts(const Sizes& sizes);
size_t norm_backward_workspace(const Sizes& sizes);
const char* norm_backward(const NormBackwardParams& params, Type type, void* stream);

// ---------------------------------------------------------------------------------------------------------------
// fold.cu

// Where a gradient goes, in the parameter's own type; null where it is not needed.
struct Output {
  void* data;
  Type type;
};

// total[i] = sum over parts of parts[part * stride + i], in the order of parts, for i < count.
struct Reduction {
  const float* parts;
  int count_of_parts;
  int64_t stride, count;
  Output total;
};

// All reductions (up to kMostReductions) in one launch. No parts: zeros.
constexpr int kMostReductions = 4;
const char* reduce(const Reduction* reductions, int count, void* stream);

// From the parts of shsa_backward to the gradients of the projection's weight, of its batch normalisation and
// of the moments of z.
struct FoldBackwardParams {
  int O, P, parts;
  float bn_eps;
  const float *dweight_parts, *dbias_parts;  // [parts, O, P], [parts, O]
  const void *weight, *bn_weight;            // [O, P], [O]
  const float *z_mean, *z_cov, *bn_mean, *bn_var;
  Output dweight, dbn_weight, dbn_bias;
  float *dz_mean, *dz_cov;  // [P], [P, P]; both null where not needed
  float* workspace;         // [2, O]
};
const char* fold_backward(const FoldBackwardParams& params, Type type, void* stream);

// ---------------------------------------------------------------------------------------------------------------
// running_statistics.cu: running means with `momentum`, or averages of all batches.
struct RunningStatisticsParams {
  int O;
  int64_t count;  // of values per channel
  bool averages;
  float momentum, unbiased;          // count / (count - 1)
  void *running_mean, *running_var;  // [O], of the type given
  const float *mean, *variance;      // [O]: of the batch; biased
  int64_t* num_batches_tracked;
};
const char* update_running_statistics(const RunningStatisticsParams& params, Type type, void* stream);

// ---------------------------------------------------------------------------------------------------------------
// shsa_long.cu: any N, through q, k and v staged in a workspace of this many bytes

size_t shsa_long_forward_workspace(const Sizes& sizes, Type type);
const char* shsa_long_forward(const ShsaForwardParams& params, void* workspace, Type type, void* stream);

// shsa_long_backward.cu: the same for the gradients; `parts` depends on the sizes only.
int shsa_long_backward_parts(const Sizes& sizes);
size_t shsa_long_backward_workspace(const Sizes& sizes, Type type);
const char* shsa_long_backward(const ShsaBackwardParams& params, void* workspace, Type type, void* stream);

}  // namespace shvit::cuda
