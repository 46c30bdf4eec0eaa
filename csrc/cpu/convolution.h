// Convolutions of 3x3 pixels and means over pixels, on images whose channels stand side by side. float32.
#pragma once

#include "linear.h"

namespace {

SHVIT_INLINE int64_t halved(int64_t n) { return (n + 1) / 2; }

// y = relu?(conv(x) + b) with stride 2 and padding 1, as a product of packed weights [9 * C, outputs], rows ordered
// by kernel row, kernel column and channel. A row of outputs reads three rows of x, which lie in scratch with the
// padding at their ends.
template <int VB>
struct Conv3x3 {
  using Params = shvit::Conv3x3Params;
  static constexpr int kTile = kTileRows<VB, true> == 12 ? 14 : kTileRows<VB, true>;  // pixels
  static constexpr int64_t kBands = 8;  // of an image, for several threads

  // A row of x as it lies in scratch: `planes` of (width + 2) pixels of `values` channels.
  struct Line {
    int64_t planes, values;
    explicit Line(const Params& a) : planes(a.channels_last ? 1 : a.channels), values(a.channels_last ? a.channels : 1) {}
  };
  static int64_t plane_floats(const Params& a) { return (a.width + 2) * Line(a).values; }
  static int64_t line_floats(const Params& a) { return plane_floats(a) * Line(a).planes; }
  static Parts bands(const Params& a) { return {halved(a.height), min64(kBands, halved(a.height))}; }

  // What a tile of pixels reads: in each line inside the image, and in each plane, three pixels.
  struct Patches {
    const float* line[3];  // null outside
    int64_t planes, values, plane_floats;

    template <class Visit>
    SHVIT_INLINE void pieces(int64_t first, Visit visit) const {
      for (int64_t ky = 0; ky < 3; ++ky) {
        if (!line[ky]) continue;
        for (int64_t plane = 0; plane < planes; ++plane)
          visit(MatrixView<float>{line[ky] + plane * plane_floats + 2 * first * values, 2 * values, 1}, 3 * values,
                3 * ky * planes * values + plane, planes);
      }
    }
  };

  static Plan plan(const Params& a) {
    return single_phase<float>(a.images * bands(a).parts,
                               18 * a.images * halved(a.height) * halved(a.width) * a.channels * a.outputs,
                               3 * line_floats(a));
  }

  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = bands(a);
    const int64_t image = task / all.parts, first = all.begin(task % all.parts), end = all.end(task % all.parts);
    const int64_t columns = halved(a.width);
    float* lines = Bump(memory).take<float>(3 * line_floats(a));
    const float* x = a.x + image * a.channels * a.height * a.width;
    float* y = a.y + image * halved(a.height) * columns * a.outputs;
    // Row r of x is line r % 3, and stays for the next row of outputs where that reads it too.
    int64_t read = 2 * first - 1;
    for (int64_t row = first; row < end; ++row) {
      for (; read <= 2 * row + 1; ++read)
        if (read >= 0 && read < a.height) copy_line(a, x, read, lines + read % 3 * line_floats(a));
      Patches patches{{}, Line(a).planes, Line(a).values, plane_floats(a)};
      for (int64_t ky = 0; ky < 3; ++ky) {
        const int64_t from = 2 * row + ky - 1;
        patches.line[ky] = from >= 0 && from < a.height ? lines + from % 3 * line_floats(a) : nullptr;
      }
      const LinearFinish finish{a.bias, nullptr, y + row * columns * a.outputs, a.outputs, a.outputs,
                                a.relu ? Activation::kRelu : Activation::kNone};
      gemm_packed<float, VB, kTile>(columns, 9 * a.channels, patches, a.weight, 0, a.outputs, finish);
    }
  }

  static void copy_line(const Params& a, const float* x, int64_t row, float* line) {
    const Line shape(a);
    for (int64_t plane = 0; plane < shape.planes; ++plane, line += plane_floats(a)) {
      const int64_t count = a.width * shape.values;
      fill(line, shape.values, 0.0f);
      copy_row<VB>(x + (plane * a.height + row) * count, line + shape.values, count);
      fill(line + shape.values + count, shape.values, 0.0f);
    }
  }
};

// y = relu?(conv(x) + b) of each channel alone, 3x3, padding 1, stride 1 or 2; weights [9, C].
template <int VB>
struct Depthwise {
  using Params = shvit::DepthwiseParams;
  using V = Vec<float, VB>;
  static constexpr int W = kLanes<float, VB>;
  static constexpr int64_t kBandFloats = 32 << 10;

  static int64_t out_height(const Params& a) { return a.stride == 2 ? halved(a.height) : a.height; }
  static int64_t out_width(const Params& a) { return a.stride == 2 ? halved(a.width) : a.width; }
  static Parts bands(const Params& a) {
    const int64_t rows = out_height(a);
    return {rows, min64(rows, ceil_div(rows * out_width(a) * a.channels, kBandFloats))};
  }
  static int64_t zeros(const Params& a) { return a.width * a.channels; }

  static Plan plan(const Params& a) {
    return single_phase<float>(a.images * bands(a).parts,
                               18 * a.images * out_height(a) * out_width(a) * a.channels, zeros(a));
  }

  // A row of zeros stands for those above and below the image.
  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = bands(a);
    const int64_t image = task / all.parts, band = task % all.parts;
    float* zero = Bump(memory).take<float>(zeros(a));
    fill(zero, zeros(a), 0.0f);
    if (a.stride == 2) {
      run_band<2>(a, image, all.begin(band), all.end(band), zero);
    } else {
      run_band<1>(a, image, all.begin(band), all.end(band), zero);
    }
  }

  template <int Stride>
  static void run_band(const Params& a, int64_t image, int64_t begin, int64_t end, const float* zero) {
    const int64_t C = a.channels;
    int64_t c = 0;
    for (; c + W <= C; c += W) run_channels<Stride, W>(a, image, begin, end, zero, c, W);
    if (c == C) return;
    if (C >= W) {
      run_channels<Stride, W>(a, image, begin, end, zero, C - W, W);  // some a second time
    } else {
      run_channels<Stride, 0>(a, image, begin, end, zero, c, C - c);
    }
  }

  // `valid` channels, W of them where Lanes says so.
  template <int Stride, int Lanes>
  SHVIT_INLINE static void run_channels(const Params& a, int64_t image, int64_t begin, int64_t end,
                                        const float* zero, int64_t channel, int64_t valid) {
    const int64_t C = a.channels, out = out_width(a);
    const auto get = [&](const float* p)
                         SHVIT_INLINE_LAMBDA { return Lanes == W ? load<V>(p) : load_some<VB>(p, valid); };
    V w[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) w[i] = get(a.weight + i * C + channel);
    const V bias = get(a.bias + channel);
    const float* x = a.x + image * a.height * a.width * C + channel;
    for (int64_t row = begin; row < end; ++row) {
      const float* from[3];
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        const int64_t source = Stride * row + ky - 1;
        from[ky] = source < 0 || source >= a.height ? zero + channel : x + source * a.width * C;
      }
      float* y = a.y + ((image * out_height(a) + row) * out) * C + channel;
      const auto pixel = [&](int64_t column, auto left, auto right) SHVIT_INLINE_LAMBDA {
        V sum = bias;
        const int64_t at = (Stride * column - 1) * C;
#pragma GCC unroll 3
        for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
          for (int kx = decltype(left)::value; kx < 3 - decltype(right)::value; ++kx)
            sum += get(from[ky] + at + kx * C) * w[3 * ky + kx];
        if (a.relu) sum = max0(sum);
        if (Lanes == W) {
          store(y + column * C, sum);
        } else {
          store_some<VB>(y + column * C, sum, valid);
        }
      };
      // The last column's right neighbour is inside where stride 2 ends on an even width.
      const bool right_inside = Stride * (out - 1) + 1 < a.width;
      const int64_t inner = right_inside ? out : out - 1;
      if (inner == 0) {
        pixel(0, Count<1>{}, Count<1>{});
        continue;
      }
      pixel(0, Count<1>{}, Count<0>{});
      for (int64_t column = 1; column < inner; ++column) pixel(column, Count<0>{}, Count<0>{});
      if (!right_inside) pixel(out - 1, Count<0>{}, Count<1>{});
    }
  }
};

// y[image][channel]: the mean over all pixels.
template <int VB>
struct Pool {
  using Params = shvit::PoolParams;
  static constexpr int64_t kRows = 64;  // summed for themselves: sums of sums round less than one long sum

  static Plan plan(const Params& a) {
    return single_phase<float>(a.images, a.images * a.pixels * a.channels, a.channels);
  }

  static void run(const Params& a, int, int64_t image, char* memory) {
    const int64_t C = a.channels;
    float *part = Bump(memory).take<float>(C), *y = a.y + image * C;
    const float* x = a.x + image * a.pixels * C;
    fill(y, C, 0.0f);
    for (int64_t first = 0; first < a.pixels; first += kRows) {
      fill(part, C, 0.0f);
      for (int64_t row = first; row < min64(first + kRows, a.pixels); ++row)
        for (int64_t c = 0; c < C; ++c) part[c] += x[row * C + c];
      for (int64_t c = 0; c < C; ++c) y[c] += part[c];
    }
    for (int64_t c = 0; c < C; ++c) y[c] /= static_cast<float>(a.pixels);
  }
};

}  // namespace
