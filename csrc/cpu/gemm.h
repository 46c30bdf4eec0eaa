// C = A B: the one matrix product of the CPU kernels.
//
// A has any strides; its elements are broadcast. A tile of MR rows by NV vectors of C stays in registers while
// K runs, and goes through `finish` to where it belongs. B is a panel in cache with contiguous rows (`gemm`),
// or packed, 16 columns side by side (`gemm_packed`).
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using shvit::kPanel;

enum class Init { kZero, kBias, kAccumulate };

template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride, col_stride;
};

// Rows of vectors: from one row to the next, and from one vector to the next.
template <class T>
struct VectorsView {
  const T* data;
  int64_t row_stride, vector_stride;
};

// What a tile reads of A comes in pieces, each with the rows of B that it meets: those from `b_row` on. Here it
// is one piece, all columns of a matrix.
template <class T>
struct WholeRows {
  MatrixView<T> a;
  int64_t K;

  // visit(piece of A, its depth, b_row) for the rows from `first` on.
  template <class Visit>
  SHVIT_INLINE void pieces(int64_t first, Visit visit) const {
    visit(MatrixView<T>{a.data + first * a.row_stride, a.row_stride, a.col_stride}, K, 0);
  }
};

// A step of a product along K: what is read of A and of B at a time, and how it adds to float sums.
template <class T, int VB>
struct Step {
  static constexpr int64_t kDepth = 1;  // rows of B
  using Sum = Vec<T, VB>;
  static SHVIT_INLINE T value(const T* a) { return *a; }
  static SHVIT_INLINE Sum row(const T* b, int64_t) { return load<Sum>(b); }
  static SHVIT_INLINE void add(Sum& sum, T a, Sum b) { sum += a * b; }
};

// In bfloat16 two rows of B side by side in each lane, as instructions for it want them, and two values of A in
// every lane. Without such instructions both products are added in float32.
template <int VB>
struct Step<BFloat16, VB> {
  static constexpr int64_t kDepth = 2;
  using Sum = Vec<float, VB>;
  using Pairs = Vec<uint32_t, VB>;

  static SHVIT_INLINE Pairs value(const BFloat16* a) {
    uint32_t both;
    __builtin_memcpy(&both, a, sizeof both);
    return Pairs{} + both;
  }
  static SHVIT_INLINE Pairs last_value(const BFloat16* a) { return Pairs{} + uint32_t{a->bits}; }
  static SHVIT_INLINE Pairs row(const BFloat16* b, int64_t next) {
#if SHVIT_BFLOAT16
    if constexpr (VB == 64) {  // all of a panel's row, and the next one behind it
      typedef uint16_t Words __attribute__((vector_size(64)));
      constexpr Words kInterleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
      return (Pairs)_mm512_permutexvar_epi16((__m512i)kInterleaved, load<__m512i>(b));
    }
#endif
    return last_row(b) | last_row(b + next) << 16;
  }
  static SHVIT_INLINE Pairs last_row(const BFloat16* b) {
    return __builtin_convertvector(load<Vec<uint16_t, VB / 2>>(b), Pairs);
  }
  static SHVIT_INLINE void add(Sum& sum, Pairs a, Pairs b) {
#if SHVIT_BFLOAT16
    if constexpr (VB == 64) {
      sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    } else {
      static_assert(VB == 32);
      sum = _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
    }
#else
    constexpr uint32_t kHigh = 0xffff0000;
    sum += (Sum)(a << 16) * (Sum)(b << 16);
    sum += (Sum)(a & kHigh) * (Sum)(b & kHigh);
#endif
  }
};

// Rows per tile. Products by packed weights are deep: as many accumulators as the registers hold beside one row
// of B and a broadcast. Those of panels are shallow: as many as hide the latency of a sum. Macros like
// __AVX512F__ do not follow the target of a pragma, so each variant says what it has.
template <int VB>
constexpr int kRegisters = SHVIT_REGISTER_BYTES / VB;
template <int VB, bool Deep>
constexpr int kTileRows = kRegisters<VB> >= 28   ? (Deep ? 12 : 4)
                          : kRegisters<VB> >= 16 ? 6
                          : kRegisters<VB> >= 8  ? (Deep ? 2 : 4)
                                                 : (Deep ? 1 : 4);

// Memory that is brought into the second-level cache while something is computed: `lines` of it with every
// kRows rows of B, as a burst would keep loads waiting.
struct Ahead {
  static constexpr int64_t kLine = 64, kRows = 4;  // bytes, rows of B
  static constexpr int kLevel = 2;                 // of __builtin_prefetch: the second-level cache
  const char *next = nullptr, *end = nullptr;
  int64_t lines = 0;

  Ahead part(int64_t i, int64_t parts) const {
    const int64_t bytes = end - next;
    return {next + bytes * i / parts, next + bytes * (i + 1) / parts, (lines + parts - 1) / parts};
  }
};

// What a tile reads and writes in the end: a row of it is brought into the first-level cache with every
// Ahead::kRows rows of B. Rows may begin within a line.
template <class S>
struct EndsAhead {
  const S *written = nullptr, *read = nullptr;  // read may be null
  int64_t distance = 0;                         // from one row to the next
  int rows = 0;

  template <int Columns>
  SHVIT_INLINE void next_row() {
    constexpr int kStep = Ahead::kLine / sizeof(S);
#pragma GCC unroll 4
    for (int i = 0; i < Columns; i += kStep) {
      __builtin_prefetch(written + i, 1);
      if (read) __builtin_prefetch(read + i, 0);
    }
    __builtin_prefetch(written + Columns - 1, 1);
    if (read) __builtin_prefetch(read + Columns - 1, 0);
    written += distance;
    if (read) read += distance;
    --rows;
  }
};

// Lines that are brought in at once.
template <class T>
SHVIT_INLINE void prefetch(const T* data, int64_t count) {
  for (int64_t i = 0; i < count; i += Ahead::kLine / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(data + i, 0, Ahead::kLevel);
}

// NV vectors, and half a vector more with Half. The sums go to finish(first row, sums), those of half vectors
// to finish.behind(NV vectors).
template <class T, int VB, int MR, int NV, bool Half = false, bool Ends = false, class A, class Finish,
          class S = T>
SHVIT_INLINE void gemm_tile(int64_t first, A a, VectorsView<T> b, Finish finish, Ahead ahead = {},
                            EndsAhead<S> ends = {}) {
  using Whole = Step<T, VB>;
  using Halved = Step<T, Half ? VB / 2 : VB>;
  static_assert(!Half || Whole::kDepth == 1);
  typename Whole::Sum acc[MR][NV] = {};
  typename Halved::Sum half_acc[MR][1] = {};
  a.pieces(first, [&](MatrixView<T> piece, int64_t depth, int64_t b_row) SHVIT_INLINE_LAMBDA {
    const T *ak = piece.data, *bk = b.data + b_row * b.row_stride;
    const int64_t next = b.row_stride;
    constexpr int64_t kDepth = Whole::kDepth;
    const auto rows_of_b = [&](int64_t k, int64_t end, auto with_ends) SHVIT_INLINE_LAMBDA {
      for (; k + kDepth <= end; k += kDepth, ak += kDepth * piece.col_stride, bk += kDepth * next) {
        if (k % Ahead::kRows == 0) {
          for (int64_t i = 0; i < ahead.lines && ahead.next < ahead.end; ++i, ahead.next += Ahead::kLine)
            __builtin_prefetch(ahead.next, 0, Ahead::kLevel);
          if constexpr (decltype(with_ends)::value) ends.template next_row<NV * kSumLanes<T, VB>>();
        }
        decltype(Whole::row(bk, next)) row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) row[j] = Whole::row(bk + j * b.vector_stride, next);
        decltype(Halved::row(bk, next)) half_row{};
        if constexpr (Half) half_row = Halved::row(bk + NV * b.vector_stride, next);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const auto s = Whole::value(ak + i * piece.row_stride);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) Whole::add(acc[i][j], s, row[j]);
          if constexpr (Half) Halved::add(half_acc[i][0], s, half_row);
        }
      }
      if constexpr (kDepth > 1) {
        if (k == end) return;
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j)
            Whole::add(acc[i][j], Whole::last_value(ak + i * piece.row_stride),
                       Whole::last_row(bk + j * b.vector_stride));
      }
    };
    if constexpr (Ends) {  // in a loop of their own: the other one would take 3% longer with them
      const int64_t head = ends.rows * Ahead::kRows;
      rows_of_b(0, head < depth ? head : depth, Count<1>{});
      if (head < depth) rows_of_b(head, depth, Count<0>{});
    } else {
      rows_of_b(0, depth, Count<0>{});
    }
  });
  finish(first, acc);
  if constexpr (Half) finish.behind(NV)(first, half_acc);
}

// The same as a function of its own, so that nothing else takes registers from many sums. A left factor may
// have tiles of its own (pairs.h).
template <class T, int VB, int MR, int NV, class A, class Finish>
__attribute__((noinline)) void gemm_tile_apart(int64_t first, const A& a, VectorsView<T> b,
                                               const Finish& finish, Ahead ahead) {
  const auto tile = [&](auto ends, auto with_ends) SHVIT_INLINE_LAMBDA {
    constexpr bool kEnds = decltype(with_ends)::value;
    if constexpr (requires { a.template tile<VB, MR, NV, kEnds>(first, b, finish, ahead, ends); }) {
      a.template tile<VB, MR, NV, kEnds>(first, b, finish, ahead, ends);
    } else {
      gemm_tile<T, VB, MR, NV, false, kEnds>(first, a, b, finish, ahead, ends);
    }
  };
  if constexpr (requires { finish.ends(first, MR); }) {
    tile(finish.ends(first, MR), Count<1>{});
  } else {
    tile(EndsAhead<T>{}, Count<0>{});
  }
}

// A tile of `rows` rows, at most MR.
template <class T, int VB, int NV, int MR, bool Half = false, class A, class Finish>
SHVIT_INLINE void gemm_tile_of(int64_t first, int64_t rows, A a, VectorsView<T> b, Finish finish,
                               Ahead ahead = {}) {
  if constexpr (MR > 1) {
    if (rows < MR) {
      gemm_tile_of<T, VB, NV, MR - 1, Half>(first, rows, a, b, finish, ahead);
      return;
    }
  }
  if constexpr (Finish::kDeep) {
    gemm_tile_apart<T, VB, MR, NV>(first, a, b, finish, ahead);
  } else {
    gemm_tile<T, VB, MR, NV, Half>(first, a, b, finish);
  }
}

// All M rows of C in NV vectors of its columns, in tiles of at most MR rows: those of a deep product of nearly
// equal height, as short tiles wait for their sums.
template <class T, int VB, int NV, int MR, bool Half = false, class A, class Finish>
SHVIT_INLINE void gemm_column(int64_t M, A a, VectorsView<T> b, Finish finish, Ahead ahead = {}) {
  int64_t first = 0;
  if constexpr (Finish::kDeep) {
    const int64_t tiles = (M + MR - 1) / MR;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t end = M * (tile + 1) / tiles;
      gemm_tile_of<T, VB, NV, MR>(first, end - first, a, b, finish, ahead.part(tile, tiles));
      first = end;
    }
  } else {
    for (; first + MR <= M; first += MR) gemm_tile<T, VB, MR, NV, Half>(first, a, b, finish);
    if (first < M) gemm_tile_of<T, VB, NV, MR - 1, Half>(first, M - first, a, b, finish);
  }
}

// Columns are written in steps of this many lanes, so panels of several images keep that distance.
template <class T, int VB>
constexpr int kColumnStep = VB > 16 ? kLanes<T, VB> / 2 : kLanes<T, VB>;

// The longest sum that is kept in one register; longer ones are added up in pieces, which rounds less.
constexpr int64_t kDepth = 48;
SHVIT_INLINE int64_t depth_pieces(int64_t K) { return (K + kDepth - 1) / kDepth; }

// f(vector, row, number of the vector) for the sums of a tile.
template <class V, int MR, int NV, class F>
SHVIT_INLINE void each_vector(V (&acc)[MR][NV], F f) {
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) f(acc[i][j], i, j);
  }
}

// Into a panel in cache, from `c` on.
template <class T, int VB>
struct PanelFinish {
  static constexpr bool kDeep = false;
  T* c;
  int64_t ldc;
  Init init;
  const T* bias;

  template <class V, int MR, int NV>
  SHVIT_INLINE void operator()(int64_t first, V (&acc)[MR][NV]) const {
    each_vector(acc, [&](V& v, int i, int j) SHVIT_INLINE_LAMBDA {
      T* p = c + (first + i) * ldc + j * kLanes<T, sizeof(V)>;
      const V start = init == Init::kAccumulate ? load<V>(p)
                      : init == Init::kBias     ? V{} + bias[first + i]
                                                : V{};
      store(p, start + v);
    });
  }
  SHVIT_INLINE PanelFinish behind(int vectors) const { return {c + vectors * kLanes<T, VB>, ldc, init, bias}; }
};

// Two vectors of columns at a time; the last of them may be half a vector.
template <class T, int VB>
__attribute__((noinline)) void gemm_depth(int64_t M, int64_t N, int64_t K, MatrixView<T> a, const T* b,
                                          int64_t ldb, T* c, int64_t ldc, Init init, const T* bias) {
  constexpr int W = kLanes<T, VB>, kStep = kColumnStep<T, VB>;
  const auto columns = [&](auto bytes, auto count, auto rows, auto half, int64_t n) SHVIT_INLINE_LAMBDA {
    constexpr int kBytes = decltype(bytes)::value;
    gemm_column<T, kBytes, decltype(count)::value, decltype(rows)::value, decltype(half)::value != 0>(
        M, WholeRows<T>{a, K}, {b + n, ldb, kLanes<T, kBytes>}, PanelFinish<T, kBytes>{c + n, ldc, init, bias});
  };
  using Rows = Count<kTileRows<VB, false>>;
  int64_t n = 0;
  for (; N - n > 2 * W - kStep; n += 2 * W) columns(Count<VB>{}, Count<2>{}, Rows{}, Count<0>{}, n);
  if constexpr (kStep < W) {
    if (N - n > W) {
      columns(Count<VB>{}, Count<1>{}, Rows{}, Count<1>{}, n);
    } else if (N - n > kStep) {
      columns(Count<VB>{}, Count<1>{}, Rows{}, Count<0>{}, n);
    } else if (N > n) {
      columns(Count<VB / 2>{}, Count<1>{}, Count<2 * Rows::value>{}, Count<0>{}, n);
    }
  } else if (N > n) {
    columns(Count<VB>{}, Count<1>{}, Rows{}, Count<0>{}, n);
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

// A finish whose vectors count from column `n`.
template <class Finish, int W>
struct ColumnsFrom {
  static constexpr bool kDeep = Finish::kDeep;
  Finish finish;
  int64_t n;

  template <class V, int MR, int NV>
  SHVIT_INLINE void operator()(int64_t first, V (&acc)[MR][NV]) const {
    finish(first, n, acc);
  }
  SHVIT_INLINE auto ends(int64_t first, int rows) const
    requires requires { finish.ends(first, n, rows); }
  {
    return finish.ends(first, n, rows);
  }
};

// B packed, [ceil(columns / 16), rows, 16]. Scaled, its columns are divided by powers of two, which stand in a
// last row and multiply the sums. What comes from memory, rather than from cache, is brought in as the columns
// before it are computed. Behind the last of it lies what the next layer reads.
template <class T, bool Scaled>
struct Packed {
  const T* data;
  int64_t rows;
  bool from_memory = false;

  SHVIT_INLINE int64_t panel() const { return (rows + Scaled) * kPanel; }
  SHVIT_INLINE const T* at(int64_t column) const { return data + column / kPanel * panel() + column % kPanel; }
  // NV vectors of `width` columns from column `n` on, and the factors of their columns.
  SHVIT_INLINE VectorsView<T> vectors(int64_t n, int64_t width) const {
    return {at(n), kPanel, width < kPanel ? width : panel()};
  }
  SHVIT_INLINE VectorsView<T> factors(int64_t n, int64_t width) const {
    static_assert(Scaled);
    return {at(n) + rows * kPanel, 0, vectors(n, width).vector_stride};
  }
  // As much as `width` columns, from a panel behind column `n` on.
  SHVIT_INLINE Ahead ahead(int64_t n, int64_t width) const { return ahead(n, width, 0, rows); }
  // What of it is as much as `count` rows, from row `first` on.
  SHVIT_INLINE Ahead ahead(int64_t n, int64_t width, int64_t first, int64_t count) const {
    if (!from_memory) return {};
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
    const int64_t panels = (n + (width > kPanel ? width : kPanel)) / kPanel;
    const char* next = reinterpret_cast<const char*>(data + panels * panel());
    return {next + first * row_bytes, next + (first + count) * row_bytes,
            Ahead::kRows * row_bytes / Ahead::kLine};
  }
};
template <class T>
using PackedWeights = Packed<T, true>;
template <class T>
using PackedRows = Packed<T, false>;

// A finish of sums that are multiplied by the factors of their columns.
template <class Finish, class T, int W>
struct ScaledColumnsFrom {
  static constexpr bool kDeep = Finish::kDeep;
  ColumnsFrom<Finish, W> finish;
  VectorsView<T> factors;

  template <class V>
  SHVIT_INLINE V factor(int j) const {
    return load_wide<sizeof(V)>(factors.data + j * factors.vector_stride);
  }
  template <class V, int MR, int NV>
  SHVIT_INLINE void operator()(int64_t first, V (&acc)[MR][NV]) const {
    each_vector(acc, [&](V& v, int, int j) SHVIT_INLINE_LAMBDA { v *= factor<V>(j); });
    finish(first, acc);
  }
  SHVIT_INLINE auto ends(int64_t first, int rows) const
    requires requires { finish.ends(first, rows); }
  {
    return finish.ends(first, rows);
  }
};

// Columns of A B, NV vectors at a time from column `n` on, while more than `rest` columns are left; returns the
// next column.
template <class T, int VB, int MR, int NV, class A, bool Scaled, class Finish>
SHVIT_INLINE int64_t packed_columns(int64_t M, A a, Packed<T, Scaled> b, int64_t n, int64_t end, int64_t rest,
                                    Finish finish) {
  constexpr int64_t W = kSumLanes<T, VB>;
  for (; end - n > rest; n += NV * W) {
    const ColumnsFrom<Finish, W> from{finish, n};
    const Ahead ahead = b.ahead(n, NV * W);
    if constexpr (Scaled) {
      gemm_column<T, VB, NV, MR>(M, a, b.vectors(n, W), ScaledColumnsFrom<Finish, T, W>{from, b.factors(n, W)},
                                 ahead);
    } else {
      gemm_column<T, VB, NV, MR>(M, a, b.vectors(n, W), from, ahead);
    }
  }
  return n;
}

// A B, for its vectors of columns from `begin` to `end` (multiples of a panel or all), in tiles of MR rows:
// finish(first row, first column, sums). Sums over K stay in one register.
template <class T, int VB, int MR, class A, bool Scaled, class Finish>
SHVIT_INLINE void gemm_packed(int64_t M, A a, Packed<T, Scaled> b, int64_t begin, int64_t end, Finish finish) {
  constexpr int64_t W = kSumLanes<T, VB>;
  constexpr int64_t kHalf = W == kPanel ? W / 2 : 0;  // half a vector does for the end of a panel
  int64_t n = packed_columns<T, VB, MR, 2>(M, a, b, begin, end, W + kHalf, finish);
  n = packed_columns<T, VB, MR, 1>(M, a, b, n, end, kHalf, finish);
  if constexpr (kHalf > 0) packed_columns<T, VB / 2, MR, 1>(M, a, b, n, end, 0, finish);
}

}  // namespace
