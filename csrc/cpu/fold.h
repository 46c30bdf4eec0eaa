// Batch normalisation folded into the projection before it (design section 3), forward and backward.
//
// Statistics per projected channel are m = W mean(z), s2 = diag(W cov(z) W^T); with f = gamma / sqrt(s2 + eps)
// the folded weight is f W and the folded bias beta - m f.
#pragma once

#include "panel.h"

namespace {

template <class S, int VB>
struct FoldForward {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::FoldForwardParams;
  static int64_t ld(const Params& a) { return round_up(a.P, kLanes<T, VB>); }

  static Plan plan(const Params& a) {
    Plan plan;
    plan.phases = 1;
    plan.tasks[0] = 1;
    if (a.z_cov) {
      Bump bump(nullptr);
      bump.take<T>(a.O * ld(a));
      bump.take<T>(a.P * ld(a));
      plan.scratch_bytes = bump.used();
    }
    return plan;
  }

  static void run(const Params& a, int, int64_t, char* memory) {
    if (a.z_cov) batch_statistics(a, memory);
    const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
    const T *gamma = static_cast<const T*>(a.bn_weight), *beta = static_cast<const T*>(a.bn_bias);
    const T *mean = static_cast<const T*>(a.mean), *variance = static_cast<const T*>(a.variance);
    T *folded_weight = static_cast<T*>(a.qkv_weight), *folded_bias = static_cast<T*>(a.qkv_bias);
    for (int64_t o = 0; o < a.O; ++o) {
      const T factor = (gamma ? gamma[o] : T(1)) / __builtin_sqrt(variance[o] + static_cast<T>(a.eps));
      for (int64_t p = 0; p < a.P; ++p) folded_weight[o * a.P + p] = factor * weight[o * a.P + p];
      folded_bias[o] = (beta ? beta[o] : T(0)) + ((bias ? bias[o] : T(0)) - mean[o]) * factor;
    }
  }

  static void batch_statistics(const Params& a, char* memory) {
    Bump bump(memory);
    T* product = bump.take<T>(a.O * ld(a));
    T* cov = bump.take<T>(a.P * ld(a));
    const T *weight = static_cast<const T*>(a.weight), *z_cov = static_cast<const T*>(a.z_cov);
    const T* z_mean = static_cast<const T*>(a.z_mean);
    T *mean = static_cast<T*>(a.mean), *variance = static_cast<T*>(a.variance);
    for (int64_t p = 0; p < a.P; ++p) map_row<VB>(z_cov + p * a.P, cov + p * ld(a), a.P, Identity{});
    gemm<T, VB>(a.O, a.P, a.P, {weight, a.P, 1}, cov, ld(a), product, ld(a));
    for (int64_t o = 0; o < a.O; ++o) {
      const T* w = weight + o * a.P;
      const T* r = product + o * ld(a);
      mean[o] = sum_row<VB, T>(
          a.P, [&](auto lane, int64_t p) { return load_as(w + p, lane) * load_as(z_mean + p, lane); });
      const double s2 = sum_row<VB, T>(
          a.P, [&](auto lane, int64_t p) { return load_as(w + p, lane) * load_as(r + p, lane); });
      variance[o] = s2 < 0 ? T(0) : static_cast<T>(s2);
    }
  }
};

// From d_weight, d_bias of the folded projection to the gradients of W, gamma, beta, mean(z) and cov(z):
//
//     df = sum_p d_weight W - m d_bias   dm = -f d_bias   ds2 = -df f / (2 (s2 + eps))
//     dW = f d_weight + dm mean(z)^T + 2 ds2 W cov   dgamma = df / sqrt(s2 + eps)   dbeta = d_bias
//     dmean = W^T dm   dcov = W^T diag(ds2) W
template <class S, int VB>
struct FoldBackward {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::FoldBackwardParams;
  static int64_t ld(const Params& a) { return round_up(a.P, kLanes<T, VB>); }

  struct Scratch {
    Bump bump;
    T *weight, *scaled, *cov, *product, *dm;  // [O, ld], [O, ld], [P, ld], [max(O, P), ld], [O]
    Scratch(void* base, const Params& a)
        : bump(base),
          weight(bump.take<T>(a.O * ld(a))),
          scaled(bump.take<T>(a.O * ld(a))),
          cov(bump.take<T>(a.P * ld(a))),
          product(bump.take<T>(max64(a.O, a.P) * ld(a))),
          dm(bump.take<T>(a.O)) {}
  };

  static Plan plan(const Params& a) {
    Plan plan;
    plan.phases = 1;
    plan.tasks[0] = 1;
    plan.scratch_bytes = Scratch(nullptr, a).bump.used();
    return plan;
  }

  static void run(const Params& a, int, int64_t, char* memory) {
    const Scratch scratch(memory, a);
    const int64_t row = ld(a);
    const T *weight = static_cast<const T*>(a.weight), *z_cov = static_cast<const T*>(a.z_cov);
    const T* z_mean = static_cast<const T*>(a.z_mean);
    const T *dqkv_weight = static_cast<const T*>(a.dqkv_weight),
            *dqkv_bias = static_cast<const T*>(a.dqkv_bias);
    const T* gamma = static_cast<const T*>(a.bn_weight);
    const T *mean = static_cast<const T*>(a.mean), *variance = static_cast<const T*>(a.variance);
    T *dweight = static_cast<T*>(a.dweight), *dgamma = static_cast<T*>(a.dbn_weight);
    T *dbeta = static_cast<T*>(a.dbn_bias), *dmean = static_cast<T*>(a.dz_mean),
      *dcov = static_cast<T*>(a.dz_cov);

    for (int64_t p = 0; p < a.P; ++p) map_row<VB>(z_cov + p * a.P, scratch.cov + p * row, a.P, Identity{});
    if (dweight) gemm<T, VB>(a.O, a.P, a.P, {weight, a.P, 1}, scratch.cov, row, scratch.product, row);
    for (int64_t o = 0; o < a.O; ++o) {
      const T *w = weight + o * a.P, *dw = dqkv_weight + o * a.P;
      const T rstd = T(1) / __builtin_sqrt(variance[o] + static_cast<T>(a.eps));
      const T factor = (gamma ? gamma[o] : T(1)) * rstd;
      const double along = sum_row<VB, T>(
          a.P, [&](auto lane, int64_t p) { return load_as(w + p, lane) * load_as(dw + p, lane); });
      const T dfactor = static_cast<T>(along - static_cast<double>(mean[o]) * dqkv_bias[o]);
      const T dm = -factor * dqkv_bias[o];
      // The statistics clamp negative rounding noise to zero, where no gradient passes.
      const T ds2 = variance[o] > 0 ? T(-0.5) * dfactor * factor * rstd * rstd : T(0);
      scratch.dm[o] = dm;
      if (dgamma) dgamma[o] = dfactor * rstd;
      if (dbeta) dbeta[o] = dqkv_bias[o];
      for (int64_t p = 0; p < a.P; ++p) {
        scratch.weight[o * row + p] = w[p];
        scratch.scaled[o * row + p] = ds2 * w[p];
      }
      if (dweight) {
        const T* product = scratch.product + o * row;
        for (int64_t p = 0; p < a.P; ++p)
          dweight[o * a.P + p] = factor * dw[p] + dm * z_mean[p] + 2 * ds2 * product[p];
      }
    }
    for (int64_t p = 0; p < a.P; ++p) dmean[p] = 0;
    for (int64_t o = 0; o < a.O; ++o)
      for (int64_t p = 0; p < a.P; ++p) dmean[p] += scratch.dm[o] * weight[o * a.P + p];
    gemm<T, VB>(a.P, a.P, a.O, {scratch.weight, 1, row}, scratch.scaled, row, scratch.product, row);
    for (int64_t p = 0; p < a.P; ++p) map_row<VB>(scratch.product + p * row, dcov + p * a.P, a.P, Identity{});
  }
};

}  // namespace
