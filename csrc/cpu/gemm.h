// C = A B (+ bias or + C): the one matrix product of the CPU kernels.
//
// B and C have contiguous rows, A has any strides; its elements are broadcast. A tile of MR rows by NV vectors
// of C stays in registers while K runs. Operands are panels that fit in cache, so nothing is packed.
#pragma once

#include "vec.h"

namespace {

enum class Init { kZero, kBias, kAccumulate };

template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride, col_stride;
};

template <class T, int VB, int MR, int NV>
SHVIT_INLINE void gemm_tile(int64_t K, MatrixView<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, Init init,
                            const T* bias) {
  using V = Vec<T, VB>;
  constexpr int W = kLanes<T, VB>;
  V acc[MR][NV] = {};
  const T* ak = a.data;
  for (int64_t k = 0; k < K; ++k, ak += a.col_stride, b += ldb) {
    V row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load<V>(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T s = ak[i * a.row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += s * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* p = c + i * ldc + j * W;
      const V start = init == Init::kAccumulate ? load<V>(p) : init == Init::kBias ? V{} + bias[i] : V{};
      store(p, start + acc[i][j]);
    }
  }
}

// Rows per tile: as many accumulators as the registers hold beside one row of B and a broadcast.
#ifdef __AVX512F__
template <int VB>
constexpr int kTileRows = VB == 64 ? 12 : 6;
#else
template <int VB>
constexpr int kTileRows = VB == 64 ? 4 : 6;
#endif

// All rows of C in one column of tiles; the last tile has M % MR rows.
template <class T, int VB, int NV, int MR = kTileRows<VB>>
SHVIT_INLINE void gemm_column(int64_t M, int64_t K, MatrixView<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                              Init init, const T* bias) {
  for (; M >= MR; M -= MR) {
    gemm_tile<T, VB, MR, NV>(K, a, b, ldb, c, ldc, init, bias);
    a.data += MR * a.row_stride;
    c += MR * ldc;
    if (init == Init::kBias) bias += MR;
  }
  if constexpr (MR > 1) gemm_column<T, VB, NV, MR - 1>(M, K, a, b, ldb, c, ldc, init, bias);
}

// Columns are written in steps of this many lanes, so panels of several images keep that distance.
template <class T, int VB>
constexpr int kColumnStep = VB > 16 ? kLanes<T, VB> / 2 : kLanes<T, VB>;

// The longest sum that is kept in one register; longer ones are added up in pieces, which rounds less.
constexpr int64_t kDepth = 48;
SHVIT_INLINE int64_t depth_pieces(int64_t K) { return (K + kDepth - 1) / kDepth; }

template <class T, int VB>
__attribute__((noinline)) void gemm_depth(int64_t M, int64_t N, int64_t K, MatrixView<T> a, const T* b,
                                          int64_t ldb, T* c, int64_t ldc, Init init, const T* bias) {
  constexpr int W = kLanes<T, VB>, kStep = kColumnStep<T, VB>;
  int64_t n = 0;
  for (; N - n > 2 * W - kStep; n += 2 * W) gemm_column<T, VB, 2>(M, K, a, b + n, ldb, c + n, ldc, init, bias);
  if (N - n > W - kStep) {
    gemm_column<T, VB, 1>(M, K, a, b + n, ldb, c + n, ldc, init, bias);
    n += W;
  }
  if constexpr (kStep < W) {
    if (N > n) gemm_column<T, VB / 2, 1, kTileRows<VB>>(M, K, a, b + n, ldb, c + n, ldc, init, bias);
  }
}

// C[M, N] = init + A[M, K] B[K, N]. N counts up to the next kColumnStep: so far B is read and C is written.
template <class T, int VB>
void gemm(int64_t M, int64_t N, int64_t K, MatrixView<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
          Init init = Init::kZero, const T* bias = nullptr) {
  const int64_t pieces = depth_pieces(K);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t k = K * i / pieces, depth = K * (i + 1) / pieces - k;
    gemm_depth<T, VB>(M, N, depth, {a.data + k * a.col_stride, a.row_stride, a.col_stride}, b + k * ldb, ldb, c,
                      ldc, i == 0 ? init : Init::kAccumulate, bias);
  }
}

}  // namespace
