// Convolutions of 3x3 pixels and means over pixels, on images whose channels stand side by side, and how they
// come to stand so.
#pragma once

#include "linear.h"

namespace {

SHVIT_INLINE int64_t halved(int64_t n) { return (n + 1) / 2; }

// y = relu?(conv(x) + b) with stride 2 and padding 1, as a product of packed weights [9 * C, outputs], rows
// ordered by kernel row, kernel column and channel. A row of outputs reads three rows of x, which lie in
// scratch, channels side by side and with the padding at their ends: brought there from memory, or made by the
// convolution before.
template <class S, int VB>
struct Conv3x3 {
  using Params = shvit::Conv3x3Params<S>;
  static constexpr int kTile = kTileRows<VB, true> == 12 ? 14 : kTileRows<VB, true>;  // pixels
  // Bands of rows of an image, for several threads. The first row of one makes a row of its source again.
  static constexpr int64_t kBands = 8, kBandsOfThread = 2, kRowsWithSource = 7;
  static constexpr int64_t kLinesAhead = 4;  // of x, on their way from memory

  // What a tile of pixels reads: three pixels in each line inside the image. `Channels`, unless 0, is known
  // when this is compiled.
  template <int64_t Channels>
  struct Patches {
    int64_t channels;
    const S* line[3];  // null outside

    template <class Visit>
    SHVIT_INLINE void pieces(int64_t first, Visit visit) const {
      const int64_t C = Channels ? Channels : channels;
#pragma GCC unroll 3
      for (int64_t ky = 0; ky < 3; ++ky)
        if (line[ky]) visit(MatrixView<S>{line[ky] + 2 * first * C, 2 * C, 1}, 3 * C, 3 * ky * C);
    }
  };

  static int64_t line_size(const Params& a) { return (a.width + 2) * a.channels; }

  // Rows of one image, from the first one asked for on. `source` makes those of x, if it is not null.
  class Rows {
   public:
    Rows(const Params& a, int64_t image, int64_t first, Rows* source, S* memory)
        : a_(a),
          x_(source ? nullptr : a.x + image * a.channels * a.height * a.width),
          first_(first),
          read_(max64(0, 2 * first - 1)),
          source_(source),
          memory_(memory) {}

    void make(int64_t row, S* y) {
      for (; read_ < min64(2 * row + 2, a_.height); ++read_) read(line(read_));
      if (a_.channels == 3) {
        multiply<3>(row, y);
      } else {
        multiply<0>(row, y);
      }
    }

   private:
    template <int64_t Channels>
    void multiply(int64_t row, S* y) const {
      Patches<Channels> patches{a_.channels, {}};
      for (int64_t ky = 0; ky < 3; ++ky) {
        const int64_t from = 2 * row + ky - 1;
        patches.line[ky] = from >= 0 && from < a_.height ? line(from) : nullptr;
      }
      gemm_packed<S, VB, kTile>(halved(a_.width), patches,
                                PackedWeights<S>{a_.weight, 9 * a_.channels, row == first_}, 0, a_.outputs,
                                LinearFinish<S>{a_.bias, nullptr, y, a_.outputs, a_.outputs, a_.relu});
    }

    // A row of outputs needs the last line of the one before, so three lines take turns.
    S* line(int64_t row) const { return memory_ + row % 3 * line_size(a_); }

    void read(S* line) {
      const int64_t C = a_.channels, count = a_.width * C;
      fill(line, C, S{});
      if (source_) {
        source_->make(read_, line + C);
      } else if (a_.channels_last) {
        bring(x_ + read_ * count, count);
        copy_row<VB>(x_ + read_ * count, line + C, count);
      } else {
        const int64_t plane = a_.height * a_.width;
        for (int64_t c = 0; c < C; ++c) bring(x_ + c * plane + read_ * a_.width, a_.width);
        const S* from = x_ + read_ * a_.width;
        if (C == 3) {
          interleave(from, from + plane, from + 2 * plane, a_.width, line + C);
        } else {
          transpose(from, plane, C, a_.width, line + C, C);
        }
      }
      fill(line + C + count, C, S{});
    }

    // Three planes side by side, by shuffles that the compiler finds: one value after the other would take a
    // fifth of the first convolution.
    static void interleave(const S* __restrict a, const S* __restrict b, const S* __restrict c, int64_t n,
                           S* __restrict to) {
      for (int64_t i = 0; i < n; ++i) {
        to[3 * i] = a[i];
        to[3 * i + 1] = b[i];
        to[3 * i + 2] = c[i];
      }
    }

    // Brings a later line.
    void bring(const S* from, int64_t count) const {
      if (read_ + kLinesAhead < a_.height) prefetch(from + kLinesAhead * count, count);
    }

    const Params& a_;
    const S* x_;
    const int64_t first_;
    int64_t read_;
    Rows* source_;
    S* memory_;
  };

  static Parts bands(const Params& a) {
    const int64_t rows = halved(a.height);
    if (!a.source) return {rows, min64(rows, kBands)};
    return {rows, min64(ceil_div(rows, kRowsWithSource), kBandsOfThread * a.threads)};
  }
  static int64_t flops(const Params& a) {
    return 18 * a.images * halved(a.height) * halved(a.width) * a.channels * a.outputs;
  }

  static Plan plan(const Params& a) {
    Plan plan = single_phase<S>(a.images * bands(a).parts, flops(a), 3 * line_size(a));
    if (a.source) {
      plan.flops += flops(*a.source);
      plan.scratch_bytes += single_phase<S>(1, 0, 3 * line_size(*a.source)).scratch_bytes;
    }
    return plan;
  }

  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = bands(a);
    const int64_t image = task / all.parts, begin = all.begin(task % all.parts),
                  end = all.end(task % all.parts);
    const int64_t row_size = halved(a.width) * a.outputs;
    Bump bump(memory);
    S* lines = bump.take<S>(3 * line_size(a));
    const Params& first = a.source ? *a.source : a;
    Rows source(first, image, max64(0, 2 * begin - 1), nullptr,
                a.source ? bump.take<S>(3 * line_size(first)) : nullptr);
    Rows rows(a, image, begin, a.source ? &source : nullptr, lines);
    for (int64_t row = begin; row < end; ++row)
      rows.make(row, a.y + (image * halved(a.height) + row) * row_size);
  }
};

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
    return single_phase<S>(a.images * bands(a).parts, a.images * flops, row_size(a) + source_size(a));
  }

  // A row of zeros stands for those above and below the image.
  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = bands(a);
    const int64_t image = task / all.parts, band = task % all.parts;
    S* zero = Bump(memory).take<S>(row_size(a) + source_size(a));
    fill(zero, row_size(a), S{});
    const Band rows = band_of(a, image, all.begin(band), all.end(band), zero, zero + row_size(a));
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

  static Band band_of(const Params& a, int64_t image, int64_t begin, int64_t end, const S* zero, S* made) {
    if (!a.source) return {image, begin, end, 0, a.x + image * a.height * row_size(a), zero};
    const int64_t first = first_source_row(a, begin);
    shvit::PointwiseParams<S> source = *a.source;
    source.images = 1;
    source.tokens = (end_source_row(a, end) - first) * a.width;
    source.x += (image * a.height + first) * a.width * source.inputs;
    source.y = made;
    const int64_t tasks = Pointwise<S, VB>::tasks(source).count();
    for (int64_t task = 0; task < tasks; ++task) Pointwise<S, VB>::run(source, 0, task, nullptr);
    return {image, begin, end, first, made, zero};
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
