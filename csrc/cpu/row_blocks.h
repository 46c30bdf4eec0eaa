// Blocks of tokens of the residual attention layer, and its products on them, from plain weights.
//
// Matrices are in the order of x: tokens are rows of channels (channels_last), or channels are rows of tokens
// (NCHW), several images side by side.
#pragma once

#include "linear.h"
#include "shsa_forward.h"

namespace {

// Blocks of the tokens of all images, one after another. Each has partial sums of its own. Rows of channels
// stay in the second-level cache; tokens side by side fill whole vectors better when there are more of them.
struct RowBlocks {
  static constexpr int64_t kFewestRows = 64;
  int64_t N, tokens, most_rows, count;  // tokens of an image, of all; rows of a block, but for the last; blocks

  RowBlocks(const Sizes& s, bool channels_last) : N(s.N), tokens(s.B * s.N) {
    const int64_t most = channels_last ? 128 : 256, enough = channels_last ? 8 : 4;  // for some threads
    most_rows = round_up(max64(kFewestRows, min64(most, ceil_div(tokens, enough))), 2 * kPanel);
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
// returns the next column.
template <class T, int VB, int MR, int NV, class A, class Finish>
SHVIT_INLINE int64_t columns_of_rows(int64_t M, A a, const T* rows, int64_t ld, int64_t n, int64_t columns,
                                     int64_t rest, Finish finish) {
  constexpr int64_t W = kLanes<T, VB>;
  for (; columns - n > rest; n += NV * W)
    gemm_column<T, VB, NV, MR>(M, a, {rows + n, ld, W}, ColumnsFrom<Finish, W>{finish, n});
  return n;
}

// A, M rows, times rows [K, columns], which are read where they are, up to a whole kColumnStep.
template <class T, int VB, class A, class Finish>
__attribute__((noinline)) void product_of_columns(int64_t M, int64_t columns, A a, const T* rows, int64_t ld,
                                                  Finish finish) {
  constexpr int MR = kTileRows<VB, true>;
  constexpr int64_t W = kLanes<T, VB>, kStep = kColumnStep<T, VB>, kHalf = W - kStep;
  int64_t n = columns_of_rows<T, VB, MR, 2>(M, a, rows, ld, 0, columns, W + kHalf, finish);
  n = columns_of_rows<T, VB, MR, 1>(M, a, rows, ld, n, columns, kHalf, finish);
  if constexpr (kHalf > 0) columns_of_rows<T, VB / 2, MR, 1>(M, a, rows, ld, n, columns, 0, finish);
}

// From one channel to the next, in a block of tokens side by side.
template <class T, int VB>
SHVIT_INLINE int64_t block_distance(const Sizes& s) {
  return row_distance<T>(RowBlocks(s, false).most_rows);
}

// Panels of the packed projection [C, C], and their values. In NCHW order it is the left factor, not packed.
template <class Attention>
SHVIT_INLINE int64_t packed_panels(const Attention& a) {
  return a.channels_last && a.sizes.B > 0 ? ceil_div(a.sizes.C, kPanel) : 0;
}
template <class Attention>
SHVIT_INLINE int64_t packed_values(const Attention& a) {
  return packed_panels(a) * kPanel * a.sizes.C;
}

// Panel `panel` of packed B[C, C] = W^T, or W itself.
template <class T>
SHVIT_INLINE void pack_panel(const T* weight, bool transposed, int64_t C, int64_t panel, T* packed) {
  const int64_t first = panel * kPanel, n = min64(kPanel, C - first);
  T* to = packed + first * C;
  if (n < kPanel)
    for (int64_t i = 0; i < C * kPanel; ++i) to[i] = 0;
  if (transposed) {
    transpose(weight + first * C, C, n, C, to, kPanel);
  } else {
    for (int64_t k = 0; k < C; ++k) {
      if (n == kPanel) {
        __builtin_memcpy(to + k * kPanel, weight + k * C + first, kPanel * sizeof(T));
      } else {
        for (int64_t i = 0; i < n; ++i) to[k * kPanel + i] = weight[k * C + first + i];
      }
    }
  }
}

// Rows [rows, ...] packed like weights: f of n tokens of an image, from row `row` on, are their channels from
// `first` on.
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
