// Convolutions of 3x3 pixels and means over pixels, on images whose channels stand side by side. float32.
#pragma once

#include "linear.h"

namespace {

SHVIT_INLINE int64_t halved(int64_t n) { return (n + 1) / 2; }

// y = relu?(conv(x) + b) with stride 2 and padding 1, as a product of packed weights [9 * C, outputs], rows
// ordered by kernel row, kernel column and channel, and patches that a block of pixels gathers in scratch.
template <int VB>
struct Conv3x3 {
  using Params = shvit::Conv3x3Params;
  static constexpr int64_t kPatchFloats = 64 << 10, kFewestPixels = 24, kMostPixels = 128;

  static int64_t depth(const Params& a) { return 9 * a.channels; }
  static int64_t pixels(const Params& a) { return halved(a.height) * halved(a.width); }
  static Parts blocks(const Params& a) {
    const int64_t most = max64(kFewestPixels, min64(kMostPixels, kPatchFloats / depth(a)));
    return {pixels(a), ceil_div(pixels(a), most)};
  }
  // Patches lie as the channels of x do: pixel by pixel, or value by value.
  static int64_t ld(const Params& a) {
    return a.channels_last ? depth(a) : ceil_div(pixels(a), blocks(a).parts);
  }
  static int64_t patch_floats(const Params& a) { return ceil_div(pixels(a), blocks(a).parts) * depth(a); }

  static Plan plan(const Params& a) {
    return single_phase<float>(a.images * blocks(a).parts, 2 * a.images * pixels(a) * depth(a) * a.outputs,
                               patch_floats(a));
  }

  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = blocks(a);
    const int64_t image = task / all.parts, first = all.begin(task % all.parts),
                  end = all.end(task % all.parts);
    float* patches = Bump(memory).take<float>(patch_floats(a));
    const float* x = a.x + image * a.channels * a.height * a.width;
    const int64_t columns = halved(a.width);
    for (int64_t pixel = first; pixel < end;) {  // by rows of the output
      const int64_t row = pixel / columns, column = pixel % columns,
                    count = min64(columns - column, end - pixel);
      if (a.channels_last) {
        gather_pixels(a, x, row, column, count, patches + (pixel - first) * depth(a));
      } else {
        gather_values(a, x, row, column, count, patches + pixel - first);
      }
      pixel += count;
    }
    const MatrixView<float> view =
        a.channels_last ? MatrixView<float>{patches, ld(a), 1} : MatrixView<float>{patches, 1, ld(a)};
    float* y = a.y + (image * pixels(a) + first) * a.outputs;
    linear_rows<VB>(end - first, depth(a), view, a.weight, 0, a.outputs,
                    {a.bias, nullptr, y, a.outputs, a.outputs, a.relu ? Activation::kRelu : Activation::kNone});
  }

  static void gather_pixels(const Params& a, const float* x, int64_t row, int64_t column, int64_t count,
                            float* patches) {
    const int64_t C = a.channels;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t ky = 0; ky < 3; ++ky, patches += 3 * C) {
        const int64_t from_row = 2 * row + ky - 1, from = 2 * (column + i) - 1;
        const float* source = x + (from_row * a.width + from) * C;
        if (from_row < 0 || from_row >= a.height) {
          fill(patches, 3 * C, 0.0f);
        } else if (from >= 0 && from + 3 <= a.width) {
          copy_row<VB>(source, patches, 3 * C);
        } else {
          for (int64_t kx = 0; kx < 3; ++kx) {
            if (from + kx >= 0 && from + kx < a.width) {
              copy_row<VB>(source + kx * C, patches + kx * C, C);
            } else {
              fill(patches + kx * C, C, 0.0f);
            }
          }
        }
      }
    }
  }

  static void gather_values(const Params& a, const float* x, int64_t row, int64_t column, int64_t count,
                            float* patches) {
    const int64_t ld_patches = ld(a);
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t from_row = 2 * row + ky - 1;
      for (int64_t kx = 0; kx < 3; ++kx) {
        const int64_t from = 2 * column + kx - 1;
        // Where the image ends on either side.
        const int64_t before = from < 0 ? 1 : 0, inside = min64(count, (a.width - from + 1) / 2);
        for (int64_t c = 0; c < a.channels; ++c, patches += ld_patches) {
          if (from_row < 0 || from_row >= a.height) {
            fill(patches, count, 0.0f);
            continue;
          }
          const float* source = x + (c * a.height + from_row) * a.width + from;
          fill(patches, before, 0.0f);
          for (int64_t i = before; i < inside; ++i) patches[i] = source[2 * i];
          fill(patches + inside, count - inside, 0.0f);
        }
      }
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
