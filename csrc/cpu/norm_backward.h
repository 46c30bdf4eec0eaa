// What every backward ends with: from the gradient of z to those of x1, the norm's parameters and nothing else.
#pragma once

#include "panel.h"

namespace {

// Sums over an image (or a block of it) that the gradient of its normalisation needs.
struct NormSums {
  double gradient = 0, projected = 0;  // of w dz, and of w dz * normal

  SHVIT_INLINE void add(const NormSums& o) {
    gradient += o.gradient;
    projected += o.projected;
  }
};

// Adds this panel's part to dweight, dbias [P] and returns its sums. `normal` is (x - mean) * rstd.
template <int VB, class T>
SHVIT_INLINE NormSums norm_sums(const T* dz, const T* normal, int64_t P, int64_t n, int64_t ld, const T* weight,
                                double* dweight, double* dbias) {
  NormSums sums;
  for (int64_t p = 0; p < P; ++p) {
    const T* d = dz + p * ld;
    const T* x = normal + p * ld;
    const double gradient = sum_row<VB, T>(n, [&](auto lane, int64_t t) { return load_as(d + t, lane); });
    const double projected =
        sum_row<VB, T>(n, [&](auto lane, int64_t t) { return load_as(d + t, lane) * load_as(x + t, lane); });
    dbias[p] += gradient;
    dweight[p] += projected;
    sums.gradient += weight[p] * gradient;
    sums.projected += weight[p] * projected;
  }
  return sums;
}

// dz becomes dx = rstd (w dz - mean(w dz) - normal * mean(w dz * normal)); count is P * N.
template <int VB, class T>
SHVIT_INLINE void norm_backward(T* dz, const T* normal, int64_t P, int64_t n, int64_t ld, const T* weight,
                                T rstd, const NormSums& sums, double count) {
  const T a = static_cast<T>(sums.gradient / count), b = static_cast<T>(sums.projected / count);
  for (int64_t p = 0; p < P; ++p) {
    T* d = dz + p * ld;
    const T* x = normal + p * ld;
    over_columns<T, VB>(n, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
      store(d + t, rstd * (weight[p] * load_as(d + t, lanes) - a - load_as(x + t, lanes) * b));
    });
  }
}

// total[i] = sum over parts of partial[part][i], in order.
template <class Sum, class T>
SHVIT_INLINE void add_parts(const Sum* partial, int64_t parts, int64_t stride, int64_t count, T* total) {
  constexpr int64_t kAtATime = 64;
  for (int64_t first = 0; first < count; first += kAtATime) {
    const int64_t n = min64(kAtATime, count - first);
    Sum sums[kAtATime] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < n; ++i) sums[i] += partial[part * stride + first + i];
    for (int64_t i = 0; i < n; ++i) total[first + i] = static_cast<T>(sums[i]);
  }
}

}  // namespace
