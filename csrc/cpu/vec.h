// The vector type: VB bytes of T, as GCC and Clang lower it to whatever the enabled instruction set has.
// One source serves 128, 256 and 512 bits; a width beyond the instruction set is split by the compiler.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define SHVIT_INLINE inline __attribute__((always_inline))
#define SHVIT_INLINE_LAMBDA __attribute__((always_inline))

namespace {

using shvit::BFloat16;

template <class T, int VB>
struct VecOf {
  typedef T type __attribute__((vector_size(VB)));
};
template <class T, int VB>
using Vec = typename VecOf<T, VB>::type;

// A number as an argument of a template lambda.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class T, int VB>
constexpr int kLanes = VB / static_cast<int>(sizeof(T));

// The type that sums, statistics and products are computed in.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};

// Of a vector of sums.
template <class S, int VB>
constexpr int kSumLanes = kLanes<typename ComputeOf<S>::type, VB>;

template <class V, class T>
SHVIT_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
SHVIT_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Apart: once for each row of a tile it would be most of the tile's code.
template <class T>
__attribute__((noinline)) void copy_lanes(T* p, const T* lanes, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Scalars between storage and compute type; bfloat16 rounds to nearest even and keeps NaN.
template <class T>
SHVIT_INLINE T widen(T v) {
  return v;
}
SHVIT_INLINE float widen(BFloat16 v) {
  uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
template <class T>
SHVIT_INLINE void narrow(T* p, T v) {
  *p = v;
}
SHVIT_INLINE void narrow(BFloat16* p, float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  p->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Vectors of compute type from and to storage.
template <int VB>
SHVIT_INLINE Vec<float, VB> load_wide(const float* p) {
  return load<Vec<float, VB>>(p);
}
template <int VB>
SHVIT_INLINE Vec<double, VB> load_wide(const double* p) {
  return load<Vec<double, VB>>(p);
}
template <int VB>
SHVIT_INLINE Vec<float, VB> load_wide(const BFloat16* p) {
  const auto bits = __builtin_convertvector(load<Vec<uint16_t, VB / 2>>(p), Vec<uint32_t, VB>) << 16;
  return (Vec<float, VB>)bits;
}
template <int VB>
SHVIT_INLINE void store_narrow(float* p, Vec<float, VB> v) {
  store(p, v);
}
template <int VB>
SHVIT_INLINE void store_narrow(double* p, Vec<double, VB> v) {
  store(p, v);
}
template <int VB>
SHVIT_INLINE void store_narrow(BFloat16* p, Vec<float, VB> v) {
#if SHVIT_BFLOAT16
  const auto half = [&] {
    if constexpr (VB == 64) return _mm512_cvtneps_pbh(v);
    if constexpr (VB == 32) return _mm256_cvtneps_pbh(v);
    if constexpr (VB == 16) return _mm_cvtneps_pbh(v);
  }();
  __builtin_memcpy(p, &half, VB / 2);
#else
  const auto bits = (Vec<uint32_t, VB>)v;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t, VB> nan = Vec<uint32_t, VB>{} + 0x7fc0;
  store(p, __builtin_convertvector(v != v ? nan : rounded, Vec<uint16_t, VB / 2>));
#endif
}

// The first n lanes of a vector, fewer than it has; loaded ones are followed by zeros. AVX-512 is used by name,
// here and for bfloat16: the compiler would go lane by lane.
template <int VB, class S>
SHVIT_INLINE void store_some(S* p, Vec<typename ComputeOf<S>::type, VB> v, int64_t n) {
#if SHVIT_LANE_MASKS
  if constexpr (std::is_same_v<S, float>) {
    const unsigned mask = (1u << n) - 1;
    if constexpr (VB == 64) {
      _mm512_mask_storeu_ps(p, mask, v);
    } else {
      static_assert(VB == 32);
      _mm256_mask_storeu_ps(p, mask, v);
    }
    return;
  }
#endif
  S lanes[kLanes<typename ComputeOf<S>::type, VB>];
  store_narrow<VB>(lanes, v);
  copy_lanes(p, lanes, n);
}
template <int VB, class S>
SHVIT_INLINE auto load_some(const S* p, int64_t n) {
  using T = typename ComputeOf<S>::type;
#if SHVIT_LANE_MASKS
  if constexpr (std::is_same_v<S, float>) {
    const unsigned mask = (1u << n) - 1;
    if constexpr (VB == 64) {
      return Vec<float, VB>(_mm512_maskz_loadu_ps(mask, p));
    } else {
      static_assert(VB == 32);
      return Vec<float, VB>(_mm256_maskz_loadu_ps(mask, p));
    }
  }
#endif
  T lanes[kLanes<T, VB>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return load<Vec<T, VB>>(lanes);
}

// The first n lanes; zeros in place of the others, whatever they are.
template <class V>
SHVIT_INLINE V keep_lanes(V v, int64_t n) {
  using Mask = decltype(v < v);
  constexpr int kCount = sizeof(V) / sizeof(v[0]);
  Mask index{};
  for (int i = 0; i < kCount; ++i) index[i] = i;
  return Mask{} + static_cast<__typeof__(+index[0])>(n) > index ? v : V{};
}

template <class V>
SHVIT_INLINE V max0(V v) {
  return v < 0 ? V{} : v;  // keeps NaN
}

template <class V>
SHVIT_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

// Both halves of a vector.
template <class T, int VB>
struct Halves {
  Vec<T, VB / 2> low, high;
#if __has_builtin(__builtin_shufflevector)
  explicit SHVIT_INLINE Halves(Vec<T, VB> v) : Halves(v, std::make_integer_sequence<int, kHalf>()) {}

 private:
  static constexpr int kHalf = kLanes<T, VB> / 2;
  template <int... I>
  SHVIT_INLINE Halves(Vec<T, VB> v, std::integer_sequence<int, I...>)
      : low(__builtin_shufflevector(v, v, I...)), high(__builtin_shufflevector(v, v, (I + kHalf)...)) {}
#else  // GCC before 12, which then keeps the vector in memory, and a sum on its way into it
  explicit SHVIT_INLINE Halves(Vec<T, VB> v) {
    __builtin_memcpy(&low, &v, VB / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + VB / 2, VB / 2);
  }
#endif
};

// A half below zeros.
template <class T, int VB>
SHVIT_INLINE Vec<T, VB> below_zeros(Vec<T, VB / 2> half) {
#if __has_builtin(__builtin_shufflevector)
  return [&]<int... I>(std::integer_sequence<int, I...>) SHVIT_INLINE_LAMBDA {
    return __builtin_shufflevector(half, Vec<T, VB / 2>{}, I...);
  }(std::make_integer_sequence<int, kLanes<T, VB>>());
#else
  Vec<T, VB> v{};
  __builtin_memcpy(&v, &half, VB / 2);
  return v;
#endif
}

// Sums of each lane in double precision.
template <class T, int VB>
struct WideSum {
  Vec<double, VB> low{}, high{};
  SHVIT_INLINE void add(Vec<T, VB> v) {
    if constexpr (sizeof(T) == sizeof(double)) {
      low += v;
    } else {
      const Halves<T, VB> halves(v);
      low += __builtin_convertvector(halves.low, Vec<double, VB>);
      high += __builtin_convertvector(halves.high, Vec<double, VB>);
    }
  }
  SHVIT_INLINE void add_product(Vec<T, VB> a, Vec<T, VB> b) {  // exact, of float
    const Halves<T, VB> as(a), bs(b);
    using Wide = Vec<double, VB>;
    low += __builtin_convertvector(as.low, Wide) * __builtin_convertvector(bs.low, Wide);
    high += __builtin_convertvector(as.high, Wide) * __builtin_convertvector(bs.high, Wide);
  }
  SHVIT_INLINE double sum() const { return lanes_sum<VB>(low + high); }

 private:
  // By halves, which is few instructions, none of which wait for long.
  template <int Bytes>
  static SHVIT_INLINE double lanes_sum(Vec<double, Bytes> v) {
    if constexpr (kLanes<double, Bytes> == 2) {
      return v[0] + v[1];
    } else {
      const Halves<double, Bytes> halves(v);
      return lanes_sum<Bytes / 2>(halves.low + halves.high);
    }
  }
};

template <class T, int VB>
SHVIT_INLINE double horizontal_sum(Vec<T, VB> v) {
  WideSum<T, VB> sum;
  sum.add(v);
  return sum.sum();
}

// All lanes of a vector by f(a, b), in pairs.
template <class T, int VB, class F>
SHVIT_INLINE T over_lanes(Vec<T, VB> v, F f) {
  if constexpr (VB > 16) {
    const Halves<T, VB> halves(v);
    return over_lanes<T, VB / 2>(f(halves.low, halves.high), f);
  } else {
    T result = v[0];
    for (int i = 1; i < kLanes<T, VB>; ++i) result = f(result, v[i]);
    return result;
  }
}
template <class T, int VB>
SHVIT_INLINE T sum_lanes(Vec<T, VB> v) {
  return over_lanes<T, VB>(v, [](auto a, auto b) SHVIT_INLINE_LAMBDA { return a + b; });
}

// exp(x) for x <= 0 or NaN, within an ulp; exactly 0 below the logarithm of the smallest normal number.
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) from its Taylor series.
// Bits have no sign: exponents wrap below the lowest.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f, kLowest = -87.33654f;
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
};
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10,
                          kLowest = -708.396418532264;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
};

template <class T, int VB>
SHVIT_INLINE Vec<T, VB> exp_nonpositive(Vec<T, VB> x) {
  using K = ExpConstants<T>;
  using I = Vec<typename K::Bits, VB>;
  const Vec<T, VB> shifted = x * T(1.4426950408889634) + K::kRound;
  const Vec<T, VB> n = shifted - K::kRound;
  const Vec<T, VB> r = (x - n * K::kLn2Hi) - n * K::kLn2Lo;
  T factorial[K::kDegree + 1] = {1};
  for (int i = 1; i <= K::kDegree; ++i) factorial[i] = factorial[i - 1] * T(i);
  Vec<T, VB> p = Vec<T, VB>{} + T(1) / factorial[K::kDegree];
#pragma GCC unroll 16
  for (int i = K::kDegree - 1; i >= 0; --i) p = p * r + T(1) / factorial[i];
  const I power = ((I)shifted << K::kMantissa) + (typename K::Bits(K::kBias) << K::kMantissa);
  const Vec<T, VB> result = p * (Vec<T, VB>)power;
  return x < K::kLowest ? Vec<T, VB>{} : result;
}

// 1 / (1 + exp(-v)); NaN stays.
template <int VB>
SHVIT_INLINE Vec<float, VB> sigmoid(Vec<float, VB> v) {
  const Vec<float, VB> e = exp_nonpositive<float, VB>(v > 0 ? -v : v);  // exp(-|v|)
  return (v > 0 ? Vec<float, VB>{} + 1.0f : e) / (e + 1.0f);
}

}  // namespace
