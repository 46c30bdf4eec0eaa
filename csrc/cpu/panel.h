// Panels: small row-major matrices of compute type in scratch, and their way from and to image tensors.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace {

using shvit::Plan;
using shvit::Sizes;

SHVIT_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
SHVIT_INLINE int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
SHVIT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
SHVIT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows an odd number of cache lines apart, so that columns do not share cache sets.
template <class T>
SHVIT_INLINE int64_t row_distance(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(columns, kLine) | 1) * kLine;
}

// Hands out aligned pieces of one buffer. With a null buffer it only measures.
class Bump {
 public:
  explicit Bump(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const uintptr_t p = base_ + static_cast<uintptr_t>(used_);
    // Vectors may read past the end of a panel's last row.
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)) + 128, 64);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

// A kernel of one phase, whose running tasks have so much scratch.
template <class T>
SHVIT_INLINE Plan single_phase(int64_t tasks, int64_t flops, int64_t scratch) {
  Plan plan;
  plan.phases = 1;
  plan.tasks[0] = tasks;
  plan.flops = flops;
  Bump bump(nullptr);
  bump.take<T>(scratch);
  plan.scratch_bytes = bump.used();
  return plan;
}

// One image [C, N] of a tensor in NCHW (token_stride 1) or channels_last (channel_stride 1) order.
template <class S>
struct ImageView {
  S* data;
  int64_t channel_stride, token_stride;

  ImageView at(int64_t channel, int64_t token) const {
    return {data + channel * channel_stride + token * token_stride, channel_stride, token_stride};
  }
};

template <class S>
SHVIT_INLINE ImageView<S> image_view(S* data, int64_t image, int64_t C, int64_t N, bool channels_last) {
  S* base = data + image * C * N;
  return channels_last ? ImageView<S>{base, 1, C} : ImageView<S>{base, N, 1};
}

// Rows that are transposed at a time: what they become in float32 is a cache line, which is then written whole.
constexpr int64_t kTransposed = 16;

struct Identity {
  template <class V>
  SHVIT_INLINE V operator()(V v) const {
    return v;
  }
};

struct Relu {
  template <class V>
  SHVIT_INLINE V operator()(V v) const {
    return max0(v);
  }
};

// dst[j][i] = f(src[i][j]), with conversion between storage and compute type.
template <class From, class To, class F = Identity>
SHVIT_INLINE void transpose(const From* src, int64_t lds, int64_t rows, int64_t cols, To* dst, int64_t ldd,
                            F f = {}) {
  using T = typename ComputeOf<To>::type;
  constexpr int VB = 4 * sizeof(T);
  using V = Vec<T, VB>;
#ifdef __clang__
#define SHVIT_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
  typedef typename ExpConstants<T>::Bits Mask __attribute__((vector_size(VB)));
#define SHVIT_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Mask{i, j, k, l})
#endif
  const auto block = [&](int64_t i, int64_t j) SHVIT_INLINE_LAMBDA {
    const From* s = src + i * lds;
    const V a = f(load_wide<VB>(s + j)), b = f(load_wide<VB>(s + lds + j)),
            c = f(load_wide<VB>(s + 2 * lds + j)), d = f(load_wide<VB>(s + 3 * lds + j));
    const V ab_lo = SHVIT_SHUFFLE(a, b, 0, 4, 1, 5), ab_hi = SHVIT_SHUFFLE(a, b, 2, 6, 3, 7);
    const V cd_lo = SHVIT_SHUFFLE(c, d, 0, 4, 1, 5), cd_hi = SHVIT_SHUFFLE(c, d, 2, 6, 3, 7);
    To* t = dst + j * ldd + i;
    store_narrow<VB>(t, SHVIT_SHUFFLE(ab_lo, cd_lo, 0, 1, 4, 5));
    store_narrow<VB>(t + ldd, SHVIT_SHUFFLE(ab_lo, cd_lo, 2, 3, 6, 7));
    store_narrow<VB>(t + 2 * ldd, SHVIT_SHUFFLE(ab_hi, cd_hi, 0, 1, 4, 5));
    store_narrow<VB>(t + 3 * ldd, SHVIT_SHUFFLE(ab_hi, cd_hi, 2, 3, 6, 7));
  };
  const int64_t whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
  for (int64_t first = 0; first < rows; first += kTransposed) {
    const int64_t end = first + kTransposed < rows ? first + kTransposed : rows;
    const int64_t whole = end < whole_rows ? end : whole_rows;
    for (int64_t j = 0; j < whole_cols; j += 4)
      for (int64_t i = first; i < whole; i += 4) block(i, j);
    for (int64_t i = first; i < end; ++i)
      for (int64_t j = i < whole ? whole_cols : 0; j < cols; ++j)
        narrow(dst + j * ldd + i, f(widen(src[i * lds + j])));
  }
#undef SHVIT_SHUFFLE
}

// Applies f to n contiguous elements, converting between storage and compute type.
template <int VB, class From, class To, class F>
SHVIT_INLINE void map_row(const From* src, To* dst, int64_t n, F f) {
  using T = typename ComputeOf<From>::type;
  constexpr int W = kLanes<T, VB>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_narrow<VB>(dst + i, f(load_wide<VB>(src + i)));
  for (; i < n; ++i) narrow(dst + i, f(widen(src[i])));
}

// A vector or a scalar, as the second argument is.
template <class V, class S>
SHVIT_INLINE V load_as(const S* p, V) {
  if constexpr (sizeof(V) > sizeof(typename ComputeOf<S>::type)) {
    return load_wide<sizeof(V)>(p);
  } else {
    return widen(*p);
  }
}

template <class S>
SHVIT_INLINE void fill(S* row, int64_t n, S value) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

// f(vector or scalar, i) for n contiguous values, in vectors; the last one takes in values before it where
// there are enough, so f must give the same for them once more.
template <int VB, class F>
SHVIT_INLINE void over_row(int64_t n, F f) {
  using V = Vec<float, VB>;
  constexpr int W = kLanes<float, VB>;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(V{}, i);
  if (i == n) return;
  if (n >= W) {
    f(V{}, n - W);
  } else {
    for (; i < n; ++i) f(0.0f, i);
  }
}

// dst[i] = f(vector or scalar, i), which must not read dst.
template <int VB, class S, class F>
SHVIT_INLINE void write_row(S* dst, int64_t n, F f) {
  over_row<VB>(n, [&](auto lane, int64_t i) SHVIT_INLINE_LAMBDA {
    if constexpr (sizeof(lane) > sizeof(float)) {
      store_narrow<VB>(dst + i, f(lane, i));
    } else {
      narrow(dst + i, f(lane, i));
    }
  });
}

template <int VB, class From, class To>
SHVIT_INLINE void copy_row(const From* src, To* dst, int64_t n) {
  write_row<VB>(dst, n, [&](auto lane, int64_t i) SHVIT_INLINE_LAMBDA { return load_as(src + i, lane); });
}

template <int VB, class S>
SHVIT_INLINE void multiply_row(const S* a, const S* b, S* dst, int64_t n) {
  write_row<VB>(dst, n, [&](auto lane, int64_t i) SHVIT_INLINE_LAMBDA {
    return load_as(a + i, lane) * load_as(b + i, lane);
  });
}

template <int VB, class S>
SHVIT_INLINE void sigmoid_row(S* row, int64_t n) {
  constexpr int W = kLanes<float, VB>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_narrow<VB>(row + i, sigmoid<VB>(load_wide<VB>(row + i)));
  if (i < n) store_some<VB>(row + i, sigmoid<VB>(load_some<VB>(row + i, n - i)), n - i);
}

// f(vector, first column) for n columns of a panel, and the few more that vectors of kColumnStep take: behind
// those may lie what another thread writes.
template <class T, int VB, class F>
SHVIT_INLINE void over_columns(int64_t n, F f) {
  constexpr int64_t kStep = kColumnStep<T, VB>;
  int64_t t = 0;
  for (; n - t > kLanes<T, VB> - kStep; t += kLanes<T, VB>) f(Vec<T, VB>{}, t);
  if constexpr (kStep < kLanes<T, VB>) {
    if (t < n) f(Vec<T, VB / 2>{}, t);
  }
}

// Zeros from column n up to the next kColumnStep.
template <int VB, class T>
SHVIT_INLINE void clear_columns(T* panel, int64_t rows, int64_t ld, int64_t n) {
  using V = Vec<T, kColumnStep<T, VB> * sizeof(T)>;
  const int64_t kept = n % kColumnStep<T, VB>;
  if (kept == 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    T* last = panel + r * ld + n - kept;
    store(last, keep_lanes(load<V>(last), kept));
  }
}

// panel[p][t] of n tokens; the columns up to the next kColumnStep are zero.
template <int VB, class S, class T>
SHVIT_INLINE void load_panel(ImageView<const S> x, int64_t P, int64_t n, T* panel, int64_t ld) {
  if (x.token_stride == 1) {
    for (int64_t p = 0; p < P; ++p) {
      const S* from = x.data + p * x.channel_stride;
      over_columns<T, VB>(n, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
        constexpr int kBytes = sizeof(lanes);
        const bool whole = n - t >= kLanes<T, kBytes>;
        store(panel + p * ld + t, whole ? load_wide<kBytes>(from + t) : load_some<kBytes>(from + t, n - t));
      });
    }
  } else {
    transpose(x.data, x.token_stride, n, P, panel, ld);
    clear_columns<VB>(panel, P, ld, n);
  }
}

template <int VB, class S, class T>
SHVIT_INLINE void store_panel(const T* panel, int64_t ld, int64_t P, int64_t n, ImageView<S> y) {
  if (y.token_stride == 1) {
    for (int64_t p = 0; p < P; ++p) map_row<VB>(panel + p * ld, y.data + p * y.channel_stride, n, Identity{});
  } else {
    transpose(panel, ld, P, n, y.data, y.token_stride);
  }
}

// dst = f(src) for `channels` channels and n tokens of two images in the same order.
template <int VB, class S, class F>
SHVIT_INLINE void map_image(ImageView<const S> src, ImageView<S> dst, int64_t channels, int64_t n, F f) {
  const bool by_channel = src.token_stride == 1;
  const int64_t rows = by_channel ? channels : n, length = by_channel ? n : channels;
  const int64_t src_stride = by_channel ? src.channel_stride : src.token_stride;
  const int64_t dst_stride = by_channel ? dst.channel_stride : dst.token_stride;
  if (src_stride == length && dst_stride == length) {
    map_row<VB>(src.data, dst.data, rows * length, f);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      map_row<VB>(src.data + r * src_stride, dst.data + r * dst_stride, length, f);
  }
}

// f(vector or scalar, i) for n contiguous values.
template <class T, int VB, class F>
SHVIT_INLINE void for_row(int64_t n, F f) {
  constexpr int W = kLanes<T, VB>;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(Vec<T, VB>{}, i);
  for (; i < n; ++i) f(T(0), i);
}

// dst[i] = f(vector or scalar, i) for n contiguous values, each from values at i alone.
template <int VB, class T, class F>
SHVIT_INLINE void make_row(T* dst, int64_t n, F f) {
  for_row<T, VB>(n, [&](auto lane, int64_t i) SHVIT_INLINE_LAMBDA { store(dst + i, f(lane, i)); });
}

// dst += src for `channels` channels and n tokens of two images in the same order.
template <int VB, class S>
SHVIT_INLINE void add_image(ImageView<const S> src, ImageView<S> dst, int64_t channels, int64_t n) {
  using T = typename ComputeOf<S>::type;
  constexpr int W = kLanes<T, VB>;
  const bool by_channel = src.token_stride == 1;
  const int64_t rows = by_channel ? channels : n, length = by_channel ? n : channels;
  const int64_t stride = by_channel ? src.channel_stride : src.token_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const S* s = src.data + r * stride;
    S* d = dst.data + r * stride;
    int64_t i = 0;
    for (; i + W <= length; i += W) store_narrow<VB>(d + i, load_wide<VB>(d + i) + load_wide<VB>(s + i));
    for (; i < length; ++i) narrow(d + i, widen(d[i]) + widen(s[i]));
  }
}

// dst = gradient where y is positive (or NaN), 0 elsewhere; all three images in the same order.
template <int VB, class S>
SHVIT_INLINE void mask_image(ImageView<const S> gradient, ImageView<const S> y, ImageView<S> dst,
                             int64_t channels, int64_t n) {
  using T = typename ComputeOf<S>::type;
  using V = Vec<T, VB>;
  constexpr int W = kLanes<T, VB>;
  const bool by_channel = y.token_stride == 1;
  const int64_t rows = by_channel ? channels : n, length = by_channel ? n : channels;
  const int64_t stride = by_channel ? y.channel_stride : y.token_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const S *g = gradient.data + r * stride, *o = y.data + r * stride;
    S* d = dst.data + r * stride;
    int64_t i = 0;
    for (; i + W <= length; i += W)
      store_narrow<VB>(d + i, load_wide<VB>(o + i) <= 0 ? V{} : load_wide<VB>(g + i));
    for (; i < length; ++i) narrow(d + i, widen(o[i]) <= 0 ? T(0) : widen(g[i]));
  }
}

// Sums over the n tokens of a panel's row, of f(vector, column).
template <int VB, class T, class F>
SHVIT_INLINE Vec<T, VB> sum_lanes_of_row(int64_t n, F f) {
  Vec<T, VB> sum{};
  over_columns<T, VB>(n, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
    auto v = f(lanes, t);
    if (n - t < kLanes<T, sizeof(v)>) v = keep_lanes(v, n - t);
    if constexpr (sizeof(v) == VB) {
      sum += v;
    } else {
      sum += below_zeros<T, VB>(v);
    }
  });
  return sum;
}
template <int VB, class T, class F>
SHVIT_INLINE double sum_row(int64_t n, F f) {
  return horizontal_sum<T, VB>(sum_lanes_of_row<VB, T>(n, f));
}

// Group normalisation of an image, or what is known of it from some of its tokens.
struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: sum of squared deviations from the mean

  SHVIT_INLINE void merge(const Moments& o) {
    if (o.count == 0) return;
    const double total = count + o.count, delta = o.mean - mean;
    squares += o.squares + delta * delta * (count * o.count / total);
    mean += delta * (o.count / total);
    count = total;
  }
  SHVIT_INLINE double rstd(double eps) const { return 1.0 / __builtin_sqrt(squares / count + eps); }
};

// The same over the P rows of a panel, of f(vector, row, column): rows are added up lane by lane.
template <int VB, class T, class F>
SHVIT_INLINE double sum_panel(int64_t P, int64_t n, F f) {
  WideSum<T, VB> total;
  for (int64_t p = 0; p < P; ++p)
    total.add(
        sum_lanes_of_row<VB, T>(n, [&](auto lane, int64_t t) SHVIT_INLINE_LAMBDA { return f(lane, p, t); }));
  return total.sum();
}

template <int VB, class T>
SHVIT_INLINE Moments panel_moments(const T* panel, int64_t P, int64_t n, int64_t ld) {
  const double count = static_cast<double>(P * n);
  const double mean =
      sum_panel<VB, T>(P, n,
                       [&](auto lane, int64_t p, int64_t t) { return load_as(panel + p * ld + t, lane); }) /
      count;
  const T centre = static_cast<T>(mean);
  const double squares = sum_panel<VB, T>(P, n, [&](auto lane, int64_t p, int64_t t) {
    const auto d = load_as(panel + p * ld + t, lane) - centre;
    return d * d;
  });
  return {count, mean, squares};
}

// z = (panel - mean) * rstd * weight + bias, in place or beside the panel, which then becomes (panel - mean) *
// rstd.
template <int VB, class T>
SHVIT_INLINE void normalise(T* panel, T* z, int64_t P, int64_t n, int64_t ld, T mean, T rstd, const T* weight,
                            const T* bias) {
  for (int64_t p = 0; p < P; ++p) {
    const T factor = rstd * weight[p], b = bias ? bias[p] : T(0);
    T* row = panel + p * ld;
    T* out = z + p * ld;
    over_columns<T, VB>(n, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
      const auto centred = load_as(row + t, lanes) - mean;
      if (panel != z) store(row + t, centred * rstd);
      store(out + t, centred * factor + b);
    });
  }
}

// How images are cut: short ones whole, several per panel when they are tiny; long ones in blocks of tokens.
constexpr int64_t kShortTokens = 256;
constexpr int64_t kGroupTokens = 64;
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kBlockLd = kBlockTokens + 16;  // not a power of two: rows would share cache sets
constexpr int64_t kQueryColumns = 32;            // queries of a block of scores [keys, queries]

template <class T, int VB>
struct Groups {
  int64_t images, distance, count, ld;  // images per panel, columns from one to the next, panels, their width

  explicit Groups(const Sizes& s) {
    distance = round_up(s.N, kColumnStep<T, VB>);
    images = min64(max64(kGroupTokens / distance, 1), max64(s.B, 1));
    count = ceil_div(s.B, images);
    ld = round_up(images * distance, kLanes<T, VB>);
  }
  int64_t begin(int64_t group) const { return group * images; }
  int64_t size(int64_t group, int64_t B) const { return min64(images, B - group * images); }
};

// Contiguous, nearly equal parts of n.
struct Parts {
  int64_t n, parts;
  int64_t begin(int64_t part) const { return n * part / parts; }
  int64_t end(int64_t part) const { return n * (part + 1) / parts; }
};

// Parts with partial sums of their own: enough for many threads, few enough to add up.
SHVIT_INLINE Parts reduction_parts(int64_t n) { return {n, min64(n, min64(max64(8, n / 8), 64))}; }

// The first D rows times the scale of the logits.
template <class T>
SHVIT_INLINE void scale_rows(const Sizes& s, double scale, int64_t columns, int64_t ld, T* rows) {
  const T factor = static_cast<T>(scale);
  if (factor == T(1)) return;
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t t = 0; t < columns; ++t) rows[d * ld + t] *= factor;
}

// qkv = W z + b, with the scale of the logits in q.
template <class T, int VB>
SHVIT_INLINE void project(const Sizes& s, const void* weight, const void* bias, double scale, int64_t columns,
                          int64_t ld, const T* z, T* qkv) {
  gemm<T, VB>(s.O(), columns, s.P, {static_cast<const T*>(weight), s.P, 1}, z, ld, qkv, ld,
              bias ? Init::kBias : Init::kZero, static_cast<const T*>(bias));
  scale_rows(s, scale, columns, ld, qkv);
}

}  // namespace
