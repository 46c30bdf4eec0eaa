// The kernels of one instruction set: included by a file that has enabled it, after every standard header, so
// that nothing of the standard library is compiled for more than the baseline, and that has defined
// SHVIT_REGISTER_BYTES, the size of all its vector registers. All names here have internal
// linkage.
#pragma once

#include "convolution.h"
#include "fold.h"
#include "mixer.h"
#include "mixer_eval.h"
#include "mixer_train.h"
#include "moments.h"
#include "shsa_backward.h"
#include "shsa_forward.h"

namespace {

template <class K>
constexpr shvit::Kernel<typename K::Params> kernel() {
  return {&K::plan, &K::run};
}

template <class S, int VB>
constexpr shvit::Kernels kernels() {
  return {kernel<ShsaForward<S, VB>>(), kernel<ShsaBackward<S, VB>>(), kernel<MomentsForward<S, VB>>(),
          kernel<MomentsBackward<S, VB>>(), kernel<Fold<S, VB>>()};
}

template <class T, int VB>
constexpr shvit::MixerKernels mixer_kernels() {
  return {kernel<MixerTrainForward<T, VB>>(), kernel<MixerTrainBackward<T, VB>>(), kernel<MixerEval<T, VB>>()};
}

// Steps of a product as in a tile, on values in cache: the processor's peak.
template <class S, int VB>
double product_flops(int64_t repeats) {
  using One = Step<S, VB>;
  constexpr int kRows = 4, kVectors = 3;
  S values[8 * kPanel];
  for (S& value : values) narrow(&value, 0.001f);
  asm volatile("" : "+m"(values));
  typename One::Sum acc[kRows][kVectors] = {};
  for (int64_t r = 0; r < repeats; ++r) {
    const S* from = values + r % 8;  // so that nothing is known before
    decltype(One::row(from, kPanel)) b[kVectors];
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) b[j] = One::row(from + 2 * kPanel * j, kPanel);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const auto a = One::value(from + 2 * i);
#pragma GCC unroll 3
      for (int j = 0; j < kVectors; ++j) One::add(acc[i][j], a, b[j]);
    }
  }
  asm volatile("" : : "m"(acc));
  return 2.0 * kRows * kVectors * One::kDepth * kSumLanes<S, VB> * static_cast<double>(repeats);
}

template <class S, int VB>
constexpr shvit::FusedKernels<S> fused_kernels() {
  return {&product_flops<S, VB>,      kernel<Conv3x3<S, VB>>(), kernel<Depthwise<S, VB>>(),
          kernel<Pointwise<S, VB>>(), kernel<Ffn<S, VB>>(),     kernel<Mixer<S, VB>>(),
          kernel<Pool<S, VB>>(),      kernel<ToRows<S, VB>>()};
}

template <int VB>
constexpr shvit::Variant variant(const char* name) {
  return {name,
          kernels<float, VB>(),
          kernels<double, VB>(),
          kernels<BFloat16, VB>(),
          mixer_kernels<float, VB>(),
          mixer_kernels<double, VB>(),
          fused_kernels<float, VB>(),
          fused_kernels<BFloat16, VB>()};
}

}  // namespace
