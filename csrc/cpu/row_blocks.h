// Blocks of tokens of the residual attention layer, and its products on them, from plain weights.
//
// Matrices are in the order of x: tokens are rows of channels (channels_last), or channels are rows of tokens
// (NCHW), several images side by side.
#pragma once

#include "linear.h"
#include "shsa_forward.h"

namespace {

// Blocks of the tokens of all images, one after another. Each has partial sums of its own. Rows of channels
// stay in the second-level cache; tokens side by side fill whole vectors better when there are more of them,
// and what is done once for each block costs less.
struct RowBlocks {
  static constexpr int64_t kFewestRows = 64, kFewestOfMany = 128, kMany = 256;
  int64_t N, tokens, most_rows, count;  // tokens of an image, of all; rows of a block, but for the last; blocks

  RowBlocks(const Sizes& s, bool channels_last) : N(s.N), tokens(s.B * s.N) {
    const int64_t most = channels_last ? 128 : 256, enough = channels_last ? 8 : 4;  // for some threads
    const int64_t fewest = !channels_last && tokens >= kMany ? kFewestOfMany : kFewestRows;
    most_rows = round_up(max64(fewest, min64(most, ceil_div(tokens, enough))), 2 * kPanel);
    count = ceil_div(tokens, most_rows);
  }
  int64_t first_row(int64_t block) const { return block * most_rows; }
  int64_t rows(int64_t block) const { return min64(most_rows, tokens - first_row(block)); }

  // What a block has of an image: n tokens from `token` on, from its row `row` on.
  struct Piece {
    int64_t image, token, n, row;
  };
  template <class F>
  SHVIT_INLINE void pieces(int64_t block, F f) const {
    const int64_t first = first_row(block), end = first + rows(block);
    for (int64_t at = first; at < end;) {
      const int64_t token = at % N, n = min64(N - token, end - at);
      f(Piece{at / N, token, n, at - first});
      at += n;
    }
  }
};

// Into rows, of which only `columns` are there.
template <class T>
SHVIT_INLINE LinearFinish<T> into_rows(T* rows, int64_t columns, int64_t ld) {
  return {nullptr, nullptr, rows, columns, ld, false};
}

// A, M rows, times packed [K, ...], for its columns from `begin` to `end` (as gemm_packed wants them).
template <class T, int VB, class A>
__attribute__((noinline)) void product_of_packed(int64_t M, A a, PackedRows<T> packed, int64_t begin,
                                                 int64_t end, LinearFinish<T> finish) {
  gemm_packed<T, VB, kTileRows<VB, true>>(M, a, packed, begin, end, finish);
}

// Columns of A times rows, NV vectors at a time from column `n` on, while more than `rest` columns are left;
// returns the next column. Those of rows in pairs have factors.
template <class T, int VB, int MR, int NV, class A, class Finish>
SHVIT_INLINE int64_t columns_of_rows(int64_t M, A a, const T* rows, int64_t ld, int64_t n, int64_t columns,
                                     int64_t rest, Finish finish, const T* factors) {
  constexpr int64_t W = kLanes<T, VB>;
  for (; columns - n > rest; n += NV * W) {
    const ColumnsFrom<Finish, W> from{finish, n};
    if constexpr (std::is_same_v<A, PairedRows>) {
      gemm_column<T, VB, NV, MR>(M, a, {rows + n, ld, W},
                                 ScaledColumnsFrom<Finish, T, W>{from, {factors + n, 0, W}});
    } else {
      gemm_column<T, VB, NV, MR>(M, a, {rows + n, ld, W}, from);
    }
  }
  return n;
}

// A, M rows, times rows [K, columns], which are read where they are, up to a whole kColumnStep.
template <class T, int VB, class A, class Finish>
__attribute__((noinline)) void product_of_columns(int64_t M, int64_t columns, A a, const T* rows, int64_t ld,
                                                  Finish finish, const T* factors = nullptr) {
  constexpr int MR = std::is_same_v<A, PairedRows> ? kPairedRows : kTileRows<VB, true>;
  constexpr int64_t W = kLanes<T, VB>, kStep = kColumnStep<T, VB>, kHalf = W - kStep;
  int64_t n = columns_of_rows<T, VB, MR, 2>(M, a, rows, ld, 0, columns, W + kHalf, finish, factors);
  n = columns_of_rows<T, VB, MR, 1>(M, a, rows, ld, n, columns, kHalf, finish, factors);
  if constexpr (kHalf > 0) columns_of_rows<T, VB / 2, MR, 1>(M, a, rows, ld, n, columns, 0, finish, factors);
}

// y = A rows in pairs: A's rows are prepared, the columns of `rows` are scaled where they are. Rows of y are as
// far apart. `factors`: scratch, [columns].
template <class T, int VB>
SHVIT_INLINE void product_in_pairs(int64_t M, int64_t columns, int64_t K, const PairedScratch& pairs, T* rows,
                                   int64_t ld, T* y, T* factors) {
  if constexpr (kInPairs<T, VB>) {
    scale_columns<VB>(rows, ld, K, columns, factors);
    pairs.multiply<VB>(K, [&](const PairedRows& left) SHVIT_INLINE_LAMBDA {
      product_of_columns<T, VB>(M, columns, left, rows, ld, into_rows(y, columns, ld), factors);
    });
    // Of infinities the sums in pairs know nothing.
    const auto value = [&](int64_t i, int64_t column, T factor) {
      T sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += pairs.row(i)[k] * rows[k * ld + column];
      y[i * ld + column] = sum * factor;
    };
    pairs.each_infinite(M, [&](int64_t i, MatrixView<T>) {
      for (int64_t column = 0; column < columns; ++column) value(i, column, factors[column]);
    });
    for (int64_t column = 0; column < columns; ++column) {
      if (factors[column] == factors[column]) continue;
      for (int64_t i = 0; i < M; ++i) value(i, column, pairs.is_infinite(i) ? T(1) : pairs.factor(i));
    }
  }
}

// The layer's products in NCHW order are in pairs where enough tokens make up for the weight's preparation in
// each call.
constexpr int64_t kFewestPairedTokens = 128;
template <class T, int VB>
SHVIT_INLINE bool weight_in_pairs(const Sizes& s, bool channels_last) {
  return kInPairs<T, VB> && !channels_last && s.C >= kFewestPairedRows && s.B * s.N >= kFewestPairedTokens;
}

// From one channel to the next, in a block of tokens side by side.
template <class T, int VB>
SHVIT_INLINE int64_t block_distance(const Sizes& s) {
  return row_distance<T>(RowBlocks(s, false).most_rows);
}

// The projection [C, C], as the products of the layer want it: packed for tokens in rows; in NCHW order it is
// the left factor, prepared for pairs or left where it is.
template <class T, int VB>
struct Projection {
  using PackedType = Packed<T, kInPairs<T, VB>>;
  T* packed;
  PairedScratch pairs;

  Projection(Bump& bump, const Sizes& s, bool channels_last)
      : packed(bump.take<T>(channels_last ? panels(s) * panel(s) : 0)) {
    if (weight_in_pairs<T, VB>(s, channels_last)) pairs = PairedScratch::take<T, VB>(bump, s.C, s.C);
  }

  static int64_t panels(const Sizes& s) { return ceil_div(s.C, kPanel); }
  static int64_t panel(const Sizes& s) { return PackedType{nullptr, s.C}.panel(); }
  // Tasks that make it, kPanel outputs each.
  static int64_t tasks(const Sizes& s, bool channels_last) {
    return s.B > 0 && (channels_last || weight_in_pairs<T, VB>(s, channels_last)) ? panels(s) : 0;
  }

  PackedType right(const Sizes& s) const { return {packed, s.C}; }

  // B = W^T, or W itself, with columns times `factor`; or A = W, or W^T.
  void make(const T* weight, bool transposed, const Sizes& s, bool channels_last, int64_t task,
            const T* factor = nullptr) const {
    const int64_t C = s.C, first = task * kPanel, n = min64(kPanel, C - first);
    if (channels_last) {
      T* to = packed + task * panel(s);
      pack_panel(weight, transposed, C, first, n, to);
      if (factor) {
        for (int64_t k = 0; k < C; ++k)
          for (int64_t i = 0; i < n; ++i) to[k * kPanel + i] *= factor[first + i];
      }
      if constexpr (kInPairs<T, VB>) scale_columns<VB>(to, kPanel, C, kPanel, to + C * kPanel);
    } else if constexpr (kInPairs<T, VB>) {
      const PairedScratch rows = pairs.from(first);
      if (transposed) {
        rows.template prepare<VB, true>(n, C, {weight + first * C, C, 1});
      } else {
        transpose(weight + first, C, C, n, rows.row(0), rows.distance());
        rows.template prepare<VB, true>(n, C, {rows.row(0), rows.distance(), 1});
      }
    }
  }

 private:
  static void pack_panel(const T* weight, bool transposed, int64_t C, int64_t first, int64_t n, T* to) {
    if (n < kPanel) fill(to, C * kPanel, T(0));
    if (transposed) {
      transpose(weight + first * C, C, n, C, to, kPanel);
      return;
    }
    for (int64_t k = 0; k < C; ++k) {
      if (n == kPanel) {
        __builtin_memcpy(to + k * kPanel, weight + k * C + first, kPanel * sizeof(T));
      } else {
        for (int64_t i = 0; i < n; ++i) to[k * kPanel + i] = weight[k * C + first + i];
      }
    }
  }
};

// Rows of tokens times the packed projection; `pairs`: of the rows, where they are.
template <class T, int VB>
SHVIT_INLINE void project(int64_t M, MatrixView<T> rows, Packed<T, kInPairs<T, VB>> weight, int64_t begin,
                          int64_t end, LinearFinish<T> finish, const PairedScratch& pairs) {
  if constexpr (kInPairs<T, VB>) {
    prepare_rows<VB, T>(M, weight.rows, rows, pairs);
    linear_rows<VB, T>(M, rows, weight, begin, end, finish, pairs);
  } else {
    product_of_packed<T, VB>(M, WholeRows<T>{rows, weight.rows}, weight, begin, end, finish);
  }
}

// Rows packed like weights, panels of `rows` rows: f of n tokens of an image, from row `row` on, are their
// channels from `first` on.
template <int VB, class T, class F>
SHVIT_INLINE void pack_rows(ImageView<const T> x, int64_t channels, int64_t n, T* packed, int64_t rows,
                            int64_t row, int64_t first, F f) {
  constexpr int64_t kAhead = 4 * kPanel;  // channels that come from memory meanwhile
  for (int64_t c = 0; c < channels;) {
    const int64_t lane = (first + c) % kPanel, count = min64(kPanel - lane, channels - c);
    T* to = packed + ((first + c - lane) * rows + row * kPanel) + lane;
    if (x.token_stride == 1) {
      for (int64_t i = c + kAhead; i < min64(c + kAhead + count, channels); ++i)
        prefetch(x.data + i * x.channel_stride, n);
      transpose(x.data + c * x.channel_stride, x.channel_stride, count, n, to, kPanel, f);
    } else {
      for (int64_t t = 0; t < n; ++t) map_row<VB>(x.data + t * x.token_stride + c, to + t * kPanel, count, f);
    }
    c += count;
  }
}

// What the projection of a block reads, rows of channels: behind the `attended` ones, images of P channels,
// those of x beyond with ReLU.
template <class T, int VB>
SHVIT_INLINE void gather_rows(const shvit::ShsaForwardParams& a, const RowBlocks& blocks, int64_t block,
                              const T* attended, T* y, int64_t ld) {
  const Sizes& s = a.sizes;
  const int64_t first = blocks.first_row(block);
  const T *x = static_cast<const T*>(a.x) + first * s.C, *from = attended + first * s.P;
  for (int64_t t = 0; t < blocks.rows(block); ++t) {
    map_row<VB>(from + t * s.P, y + t * ld, s.P, Identity{});
    map_row<VB>(x + t * s.C + s.P, y + t * ld + s.P, s.C - s.P, Relu{});
  }
}

// The same of images in NCHW order: channels are rows of tokens.
template <class T, int VB>
SHVIT_INLINE void gather_channels(const shvit::ShsaForwardParams& a, const RowBlocks& blocks, int64_t block,
                                  const T* attended, T* y, int64_t ld) {
  const Sizes& s = a.sizes;
  blocks.pieces(block, [&](const RowBlocks::Piece& piece) {
    const auto x = ShsaForward<T, VB>::x(a, piece.image).at(s.P, piece.token);
    const auto first = image_view(attended, piece.image, s.P, s.N, false).at(0, piece.token);
    const ImageView<T> to{y + piece.row, ld, 1};
    map_image<VB>(first, to, s.P, piece.n, Identity{});
    map_image<VB>(x, to.at(s.P, 0), s.C - s.P, piece.n, Relu{});
  });
}

}  // namespace
