// What the operators (ops.cpp) and the kernels share: plain structs and function pointers, no PyTorch.
//
// A kernel is a sequence of phases; a phase is a number of independent tasks. How the work is cut depends on
// the sizes (the rows of a stem and the channels of mixer_eval, no two of which share a sum, also on the number
// of threads), and every sum has a fixed order, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace shvit {

constexpr int kMaxPhases = 20;

struct BFloat16 {
  uint16_t bits;
};

struct Plan {
  int phases = 0;
  int64_t tasks[kMaxPhases] = {};
  int64_t flops = 0;            // of the whole kernel, roughly
  int64_t scratch_bytes = 0;    // per running task
  int64_t workspace_bytes = 0;  // shared by all tasks
};

// B images, C channels, P partial channels, D = qk_dim, N tokens, O = 2 D + P.
struct Sizes {
  int64_t B, C, P, D, N;
  int64_t O() const { return 2 * D + P; }
};

// Image tensors hold the storage type, in NCHW or channels_last order; everything else the compute type.
//
// Batch normalisation of the projection by its own statistics; none where `mean` is null.
struct BatchNorm {
  const void *weight, *bias;  // [O]; null if absent
  double eps;
  void *mean, *variance;  // [O]: written by the forward, read by the backward
};

struct ShsaForwardParams {
  Sizes sizes;
  bool channels_last, relu;
  double norm_eps, scale;
  const void *x, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;  // [P], [P], [O, P], [O]; null if absent
  BatchNorm batch_norm;                                             // then there is no qkv_bias
  void *y, *mean, *rstd, *row_max, *row_sum;  // image, [B], [B], [B, N], [B, N]; the last four
                                              // are what a backward needs, or all null
  void* x1;                                   // with batch_norm: a copy of the first P channels, or null
  bool attended_only;                         // y is an image of the first P channels alone
  void* workspace;
};

struct ShsaBackwardParams {
  Sizes sizes;
  bool channels_last, x1_channels_last, relu;
  double scale;
  const void *dy, *x1, *y, *mean, *rstd, *row_max, *row_sum, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;
  BatchNorm batch_norm;
  void *dx, *dnorm_weight, *dnorm_bias, *dqkv_weight, *dqkv_bias;  // null where not needed
  void *dbn_weight, *dbn_bias;                                     // [O], with batch_norm
  int64_t x1_channels;   // of the images that x1 are the first channels of
  bool attended_only;    // dy and y are images of the first P channels alone,
  const void* residual;  // and dx gets those alone, plus those of this image; null if absent
  bool makes_y;          // of short images with batch_norm: a phase before dy is read writes y once more
  void* workspace;
};

// The residual attention layer in training.
struct MixerTrainForwardParams {
  ShsaForwardParams attention;  // with batch_norm and ReLU; y and workspace are ours
  bool residual;
  const void* proj_weight;  // [C, C]
  BatchNorm proj_norm;      // of C channels
  void *projected, *out;    // images
  void* workspace;
};

struct MixerTrainBackwardParams {
  ShsaBackwardParams attention;  // as above; dy, y and residual are ours; x1 is x
  double norm_eps;
  bool residual;
  const void *dout, *projected, *proj_weight;
  BatchNorm proj_norm;
  void *dproj_weight, *dproj_norm_weight, *dproj_norm_bias;  // null where not needed
  void* workspace;
};

struct MomentsForwardParams {
  Sizes sizes;  // D is 0
  bool channels_last;
  double norm_eps;
  const void *x, *norm_weight, *norm_bias;
  void *mean, *cov, *image_mean, *image_rstd;  // [P], [P, P], [B], [B]
  void* workspace;
};

struct MomentsBackwardParams {
  Sizes sizes;  // D is 0
  bool channels_last;
  const void *dmean, *dcov, *x1, *mean, *image_mean, *image_rstd, *norm_weight, *norm_bias;
  void *dx, *dnorm_weight, *dnorm_bias;  // null where not needed
  void* workspace;
};

// Running statistics of a batch normalisation folded into the projection before it; none where `mean` is null.
struct FoldParams {
  int64_t O, P;
  double eps;
  const void *weight, *bias, *bn_weight, *bn_bias, *mean, *variance;  // [O, P], the others [O]; null if absent
  void *folded_weight, *folded_bias;
  void* workspace;
};

// The residual attention layer in evaluation.
struct MixerEvalParams {
  ShsaForwardParams attention;  // with ReLU; qkv_weight, qkv_bias, y and workspace are ours
  bool residual;
  FoldParams qkv, projection;  // [O, P], [C, C]; what is folded is ours
  void* out;                   // image
  int64_t threads;             // for which channels are cut
  void* workspace;
};

// Packed weights: [ceil(N / 16), K + 1, 16], zeros beyond column N; the same on every instruction set. Columns
// are divided by powers of two that stand in the last row, so that their values are of the order of 1.
constexpr int64_t kPanel = 16;

// The operators of fused models: images whose channels stand side by side ([B, H, W, C]), packed weights and a
// bias for each output, all of type S.
template <class S>
struct Conv3x3Params {
  int64_t images, channels, height, width, outputs;  // stride 2, padding 1
  bool channels_last, relu;                          // of x; y always is
  bool winograd;                                     // the order of the weights
  const S *x, *weight, *bias;                        // weight: [9 or 25 * channels, outputs], packed
  S* y;
  const Conv3x3Params* source;  // makes x row by row, or null; its y is not used
  int64_t threads;              // for which images are cut
  void* workspace;
};

enum class Activation { kNone, kRelu, kSigmoid };

template <class S>
struct PointwiseParams {
  int64_t images, tokens, inputs, outputs;
  Activation activation;
  const S *x, *scale, *weight, *bias;  // scale: [images, inputs] or null
  S* y;
  void* workspace;
};

template <class S>
struct DepthwiseParams {
  int64_t images, channels, height, width, stride;  // stride 1 or 2, padding 1
  bool relu;
  const S *x, *weight, *bias;  // weight: [9, channels], plain
  S* y;
  const PointwiseParams<S>* source;  // makes x band by band, or null; its y is not used
  void* workspace;
};

template <class S>
struct FfnParams {
  int64_t rows, channels, hidden;
  const S *x, *weight1, *bias1, *weight2, *bias2;
  S* y;
  void* workspace;
};

template <class S>
struct MixerParams {
  ShsaForwardParams attention;  // channels_last, with ReLU, its parameters of type S; y and workspace are ours
  const S *weight, *bias;       // the projection
  S* y;
  void* workspace;
};

template <class S>
struct RowsParams {
  int64_t images, channels, pixels;
  const S* x;  // [images, channels, pixels]
  S* y;        // [images, pixels, channels]
  void* workspace;
};

template <class S>
struct PoolParams {
  int64_t images, pixels, channels;
  const S* x;
  S* y;
  void* workspace;
};

template <class Params>
struct Kernel {
  Plan (*plan)(const Params&);
  void (*run)(const Params&, int phase, int64_t task, char* scratch);
};

struct Kernels {
  Kernel<ShsaForwardParams> shsa_forward;
  Kernel<ShsaBackwardParams> shsa_backward;
  Kernel<MomentsForwardParams> moments_forward;
  Kernel<MomentsBackwardParams> moments_backward;
  Kernel<FoldParams> fold;
};

template <class S>
struct FusedKernels {
  double (*product_flops)(int64_t repeats);  // runs what products are made of, returns how many operations
  Kernel<Conv3x3Params<S>> conv3x3;
  Kernel<DepthwiseParams<S>> depthwise;
  Kernel<PointwiseParams<S>> pointwise;
  Kernel<FfnParams<S>> ffn;
  Kernel<MixerParams<S>> mixer;
  Kernel<PoolParams<S>> pool;
  Kernel<RowsParams<S>> rows;
};

struct MixerKernels {
  Kernel<MixerTrainForwardParams> train_forward;
  Kernel<MixerTrainBackwardParams> train_backward;
  Kernel<MixerEvalParams> eval;
};

// The kernels compiled for one instruction set, for each storage type.
struct Variant {
  const char* name;
  Kernels float32, float64, bfloat16;
  MixerKernels mixer_float32, mixer_float64;
  FusedKernels<float> fused_float32;
  FusedKernels<BFloat16> fused_bfloat16;
};

extern const Variant kBaseline, kBaselineWide;
#if defined(__x86_64__)
extern const Variant kAvx2, kAvx2Wide, kAvx512;
extern const FusedKernels<BFloat16> kAvx512Bf16;  // in which avx512_bf16 differs from kAvx512
extern const FusedKernels<float> kZen4Fused;      // in which zen4 differs from that
extern const MixerKernels kZen4Mixer;
#endif

}  // namespace shvit
