// What the operators (ops.cpp) and the kernels share: plain structs and function pointers, no PyTorch.
//
// A kernel is a sequence of phases; a phase is a number of independent tasks. How the work is cut depends on
// the sizes only, and every sum has a fixed order, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace shvit {

constexpr int kMaxPhases = 5;

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
struct ShsaForwardParams {
  Sizes sizes;
  bool channels_last, relu;
  double norm_eps, scale;
  const void *x, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;  // [P], [P], [O, P], [O]; null if absent
  void *y, *mean, *rstd, *row_max, *row_sum;  // image, [B], [B], [B, N], [B, N]; the last four
                                              // are what a backward needs, or all null
  void* workspace;
};

struct ShsaBackwardParams {
  Sizes sizes;
  bool channels_last, x1_channels_last, relu;
  double scale;
  const void *dy, *x1, *y, *mean, *rstd, *row_max, *row_sum, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias;
  void *dx, *dnorm_weight, *dnorm_bias, *dqkv_weight, *dqkv_bias;  // null where not needed
  void* workspace;
};

struct MomentsForwardParams {
  Sizes sizes;  // D is 0
  bool channels_last;
  double norm_eps;
  const void *x, *norm_weight, *norm_bias;
  void *mean, *cov, *image_mean, *image_rstd;  // [P], [P, P], [B], [B]
  void* x1;                                    // a copy of the first P channels, or null
  void* workspace;
};

struct MomentsBackwardParams {
  Sizes sizes;  // D is 0
  bool channels_last;
  bool accumulate;  // add to the gradients instead of writing them
  const void *dmean, *dcov, *x1, *mean, *image_mean, *image_rstd, *norm_weight, *norm_bias;
  void *dx, *dnorm_weight, *dnorm_bias;  // null where not needed
  void* workspace;
};

struct FoldForwardParams {
  int64_t O, P;
  double eps;
  const void *weight, *bias, *bn_weight, *bn_bias;  // [O, P], [O], [O], [O]; null if absent
  const void *z_mean, *z_cov;                       // batch statistics from these, or null
  void *mean, *variance;                            // [O]: written with batch statistics, read without
  void *qkv_weight, *qkv_bias;
  void* workspace;
};

struct FoldBackwardParams {
  int64_t O, P;
  double eps;
  const void *dqkv_weight, *dqkv_bias, *weight, *bn_weight, *z_mean, *z_cov, *mean, *variance;
  void *dweight, *dbn_weight, *dbn_bias, *dz_mean, *dz_cov;  // the first three null where not needed
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
  Kernel<FoldForwardParams> fold_forward;
  Kernel<FoldBackwardParams> fold_backward;
};

// The kernels compiled for one instruction set, for each storage type.
struct Variant {
  const char* name;
  Kernels float32, float64, bfloat16;
  double (*fma_flops)(int64_t repeats);  // runs fused multiply-adds in registers, returns how many operations
};

extern const Variant kBaseline, kBaselineWide;
#if defined(__x86_64__)
extern const Variant kAvx2, kAvx2Wide, kAvx512;
#endif

}  // namespace shvit
