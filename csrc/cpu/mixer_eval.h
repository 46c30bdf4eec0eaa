// The residual attention layer in evaluation, from its plain weights and running statistics (design section 2,
// shsa_mixer; section 3): out = (x +) W relu(shsa(x)) + b, with W and b the folded projection.
#pragma once

#include "fold.h"
#include "row_blocks.h"

namespace {

template <class T, int VB>
struct MixerEval {
  using Params = shvit::MixerEvalParams;
  using Attention = ShsaForward<T, VB>;

  struct Workspace {
    Bump bump;
    char* attention;
    T* attended;  // image of P channels
    Projection<T, VB> projection;
    T *qkv_weight, *qkv_bias, *factor, *offset;  // folded: [O, P], [O], [C], [C]
    Workspace(void* base, const Params& a)
        : bump(base),
          attention(bump.take<char>(Attention::plan(a.attention).workspace_bytes)),
          attended(bump.take<T>(sizes(a).B * sizes(a).N * sizes(a).P)),
          projection(bump, sizes(a), a.attention.channels_last),
          qkv_weight(bump.take<T>(sizes(a).O() * sizes(a).P)),
          qkv_bias(bump.take<T>(sizes(a).O())),
          factor(bump.take<T>(sizes(a).C)),
          offset(bump.take<T>(sizes(a).C)) {}
  };

  static const Sizes& sizes(const Params& a) { return a.attention.sizes; }
  static RowBlocks blocks_of(const Params& a) { return RowBlocks(sizes(a), a.attention.channels_last); }
  static int64_t ld(const Params& a) {
    return a.attention.channels_last ? row_distance<T>(sizes(a).C) : block_distance<T, VB>(sizes(a));
  }

  // The projected channels, cut where there are fewer blocks than threads.
  static Parts panels_of(const Params& a) {
    const int64_t panels = ceil_div(sizes(a).C, kPanel), blocks = max64(blocks_of(a).count, 1);
    return {panels, min64(panels, ceil_div(a.threads, blocks))};
  }
  struct Channels {
    int64_t begin, end;
  };

  // Of a block: what is projected, and what pairs need for it; in NCHW order the projection, and factors of the
  // tokens.
  struct Scratch {
    T *y, *p, *factors;
    PairedScratch pairs;
    Scratch(Bump& bump, const Params& a) {
      const bool in_rows = a.attention.channels_last;
      const int64_t rows = in_rows ? blocks_of(a).most_rows : sizes(a).C;
      y = bump.take<T>(rows * ld(a));
      p = bump.take<T>(in_rows ? 0 : rows * ld(a));
      factors = bump.take<T>(in_rows ? 0 : ld(a));
      if (in_rows) pairs = PairedScratch::in_place<T, VB>(bump, rows, y, ld(a));
    }
  };

  // Phases: fold, pack, those of the attention, project.
  static constexpr int kPack = 1, kAttention = 2, kProject = 7;

  static Plan plan(const Params& a) {
    const Sizes& s = sizes(a);
    const Plan attention = Attention::plan(a.attention);
    Plan plan;
    plan.phases = 8;
    plan.flops = attention.flops + 2 * s.B * s.N * s.C * s.C;
    plan.tasks[0] = 1;
    plan.tasks[kPack] = Projection<T, VB>::tasks(s, a.attention.channels_last);
    for (int phase = 0; phase < attention.phases; ++phase)
      plan.tasks[kAttention + phase] = attention.tasks[phase];
    plan.tasks[kProject] = blocks_of(a).count * panels_of(a).parts;
    Bump bump(nullptr);
    Scratch(bump, a);
    plan.scratch_bytes = max64(bump.used(), attention.scratch_bytes);
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Workspace workspace(a.workspace, a);
    if (phase == 0) fold(a, workspace);
    if (phase == kPack)
      workspace.projection.make(static_cast<const T*>(a.projection.weight), true, sizes(a),
                                a.attention.channels_last, task, workspace.factor);
    if (phase >= kAttention && phase < kProject) {
      auto attention = a.attention;
      attention.qkv_weight = workspace.qkv_weight;
      attention.qkv_bias = workspace.qkv_bias;
      attention.y = workspace.attended;
      attention.attended_only = true;
      attention.workspace = workspace.attention;
      Attention::run(attention, phase - kAttention, task, memory);
    }
    if (phase < kProject) return;
    Bump bump(memory);
    const Parts panels = panels_of(a);
    const int64_t block = task / panels.parts, part = task % panels.parts;
    const Channels channels{panels.begin(part) * kPanel, min64(panels.end(part) * kPanel, sizes(a).C)};
    if (a.attention.channels_last) {
      project_rows(a, block, channels, Scratch(bump, a), workspace);
    } else {
      project_channels(a, block, channels, Scratch(bump, a), workspace);
    }
  }

  static void fold(const Params& a, const Workspace& workspace) {
    shvit::FoldParams qkv = a.qkv;
    qkv.folded_weight = workspace.qkv_weight;
    qkv.folded_bias = workspace.qkv_bias;
    Fold<T, VB>::run(qkv, 0, 0, nullptr);
    for (int64_t c = 0; c < sizes(a).C; ++c) {
      const auto [factor, bias] = folded_channel<T>(a.projection, c);
      workspace.factor[c] = factor;
      workspace.offset[c] = bias;
    }
  }

  static void project_rows(const Params& a, int64_t block, const Channels& channels, const Scratch& scratch,
                           const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    const int64_t at = blocks.first_row(block) * s.C;
    gather_rows<T, VB>(a.attention, blocks, block, workspace.attended, scratch.y, ld(a));
    const T* residual = a.residual ? static_cast<const T*>(a.attention.x) + at : nullptr;
    const LinearFinish<T> finish{workspace.offset, residual, static_cast<T*>(a.out) + at, s.C, s.C, false};
    project<T, VB>(blocks.rows(block), {scratch.y, ld(a), 1}, workspace.projection.right(s), channels.begin,
                   channels.end, finish, scratch.pairs);
  }

  static void project_channels(const Params& a, int64_t block, const Channels& channels, const Scratch& scratch,
                               const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks = blocks_of(a);
    const int64_t tokens = blocks.rows(block), begin = channels.begin;
    gather_channels<T, VB>(a.attention, blocks, block, workspace.attended, scratch.y, ld(a));
    if (weight_in_pairs<T, VB>(s, false)) {
      product_in_pairs<T, VB>(channels.end - begin, tokens, s.C, workspace.projection.pairs.from(begin),
                              scratch.y, ld(a), scratch.p, scratch.factors);
    } else {
      const WholeRows<T> weight{{static_cast<const T*>(a.projection.weight) + begin * s.C, s.C, 1}, s.C};
      product_of_columns<T, VB>(channels.end - begin, tokens, weight, scratch.y, ld(a),
                                into_rows(scratch.p, tokens, ld(a)));
    }
    blocks.pieces(block, [&](const RowBlocks::Piece& piece) {
      for (int64_t c = begin; c < channels.end; ++c)
        finish_channel(a, c, piece, scratch.p + (c - begin) * ld(a) + piece.row, workspace);
    });
  }

  // A channel of a piece, from its projection p.
  static void finish_channel(const Params& a, int64_t c, const RowBlocks::Piece& piece, const T* p,
                             const Workspace& workspace) {
    const int64_t at = (piece.image * sizes(a).C + c) * sizes(a).N + piece.token;
    const T* x = static_cast<const T*>(a.attention.x) + at;
    const T factor = workspace.factor[c], offset = workspace.offset[c];
    make_row<VB>(static_cast<T*>(a.out) + at, piece.n, [&](auto lane, int64_t t) SHVIT_INLINE_LAMBDA {
      const auto v = load_as(p + t, lane) * factor + offset;
      return a.residual ? load_as(x + t, lane) + v : v;
    });
  }
};

}  // namespace
