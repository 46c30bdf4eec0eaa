// Depthwise convolutions and means over pixels, on images whose channels stand side by side, and how they come
// to stand so.
#pragma once

#include "conv3x3.h"

namespace {

// y = relu?(conv(x) + b) of each channel alone, 3x3, padding 1, stride 1 or 2; weights [9, C]. Rows of x come
// from memory, or are made in scratch, a band at a time, by the pointwise layer before.
template <class S, int VB>
struct Depthwise {
  using Params = shvit::DepthwiseParams<S>;
  using V = Vec<float, VB>;
  static constexpr int W = kLanes<float, VB>;
  // What neighbouring outputs read stays in registers, where it fits beside the weights.
  static constexpr bool kWindow = kRegisters<VB> >= 28;
  static constexpr int64_t kBandSize = (128 << 10) / sizeof(S), kSourceSize = (512 << 10) / sizeof(S);

  static int64_t out_height(const Params& a) { return a.stride == 2 ? halved(a.height) : a.height; }
  static int64_t out_width(const Params& a) { return a.stride == 2 ? halved(a.width) : a.width; }
  static int64_t row_size(const Params& a) { return a.width * a.channels; }
  static Parts bands(const Params& a) {
    const int64_t rows = out_height(a);
    if (!a.source) return {rows, min64(rows, ceil_div(rows * out_width(a) * a.channels, kBandSize))};
    // Neighbours make a row twice, so bands are few.
    return {rows, ceil_div(rows, max64(1, (kSourceSize / row_size(a) - 3) / a.stride + 1))};
  }
  // Rows of x that a band reads.
  static int64_t first_source_row(const Params& a, int64_t begin) { return max64(0, a.stride * begin - 1); }
  static int64_t end_source_row(const Params& a, int64_t end) {
    return min64(a.height, a.stride * (end - 1) + 2);
  }
  static int64_t source_size(const Params& a) {
    const Parts all = bands(a);
    return a.source ? (a.stride * (ceil_div(all.n, all.parts) - 1) + 3) * row_size(a) : 0;
  }

  static Plan plan(const Params& a) {
    const int64_t flops = 18 * out_height(a) * out_width(a) * a.channels +
                          (a.source ? 2 * a.height * a.width * a.source->inputs * a.channels : 0);
    Plan plan = single_phase<S>(a.images * bands(a).parts, a.images * flops, 0);
    Bump bump(nullptr);
    Scratch(bump, a);
    plan.scratch_bytes = bump.used();
    return plan;
  }

  using Source = Pointwise<S, VB>;
  static constexpr int64_t kSourceRows = LinearTasks::kMostRows;  // of x, that its source makes at a time

  // A row of zeros, which stands for those above and below the image; rows of x, if they are made here.
  struct Scratch {
    S *zero, *made = nullptr;
    typename Source::Rows source;
    Scratch(Bump& bump, const Params& a) : zero(bump.take<S>(row_size(a))) {
      if (!a.source) return;
      made = bump.take<S>(source_size(a));
      source = typename Source::Rows(bump, *a.source, kSourceRows);
    }
  };

  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = bands(a);
    const int64_t image = task / all.parts, band = task % all.parts;
    Bump bump(memory);
    const Scratch scratch(bump, a);
    fill(scratch.zero, row_size(a), S{});
    const Band rows = band_of(a, image, all.begin(band), all.end(band), scratch);
    if (a.stride == 2) {
      run_band<2>(a, rows);
    } else {
      run_band<1>(a, rows);
    }
  }

  // Rows of outputs, and where those of x lie, from `first` on.
  struct Band {
    int64_t image, begin, end, first;
    const S *x, *zero;
  };

  static Band band_of(const Params& a, int64_t image, int64_t begin, int64_t end, const Scratch& scratch) {
    if (!a.source) return {image, begin, end, 0, a.x + image * a.height * row_size(a), scratch.zero};
    const int64_t first = first_source_row(a, begin), tokens = (end_source_row(a, end) - first) * a.width;
    shvit::PointwiseParams<S> source = *a.source;
    source.x += (image * a.height + first) * a.width * source.inputs;
    source.y = scratch.made;
    const Parts blocks{tokens, ceil_div(tokens, kSourceRows)};
    for (int64_t block = 0; block < blocks.parts; ++block) {
      const int64_t row = blocks.begin(block), count = blocks.end(block) - row;
      Source::prepare(source, row, count, scratch.source);
      Source::multiply(source, row, count, 0, source.outputs, scratch.source);
    }
    return {image, begin, end, first, scratch.made, scratch.zero};
  }

  template <int Stride>
  static void run_band(const Params& a, const Band& band) {
    const int64_t C = a.channels;
    int64_t c = 0;
    for (; c + W <= C; c += W) run_channels<Stride, W>(a, band, c, W);
    if (c == C) return;
    if (C >= W) {
      run_channels<Stride, W>(a, band, C - W, W);  // some a second time
    } else {
      run_channels<Stride, 0>(a, band, c, C - c);
    }
  }

  // `valid` channels, W of them where Lanes says so.
  template <int Stride, int Lanes>
  SHVIT_INLINE static void run_channels(const Params& a, const Band& band, int64_t channel, int64_t valid) {
    const int64_t C = a.channels, out = out_width(a);
    const auto get = [&](const S* p) SHVIT_INLINE_LAMBDA {
      return Lanes == W ? load_wide<VB>(p) : load_some<VB>(p, valid);
    };
    V w[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) w[i] = get(a.weight + i * C + channel);
    const V bias = get(a.bias + channel);
    for (int64_t row = band.begin; row < band.end; ++row) {
      const S* from[3];
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t source = Stride * row + ky - 1;
        const bool inside = source >= 0 && source < a.height;
        from[ky] = (inside ? band.x + (source - band.first) * row_size(a) : band.zero) + channel;
      }
      S* y = a.y + ((band.image * out_height(a) + row) * out) * C + channel;
      const auto value = [&](int64_t column, int ky, int kx)
                             SHVIT_INLINE_LAMBDA { return get(from[ky] + (Stride * column - 1 + kx) * C); };
      // Without its neighbours on the left or right, where those are outside. `x`: the values under w.
      const auto pixel = [&](int64_t column, auto left, auto right, auto x) SHVIT_INLINE_LAMBDA {
        V sum = bias;
#pragma GCC unroll 3
        for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
          for (int kx = decltype(left)::value; kx < 3 - decltype(right)::value; ++kx)
            sum += x(column, ky, kx) * w[3 * ky + kx];
        if (a.relu) sum = max0(sum);
        if (Lanes == W) {
          store_narrow<VB>(y + column * C, sum);
        } else {
          store_some<VB>(y + column * C, sum, valid);
        }
      };
      // The last column's right neighbour is inside where stride 2 ends on an even width.
      const bool right_inside = Stride * (out - 1) + 1 < a.width;
      const int64_t inner = right_inside ? out : out - 1;
      if (inner == 0) {
        pixel(0, Count<1>{}, Count<1>{}, value);
        continue;
      }
      pixel(0, Count<1>{}, Count<0>{}, value);
      if constexpr (kWindow) {
        V window[3][3];
        const auto in_window = [&](int64_t, int ky, int kx) SHVIT_INLINE_LAMBDA { return window[ky][kx]; };
        const auto each = [&](int begin, int end, auto f) SHVIT_INLINE_LAMBDA {
#pragma GCC unroll 3
          for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
            for (int kx = begin; kx < end; ++kx) window[ky][kx] = f(ky, kx);
        };
        each(0, 3 - Stride, [&](int ky, int kx) SHVIT_INLINE_LAMBDA { return value(1, ky, kx); });
        for (int64_t column = 1; column < inner; ++column) {
          each(3 - Stride, 3, [&](int ky, int kx) SHVIT_INLINE_LAMBDA { return value(column, ky, kx); });
          pixel(column, Count<0>{}, Count<0>{}, in_window);
          each(0, 3 - Stride, [&](int ky, int kx) SHVIT_INLINE_LAMBDA { return window[ky][kx + Stride]; });
        }
      } else {
        for (int64_t column = 1; column < inner; ++column) pixel(column, Count<0>{}, Count<0>{}, value);
      }
      if (!right_inside) pixel(out - 1, Count<0>{}, Count<1>{}, value);
    }
  }
};

// Channels side by side, from planes.
template <class S, int VB>
struct ToRows {
  using Params = shvit::RowsParams<S>;
  static constexpr int64_t kChannels = 4 * kPanel;  // of a task

  static int64_t blocks(const Params& a) { return ceil_div(a.channels, kChannels); }
  static Plan plan(const Params& a) {
    return single_phase<S>(a.images * blocks(a), a.images * a.pixels * a.channels, 0);
  }

  static void run(const Params& a, int, int64_t task, char*) {
    const int64_t image = task / blocks(a), channel = task % blocks(a) * kChannels;
    const int64_t at = image * a.channels * a.pixels, channels = min64(kChannels, a.channels - channel);
    const S* x = a.x + at + channel * a.pixels;
    if (task + 1 < a.images * blocks(a)) prefetch(x + channels * a.pixels, channels * a.pixels);
    transpose(x, a.pixels, channels, a.pixels, a.y + at + channel, a.channels);
  }
};

// y[image][channel]: the mean over all pixels.
template <class S, int VB>
struct Pool {
  using Params = shvit::PoolParams<S>;
  static constexpr int64_t kRows = 64;  // summed for themselves: sums of sums round less than one long sum

  static Plan plan(const Params& a) {
    return single_phase<float>(a.images, a.images * a.pixels * a.channels, 2 * a.channels);
  }

  static void run(const Params& a, int, int64_t image, char* memory) {
    const int64_t C = a.channels;
    float *sum = Bump(memory).take<float>(2 * C), *part = sum + C;
    const S* x = a.x + image * a.pixels * C;
    fill(sum, C, 0.0f);
    for (int64_t first = 0; first < a.pixels; first += kRows) {
      fill(part, C, 0.0f);
      for (int64_t row = first; row < min64(first + kRows, a.pixels); ++row)
        for (int64_t c = 0; c < C; ++c) part[c] += widen(x[row * C + c]);
      for (int64_t c = 0; c < C; ++c) sum[c] += part[c];
    }
    for (int64_t c = 0; c < C; ++c) narrow(a.y + image * C + c, sum[c] / static_cast<float>(a.pixels));
  }
};

}  // namespace
