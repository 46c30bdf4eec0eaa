// Linear layers on rows of tokens, with packed weights: y = x W + b, alone or two with ReLU between them
// (design section 2, FFN of a block).
#pragma once

#include "pairs.h"

namespace {

using shvit::Activation;

// Where a product goes: y[row][column] = sum (+ bias) (+ residual), then ReLU or not. Rows of y and of the
// residual are `ld` values apart and `columns` long.
template <class S>
struct LinearFinish {
  static constexpr bool kDeep = true;
  const S *bias, *residual;
  S* y;
  int64_t columns, ld;
  bool relu;

  // Of the rows from `row` on.
  LinearFinish from(int64_t row) const {
    return {bias, residual ? residual + row * ld : nullptr, y + row * ld, columns, ld, relu};
  }

  SHVIT_INLINE EndsAhead<S> ends(int64_t row, int64_t column, int rows) const {
    const int64_t at = row * ld + column;
    return {y + at, residual ? residual + at : nullptr, ld, rows};
  }

  template <class V, int MR, int NV>
  SHVIT_INLINE void operator()(int64_t row, int64_t column, V (&acc)[MR][NV]) const {
    constexpr int VB = sizeof(V), W = kSumLanes<S, VB>;
    const int64_t last = columns - column - (NV - 1) * W;  // values of the last vector, which can be cut
    const auto get = [&](const S* p, int j) SHVIT_INLINE_LAMBDA {
      return j < NV - 1 || last >= W ? load_wide<VB>(p + j * W) : load_some<VB>(p + j * W, last);
    };
    V b[NV] = {};  // added last: a large one would cost every partial sum its low bits
    if (bias) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) b[j] = get(bias + column, j);
    }
    int64_t at = row * ld + column;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i, at = next(at)) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        V v = acc[i][j] + b[j];
        if (residual) v += get(residual + at, j);
        if (relu) v = max0(v);
        if (j < NV - 1 || last >= W) {
          store_narrow<VB>(y + at + j * W, v);
        } else {
          store_some<VB>(y + at + j * W, v, last);
        }
      }
    }
  }

 private:
  // The same column, a row further. The addresses of all rows at once would not fit into the registers, and a
  // compiler that sees through the sum would keep them.
  SHVIT_INLINE int64_t next(int64_t at) const {
    at += ld;
    asm("" : "+r"(at));
    return at;
  }
};

// The rows of a product, cut so that what a block of rows touches stays in the second-level cache. Few rows are
// one block, whose columns are cut instead.
struct LinearTasks {
  static constexpr int64_t kFewRows = 64, kMostRows = 128, kCacheBytes = 512 << 10, kColumns = 4 * kPanel;
  Parts rows, columns;

  // `row_bytes`: what a row touches.
  LinearTasks(int64_t M, int64_t N, int64_t row_bytes) : rows{M, 1}, columns{N, 1} {
    if (M <= kFewRows) {
      columns.parts = ceil_div(N, kColumns);
    } else {
      const int64_t most = max64(24, min64(kMostRows, kCacheBytes / row_bytes));
      rows.parts = round_up(ceil_div(M, most), 4);  // even for several threads
    }
  }
  bool few() const { return rows.parts == 1; }
  int64_t most_rows() const { return ceil_div(rows.n, rows.parts); }
  int64_t count() const { return rows.n == 0 ? 0 : rows.parts * columns.parts; }
  int64_t first_row(int64_t task) const { return rows.begin(task / columns.parts); }
  int64_t rows_of(int64_t task) const { return rows.end(task / columns.parts) - first_row(task); }
  int64_t first_column(int64_t task) const { return few() ? task * kColumns : 0; }
  int64_t end_column(int64_t task) const { return few() ? min64(columns.n, (task + 1) * kColumns) : columns.n; }
};

// Rows of a product by packed weights, for a range of columns; in pairs, where `pairs` has prepared the rows.
template <int VB, class S>
__attribute__((noinline)) void linear_rows(int64_t M, MatrixView<S> x, PackedWeights<S> weight, int64_t begin,
                                           int64_t end, LinearFinish<S> finish, const PairedScratch& pairs) {
  constexpr int W = kSumLanes<S, VB>, kRows = kTileRows<VB, true>;
  if constexpr (kInPairs<S, VB>) {
    if (pairs.exists()) {
      pairs.multiply<VB>(weight.rows, [&](const PairedRows& rows) SHVIT_INLINE_LAMBDA {
        gemm_packed<S, VB, kPairedRows>(M, rows, weight, begin, end, finish);
      });
      pairs.each_infinite(M, [&](int64_t i, MatrixView<S> row) SHVIT_INLINE_LAMBDA {
        gemm_packed<S, VB, 1>(1, WholeRows<S>{row, weight.rows}, weight, begin, end, finish.from(i));
      });
      return;
    }
  }
  const WholeRows<S> rows{x, weight.rows};
  if constexpr (W == kPanel && kRows >= 12) {
    // Few rows wait for the weights, which come faster from more panels at a time.
    if (M <= 16) begin = packed_columns<S, VB, 4, 4>(M, rows, weight, begin, end, 3 * W, finish);
  }
  gemm_packed<S, VB, kRows>(M, rows, weight, begin, end, finish);
}

// y = activation(scale * x W + b); the scale is per image and input channel.
template <class S, int VB>
struct Pointwise {
  using Params = shvit::PointwiseParams<S>;

  static LinearTasks tasks(const Params& a) {
    return {a.images * a.tokens, a.outputs, (2 * a.inputs + a.outputs) * static_cast<int64_t>(sizeof(S))};
  }

  // Some rows of x times the scale, and what pairs need.
  struct Rows {
    S* scaled = nullptr;
    int64_t ld = 0;
    PairedScratch pairs;
    Rows() = default;
    Rows(Bump& bump, const Params& a, int64_t most) : ld(row_distance<S>(a.inputs)) {
      if (a.scale) {
        scaled = bump.take<S>(most * ld);
        pairs = PairedScratch::in_place<S, VB>(bump, most, scaled, ld);
      } else {
        pairs = PairedScratch::take<S, VB>(bump, most, a.inputs);
      }
    }
    MatrixView<S> of(const Params& a, int64_t first) const {
      return scaled ? MatrixView<S>{scaled, ld, 1} : MatrixView<S>{a.x + first * a.inputs, a.inputs, 1};
    }
  };

  // Phases: few rows are prepared for all tasks at once, others by the task itself.
  static constexpr int kPrepare = 0, kMultiply = 1;

  static Plan plan(const Params& a) {
    const LinearTasks all = tasks(a);
    Plan plan;
    plan.phases = 2;
    plan.flops = 2 * a.images * a.tokens * a.inputs * a.outputs;
    plan.tasks[kMultiply] = all.count();
    Bump bump(nullptr);
    const Rows rows(bump, a, all.most_rows());
    if (all.few() && (a.scale || rows.pairs.exists())) plan.tasks[kPrepare] = 1;
    (all.few() ? plan.workspace_bytes : plan.scratch_bytes) = bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const LinearTasks all = tasks(a);
    Bump bump(all.few() ? a.workspace : memory);
    const Rows rows(bump, a, all.most_rows());
    const int64_t first = all.first_row(task), count = all.rows_of(task);
    if (phase == kPrepare || !all.few()) prepare(a, first, count, rows);
    if (phase == kMultiply) multiply(a, first, count, all.first_column(task), all.end_column(task), rows);
  }

  static void prepare(const Params& a, int64_t first, int64_t count, const Rows& rows) {
    if (a.scale) {
      for (int64_t row = first; row < first + count; ++row)
        multiply_row<VB>(a.x + row * a.inputs, a.scale + row / a.tokens * a.inputs,
                         rows.scaled + (row - first) * rows.ld, a.inputs);
    }
    prepare_rows<VB, S>(count, a.inputs, rows.of(a, first), rows.pairs);
  }

  static void multiply(const Params& a, int64_t first, int64_t count, int64_t begin, int64_t end,
                       const Rows& rows) {
    S* y = a.y + first * a.outputs;
    linear_rows<VB, S>(count, rows.of(a, first), {a.weight, a.inputs, true}, begin, end,
                       {a.bias, nullptr, y, a.outputs, a.outputs, a.activation == Activation::kRelu},
                       rows.pairs);
    if (a.activation == Activation::kSigmoid)
      for (int64_t row = 0; row < count; ++row) sigmoid_row<VB>(y + row * a.outputs + begin, end - begin);
  }
};

// y = x + W2 relu(W1 x + b1) + b2. A block of rows keeps its hidden values in scratch; few rows share them.
template <class S, int VB>
struct Ffn {
  using Params = shvit::FfnParams<S>;

  static int64_t hidden_ld(const Params& a) {
    const int64_t ld = round_up(a.hidden, kPanel);
    return ld % 256 ? ld : ld + kPanel;  // rows a power of two apart would share cache sets
  }
  static int64_t row_bytes(const Params& a) {
    return (a.channels + hidden_ld(a)) * static_cast<int64_t>(sizeof(S));
  }
  static LinearTasks first(const Params& a) { return {a.rows, a.hidden, row_bytes(a)}; }
  static LinearTasks second(const Params& a) { return {a.rows, a.channels, row_bytes(a)}; }
  static int64_t hidden_values(const Params& a) { return first(a).most_rows() * hidden_ld(a); }

  // Hidden values, and what pairs need for both products.
  struct Memory {
    S* hidden;
    PairedScratch first_pairs, second_pairs;
    Memory(Bump& bump, const Params& a)
        : hidden(bump.take<S>(hidden_values(a))),
          first_pairs(PairedScratch::take<S, VB>(bump, first(a).most_rows(), a.channels)),
          second_pairs(PairedScratch::in_place<S, VB>(bump, first(a).most_rows(), hidden, hidden_ld(a))) {}
  };

  // Phases, where few rows are shared by tasks; otherwise the first product's task does everything.
  static constexpr int kPrepare = 0, kExpand = 1, kPrepareHidden = 2, kContract = 3;

  static Plan plan(const Params& a) {
    Plan plan;
    const bool few = first(a).few();
    plan.phases = 4;
    plan.tasks[kExpand] = first(a).count();
    plan.flops = (few ? 2 : 4) * a.rows * a.channels * a.hidden;  // of a phase
    Bump bump(nullptr);
    const Memory memory(bump, a);
    if (few) {
      plan.tasks[kContract] = second(a).count();
      plan.tasks[kPrepare] = plan.tasks[kPrepareHidden] = memory.first_pairs.exists() ? 1 : 0;
    }
    (few ? plan.workspace_bytes : plan.scratch_bytes) = bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* scratch) {
    const bool few = first(a).few();
    Bump bump(few ? a.workspace : scratch);
    const Memory memory(bump, a);
    const int64_t rows = few ? a.rows : first(a).rows_of(task);
    const MatrixView<S> x{a.x + (few ? 0 : first(a).first_row(task)) * a.channels, a.channels, 1},
        hidden{memory.hidden, hidden_ld(a), 1};
    if (phase == kPrepare || !few) prepare_rows<VB, S>(rows, a.channels, x, memory.first_pairs);
    if (phase == kExpand) {
      const LinearTasks all = first(a);
      linear_rows<VB, S>(rows, x, {a.weight1, a.channels, true}, all.first_column(task), all.end_column(task),
                         {a.bias1, nullptr, memory.hidden, a.hidden, hidden_ld(a), true}, memory.first_pairs);
    }
    if (phase == kPrepareHidden || !few) prepare_rows<VB, S>(rows, a.hidden, hidden, memory.second_pairs);
    if (phase == kContract || !few) {
      const LinearTasks all = second(a);
      const int64_t at = all.first_row(task) * a.channels;
      linear_rows<VB, S>(rows, hidden, {a.weight2, a.hidden, true}, all.first_column(task),
                         all.end_column(task), {a.bias2, a.x + at, a.y + at, a.channels, a.channels, false},
                         memory.second_pairs);
    }
  }
};

}  // namespace
