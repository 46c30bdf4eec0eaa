// Convolutions of 3x3 pixels with stride 2 and padding 1, y = relu?(conv(x) + b), on images whose channels
// stand side by side in the result.
#pragma once

#include "linear.h"

namespace {

SHVIT_INLINE int64_t halved(int64_t n) { return (n + 1) / 2; }

// Squares of 2x2 outputs by Winograd's minimal filtering (Lavin and Gray, CVPR 2016), F(2, 2) on every second
// value. Two outputs in a row read five values o e o' e' o",
//   y = o g0 + e g1 + o' g2   and   y' = o' g0 + e' g1 + o" g2,
// which are y = A + B and y' = C + B of three sums that have five products, not six:
//   A = (o - o') g0 + e g1,   B = o' (g0 + g2),   C = (o" - o') g2 + e' g1.
// In both directions nine sums have 25 products for each channel, not 36. Every output is made of the values
// under its kernel and of no others, so NaN stays where it is.
//
// Weights are in the order of the sums AA, AB, AC, BA and so on, for each one its products, row by row.
struct Winograd {
  static constexpr int kProducts = 5;  // in a direction: two of A, one of B, two of C
  static constexpr int kAll = kProducts * kProducts;
  static constexpr int kFirst[3] = {0, 2, 3}, kTerms[3] = {2, 1, 2};  // of a sum

  // Of a sum, its first product, and how many there are.
  static constexpr int first(int row, int column) {
    return kProducts * kFirst[row] + kTerms[row] * kFirst[column];
  }
  static constexpr int terms(int row, int column) { return kTerms[row] * kTerms[column]; }

  // f(row, column) of the products in this order.
  template <class F>
  static SHVIT_INLINE void each_product(F f) {
#pragma GCC unroll 9
    for (int sum = 0; sum < 9; ++sum)
#pragma GCC unroll 4
      for (int term = 0; term < 4; ++term)  // as many as a sum has at most, so that the loop can be unrolled
        if (term < terms(sum / 3, sum % 3))
          f(kFirst[sum / 3] + term / kTerms[sum % 3], kFirst[sum % 3] + term % kTerms[sum % 3]);
  }

  // Where the product with this weight of the kernel alone lies.
  static constexpr int place_of_tap(int ky, int kx) {
    const int row = ky / 2 * 2, column = kx / 2 * 2;  // of the sum
    return first(row, column) + ky % 2 * kTerms[column] + kx % 2;
  }
};

// A product of packed weights [9 * C, outputs], rows ordered by kernel row, kernel column and channel, or
// [25 * C, outputs] as Winograd has them. Lines that it reads lie in scratch, channels side by side: brought
// there from memory, or made by the convolution before.
template <class S, int VB>
struct Conv3x3 {
  using Params = shvit::Conv3x3Params<S>;
  static constexpr int kTile =
      kTileRows<VB, true> == 12 ? 14 : kTileRows<VB, true>;  // pixels, or squares of them
  // Bands of rows of an image, for several threads. The first row of one makes a row of its source again.
  static constexpr int64_t kBands = 8, kBandsOfThread = 2, kRowsWithSource = 7;
  static constexpr int64_t kLinesAhead = 4;  // of x, on their way from memory

  class Rows;

  // bfloat16 would round the differences of values, so it reads the weights of the kernel alone.
  static bool in_squares(const Params& a) { return std::is_same_v<S, float> && a.winograd; }

  // Lines that are kept: as many as outputs read that are made at a time. The last one of them is read again.
  static int64_t kept(const Params& a) { return in_squares(a) ? 5 : 3; }
  static int64_t squares_across(const Params& a) { return ceil_div(a.width, 4); }
  // Squares read lines where they are, if they can, and have padding of their own.
  static int64_t padding(const Params& a) { return in_squares(a) ? 0 : a.channels; }
  static bool in_place(const Params& a) { return in_squares(a) && !a.source && a.channels_last; }
  static int64_t line_size(const Params& a) { return a.width * a.channels + 2 * padding(a); }

  // Lines of one image, with the padding around each. `source` makes them, if it is not null.
  class Lines {
   public:
    static int64_t size(const Params& a) { return in_place(a) ? 0 : kept(a) * line_size(a); }

    Lines(const Params& a, int64_t image, int64_t first, Rows* source, S* memory)
        : a_(a),
          x_(source ? nullptr : a.x + image * a.channels * a.height * a.width),
          read_(max64(0, first)),
          source_(source),
          memory_(memory) {}

    void read_to(int64_t end) {
      if (in_place(a_)) return;
      for (; read_ < min64(end, a_.height); ++read_) read(memory_ + read_ % kept(a_) * line_size(a_));
    }
    // One of those kept; null outside the image.
    const S* line(int64_t row) const {
      if (row < 0 || row >= a_.height) return nullptr;
      return in_place(a_) ? x_ + row * line_size(a_) : memory_ + row % kept(a_) * line_size(a_);
    }

   private:
    void read(S* line) {
      const int64_t C = a_.channels, count = a_.width * C;
      fill(line, padding(a_), S{});
      line += padding(a_);
      if (source_) {
        source_->make(read_, line);
      } else if (a_.channels_last) {
        bring(x_ + read_ * count, count);
        copy_row<VB>(x_ + read_ * count, line, count);
      } else {
        const int64_t plane = a_.height * a_.width;
        for (int64_t c = 0; c < C; ++c) bring(x_ + c * plane + read_ * a_.width, a_.width);
        const S* from = x_ + read_ * a_.width;
        if (C == 3) {
          interleave(from, from + plane, from + 2 * plane, a_.width, line);
        } else {
          transpose(from, plane, C, a_.width, line, C);
        }
      }
      fill(line + count, padding(a_), S{});
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
    int64_t read_;
    Rows* source_;
    S* memory_;
  };

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

  // The same with weights as Winograd has them, a pixel at a time.
  struct PatchesByPixel {
    int64_t channels;
    const S* line[3];

    template <class Visit>
    SHVIT_INLINE void pieces(int64_t first, Visit visit) const {
      for (int ky = 0; ky < 3; ++ky) {
        if (!line[ky]) continue;
        for (int kx = 0; kx < 3; ++kx)
          visit(MatrixView<S>{line[ky] + (2 * first + kx) * channels, 2 * channels, 1}, channels,
                Winograd::place_of_tap(ky, kx) * channels);
      }
    }
  };

  // Rows of one image, from the first one asked for on, each a product.
  class Rows {
   public:
    Rows(const Params& a, int64_t image, int64_t first, Rows* source, S* memory)
        : a_(a), first_(first), lines_(a, image, 2 * first - 1, source, memory) {}

    void make(int64_t row, S* y) {
      lines_.read_to(2 * row + 2);
      if (a_.winograd) {
        if constexpr (!std::is_same_v<S, float>) multiply<PatchesByPixel>(row, Winograd::kAll, y);
      } else if (a_.channels == 3) {
        multiply<Patches<3>>(row, 9, y);
      } else {
        multiply<Patches<0>>(row, 9, y);
      }
    }

   private:
    template <class A>
    void multiply(int64_t row, int64_t products, S* y) const {
      A patches{a_.channels, {}};
      for (int64_t ky = 0; ky < 3; ++ky) patches.line[ky] = lines_.line(2 * row + ky - 1);
      gemm_packed<S, VB, kTile>(
          halved(a_.width), patches, PackedWeights<S>{a_.weight, products * a_.channels, row == first_}, 0,
          a_.outputs, LinearFinish<S>{a_.bias, nullptr, y, a_.outputs, a_.outputs, a_.relu});
    }

    const Params& a_;
    const int64_t first_;
    Lines lines_;
  };

  // Rows of squares of one image: products of some squares at a time, which stay in cache.
  class Squares {
   public:
    static constexpr int64_t kMost = 28;
    static constexpr int64_t kFewestPairedChannels = 48;  // so that sums are long enough for pairs

    struct Scratch {
      S *lines, *patch, *terms, *sums;
      PairedScratch pairs[9];  // of the terms of each sum
      Scratch(const Params& a, Bump& bump)
          : lines(bump.take<S>(Lines::size(a))),
            patch(bump.take<S>(25 * a.channels)),
            terms(bump.take<S>(kMost * distance(a))),
            sums(bump.take<S>(9 * kMost * kColumns)) {
        if (a.channels < kFewestPairedChannels) return;
        for (int sum = 0; sum < 9; ++sum)
          pairs[sum] = PairedScratch::in_place<S, VB>(bump, kMost, terms + first_term(a, sum), distance(a));
      }
    };

    Squares(const Params& a, int64_t image, int64_t first, Rows* source, const Scratch& scratch)
        : a_(a),
          y_(a.y + image * halved(a.height) * halved(a.width) * a.outputs),
          lines_(a, image, 4 * first - 1, source, scratch.lines),
          scratch_(scratch) {}

    void make(int64_t begin, int64_t end) {
      const int64_t across = squares_across(a_), count = (end - begin) * across;
      const Parts blocks{count, ceil_div(count, kMost)};
      for (int64_t block = 0; block < blocks.parts; ++block) {
        const int64_t first = begin * across + blocks.begin(block), M = blocks.end(block) - blocks.begin(block);
        for (int64_t i = 0; i < M; ++i) read(place_of(first + i), scratch_.terms + i * distance(a_));
        multiply(first, M);
      }
    }

   private:
    static constexpr int64_t kColumns = 2 * kLanes<S, VB>;
    // Those of a sum, among the terms of a square, and how many there are.
    static int64_t first_term(const Params& a, int sum) {
      return Winograd::first(sum / 3, sum % 3) * a.channels;
    }
    static int64_t terms(const Params& a, int sum) { return Winograd::terms(sum / 3, sum % 3) * a.channels; }
    // From the terms of a square to those of the next.
    static int64_t distance(const Params& a) { return row_distance<S>(Winograd::kAll * a.channels); }

    struct Place {
      int64_t row, column;  // among the squares of the image
    };
    Place place_of(int64_t square) const {
      const int64_t across = squares_across(a_);
      return {square / across, square % across};
    }
    // The first of the outputs of a square.
    S* outputs(Place square) const {
      return y_ + 2 * (square.row * halved(a_.width) + square.column) * a_.outputs;
    }

    // The left factors of all products of a square.
    void read(Place square, S* to) {
      const auto [row, column] = square;
      lines_.read_to(4 * row + 4);
      const int64_t C = a_.channels, first = 4 * column - 1;
      const S* line[5];
      bool inside = first >= 0 && first + 5 <= a_.width;
      for (int64_t i = 0; i < 5; ++i) {
        const S* from = lines_.line(4 * row - 1 + i);
        inside = inside && from;
        line[i] = from ? from + first * C : nullptr;
      }
      if (!inside) pad(row, first, line);
      if (in_place(a_)) bring(square);
      over_row<VB>(C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA {
        decltype(lane) v[5][5];
#pragma GCC unroll 5
        for (int j = 0; j < 5; ++j) {
          const auto at = [&](int i) SHVIT_INLINE_LAMBDA { return load_as(line[i] + j * C + c, lane); };
          factors(at(0), at(1), at(2), at(3), at(4),
                  [&](int i, auto value) SHVIT_INLINE_LAMBDA { v[i][j] = value; });
        }
#pragma GCC unroll 5
        for (auto& u : v)
          factors(u[0], u[1], u[2], u[3], u[4], [&](int j, auto value) SHVIT_INLINE_LAMBDA { u[j] = value; });
        S* at = to + c;
        Winograd::each_product([&](int i, int j) SHVIT_INLINE_LAMBDA {
          store(at, v[i][j]);
          at += C;
        });
      });
    }

    // Brings what the square below reads of further lines.
    void bring(Place square) const {
      const int64_t row = 4 * square.row + 4, column = 4 * square.column;
      for (int64_t i = row; i < min64(row + 4, a_.height); ++i)
        prefetch(lines_.line(i) + column * a_.channels, min64(4, a_.width - column) * a_.channels);
    }

    // Puts a copy with zeros in the place of what a square reads at the border of the image.
    void pad(int64_t row, int64_t column, const S* (&line)[5]) const {
      const int64_t C = a_.channels, begin = max64(0, -column), end = min64(5, a_.width - column);
      for (int64_t i = 0; i < 5; ++i) {
        S* to = scratch_.patch + 5 * i * C;
        fill(to, 5 * C, S{});
        if (lines_.line(4 * row - 1 + i)) copy_row<VB>(line[i] + begin * C, to + begin * C, (end - begin) * C);
        line[i] = to;
      }
    }

    // f(product, its left factor) of a line.
    template <class V, class F>
    static SHVIT_INLINE void factors(V odd0, V even0, V odd1, V even1, V odd2, F f) {
      f(0, odd0 - odd1);
      f(1, even0);
      f(2, odd1);
      f(3, odd2 - odd1);
      f(4, even1);
    }

    struct SumsFinish {
      static constexpr bool kDeep = true;
      S* sums;

      template <class V, int MR, int NV>
      SHVIT_INLINE void operator()(int64_t first, int64_t, V (&acc)[MR][NV]) const {
        each_vector(acc, [&](V& v, int i, int j) SHVIT_INLINE_LAMBDA {
          store(sums + (first + i) * kColumns + j * kLanes<S, sizeof(V)>, v);
        });
      }
    };

    void multiply(int64_t first, int64_t M) const {
      for (int sum = 0; sum < 9; ++sum) prepare_rows<VB, S>(M, terms(a_, sum), left(sum), scratch_.pairs[sum]);
      constexpr int64_t W = kLanes<S, VB>, kHalf = W == kPanel ? W / 2 : 0;
      int64_t n = columns<VB, 2>(first, M, 0, W + kHalf);
      n = columns<VB, 1>(first, M, n, kHalf);
      if constexpr (kHalf > 0) columns<VB / 2, 1>(first, M, n, 0);
    }

    MatrixView<S> left(int sum) const { return {scratch_.terms + first_term(a_, sum), distance(a_), 1}; }

    // NV vectors of columns at a time from column `n` on, while more than `rest` are left; returns the next
    // column.
    template <int Bytes, int NV>
    int64_t columns(int64_t first, int64_t M, int64_t n, int64_t rest) const {
      constexpr int64_t W = kLanes<S, Bytes>;
      const PackedWeights<S> weights{a_.weight, Winograd::kAll * a_.channels, true};
      for (; a_.outputs - n > rest; n += NV * W) {
        for (int sum = 0; sum < 9; ++sum) {
          bring_results(first + M * sum / 9, first + M * (sum + 1) / 9, n, NV * W);
          const int64_t k = first_term(a_, sum), K = terms(a_, sum);
          const VectorsView<S> b{weights.at(n) + k * kPanel, kPanel, weights.vectors(n, W).vector_stride};
          const ScaledColumnsFrom<SumsFinish, S, W> finish{
              {SumsFinish{scratch_.sums + sum * kMost * kColumns}, n}, weights.factors(n, W)};
          const Ahead ahead = weights.ahead(n, NV * W, k, K);
          if constexpr (kInPairs<S, VB>) {
            const PairedScratch& pairs = scratch_.pairs[sum];
            if (pairs.exists()) {
              pairs.multiply<VB>(K, [&](const PairedRows& rows) SHVIT_INLINE_LAMBDA {
                gemm_column<S, Bytes, NV, kPairedRows>(M, rows, b, finish, ahead);
              });
              continue;
            }
          }
          gemm_column<S, Bytes, NV, kTile>(M, WholeRows<S>{left(sum), K}, b, finish, ahead);
        }
        this->template finish<Bytes, NV>(first, M, n);
      }
      return n;
    }

    // Brings where the results of some squares go, `count` columns from column `n` on.
    void bring_results(int64_t first, int64_t end, int64_t n, int64_t count) const {
      for (int64_t square = first; square < end; ++square) {
        const S* y = outputs(place_of(square)) + n;
        for (int64_t pixel = 0; pixel < 4; ++pixel) {
          const S* to = y + (pixel / 2 * halved(a_.width) + pixel % 2) * a_.outputs;
          for (int64_t i = 0; i < count; i += Ahead::kLine / static_cast<int64_t>(sizeof(S)))
            __builtin_prefetch(to + i, 1);
          __builtin_prefetch(to + count - 1, 1);
        }
      }
    }

    template <int Bytes, int NV>
    SHVIT_INLINE void finish(int64_t first, int64_t M, int64_t n) const {
      using V = Vec<S, Bytes>;
      constexpr int64_t W = kLanes<S, Bytes>;
      const int64_t width = halved(a_.width), height = halved(a_.height);
      const int64_t last = a_.outputs - n - (NV - 1) * W;  // values of the last vector, which can be cut
      for (int j = 0; j < NV; ++j) {
        const bool whole = j < NV - 1 || last >= W;
        const S* b = a_.bias + n + j * W;
        const V bias = whole ? load<V>(b) : load_some<Bytes>(b, last);
        for (int64_t i = 0; i < M; ++i) {
          const auto sum = [&](int k) SHVIT_INLINE_LAMBDA {
            return load<V>(scratch_.sums + (k * kMost + i) * kColumns + j * W);
          };
          const Place square = place_of(first + i);
          S* y = outputs(square) + n + j * W;
          const auto put = [&](S* to, V v) SHVIT_INLINE_LAMBDA {
            v += bias;
            if (a_.relu) v = max0(v);
            if (whole) {
              store(to, v);
            } else {
              store_some<Bytes>(to, v, last);
            }
          };
          const auto line = [&](S* to, V a, V b, V c) SHVIT_INLINE_LAMBDA {
            put(to, a + b);
            if (2 * square.column + 1 < width) put(to + a_.outputs, c + b);
          };
          const V left = sum(3), middle = sum(4), right = sum(5);
          line(y, sum(0) + left, sum(1) + middle, sum(2) + right);
          if (2 * square.row + 1 < height)
            line(y + width * a_.outputs, sum(6) + left, sum(7) + middle, sum(8) + right);
        }
      }
    }

    const Params& a_;
    S* y_;
    Lines lines_;
    const Scratch scratch_;
  };

  // Rows of outputs, or of squares.
  static Parts bands(const Params& a) {
    const int64_t rows = halved(a.height);
    if (in_squares(a)) {
      const int64_t most = a.threads > 1 ? kBandsOfThread * a.threads : 1;
      return {halved(rows), min64(halved(rows), most)};
    }
    if (!a.source) return {rows, min64(rows, kBands)};
    return {rows, min64(ceil_div(rows, kRowsWithSource), kBandsOfThread * a.threads)};
  }
  static int64_t flops(const Params& a) {
    return 18 * a.images * halved(a.height) * halved(a.width) * a.channels * a.outputs;
  }

  static Plan plan(const Params& a) {
    Plan plan = single_phase<S>(a.images * bands(a).parts, flops(a), 0);
    Bump bump(nullptr);
    if (a.source) {
      plan.flops += flops(*a.source);
      bump.take<S>(Lines::size(*a.source));
    }
    if (in_squares(a)) {
      typename Squares::Scratch(a, bump);
    } else {
      bump.take<S>(Lines::size(a));
    }
    plan.scratch_bytes = bump.used();
    return plan;
  }

  static void run(const Params& a, int, int64_t task, char* memory) {
    const Parts all = bands(a);
    const int64_t image = task / all.parts, begin = all.begin(task % all.parts),
                  end = all.end(task % all.parts);
    Bump bump(memory);
    const Params& first = a.source ? *a.source : a;
    Rows made(first, image, max64(0, (in_squares(a) ? 4 : 2) * begin - 1), nullptr,
              a.source ? bump.take<S>(Lines::size(first)) : nullptr);
    Rows* source = a.source ? &made : nullptr;
    if constexpr (std::is_same_v<S, float>) {
      if (a.winograd) {
        Squares(a, image, begin, source, typename Squares::Scratch(a, bump)).make(begin, end);
        return;
      }
    }
    const int64_t height = halved(a.height), row_size = halved(a.width) * a.outputs;
    Rows rows(a, image, begin, source, bump.take<S>(Lines::size(a)));
    for (int64_t row = begin; row < end; ++row) rows.make(row, a.y + (image * height + row) * row_size);
  }
};

}  // namespace
