// Products in pairs (S. Winograd, "A New Algorithm for Inner Product", IEEE Transactions on Computers C-17,
// 1968), for cores whose adders stand idle in a product of fused multiply-adds, as AMD's do:
//
//     a0 b0 + a1 b1 = (a0 + b1)(a1 + b0) - a0 a1 - b0 b1
//
// has one multiplication for each element of C, not two, and two additions. What is subtracted belongs to a row
// of A or to a column of B, and is summed once for each. Of three values two are a pair and one is multiplied
// as ever: then additions and multiply-adds are as many, and together take two thirds of the time.
//
// Sums round by |a|^2 + |b|^2, so a and b must be of like size: columns of packed weights are (kernels.h), rows
// of A are scaled here, by powers of two. Signs alternate, (a0 - b1)(a1 - b0) = a0 a1 + b0 b1 - (a0 b0 + a1
// b1), so that what is corrected does not add up.
#pragma once

#include "panel.h"

namespace {

#if SHVIT_PAIRS
template <class T, int VB>
constexpr bool kInPairs = std::is_same_v<T, float> && VB == 64;
#else
template <class T, int VB>
constexpr bool kInPairs = false;
#endif

// Rows of B that are taken at a time, with both signs, and rows of A: more would not fit into the registers.
constexpr int64_t kPairedDepth = 6;
constexpr int kPairedRows = 8;

// Fewer rows do not make up for what is done once for each row and column.
constexpr int64_t kFewestPairedRows = 16;

// A value in all lanes. By its bits: the broadcast of a float takes time from the adders.
template <int VB>
SHVIT_INLINE Vec<float, VB> broadcast(const float* p) {
  int32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float, VB>)(Vec<int32_t, VB>{} + bits);
}

template <class V>
SHVIT_INLINE V magnitude_of(V v) {
  return v < 0 ? -v : v;
}

// The power of two by which values of a mean magnitude are divided, so that it lies in [0.5, 1), as that of
// packed weights does; 1 for zeros and what is infinite. Of a vector or a scalar.
template <class V>
struct Power {
  V value, inverse;
  bool infinite;  // of a scalar
};
template <class V>
SHVIT_INLINE Power<V> power_near(V magnitude) {
  using Bits = std::conditional_t<sizeof(V) == sizeof(float), uint32_t, Vec<uint32_t, sizeof(V)>>;
  const auto bits_of = [](auto v) SHVIT_INLINE_LAMBDA {
    Bits bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    return bits;
  };
  const auto value_of = [](Bits bits) SHVIT_INLINE_LAMBDA {
    V v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
  };
  const Bits one = Bits{} + 127u, largest = Bits{} + 253u;  // the inverse is a normal number too
  Bits exponent = (bits_of(magnitude) >> 23) + 1u;
  Power<V> power;
  if constexpr (sizeof(V) == sizeof(float)) power.infinite = exponent > 255;
  exponent = exponent > 255 ? one : exponent > largest ? largest : exponent == 1 ? one : exponent;
  power.value = value_of(exponent << 23);
  power.inverse = value_of((254 - exponent) << 23);
  return power;
}

// Divides columns of B, n of them and the few more of their last vector, K values each, by powers of two.
template <int VB>
SHVIT_INLINE void scale_columns(float* rows, int64_t ld, int64_t K, int64_t n, float* factors) {
  over_columns<float, VB>(n, [&](auto lanes, int64_t column) SHVIT_INLINE_LAMBDA {
    using V = decltype(lanes);
    float* at = rows + column;
    const float share = 1.0f / static_cast<float>(K);
    V mean{};
    for (int64_t k = 0; k < K; ++k) mean += magnitude_of(load<V>(at + k * ld)) * share;
    const auto power = power_near(mean);
    for (int64_t k = 0; k < K; ++k) store(at + k * ld, load<V>(at + k * ld) * power.inverse);
    store(factors + column, power.value);
  });
}

// The left factor: rows divided by factors, which are powers of two, and what is added to the sums of each row.
struct PairedRows {
  const float* data;
  int64_t ld, K;
  const float *corrections, *rests, *factors;
  float* column_corrections;  // of the columns at work, made by their first tile

  template <int VB, int MR, int NV, bool Ends, class Finish, class S>
  SHVIT_INLINE void tile(int64_t first, VectorsView<float> b, const Finish& finish, Ahead ahead,
                         EndsAhead<S> ends) const {
    if (first == 0) {
      tile_of<VB, MR, NV, Ends, true>(first, b, finish, ahead, ends);
    } else {
      tile_of<VB, MR, NV, Ends, false>(first, b, finish, ahead, ends);
    }
  }

 private:
  // First: makes the corrections of the columns.
  template <int VB, int MR, int NV, bool Ends, bool First, class Finish, class S>
  SHVIT_INLINE void tile_of(int64_t first, VectorsView<float> b, const Finish& finish, Ahead ahead,
                            EndsAhead<S> ends) const;
};

// Its rows and their numbers in scratch.
class PairedScratch {
 public:
  PairedScratch() = default;
  // For M rows of K values; nothing if products of T are not in pairs.
  template <class T, int VB>
  static PairedScratch take(Bump& bump, int64_t M, int64_t K) {
    if constexpr (kInPairs<T, VB>) {
      const int64_t ld = row_distance<T>(K);
      return in_place<T, VB>(bump, M, bump.take<T>(M * ld), ld);
    } else {
      return {};
    }
  }
  // The same for rows that may be scaled where they are.
  template <class T, int VB>
  static PairedScratch in_place(Bump& bump, int64_t M, T* rows, int64_t ld) {
    if constexpr (kInPairs<T, VB>) {
      return {rows, ld, bump.take<T>(M), bump.take<T>(M), bump.take<T>(M)};
    } else {
      return {};
    }
  }

  // The rows from row `i` on.
  PairedScratch from(int64_t i) const {
    if (!rows_) return {};
    return {row(i), ld_, corrections_ + i, rests_ + i, factors_ + i};
  }

  float* row(int64_t i) const { return rows_ + i * ld_; }
  int64_t distance() const { return ld_; }

  // Whether M rows are multiplied in pairs.
  bool fits(int64_t M) const { return rows_ && M >= kFewestPairedRows; }

  // Scales M rows of K values from x, before they are multiplied.
  template <int VB>
  void prepare(int64_t M, int64_t K, MatrixView<float> x) const {
    for (int64_t i = 0; i < M; ++i) {
      factors_[i] = scale<VB>(x.data + i * x.row_stride, K, row(i));
      const double sum = correction<VB>(row(i), K);
      corrections_[i] = static_cast<float>(sum);
      rests_[i] = static_cast<float>(sum - static_cast<double>(corrections_[i]));
    }
  }

  // f(rows of A), K values each.
  template <int VB, class F>
  SHVIT_INLINE void multiply(int64_t K, F f) const {
    float column_corrections[2 * kLanes<float, VB>];
    f(PairedRows{rows_, ld_, K, corrections_, rests_, factors_, column_corrections});
  }

  // f(row, its values) of M rows for those that are not finite: of infinities the sums in pairs know nothing.
  template <class F>
  SHVIT_INLINE void each_infinite(int64_t M, F f) const {
    for (int64_t i = 0; i < M; ++i)
      if (factors_[i] == 0) f(i, MatrixView<float>{row(i), ld_, 1});
  }

 private:
  PairedScratch(float* rows, int64_t ld, float* corrections, float* rests, float* factors)
      : rows_(rows), ld_(ld), corrections_(corrections), rests_(rests), factors_(factors) {}

  // to = x / factor. The factor is 0 and to = x where x is not finite.
  template <int VB>
  static SHVIT_INLINE float scale(const float* x, int64_t K, float* to) {
    using V = Vec<float, VB>;
    constexpr int W = kLanes<float, VB>;
    const float share = 1.0f / static_cast<float>(K);
    V mean{};
    int64_t k = 0;
    for (; k + W <= K; k += W) mean += magnitude_of(load<V>(x + k)) * share;
    if (k < K) mean += magnitude_of(load_some<VB>(x + k, K - k)) * share;
    const auto power = power_near(static_cast<float>(horizontal_sum<float, VB>(mean)));
    for (k = 0; k + W <= K; k += W) store(to + k, load<V>(x + k) * power.inverse);
    if (k < K) store_some<VB>(to + k, load_some<VB>(x + k, K - k) * power.inverse, K - k);
    return power.infinite ? 0 : power.value;
  }

  // Of the pairs of a row: minus the product of the first in every six, plus that of the second. In double:
  // where rows are weights, an error would be the same for every token.
  template <int VB>
  static SHVIT_INLINE double correction(const float* row, int64_t K) {
    using V = Vec<float, VB>;
    constexpr int W = kLanes<float, VB>, kPeriod = 3 * W;
    constexpr auto kSigns = [] {
      struct {
        float values[kPeriod] = {};
      } signs;
      for (int i = 0; i < kPeriod; i += 3) signs.values[i] = i % 2 ? 1 : -1;
      return signs;
    }();
    const int64_t end = K / kPairedDepth * kPairedDepth;
    WideSum<float, VB> sum;
    const auto add = [&](V first, V second, int64_t k) SHVIT_INLINE_LAMBDA {
      const V sign = load<V>(kSigns.values + k % kPeriod), product = first * second;
      sum.add(sign * product);
      sum.add(sign * (first * second - product));  // what rounding took, with a multiply-add
    };
    int64_t k = 0;
    for (; k + W < end; k += W) add(load<V>(row + k), load<V>(row + k + 1), k);
    if (k < end) add(load_some<VB>(row + k, end - k), load_some<VB>(row + k + 1, end - k - 1), k);
    return sum.sum();
  }

  float* rows_ = nullptr;
  int64_t ld_ = 0;
  float *corrections_ = nullptr, *rests_ = nullptr, *factors_ = nullptr;
};

template <int VB, int MR, int NV, bool Ends, bool First, class Finish, class S>
SHVIT_INLINE void PairedRows::tile_of(int64_t first, VectorsView<float> b, const Finish& finish, Ahead ahead,
                                      EndsAhead<S> ends) const {
  using V = Vec<float, VB>;
  V acc[MR][NV] = {}, columns[NV] = {};
  const float *ak = data + first * ld, *bk = b.data;
  const auto row_of = [&](int64_t k, V(&row)[NV]) SHVIT_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load<V>(bk + k * b.row_stride + j * b.vector_stride);
  };
  const auto three = [&](int64_t k, auto negative) SHVIT_INLINE_LAMBDA {
    constexpr bool kNegative = decltype(negative)::value;
    V b0[NV], b1[NV], b2[NV];
    row_of(k, b0);
    row_of(k + 1, b1);
    row_of(k + 2, b2);
    if constexpr (First) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        columns[j] = kNegative ? columns[j] + b0[j] * b1[j] : columns[j] - b0[j] * b1[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const float* ai = ak + i * ld + k;
      const V a0 = broadcast<VB>(ai), a1 = broadcast<VB>(ai + 1), a2 = broadcast<VB>(ai + 2);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        acc[i][j] += a2 * b2[j];
        if constexpr (kNegative) {
          acc[i][j] -= (a0 - b1[j]) * (a1 - b0[j]);
        } else {
          acc[i][j] += (a0 + b1[j]) * (a1 + b0[j]);
        }
      }
    }
  };
  const int64_t lines = (ahead.lines * kPairedDepth + Ahead::kRows - 1) / Ahead::kRows;
  const auto steps = [&](int64_t count, auto with_ends) SHVIT_INLINE_LAMBDA {
    for (int64_t step = 0; step < count; ++step, ak += kPairedDepth, bk += kPairedDepth * b.row_stride) {
      for (int64_t i = 0; i < lines && ahead.next < ahead.end; ++i, ahead.next += Ahead::kLine)
        __builtin_prefetch(ahead.next, 0, Ahead::kLevel);
      if constexpr (decltype(with_ends)::value) ends.template next_row<NV * kLanes<float, VB>>();
      three(0, Count<0>{});
      three(3, Count<1>{});
    }
  };
  const int64_t count = K / kPairedDepth, head = Ends ? min64(ends.rows, count) : 0;
  if constexpr (Ends) steps(head, Count<1>{});
  steps(count - head, Count<0>{});
  for (int64_t k = count * kPairedDepth; k < K; ++k, ++ak, bk += b.row_stride) {
    V row[NV];
    row_of(0, row);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += ak[i * ld] * row[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    float* at = column_corrections + j * kLanes<float, VB>;
    if constexpr (First) {
      store(at, columns[j]);
    } else {
      columns[j] = load<V>(at);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const float correction = corrections[first + i], rest = rests[first + i], factor = factors[first + i];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      acc[i][j] = (acc[i][j] + (columns[j] + correction) + rest) * (finish.template factor<V>(j) * factor);
  }
  finish.finish(first, acc);
}

template <int VB, class S>
SHVIT_INLINE void prepare_rows(int64_t M, int64_t K, MatrixView<S> x, const PairedScratch& pairs) {
  if constexpr (kInPairs<S, VB>) {
    if (pairs.fits(M)) pairs.prepare<VB>(M, K, x);
  }
}

}  // namespace
