// The residual attention layer for inference: y = x + W relu(shsa(x)) + b, on rows of tokens, with a packed
// projection (design section 2, shsa_mixer).
#pragma once

#include "linear.h"
#include "shsa_forward.h"

namespace {

// Parameters in float32: as they are, or converted in scratch, of which null takes as much and stays null.
template <int VB, class S>
SHVIT_INLINE const float* in_float32(const S* values, int64_t n, Bump& bump) {
  if constexpr (std::is_same_v<S, float>) {
    return values;
  } else {
    float* made = bump.take<float>(n);
    if (values) copy_row<VB>(values, made, n);
    return values ? made : nullptr;
  }
}

template <class S, int VB>
struct Mixer {
  using Params = shvit::MixerParams<S>;
  using Attention = ShsaForward<S, VB>;

  // Short images, many of them: a group stays in cache from its attention to the residual. Otherwise the
  // attention of all images is staged, and the projection cut as a linear layer is.
  static bool is_staged(const Params& a) {
    const Sizes& s = a.attention.sizes;
    return !Attention::is_short(s) || Attention::units(s) < 4;
  }
  static LinearTasks projection(const Params& a) {
    const Sizes& s = a.attention.sizes;
    return {s.B * s.N, s.C, 3 * s.C * static_cast<int64_t>(sizeof(S))};
  }

  // A group of short images as a batch of its own.
  static shvit::ShsaForwardParams attention_of(const shvit::ShsaForwardParams& all, int64_t group, S* y) {
    const Groups<float, VB> groups(all.sizes);
    shvit::ShsaForwardParams one = all;
    const Sizes& s = all.sizes;
    one.sizes.B = groups.size(group, s.B);
    one.x = static_cast<const S*>(one.x) + groups.begin(group) * s.C * s.N;
    one.y = y;
    return one;
  }
  static int64_t group_rows(const Sizes& s) { return Groups<float, VB>(s).images * s.N; }

  // What is projected, of a group or of all images, and what pairs need.
  struct Projected {
    S* attended;
    PairedScratch pairs;
    Projected(Bump& bump, const Params& a) {
      const Sizes& s = a.attention.sizes;
      const int64_t rows = is_staged(a) ? s.B * s.N : group_rows(s);
      attended = bump.take<S>(rows * s.C);
      pairs = PairedScratch::in_place<S, VB>(bump, rows, attended, s.C);
    }
  };

  // The last two phases of staged attention: few rows are prepared for all tasks at once.
  static int prepare_phase(const Plan& attention) { return attention.phases; }
  static int project_phase(const Plan& attention) { return attention.phases + 1; }

  static Plan plan(const Params& a) {
    const Sizes& s = a.attention.sizes;
    const Plan attention = Attention::plan(a.attention);
    Plan plan = attention;
    Bump scratch(nullptr), workspace(nullptr);
    scratch.take<char>(attention.scratch_bytes);
    for (const int64_t n : {s.P, s.P, s.O() * s.P, s.O()}) in_float32<VB, S>(nullptr, n, scratch);
    plan.flops += 2 * s.B * s.N * s.C * s.C;
    if (is_staged(a)) {
      workspace.take<char>(attention.workspace_bytes);
      const bool prepares = Projected(workspace, a).pairs.exists() && projection(a).few();
      plan.phases = attention.phases + 2;
      plan.tasks[prepare_phase(attention)] = prepares ? 1 : 0;
      plan.tasks[project_phase(attention)] = projection(a).count();
    } else {
      Projected(scratch, a);
    }
    plan.scratch_bytes = scratch.used();
    plan.workspace_bytes = workspace.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Sizes& s = a.attention.sizes;
    const Plan attention = Attention::plan(a.attention);
    Bump scratch(memory);
    char* inner = scratch.take<char>(attention.scratch_bytes);
    shvit::ShsaForwardParams all = a.attention;
    if (phase < attention.phases) {
      const auto parameter = [&](const void*& values, int64_t n) {
        values = in_float32<VB>(static_cast<const S*>(values), n, scratch);
      };
      parameter(all.norm_weight, s.P);
      parameter(all.norm_bias, s.P);
      parameter(all.qkv_weight, s.O() * s.P);
      parameter(all.qkv_bias, s.O());
    }
    if (!is_staged(a)) {
      const Projected projected(scratch, a);
      const auto group = attention_of(all, task, projected.attended);
      Attention::run(group, phase, 0, inner);
      const int64_t rows = group.sizes.B * s.N;
      prepare(rows, s.C, projected.attended, projected.pairs);
      project(a, Groups<float, VB>(s).begin(task) * s.N, rows, projected.attended, 0, s.C, projected.pairs);
      return;
    }
    Bump workspace(a.workspace);
    all.workspace = workspace.take<char>(attention.workspace_bytes);
    const Projected projected(workspace, a);
    all.y = projected.attended;
    if (phase < attention.phases) Attention::run(all, phase, task, inner);
    if (phase == prepare_phase(attention)) prepare(s.B * s.N, s.C, projected.attended, projected.pairs);
    if (phase == project_phase(attention)) {
      const LinearTasks tasks = projection(a);
      const int64_t first = tasks.first_row(task), rows = tasks.rows_of(task);
      const S* attended = projected.attended + first * s.C;
      const PairedScratch pairs = projected.pairs.from(first);
      if (!tasks.few()) prepare(rows, s.C, attended, pairs);
      project(a, first, rows, attended, tasks.first_column(task), tasks.end_column(task), pairs);
    }
  }

  static void prepare(int64_t rows, int64_t C, const S* attended, const PairedScratch& pairs) {
    prepare_rows<VB, S>(rows, C, {attended, C, 1}, pairs);
  }

  static void project(const Params& a, int64_t first, int64_t rows, const S* attended, int64_t begin,
                      int64_t end, const PairedScratch& pairs) {
    const int64_t C = a.attention.sizes.C, at = first * C;
    linear_rows<VB, S>(rows, {attended, C, 1}, {a.weight, C, true}, begin, end,
                       {a.bias, static_cast<const S*>(a.attention.x) + at, a.y + at, C, C, false}, pairs);
  }
};

}  // namespace
