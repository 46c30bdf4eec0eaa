// Batch normalisation of the projection u = W z by the statistics of the batch, without a pass of its own: u is
// staged in panels, one per unit of work (a group of short images or a block of a long one).
//
//     forward    n = (u - mean) * rstd          qkv = gamma n + beta
//     backward   dgamma = sum dqkv n   dbeta = sum dqkv   du = gamma rstd (dqkv - (dbeta + n dgamma) / count)
//
// The variance is summed from centred values, and units are merged exactly (Chan, Golub and LeVeque 1983).
#pragma once

#include "panel.h"

namespace {

// Per unit, mean and sum of squared deviations of each channel: [units, 2, O].
struct ChannelMoments {
  double* values;
  int64_t O;
  double* mean(int64_t unit) const { return values + 2 * unit * O; }
  double* squares(int64_t unit) const { return mean(unit) + O; }
};

// Moments of n tokens of each row of a panel, merged with those of `earlier` tokens of the same unit.
template <int VB, class T>
SHVIT_INLINE void measure_channels(const ChannelMoments& moments, int64_t unit, const T* panel, int64_t n,
                                   int64_t ld, int64_t earlier) {
  const double count = static_cast<double>(n), share = count / static_cast<double>(n + earlier);
  double *means = moments.mean(unit), *all_squares = moments.squares(unit);
  for (int64_t o = 0; o < moments.O; ++o) {
    const T* row = panel + o * ld;
    const double mean = sum_row<VB, T>(n, [&](auto lane, int64_t t) { return load_as(row + t, lane); }) / count;
    const T centre = static_cast<T>(mean);
    const double squares = sum_row<VB, T>(n, [&](auto lane, int64_t t) {
      const auto d = load_as(row + t, lane) - centre;
      return d * d;
    });
    const double delta = earlier ? mean - means[o] : 0;
    means[o] = earlier ? means[o] + delta * share : mean;
    all_squares[o] =
        (earlier ? all_squares[o] : 0) + squares + delta * delta * share * static_cast<double>(earlier);
  }
}

// All units become unit 0. `count_of(unit)` is its number of tokens.
template <class CountOf>
SHVIT_INLINE void merge_channels(const ChannelMoments& moments, int64_t units, CountOf count_of) {
  double *mean = moments.mean(0), *squares = moments.squares(0), earlier = static_cast<double>(count_of(0));
  for (int64_t unit = 1; unit < units; ++unit) {
    const double count = static_cast<double>(count_of(unit)), share = count / (earlier + count);
    const double *more_mean = moments.mean(unit), *more_squares = moments.squares(unit);
    for (int64_t o = 0; o < moments.O; ++o) {
      const double delta = more_mean[o] - mean[o];
      mean[o] += delta * share;
      squares[o] += more_squares[o] + delta * delta * share * earlier;
    }
    earlier += count;
  }
}

template <class T>
SHVIT_INLINE T channel_rstd(const shvit::BatchNorm& bn, int64_t o) {
  return T(1) / __builtin_sqrt(static_cast<const T*>(bn.variance)[o] + static_cast<T>(bn.eps));
}

template <class T>
SHVIT_INLINE T channel_gamma(const shvit::BatchNorm& bn, int64_t o) {
  return bn.weight ? static_cast<const T*>(bn.weight)[o] : T(1);
}

// u becomes n, and `qkv` (which may be the same panel: then only this is kept) gamma n + beta, with the scale
// of the logits in q.
template <int VB, class T>
SHVIT_INLINE void normalise_channels(const shvit::BatchNorm& bn, const Sizes& s, double scale, int64_t columns,
                                     int64_t ld, T* u, T* qkv) {
  for (int64_t o = 0; o < s.O(); ++o) {
    const T mean = static_cast<const T*>(bn.mean)[o], rstd = channel_rstd<T>(bn, o);
    const T logits = o < s.D ? static_cast<T>(scale) : T(1), factor = channel_gamma<T>(bn, o) * logits;
    const T offset = (bn.bias ? static_cast<const T*>(bn.bias)[o] : T(0)) * logits;
    T *from = u + o * ld, *to = qkv + o * ld;
    over_columns<T, VB>(columns, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
      const auto n = (load_as(from + t, lanes) - mean) * rstd;
      store(from + t, n);
      store(to + t, n * factor + offset);
    });
  }
}

// Adds a panel's sums of dqkv and dqkv n over n tokens to dbeta and dgamma [O].
template <int VB, class T>
SHVIT_INLINE void channel_sums(const T* dqkv, const T* normal, int64_t O, int64_t n, int64_t ld, double* dbeta,
                               double* dgamma) {
  for (int64_t o = 0; o < O; ++o) {
    const T *d = dqkv + o * ld, *x = normal + o * ld;
    dbeta[o] += sum_row<VB, T>(n, [&](auto lane, int64_t t) { return load_as(d + t, lane); });
    dgamma[o] +=
        sum_row<VB, T>(n, [&](auto lane, int64_t t) { return load_as(d + t, lane) * load_as(x + t, lane); });
  }
}

// dqkv becomes du in n columns; count is B * N.
template <int VB, class T>
SHVIT_INLINE void channel_backward(const shvit::BatchNorm& bn, const double* dbeta, const double* dgamma,
                                   double count, int64_t O, int64_t n, int64_t ld, T* dqkv, const T* normal) {
  for (int64_t o = 0; o < O; ++o) {
    const T factor = channel_gamma<T>(bn, o) * channel_rstd<T>(bn, o);
    const T shift = static_cast<T>(dbeta[o] / count), slope = static_cast<T>(dgamma[o] / count);
    T* d = dqkv + o * ld;
    const T* x = normal + o * ld;
    over_columns<T, VB>(n, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
      store(d + t, factor * (load_as(d + t, lanes) - shift - load_as(x + t, lanes) * slope));
    });
  }
}

}  // namespace
