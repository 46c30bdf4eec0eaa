// Products in pairs (S. Winograd, "A New Algorithm for Inner Product", IEEE Transactions on Computers C-17,
// 1968), for cores whose adders stand idle in a product of fused multiply-adds, as AMD's do:
//
//     a0 b0 + a1 b1 = (a0 + b1)(a1 + b0) - a0 a1 - b0 b1
//
// has one multiplication for each element of C, not two, and two additions. What is subtracted belongs to a row
// of A or to a column of B, and is summed once for each. Of three values two are a pair and one is multiplied
// as ever: then additions and multiply-adds are as many, and together take two thirds of the time. The three
// lie a third of K apart, as neighbours (tokens, say) are often large together.
//
// Sums round by |a|^2 + |b|^2, so a and b must be of like size: rows of A and columns of B are divided by
// powers of two, those of packed weights when they are packed. Signs alternate, (a0 - b1)(a1 - b0) = a0 a1 + b0
// b1 - (a0 b0 + a1 b1), so that what is corrected does not add up.
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

// Rows of B that are taken at a time: three with either sign. Rows of A: more would not fit into the registers.
constexpr int64_t kPairedDepth = 6;
constexpr int kPairedRows = 8;

// How far the three values are apart.
SHVIT_INLINE int64_t paired_distance(int64_t K) { return K / kPairedDepth * (kPairedDepth / 3); }

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

// Mean and largest magnitude of values. Their geometric mean is near the root mean square of dense and of
// sparse values, and no square of theirs can overflow.
template <class V>
struct Size {
  V mean{}, largest{};

  SHVIT_INLINE void add(V v, float share) {
    const V magnitude = magnitude_of(v);
    mean += magnitude * share;
    largest = vmax(magnitude, largest);
  }
};

// The power of two near such a size, by which values are divided. Zeros have the power 0, so that what rounding
// leaves of them vanishes, and what is not finite has NaN; both are divided by 1. Of a vector or a scalar.
template <class V>
struct Power {
  V value, inverse;
};
template <class V>
SHVIT_INLINE Power<V> power_near(const Size<V>& size) {
  using Bits = std::conditional_t<sizeof(V) == sizeof(float), uint32_t, Vec<uint32_t, sizeof(V)>>;
  const auto exponent_of = [](V v) SHVIT_INLINE_LAMBDA {
    Bits bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    return bits >> 23;
  };
  const auto power_of = [](Bits exponent) SHVIT_INLINE_LAMBDA {
    const Bits bits = exponent << 23;
    V v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
  };
  constexpr float kNaN = __builtin_nanf("");
  const Bits one = Bits{} + 127u, largest = Bits{} + 253u;  // whose inverse is a normal number
  Bits exponent = (exponent_of(size.mean) + exponent_of(size.largest)) / 2 + 1;
  exponent = exponent > largest ? largest : exponent;
  const auto finite = exponent_of(size.mean) < 255;
  const auto ordinary = finite & (size.largest > 0);
  Power<V> power;
  power.inverse = power_of(ordinary ? 254 - exponent : one);
  power.value = finite ? (ordinary ? power_of(exponent) : V{}) : V{} + kNaN;
  return power;
}

// Divides columns of B, n of them and the few more of their last vector, K values each, by powers of two.
template <int VB>
SHVIT_INLINE void scale_columns(float* rows, int64_t ld, int64_t K, int64_t n, float* factors) {
  over_columns<float, VB>(n, [&](auto lanes, int64_t column) SHVIT_INLINE_LAMBDA {
    using V = decltype(lanes);
    float* at = rows + column;
    const float share = 1.0f / static_cast<float>(K);
    Size<V> size;
    for (int64_t k = 0; k < K; ++k) size.add(load<V>(at + k * ld), share);
    const Power<V> power = power_near(size);
    for (int64_t k = 0; k < K; ++k) store(at + k * ld, load<V>(at + k * ld) * power.inverse);
    store(factors + column, power.value);
  });
}

template <int VB>
struct LaneSum {
  Vec<float, VB> lanes{};
  SHVIT_INLINE void add_product(Vec<float, VB> a, Vec<float, VB> b) { lanes += a * b; }
  SHVIT_INLINE float sum() const { return sum_lanes<float, VB>(lanes); }
};

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
  // For M rows of K values at most; nothing if products of T are not in pairs, or those of so few rows.
  template <class T, int VB>
  static PairedScratch take(Bump& bump, int64_t M, int64_t K) {
    const int64_t ld = row_distance<T>(K);
    return are_enough<T, VB>(M) ? in_place<T, VB>(bump, M, bump.take<T>(M * ld), ld) : PairedScratch{};
  }
  // The same for rows that may be scaled where they are.
  template <class T, int VB>
  static PairedScratch in_place(Bump& bump, int64_t M, T* rows, int64_t ld) {
    if constexpr (kInPairs<T, VB>) {
      if (are_enough<T, VB>(M)) return {rows, ld, bump.take<T>(M), bump.take<T>(M), bump.take<T>(M)};
    }
    return {};
  }

  // The rows from row `i` on.
  PairedScratch from(int64_t i) const {
    return exists() ? PairedScratch{row(i), ld_, corrections_ + i, rests_ + i, factors_ + i} : PairedScratch{};
  }

  float* row(int64_t i) const { return rows_ + i * ld_; }
  float factor(int64_t i) const { return factors_[i]; }
  bool is_infinite(int64_t i) const { return factors_[i] != factors_[i]; }
  int64_t distance() const { return ld_; }

  bool exists() const { return ld_ > 0; }  // without memory too, when it is only measured

  // Scales M rows of K values from x, before they are multiplied. Exact: corrections are sums in double, for
  // rows of weights, whose error all tokens would share.
  template <int VB, bool Exact = false>
  void prepare(int64_t M, int64_t K, MatrixView<float> x) const {
    for (int64_t i = 0; i < M; ++i) {
      factors_[i] = scale<VB>(x.data + i * x.row_stride, K, row(i));
      const auto sum = correction<VB, Exact>(row(i), K);
      corrections_[i] = static_cast<float>(sum);
      rests_[i] = static_cast<float>(sum - corrections_[i]);
    }
  }

  // f(rows of A), K values each.
  template <int VB, class F>
  SHVIT_INLINE void multiply(int64_t K, F f) const {
    float column_corrections[4 * kLanes<float, VB>];
    f(PairedRows{rows_, ld_, K, corrections_, rests_, factors_, column_corrections});
  }

  // f(row, its values) of M rows for those that are not finite: of infinities the sums in pairs know nothing.
  template <class F>
  SHVIT_INLINE void each_infinite(int64_t M, F f) const {
    for (int64_t i = 0; i < M; ++i)
      if (is_infinite(i)) f(i, MatrixView<float>{row(i), ld_, 1});
  }

 private:
  template <class T, int VB>
  static bool are_enough(int64_t M) {
    return kInPairs<T, VB> && M >= kFewestPairedRows;
  }

  PairedScratch(float* rows, int64_t ld, float* corrections, float* rests, float* factors)
      : rows_(rows), ld_(ld), corrections_(corrections), rests_(rests), factors_(factors) {}

  // to = x / factor; the factor is NaN where x is not finite.
  template <int VB>
  static SHVIT_INLINE float scale(const float* x, int64_t K, float* to) {
    using V = Vec<float, VB>;
    constexpr int W = kLanes<float, VB>;
    const float share = 1.0f / static_cast<float>(K);
    Size<V> lanes;
    int64_t k = 0;
    for (; k + W <= K; k += W) lanes.add(load<V>(x + k), share);
    if (k < K) lanes.add(load_some<VB>(x + k, K - k), share);
    const Size<float> size{
        sum_lanes<float, VB>(lanes.mean),
        over_lanes<float, VB>(lanes.largest, [](auto a, auto b) SHVIT_INLINE_LAMBDA { return vmax(a, b); })};
    const Power<float> power = power_near(size);
    for (k = 0; k + W <= K; k += W) store(to + k, load<V>(x + k) * power.inverse);
    if (k < K) store_some<VB>(to + k, load_some<VB>(x + k, K - k) * power.inverse, K - k);
    return power.value;
  }

  // Of the pairs of a row: minus the product of every even one, plus that of every odd one.
  template <int VB, bool Exact>
  static SHVIT_INLINE auto correction(const float* row, int64_t K) {
    using V = Vec<float, VB>;
    constexpr int W = kLanes<float, VB>;
    V signs;
    for (int i = 0; i < W; ++i) signs[i] = i % 2 ? 1 : -1;
    const int64_t n = paired_distance(K);
    std::conditional_t<Exact, WideSum<float, VB>, LaneSum<VB>> sum;
    int64_t k = 0;
    for (; k + W <= n; k += W) sum.add_product(signs * load<V>(row + k), load<V>(row + n + k));
    if (k < n) sum.add_product(signs * load_some<VB>(row + k, n - k), load_some<VB>(row + n + k, n - k));
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
  V acc[MR][NV] = {}, columns[NV] = {}, lost[NV] = {};
  const float *ak = data + first * ld, *bk = b.data;
  const int64_t apart = paired_distance(K);
  const auto row_of = [&](int64_t k, V(&row)[NV]) SHVIT_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load<V>(bk + k * b.row_stride + j * b.vector_stride);
  };
  const auto three = [&](int64_t k, auto negative) SHVIT_INLINE_LAMBDA {
    constexpr bool kNegative = decltype(negative)::value;
    V b0[NV], b1[NV], b2[NV];
    row_of(k, b0);
    row_of(k + apart, b1);
    row_of(k + 2 * apart, b2);
    if constexpr (First) {  // a compensated sum, as all rows will share its error
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const V more = (kNegative ? b0[j] * b1[j] : -(b0[j] * b1[j])) - lost[j], sum = columns[j] + more;
        lost[j] = (sum - columns[j]) - more;
        columns[j] = sum;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const float* ai = ak + i * ld + k;
      const V a0 = broadcast<VB>(ai), a1 = broadcast<VB>(ai + apart), a2 = broadcast<VB>(ai + 2 * apart);
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
    for (int64_t step = 0; step < count; ++step, ak += 2, bk += 2 * b.row_stride) {
      for (int64_t i = 0; i < lines && ahead.next < ahead.end; ++i, ahead.next += Ahead::kLine)
        __builtin_prefetch(ahead.next, 0, Ahead::kLevel);
      if constexpr (decltype(with_ends)::value) ends.template next_row<NV * kLanes<float, VB>>();
      three(0, Count<0>{});
      three(1, Count<1>{});
    }
  };
  const int64_t count = K / kPairedDepth, head = Ends ? min64(ends.rows, count) : 0;
  if constexpr (Ends) steps(head, Count<1>{});
  steps(count - head, Count<0>{});
  ak += 2 * apart;
  bk += 2 * apart * b.row_stride;
  for (int64_t k = 3 * apart; k < K; ++k, ++ak, bk += b.row_stride) {
    V row[NV];
    row_of(0, row);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += ak[i * ld] * row[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    float* at = column_corrections + 2 * j * kLanes<float, VB>;
    if constexpr (First) {
      store(at, columns[j]);
      store(at + kLanes<float, VB>, lost[j]);
    } else {
      columns[j] = load<V>(at);
      lost[j] = load<V>(at + kLanes<float, VB>);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const float correction = corrections[first + i], rest = rests[first + i], factor = factors[first + i];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      acc[i][j] =
          (acc[i][j] + (columns[j] + correction) + (rest - lost[j])) * (finish.template factor<V>(j) * factor);
  }
  finish.finish(first, acc);
}

template <int VB, class S>
SHVIT_INLINE void prepare_rows(int64_t M, int64_t K, MatrixView<S> x, const PairedScratch& pairs) {
  if constexpr (kInPairs<S, VB>) {
    if (pairs.exists()) pairs.prepare<VB>(M, K, x);
  }
}

}  // namespace
