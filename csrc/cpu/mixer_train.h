// The residual attention layer in training: out = (x +) BN(W y), y = relu(shsa(x)), both batch normalisations
// by the statistics of the batch (design section 2, mixer_train).
//
//     forward    p = W y   n = (p - mean) rstd   out = (x +) gamma n + beta
//     backward   dgamma = sum dout n   dbeta = sum dout   dp = gamma rstd (dout - (dbeta + n dgamma) / count)
//                dy = W^T dp   dW = sum dp y^T   dx = dy through the attention (+ dout)
//
// Products are of matrices in the order of x: tokens are rows of channels (channels_last) and the weights are
// packed, or channels are rows of tokens (NCHW), several images side by side, and dp is packed, 16 tokens side
// by side, unless products are in pairs (pairs.h). Only the y of dW is packed by channels in both. The forward
// keeps p, in the order of x; the backward makes y once more. A block of dp and y is used for dW and dx while
// it is in cache, and then dropped.
#pragma once

#include "row_blocks.h"
#include "shsa_backward.h"

namespace {

// Packed tokens as the left factor: a row for each channel, a column for each token.
template <class T>
struct PackedTokens {
  const T* data;
  int64_t channels, tokens;

  template <class Visit>
  SHVIT_INLINE void pieces(int64_t first, Visit visit) const {
    for (int64_t token = 0; token < tokens; token += kPanel)
      visit(MatrixView<T>{data + token * channels + first * kPanel, kPanel, 1}, min64(kPanel, tokens - token),
            token);
  }
};

// Packs the tokens of a block: make(piece, channel, row) writes those of a piece to a row. `rows` has room for
// some rows of a block, C at most.
template <class T, class F>
SHVIT_INLINE void pack_tokens(const RowBlocks& blocks, int64_t block, int64_t C, T* rows, T* packed, F make) {
  constexpr int64_t kChannels = 8;  // what is read and written of them lies side by side
  const int64_t tokens = blocks.rows(block), ld = blocks.most_rows;
  for (int64_t first = 0; first < C; first += kChannels) {
    const int64_t end = min64(first + kChannels, C);
    blocks.pieces(block, [&](const RowBlocks::Piece& piece) {
      for (int64_t c = first; c < end; ++c) make(piece, c, rows + (c - first) * ld + piece.row);
    });
    for (int64_t t = 0; t < tokens; t += kPanel)
      for (int64_t c = first; c < end; ++c)
        __builtin_memcpy(packed + t * C + c * kPanel, rows + (c - first) * ld + t, kPanel * sizeof(T));
  }
}

// f(vector or scalar, column, row, count) adds `count` rows from `row` on to each column, in steps of rows that
// hide the latency of a sum and keep the sums short.
template <int VB, class T, class F>
SHVIT_INLINE void over_rows(int64_t n, int64_t C, F f) {
  int64_t t = 0;
  for (; t + 4 <= n; t += 4)
    for_row<T, VB>(C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA { f(lane, c, t, Count<4>{}); });
  for (; t < n; ++t)
    for_row<T, VB>(C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA { f(lane, c, t, Count<1>{}); });
}

// The sum of f(0) to f(N - 1), in pairs.
template <int N, class F>
SHVIT_INLINE auto sum_of(F f) {
  if constexpr (N == 1) {
    return f(0);
  } else {
    return (f(0) + f(1)) + (f(2) + f(3));
  }
}

// Mean and sum of squared deviations of each column of n rows. `sums`: [3, C].
template <int VB, class T>
__attribute__((noinline)) void measure_columns(const ChannelMoments& moments, int64_t block, const T* rows,
                                               int64_t n, int64_t ld, T* sums) {
  const int64_t C = moments.O;
  T *centre = sums, *rest = sums + C, *squares = rest + C;
  const T share = T(1) / static_cast<T>(n);
  for (int64_t i = 0; i < 3 * C; ++i) sums[i] = 0;
  over_rows<VB, T>(n, C, [&](auto lane, int64_t c, int64_t row, auto count) SHVIT_INLINE_LAMBDA {
    const auto value = [&](int r) SHVIT_INLINE_LAMBDA { return load_as(rows + (row + r) * ld + c, lane); };
    store(centre + c, load_as(centre + c, lane) + sum_of<decltype(count)::value>(value));
  });
  for (int64_t c = 0; c < C; ++c) centre[c] *= share;
  over_rows<VB, T>(n, C, [&](auto lane, int64_t c, int64_t row, auto count) SHVIT_INLINE_LAMBDA {
    const auto middle = load_as(centre + c, lane);
    const auto value = [&](int r)
                           SHVIT_INLINE_LAMBDA { return load_as(rows + (row + r) * ld + c, lane) - middle; };
    const auto square = [&](int r) SHVIT_INLINE_LAMBDA { return value(r) * value(r); };
    store(rest + c, load_as(rest + c, lane) + sum_of<decltype(count)::value>(value));
    store(squares + c, load_as(squares + c, lane) + sum_of<decltype(count)::value>(square));
  });
  for (int64_t c = 0; c < C; ++c) {  // with what rounding left of the mean in the centred values
    const double left = static_cast<double>(rest[c]) * static_cast<double>(share);
    moments.mean(block)[c] = static_cast<double>(centre[c]) + left;
    moments.squares(block)[c] = static_cast<double>(squares[c]) - left * left * static_cast<double>(n);
  }
}

// The same of each row of a panel of n columns.
template <int VB, class T>
__attribute__((noinline)) void measure_rows(const ChannelMoments& moments, int64_t block, const T* panel,
                                            int64_t n, int64_t ld) {
  using V = Vec<T, VB>;
  constexpr int W = kLanes<T, VB>;
  const T share = T(1) / static_cast<T>(n);
  for (int64_t c = 0; c < moments.O; ++c) {
    const T* row = panel + c * ld;
    V sums{}, rest{}, squares{};
    T sum = 0, last_rest = 0, last_squares = 0;
    int64_t t = 0;
    for (; t + W <= n; t += W) sums += load<V>(row + t);
    for (; t < n; ++t) sum += row[t];
    const T centre = (sum + sum_lanes<T, VB>(sums)) * share;
    for (t = 0; t + W <= n; t += W) {
      const V d = load<V>(row + t) - centre;
      rest += d;
      squares += d * d;
    }
    for (; t < n; ++t) {
      const T d = row[t] - centre;
      last_rest += d;
      last_squares += d * d;
    }
    const double left = static_cast<double>(last_rest + sum_lanes<T, VB>(rest)) * static_cast<double>(share);
    moments.mean(block)[c] = static_cast<double>(centre) + left;
    moments.squares(block)[c] =
        static_cast<double>(last_squares + sum_lanes<T, VB>(squares)) - left * left * static_cast<double>(n);
  }
}

template <class T, int VB>
struct MixerTrainForward {
  using Params = shvit::MixerTrainForwardParams;
  using Attention = ShsaForward<T, VB>;

  struct Workspace {
    Bump bump;
    char* attention;
    T* attended;  // image of P channels
    Projection<T, VB> projection;
    T* factor;  // [C]
    ChannelMoments channels;
    Workspace(void* base, const Params& a)
        : bump(base),
          attention(bump.take<char>(Attention::plan(attention_of(a)).workspace_bytes)),
          attended(bump.take<T>(sizes(a).B * sizes(a).N * sizes(a).P)),
          projection(bump, sizes(a), a.attention.channels_last),
          factor(bump.take<T>(sizes(a).C)),
          channels{bump.take<double>(2 * blocks_of(a).count * sizes(a).C), sizes(a).C} {}
  };

  static const Sizes& sizes(const Params& a) { return a.attention.sizes; }
  static RowBlocks blocks_of(const Params& a) { return RowBlocks(sizes(a), a.attention.channels_last); }
  static shvit::ShsaForwardParams attention_of(const Params& a) {
    shvit::ShsaForwardParams attention = a.attention;
    attention.attended_only = true;
    return attention;
  }
  static int64_t ld(const Params& a) { return row_distance<T>(sizes(a).C); }

  struct Scratch {
    // Of a block: rows of channels, or channels of tokens, their projection and factors; [3, C].
    T *y, *p, *factors, *sums;
    PairedScratch pairs;  // of rows
    Scratch(Bump& bump, const Params& a) {
      const Sizes& s = sizes(a);
      const bool by_channel = !a.attention.channels_last;
      const int64_t distance = block_distance<T, VB>(s), rows = blocks_of(a).most_rows;
      y = bump.take<T>(by_channel ? s.C * distance : rows * ld(a));
      p = bump.take<T>(by_channel ? s.C * distance : 0);
      factors = bump.take<T>(by_channel ? distance : 0);
      sums = bump.take<T>(3 * s.C);
      if (!by_channel) pairs = PairedScratch::in_place<T, VB>(bump, rows, y, ld(a));
    }
  };

  // Phases: pack, those of the attention, project, statistics, normalise.
  static constexpr int kAttention = 1, kProject = 6, kStatistics = 7, kNormalise = 8;

  static Plan plan(const Params& a) {
    const Sizes& s = sizes(a);
    const Plan attention = Attention::plan(attention_of(a));
    const int64_t blocks = blocks_of(a).count;
    Plan plan;
    plan.phases = 9;
    plan.flops = attention.flops + 2 * s.B * s.N * s.C * s.C;
    plan.tasks[0] = Projection<T, VB>::tasks(s, a.attention.channels_last);
    for (int phase = 0; phase < attention.phases; ++phase)
      plan.tasks[kAttention + phase] = attention.tasks[phase];
    plan.tasks[kProject] = plan.tasks[kNormalise] = blocks;
    plan.tasks[kStatistics] = 1;
    Bump bump(nullptr);
    Scratch(bump, a);
    plan.scratch_bytes = max64(bump.used(), attention.scratch_bytes);
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Workspace workspace(a.workspace, a);
    if (phase == 0)
      workspace.projection.make(static_cast<const T*>(a.proj_weight), true, sizes(a), a.attention.channels_last,
                                task);
    if (phase >= kAttention && phase < kProject) {
      auto attention = attention_of(a);
      attention.y = workspace.attended;
      attention.workspace = workspace.attention;
      Attention::run(attention, phase - kAttention, task, memory);
    }
    Bump bump(memory);
    if (phase == kProject && a.attention.channels_last) project_rows(a, task, Scratch(bump, a), workspace);
    if (phase == kProject && !a.attention.channels_last) project_channels(a, task, Scratch(bump, a), workspace);
    if (phase == kStatistics) finish_statistics(a, workspace);
    if (phase == kNormalise) normalise_block(a, task, workspace);
  }

  static void project_rows(const Params& a, int64_t task, const Scratch& scratch, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    const int64_t first = blocks.first_row(task), rows = blocks.rows(task);
    gather_rows<T, VB>(a.attention, blocks, task, workspace.attended, scratch.y, ld(a));
    T* projected = static_cast<T*>(a.projected) + first * s.C;
    project<T, VB>(rows, {scratch.y, ld(a), 1}, workspace.projection.right(s), 0, s.C,
                   into_rows(projected, s.C, s.C), scratch.pairs);
    measure_columns<VB>(workspace.channels, task, projected, rows, s.C, scratch.sums);
  }

  static void project_channels(const Params& a, int64_t task, const Scratch& scratch,
                               const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    const int64_t tokens = blocks.rows(task), distance = block_distance<T, VB>(s);
    gather_channels<T, VB>(a.attention, blocks, task, workspace.attended, scratch.y, distance);
    if (weight_in_pairs<T, VB>(s, false)) {
      product_in_pairs<T, VB>(s.C, tokens, s.C, workspace.projection.pairs, scratch.y, distance, scratch.p,
                              scratch.factors);
    } else {
      product_of_columns<T, VB>(s.C, tokens, WholeRows<T>{{static_cast<const T*>(a.proj_weight), s.C, 1}, s.C},
                                scratch.y, distance, into_rows(scratch.p, tokens, distance));
    }
    measure_rows<VB>(workspace.channels, task, scratch.p, tokens, distance);
    blocks.pieces(task, [&](const RowBlocks::Piece& piece) {
      T* projected = image_of(a, a.projected, piece.image, piece.token).data;
      for (int64_t c = 0; c < s.C; ++c)
        map_row<VB>(scratch.p + c * distance + piece.row, projected + c * s.N, piece.n, Identity{});
    });
  }

  static void finish_statistics(const Params& a, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    T *mean = static_cast<T*>(a.proj_norm.mean), *variance = static_cast<T*>(a.proj_norm.variance);
    if (blocks.count > 0)
      merge_channels(workspace.channels, blocks.count, [&](int64_t block) { return blocks.rows(block); });
    for (int64_t c = 0; c < s.C; ++c) {
      mean[c] = s.B > 0 ? static_cast<T>(workspace.channels.mean(0)[c]) : T(0);
      variance[c] =
          s.B > 0 ? static_cast<T>(workspace.channels.squares(0)[c] / static_cast<double>(s.B * s.N)) : T(0);
      workspace.factor[c] = channel_gamma<T>(a.proj_norm, c) * channel_rstd<T>(a.proj_norm, c);
    }
  }

  static ImageView<T> image_of(const Params& a, void* images, int64_t image, int64_t token) {
    return image_view(static_cast<T*>(images), image, sizes(a).C, sizes(a).N, a.attention.channels_last)
        .at(0, token);
  }

  static void normalise_block(const Params& a, int64_t task, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const T *mean = static_cast<const T*>(a.proj_norm.mean), *beta = static_cast<const T*>(a.proj_norm.bias);
    blocks_of(a).pieces(task, [&](const RowBlocks::Piece& piece) {
      const auto x = Attention::x(a.attention, piece.image).at(0, piece.token);
      const auto p = image_of(a, a.projected, piece.image, piece.token);
      const auto out = image_of(a, a.out, piece.image, piece.token);
      if (a.attention.channels_last) {
        for (int64_t t = 0; t < piece.n; ++t) {
          const T *from = p.data + t * s.C, *more = x.data + t * s.C;
          make_row<VB>(out.data + t * s.C, s.C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA {
            auto v = (load_as(from + c, lane) - load_as(mean + c, lane)) * load_as(workspace.factor + c, lane);
            if (beta) v += load_as(beta + c, lane);
            return a.residual ? load_as(more + c, lane) + v : v;
          });
        }
        return;
      }
      for (int64_t c = 0; c < s.C; ++c) {
        const T *from = p.data + c * s.N, *more = x.data + c * s.N;
        const T centre = mean[c], factor = workspace.factor[c], offset = beta ? beta[c] : T(0);
        make_row<VB>(out.data + c * s.N, piece.n, [&](auto lane, int64_t t) SHVIT_INLINE_LAMBDA {
          const auto v = (load_as(from + t, lane) - centre) * factor + offset;
          return a.residual ? load_as(more + t, lane) + v : v;
        });
      }
    });
  }
};

template <class T, int VB>
struct MixerTrainBackward {
  using Params = shvit::MixerTrainBackwardParams;
  using Forward = ShsaForward<T, VB>;
  using Attention = ShsaBackward<T, VB>;
  static constexpr int W = kLanes<T, VB>;

  static const Sizes& sizes(const Params& a) { return a.attention.sizes; }
  static RowBlocks blocks_of(const Params& a) { return RowBlocks(sizes(a), a.attention.channels_last); }
  static int64_t ld(const Params& a) { return row_distance<T>(sizes(a).C); }
  static const T* typed(const void* p) { return static_cast<const T*>(p); }

  // What makes y once more, and the gradients of the attention; their tensors in the workspace come later.
  static shvit::ShsaForwardParams forward_of(const Params& a) {
    shvit::ShsaForwardParams forward{};
    const shvit::ShsaBackwardParams& b = a.attention;
    forward.sizes = b.sizes;
    forward.channels_last = b.x1_channels_last;
    forward.relu = true;
    forward.norm_eps = a.norm_eps;
    forward.scale = b.scale;
    forward.x = b.x1;
    forward.norm_weight = b.norm_weight;
    forward.norm_bias = b.norm_bias;
    forward.qkv_weight = b.qkv_weight;
    forward.batch_norm = b.batch_norm;
    forward.attended_only = true;
    return forward;
  }
  static shvit::ShsaBackwardParams attention_of(const Params& a) {
    shvit::ShsaBackwardParams attention = a.attention;
    attention.attended_only = true;
    attention.residual = a.residual ? a.dout : nullptr;
    attention.makes_y = attention_makes_y(a);
    return attention;
  }

  struct Workspace {
    Bump bump;
    char* attention;
    T *attended, *dattended;  // images of P channels
    Projection<T, VB> projection;
    T *factor, *shift, *slope;  // [C] each
    T* dweights;                // [parts - 1, C, C]: the first part is dproj_weight
    double* partials;           // [blocks, 2, C]: dbeta, dgamma
    Workspace(void* base, const Params& a)
        : bump(base),
          attention(bump.take<char>(max64(Forward::plan(forward_of(a)).workspace_bytes,
                                          Attention::plan(attention_of(a)).workspace_bytes))),
          attended(bump.take<T>(sizes(a).B * sizes(a).N * sizes(a).P)),
          dattended(bump.take<T>(sizes(a).B * sizes(a).N * sizes(a).P)),
          projection(bump, sizes(a), a.attention.channels_last),
          factor(bump.take<T>(sizes(a).C)),
          shift(bump.take<T>(sizes(a).C)),
          slope(bump.take<T>(sizes(a).C)),
          dweights(bump.take<T>(a.dproj_weight ? (parts(a).parts - 1) * sizes(a).C * sizes(a).C : 0)),
          partials(bump.take<double>(blocks_of(a).count * 2 * sizes(a).C)) {}

    // The sum of a part of the blocks.
    T* dweight(const Params& a, int64_t part) const {
      return part > 0 ? dweights + (part - 1) * sizes(a).C * sizes(a).C : static_cast<T*>(a.dproj_weight);
    }
  };

  // dW, and in NCHW order dy, are in pairs if it is worth it. With tokens in rows the left factor of dW would
  // have to be transposed.
  static bool in_pairs(const Params& a) { return weight_in_pairs<T, VB>(sizes(a), a.attention.channels_last); }

  // Of a block: dp, rows of channels, packed tokens or (in pairs) channels of tokens; dy, rows of channels or
  // channels of tokens; y, packed rows of channels. What pairs need: for dW a copy of dp, for dy dp itself.
  struct Scratch {
    T *dp, *dy, *y, *factors;
    PairedScratch channels, rows;
    Scratch(Bump& bump, const Params& a) {
      const int64_t most = blocks_of(a).most_rows, values = most * ld(a), C = sizes(a).C;
      const bool in_rows = a.attention.channels_last;
      dp = bump.take<T>(in_rows || !in_pairs(a) ? values : C * distance(a));
      dy = bump.take<T>(in_rows ? values : C * distance(a));
      y = bump.take<T>(a.dproj_weight ? (most + 1) * round_up(C, kPanel) : 0);
      factors = bump.take<T>(in_rows ? 0 : distance(a));
      if (in_pairs(a) && a.dproj_weight) channels = PairedScratch::take<T, VB>(bump, C, most);
      if (in_rows) rows = PairedScratch::in_place<T, VB>(bump, most, dp, ld(a));
    }
  };
  static int64_t distance(const Params& a) {
    return a.attention.channels_last ? ld(a) : block_distance<T, VB>(sizes(a));
  }

  // Blocks that add to one sum of dW: of enough tokens that the sums are few.
  static Parts parts(const Params& a) {
    constexpr int64_t kTokens = 128, kMost = 64;
    const RowBlocks blocks = blocks_of(a);
    return {blocks.count, max64(1, min64(blocks.count, min64(kMost, blocks.tokens / kTokens)))};
  }

  // Channels that are brought in ahead of the one at work, where each is a plane of tokens.
  static constexpr int64_t kPlanesAhead = 8;

  // Rows of dW whose parts one task adds up.
  static constexpr int64_t kWeightRows = 16;

  static bool needs_attention(const Params& a) {
    const shvit::ShsaBackwardParams& b = a.attention;
    return b.dx || b.dnorm_weight || b.dnorm_bias || b.dqkv_weight || b.dbn_weight || b.dbn_bias;
  }

  // The gradients of short images make y themselves.
  static bool attention_makes_y(const Params& a) { return needs_attention(a) && Attention::is_short(sizes(a)); }

  // Phases: sums over channels, their total, pack, y once more (by the forward, or the first phase of the
  // attention), through the projection, the attention's other phases, the projection's weight.
  static constexpr int kTotal = 1, kPack = 2, kForward = 3, kMakeY = 8, kProject = 9, kAttention = 9,
                       kWeight = 17;
  static int attention_phase(int phase) { return phase == 0 ? kMakeY : kAttention + phase; }

  static Plan plan(const Params& a) {
    const Sizes& s = sizes(a);
    const Plan forward = Forward::plan(forward_of(a)), attention = Attention::plan(attention_of(a));
    const RowBlocks blocks = blocks_of(a);
    const bool attends = needs_attention(a), weighs = a.dproj_weight;
    Plan plan;
    plan.phases = 18;
    plan.flops = forward.flops + attention.flops + 4 * s.B * s.N * s.C * s.C;
    plan.tasks[0] = blocks.count;
    plan.tasks[kTotal] = 1;
    if (attends) plan.tasks[kPack] = Projection<T, VB>::tasks(s, a.attention.channels_last);
    if (attends || weighs) plan.tasks[kProject] = parts(a).parts;
    if ((attends || weighs) && !attention_makes_y(a)) {
      for (int phase = 0; phase < forward.phases; ++phase) plan.tasks[kForward + phase] = forward.tasks[phase];
      plan.tasks[kForward + 2] = 0;  // the statistics are known
    }
    if (attends)
      for (int phase = 0; phase < attention.phases; ++phase)
        plan.tasks[attention_phase(phase)] = attention.tasks[phase];
    if (weighs && parts(a).parts > 1) plan.tasks[kWeight] = ceil_div(s.C, kWeightRows);
    Bump scratch(nullptr);
    Scratch(scratch, a);
    plan.scratch_bytes = max64(scratch.used(), max64(forward.scratch_bytes, attention.scratch_bytes));
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Workspace workspace(a.workspace, a);
    if (phase == 0) sum_block(a, task, Bump(memory).take<T>(0), workspace);
    if (phase == kTotal) total_channels(a, workspace);
    if (phase == kPack)
      workspace.projection.make(typed(a.proj_weight), false, sizes(a), a.attention.channels_last, task);
    if (phase >= kForward && phase < kMakeY) {
      auto forward = forward_of(a);
      forward.y = workspace.attended;
      forward.workspace = workspace.attention;
      Forward::run(forward, phase - kForward, task, memory);
    }
    if (phase == kProject) {
      Bump bump(memory);
      const Scratch scratch(bump, a);
      const Parts cut = parts(a);
      if (cut.n == 0 && a.dproj_weight) fill(workspace.dweight(a, task), sizes(a).C * sizes(a).C, T(0));
      for (int64_t block = cut.begin(task); block < cut.end(task); ++block)
        project_block(a, block, task, scratch, workspace);
    } else if (phase >= kMakeY && phase < kWeight) {
      auto attention = attention_of(a);
      attention.dy = workspace.dattended;
      attention.y = workspace.attended;
      attention.workspace = workspace.attention;
      Attention::run(attention, phase == kMakeY ? 0 : phase - kAttention, task, memory);
    }
    if (phase == kWeight) sum_weight(a, task, workspace);
  }

  static void sum_block(const Params& a, int64_t task, T* sums, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    double* dbeta = workspace.partials + task * 2 * s.C;
    if (a.attention.channels_last) {
      const int64_t first = blocks.first_row(task) * s.C;
      sum_columns(a, typed(a.dout) + first, typed(a.projected) + first, blocks.rows(task), sums, dbeta);
      return;
    }
    for (int64_t i = 0; i < 2 * s.C; ++i) dbeta[i] = 0;
    blocks.pieces(task, [&](const RowBlocks::Piece& piece) {
      sum_channels(a, channels_of(a, a.dout, piece.image, 0, piece.token).data,
                   channels_of(a, a.projected, piece.image, 0, piece.token).data, piece.n, dbeta);
    });
  }

  // Of an image in NCHW order.
  static __attribute__((noinline)) void sum_channels(const Params& a, const T* dout, const T* projected,
                                                     int64_t n, double* dbeta) {
    const Sizes& s = sizes(a);
    double* dgamma = dbeta + s.C;
    for (int64_t c = 0; c < s.C; ++c) {
      const T *d = dout + c * s.N, *p = projected + c * s.N, centre = typed(a.proj_norm.mean)[c];
      Vec<T, VB> sums{}, products{};
      T sum = 0, product = 0;
      int64_t t = 0;
      for (; t + W <= n; t += W) {
        const auto v = load<Vec<T, VB>>(d + t);
        sums += v;
        products += v * (load<Vec<T, VB>>(p + t) - centre);
      }
      for (; t < n; ++t) {
        sum += d[t];
        product += d[t] * (p[t] - centre);
      }
      dbeta[c] += static_cast<double>(sum + sum_lanes<T, VB>(sums));
      dgamma[c] += static_cast<double>(product + sum_lanes<T, VB>(products));
    }
  }

  static __attribute__((noinline)) void sum_columns(const Params& a, const T* dout, const T* projected,
                                                    int64_t n, T* sums, double* dbeta) {
    const Sizes& s = sizes(a);
    const T* mean = typed(a.proj_norm.mean);
    T* products = sums + s.C;
    for (int64_t i = 0; i < 2 * s.C; ++i) sums[i] = 0;
    over_rows<VB, T>(n, s.C, [&](auto lane, int64_t c, int64_t row, auto count) SHVIT_INLINE_LAMBDA {
      const auto centre = load_as(mean + c, lane);
      const auto d = [&](int r) SHVIT_INLINE_LAMBDA { return load_as(dout + (row + r) * s.C + c, lane); };
      const auto product = [&](int r) SHVIT_INLINE_LAMBDA {
        return d(r) * (load_as(projected + (row + r) * s.C + c, lane) - centre);
      };
      store(sums + c, load_as(sums + c, lane) + sum_of<decltype(count)::value>(d));
      store(products + c, load_as(products + c, lane) + sum_of<decltype(count)::value>(product));
    });
    for (int64_t i = 0; i < 2 * s.C; ++i) dbeta[i] = static_cast<double>(sums[i]);  // dgamma follows dbeta
  }

  static void total_channels(const Params& a, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const int64_t blocks = blocks_of(a).count;
    const double count = static_cast<double>(s.B * s.N);
    T *dbeta = static_cast<T*>(a.dproj_norm_bias), *dgamma = static_cast<T*>(a.dproj_norm_weight);
    for (int64_t c = 0; c < s.C; ++c) {
      const T rstd = channel_rstd<T>(a.proj_norm, c);
      double sum = 0, product = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        sum += workspace.partials[block * 2 * s.C + c];
        product += workspace.partials[(block * 2 + 1) * s.C + c];
      }
      product *= rstd;
      if (dbeta) dbeta[c] = static_cast<T>(sum);
      if (dgamma) dgamma[c] = static_cast<T>(product);
      workspace.factor[c] = channel_gamma<T>(a.proj_norm, c) * rstd;
      workspace.shift[c] = s.B > 0 ? static_cast<T>(sum / count) : T(0);
      workspace.slope[c] = s.B > 0 ? static_cast<T>(product * rstd / count) : T(0);
    }
  }

  // A block of dp, through the projection, and its part of dW.
  static void project_block(const Params& a, int64_t block, int64_t part, const Scratch& scratch,
                            const Workspace& workspace) {
    if (a.attention.channels_last) {
      rows_through_norm(a, block, scratch.dp, workspace);
    } else if (in_pairs(a)) {
      channels_through_norm(a, block, scratch.dp, workspace);
    } else {
      tokens_through_norm(a, block, scratch.dy, scratch.dp, workspace);
    }
    if (a.dproj_weight) add_weight(a, block, part, scratch, workspace);
    if (needs_attention(a)) through_projection(a, block, scratch, workspace);  // scales dp where it is
  }

  static void through_projection(const Params& a, int64_t block, const Scratch& scratch,
                                 const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    const int64_t tokens = blocks.rows(block), rows = distance(a);
    const bool by_channel = !a.attention.channels_last;
    if (!by_channel) {
      project<T, VB>(tokens, {scratch.dp, rows, 1}, workspace.projection.right(s), 0, s.C,
                     into_rows(scratch.dy, s.C, rows), scratch.rows);
    } else if (in_pairs(a)) {
      product_in_pairs<T, VB>(s.C, tokens, s.C, workspace.projection.pairs, scratch.dp, rows, scratch.dy,
                              scratch.factors);
    } else {
      product_of_packed<T, VB>(s.C, WholeRows<T>{{typed(a.proj_weight), 1, s.C}, s.C},
                               PackedRows<T>{scratch.dp, s.C}, 0, tokens, into_rows(scratch.dy, tokens, rows));
    }
    blocks.pieces(block, [&](const RowBlocks::Piece& piece) {
      const ImageView<const T> dy{scratch.dy + piece.row * (by_channel ? 1 : rows), by_channel ? rows : 1,
                                  by_channel ? 1 : rows};
      map_image<VB>(dy, image_view(workspace.dattended, piece.image, s.P, s.N, !by_channel).at(0, piece.token),
                    s.P, piece.n, Identity{});
      if (a.attention.dx) store_rest(a, piece.image, piece.token, piece.n, dy.at(s.P, 0).data);
    });
  }

  static void add_weight(const Params& a, int64_t block, int64_t part, const Scratch& scratch,
                         const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    const int64_t tokens = blocks.rows(block), rows = in_pairs(a) ? tokens + 1 : tokens;  // of a panel
    blocks.pieces(block, [&](const RowBlocks::Piece& piece) {
      const auto attended = image_view(static_cast<const T*>(workspace.attended), piece.image, s.P, s.N,
                                       a.attention.channels_last);
      pack_rows<VB>(attended.at(0, piece.token), s.P, piece.n, scratch.y, rows, piece.row, 0, Identity{});
      pack_rows<VB>(channels_of(a, a.attention.x1, piece.image, s.P, piece.token), s.C - s.P, piece.n,
                    scratch.y, rows, piece.row, s.P, Relu{});
    });
    T* sum = workspace.dweight(a, part);
    const T* earlier = block == parts(a).begin(part) ? nullptr : sum;
    const LinearFinish<T> finish{nullptr, earlier, sum, s.C, s.C, false};
    const PackedRows<T> y{scratch.y, tokens};
    if (in_pairs(a)) {
      add_weight_in_pairs(a, tokens, scratch, finish);
    } else if (a.attention.channels_last) {
      product_of_packed<T, VB>(s.C, WholeRows<T>{{scratch.dp, 1, ld(a)}, tokens}, y, 0, s.C, finish);
    } else {
      product_of_packed<T, VB>(s.C, PackedTokens<T>{scratch.dp, s.C, tokens}, y, 0, s.C, finish);
    }
  }

  static void add_weight_in_pairs(const Params& a, int64_t tokens, const Scratch& scratch,
                                  LinearFinish<T> finish) {
    if constexpr (kInPairs<T, VB>) {
      const int64_t C = sizes(a).C;
      const PackedWeights<T> y{scratch.y, tokens};
      for (int64_t c = 0; c < C; c += kPanel) {
        T* panel = scratch.y + c / kPanel * y.panel();
        scale_columns<VB>(panel, kPanel, tokens, kPanel, panel + tokens * kPanel);
      }
      scratch.channels.template prepare<VB>(C, tokens, {scratch.dp, distance(a), 1});
      scratch.channels.template multiply<VB>(tokens, [&](const PairedRows& dp) SHVIT_INLINE_LAMBDA {
        gemm_packed<T, VB, kPairedRows>(C, dp, y, 0, C, finish);
      });
    }
  }

  // dp of the rows of a block.
  static void rows_through_norm(const Params& a, int64_t block, T* dp, const Workspace& workspace) {
    const int64_t C = sizes(a).C, first = blocks_of(a).first_row(block), rows = blocks_of(a).rows(block);
    const T *dout = typed(a.dout) + first * C, *projected = typed(a.projected) + first * C;
    const T *mean = typed(a.proj_norm.mean), *factor = workspace.factor, *shift = workspace.shift,
            *slope = workspace.slope;
    for (int64_t t = 0; t < rows; ++t) {
      const T *d = dout + t * C, *p = projected + t * C;
      make_row<VB>(dp + t * ld(a), C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA {
        const auto centred = load_as(p + c, lane) - load_as(mean + c, lane);
        return load_as(factor + c, lane) *
               (load_as(d + c, lane) - load_as(shift + c, lane) - centred * load_as(slope + c, lane));
      });
    }
  }

  // dp of the channels of a block.
  static void channels_through_norm(const Params& a, int64_t block, T* dp, const Workspace& workspace) {
    for (int64_t c = 0; c < sizes(a).C; ++c)
      blocks_of(a).pieces(block, [&](const RowBlocks::Piece& piece) {
        channel_through_norm(a, piece, c, dp + c * distance(a) + piece.row, workspace);
      });
  }

  // dp of the packed tokens of a block; `rows` is scratch.
  static void tokens_through_norm(const Params& a, int64_t block, T* rows, T* dp, const Workspace& workspace) {
    pack_tokens(blocks_of(a), block, sizes(a).C, rows, dp,
                [&](const RowBlocks::Piece& piece, int64_t c, T* to)
                    SHVIT_INLINE_LAMBDA { channel_through_norm(a, piece, c, to, workspace); });
  }

  static SHVIT_INLINE void channel_through_norm(const Params& a, const RowBlocks::Piece& piece, int64_t c,
                                                T* dp, const Workspace& workspace) {
    const T *d = channels_of(a, a.dout, piece.image, c, piece.token).data,
            *p = channels_of(a, a.projected, piece.image, c, piece.token).data;
    prefetch(d + kPlanesAhead * sizes(a).N, piece.n);
    prefetch(p + kPlanesAhead * sizes(a).N, piece.n);
    const T mean = typed(a.proj_norm.mean)[c], factor = workspace.factor[c], shift = workspace.shift[c],
            slope = workspace.slope[c];
    make_row<VB>(dp, piece.n, [&](auto lane, int64_t t) SHVIT_INLINE_LAMBDA {
      return factor * (load_as(d + t, lane) - shift - (load_as(p + t, lane) - mean) * slope);
    });
  }

  // An image in the order of x, from a channel and a token on.
  static ImageView<const T> channels_of(const Params& a, const void* images, int64_t image, int64_t channel,
                                        int64_t token) {
    return image_view(typed(images), image, sizes(a).C, sizes(a).N, a.attention.channels_last)
        .at(channel, token);
  }

  // dx of the channels beyond the partial ones, from their dy.
  static void store_rest(const Params& a, int64_t image, int64_t token, int64_t n, const T* dy) {
    const Sizes& s = sizes(a);
    const auto x = channels_of(a, a.attention.x1, image, s.P, token),
               dout = channels_of(a, a.dout, image, s.P, token);
    T* dx = static_cast<T*>(a.attention.dx) + (x.data - typed(a.attention.x1));
    const bool by_channel = !a.attention.channels_last;
    const int64_t count = by_channel ? s.C - s.P : n, length = by_channel ? n : s.C - s.P;
    const int64_t stride = by_channel ? s.N : s.C;
    for (int64_t r = 0; r < count; ++r) {
      const T *from = x.data + r * stride, *more = dout.data + r * stride, *gradient = dy + r * distance(a);
      if (by_channel) {
        prefetch(from + kPlanesAhead * stride, length);
        prefetch(more + kPlanesAhead * stride, length);
      }
      make_row<VB>(dx + r * stride, length, [&](auto lane, int64_t i) SHVIT_INLINE_LAMBDA {
        const auto v = load_as(from + i, lane) <= 0 ? decltype(lane){} : load_as(gradient + i, lane);
        return a.residual ? v + load_as(more + i, lane) : v;
      });
    }
  }

  // Some rows of dW: adds the other parts to the first.
  static void sum_weight(const Params& a, int64_t task, const Workspace& workspace) {
    const int64_t C = sizes(a).C, first = task * kWeightRows * C, n = min64(C * C - first, kWeightRows * C);
    T* total = static_cast<T*>(a.dproj_weight) + first;
    for (int64_t part = 1; part < parts(a).parts; ++part) {
      const T* more = workspace.dweight(a, part) + first;
      for (int64_t i = 0; i < n; ++i) total[i] += more[i];
    }
  }
};

}  // namespace
