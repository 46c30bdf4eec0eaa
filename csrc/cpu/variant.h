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

template <class S, int VB>
constexpr shvit::FusedKernels<S> fused_kernels() {
  return {kernel<Conv3x3<S, VB>>(), kernel<Depthwise<S, VB>>(), kernel<Pointwise<S, VB>>(),
          kernel<Ffn<S, VB>>(),     kernel<Mixer<S, VB>>(),     kernel<Pool<S, VB>>(),
          kernel<ToRows<S, VB>>()};
}

// Independent fused multiply-adds in registers: the processor's peak in float32.
template <int VB>
double fma_flops(int64_t repeats) {
  using V = Vec<float, VB>;
  constexpr int kChains = 12;
  V acc[kChains] = {};
  V factor = V{} + 0.999f, term = V{} + 0.001f;
  asm volatile("" : "+m"(factor), "+m"(term));
  const V f = factor, t = term;
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * f + t;
  }
  asm volatile("" : : "m"(acc));
  return 2.0 * kChains * kLanes<float, VB> * static_cast<double>(repeats);
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
          fused_kernels<BFloat16, VB>(),
          &fma_flops<VB>};
}

}  // namespace
