// Batch normalisation by running statistics, folded into the projection before it (design section 3).
//
// With f = gamma / sqrt(variance + eps) the folded weight is f W and the folded bias beta + (bias - mean) f.
#pragma once

#include "panel.h"

namespace {

template <class T>
struct FoldedChannel {
  T factor, bias;
};

// Of projected channel o; without statistics the projection stays as it is.
template <class T>
SHVIT_INLINE FoldedChannel<T> folded_channel(const shvit::FoldParams& a, int64_t o) {
  const auto at = [o](const void* values, T otherwise)
                      SHVIT_INLINE_LAMBDA { return values ? static_cast<const T*>(values)[o] : otherwise; };
  const T bias = at(a.bias, T(0));
  if (!a.mean) return {T(1), bias};
  const T factor = at(a.bn_weight, T(1)) / __builtin_sqrt(at(a.variance, T(1)) + static_cast<T>(a.eps));
  return {factor, at(a.bn_bias, T(0)) + (bias - at(a.mean, T(0))) * factor};
}

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
    const T* weight = static_cast<const T*>(a.weight);
    T *folded_weight = static_cast<T*>(a.folded_weight), *folded_bias = static_cast<T*>(a.folded_bias);
    for (int64_t o = 0; o < a.O; ++o) {
      const auto [factor, bias] = folded_channel<T>(a, o);
      for (int64_t p = 0; p < a.P; ++p) folded_weight[o * a.P + p] = factor * weight[o * a.P + p];
      folded_bias[o] = bias;
    }
  }
};

}  // namespace
