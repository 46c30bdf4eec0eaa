// Batch normalisation by running statistics, folded into the projection before it (design section 3).
//
// With f = gamma / sqrt(variance + eps) the folded weight is f W and the folded bias beta + (bias - mean) f.
#pragma once

#include "panel.h"

namespace {

template <class S, int VB>
struct Fold {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::FoldParams;

  static Plan plan(const Params&) {
    Plan plan;
    plan.phases = 1;
    plan.tasks[0] = 1;
    return plan;
  }

  static void run(const Params& a, int, int64_t, char*) {
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
};

}  // namespace
