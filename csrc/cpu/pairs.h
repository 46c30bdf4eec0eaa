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

// The left factor: rows divided by factors, which are powers of two, and what is added to the sums of each row.
struct PairedRows {
  const float* data;
  int64_t ld, K;
  const float *corrections, *factors;
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
      return {rows, ld, bump.take<T>(M), bump.take<T>(M)};
    } else {
      return {};
    }
  }

  // The rows from `row` on.
  PairedScratch from(int64_t row) const {
    if (!rows_) return {};
    return {rows_ + row * ld_, ld_, corrections_ + row, factors_ + row};
  }

  // Whether M rows are multiplied in pairs.
  bool fits(int64_t M) const { return rows_ && M >= kFewestPairedRows; }

  // Scales M rows of K values from x, before they are multiplied.
  template <int VB>
  void prepare(int64_t M, int64_t K, MatrixView<float> x) const {
    for (int64_t i = 0; i < M; ++i) {
      factors_[i] = scale<VB>(x.data + i * x.row_stride, K, rows_ + i * ld_);
      corrections_[i] = correction<VB>(rows_ + i * ld_, K);
    }
  }

  // f(rows of A), K values each.
  template <int VB, class F>
  SHVIT_INLINE void multiply(int64_t K, F f) const {
    float column_corrections[2 * kLanes<float, VB>];
    f(PairedRows{rows_, ld_, K, corrections_, factors_, column_corrections});
  }

  // f(row, its values) of M rows for those that are not finite: of infinities the sums in pairs know nothing.
  template <class F>
  SHVIT_INLINE void each_infinite(int64_t M, F f) const {
    for (int64_t i = 0; i < M; ++i)
      if (factors_[i] == 0) f(i, MatrixView<float>{rows_ + i * ld_, ld_, 1});
  }

 private:
  PairedScratch(float* rows, int64_t ld, float* corrections, float* factors)
      : rows_(rows), ld_(ld), corrections_(corrections), factors_(factors) {}

  // to = x / factor, of magnitudes whose mean lies in [0.5, 1), as that of packed weights does. The factor is 0
  // and to = x where x is not finite.
  template <int VB>
  static SHVIT_INLINE float scale(const float* x, int64_t K, float* to) {
    using V = Vec<float, VB>;
    using Bits = Vec<uint32_t, VB>;
    constexpr int W = kLanes<float, VB>;
    constexpr uint32_t kMagnitude = 0x7fffffff, kLargest = 253;
    V sums{};
    int64_t k = 0;
    for (; k + W <= K; k += W) sums += (V)((Bits)load<V>(x + k) & kMagnitude);
    if (k < K) sums += (V)((Bits)load_some<VB>(x + k, K - k) & kMagnitude);
    const float magnitude = static_cast<float>(horizontal_sum<float, VB>(sums) / static_cast<double>(K));
    uint32_t bits;
    __builtin_memcpy(&bits, &magnitude, sizeof bits);
    uint32_t exponent = (bits >> 23) + 1;
    const bool finite = exponent < 256;
    if (exponent == 1 || !finite) exponent = 127;  // zeros stay as they are
    if (exponent > kLargest) exponent = kLargest;  // so that the inverse is a normal number
    const auto power = [](uint32_t biased) {
      const uint32_t power_bits = biased << 23;
      float value;
      __builtin_memcpy(&value, &power_bits, sizeof value);
      return value;
    };
    const float inverse = power(254 - exponent);
    for (k = 0; k + W <= K; k += W) store(to + k, load<V>(x + k) * inverse);
    if (k < K) store_some<VB>(to + k, load_some<VB>(x + k, K - k) * inverse, K - k);
    return finite ? power(exponent) : 0;
  }

  // Of the pairs of a row: minus the product of the first in every six, plus that of the second.
  template <int VB>
  static SHVIT_INLINE float correction(const float* row, int64_t K) {
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
    const auto products = [&](V first, V second, int64_t k) SHVIT_INLINE_LAMBDA {
      return load<V>(kSigns.values + k % kPeriod) * (first * second);
    };
    V sums{};
    int64_t k = 0;
    for (; k + W < end; k += W) sums += products(load<V>(row + k), load<V>(row + k + 1), k);
    if (k < end) sums += products(load_some<VB>(row + k, end - k), load_some<VB>(row + k + 1, end - k - 1), k);
    return sum_lanes<float, VB>(sums);
  }

  float* rows_ = nullptr;
  int64_t ld_ = 0;
  float *corrections_ = nullptr, *factors_ = nullptr;
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
    const float correction = corrections[first + i], factor = factors[first + i];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      acc[i][j] = (acc[i][j] + (columns[j] + correction)) * (finish.template factor<V>(j) * factor);
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
