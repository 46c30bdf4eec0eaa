// y = concat(softmax attention of the first P channels, the others), then ReLU (design section 2).
//
// Everything is computed in columns of tokens: z [P, n], qkv [O, n] = W z + b, scores [keys, queries], so that
// the softmax over keys runs down columns and no operand needs packing. Short images are one task from the load
// of x to the store of y. Long images stage q, k and v in blocks of tokens and run an online softmax over the
// blocks. With batch normalisation by the statistics of the batch, the projection of all images is staged.
#pragma once

#include "batch_norm.h"
#include "panel.h"

namespace {

template <class T>
struct QueryState {
  T *scores, *out, *row_max, *row_sum;  // [keys, 32], [P, 32], [32], [32]

  QueryState(Bump& bump, const Sizes& s, int64_t keys)
      : scores(bump.take<T>(keys * kQueryColumns)),
        out(bump.take<T>(s.P * kQueryColumns)),
        row_max(bump.take<T>(kQueryColumns)),
        row_sum(bump.take<T>(kQueryColumns)) {}
};

// One block of keys: out = out * exp(old max - new max) + v exp(k^T q - new max), and the same for the sums.
template <class T, int VB>
SHVIT_INLINE void attend_block(const Sizes& s, const T* q, const T* k, const T* v, int64_t q_ld, int64_t kv_ld,
                               int64_t queries, int64_t keys, bool first, const QueryState<T>& state) {
  using V = Vec<T, VB>;
  constexpr int W = kLanes<T, VB>;
  gemm<T, VB>(keys, queries, s.D, {k, 1, kv_ld}, q, q_ld, state.scores, kQueryColumns);
  for (int64_t j = 0; j < queries; j += W) {
    T* column = state.scores + j;
    V highest = load<V>(column);
    for (int64_t i = 1; i < keys; ++i) highest = vmax(highest, load<V>(column + i * kQueryColumns));
    const V old = first ? highest : load<V>(state.row_max + j);
    highest = vmax(highest, old);
    // Where all logits so far are -inf, differences are NaN, and what comes later may still be finite.
    const V base = highest == -static_cast<T>(__builtin_inf()) ? V{} : highest;
    V earlier{};
    if (!first) {
      const V shrink = exp_nonpositive<T, VB>(old - base);
      earlier = load<V>(state.row_sum + j) * shrink;
      for (int64_t p = 0; p < s.P; ++p) {
        T* o = state.out + p * kQueryColumns + j;
        store(o, load<V>(o) * shrink);
      }
    }
    V sums[4] = {};  // several short sums round less than a long one
    for (int64_t i = 0; i < keys; ++i) {
      const V e = exp_nonpositive<T, VB>(load<V>(column + i * kQueryColumns) - base);
      store(column + i * kQueryColumns, e);
      sums[i % 4] += e;
    }
    store(state.row_max + j, highest);
    store(state.row_sum + j, earlier + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  gemm<T, VB>(s.P, queries, keys, {v, kv_ld, 1}, state.scores, kQueryColumns, state.out, kQueryColumns,
              first ? Init::kZero : Init::kAccumulate);
}

template <class S, int VB>
struct ShsaForward {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::ShsaForwardParams;
  static constexpr int W = kLanes<T, VB>;

  static int64_t blocks(const Sizes& s) { return ceil_div(s.N, kBlockTokens); }

  struct Scratch {
    Bump bump;
    T *z, *qkv;
    QueryState<T> state;
    Scratch(void* base, const Sizes& s, int64_t ld, int64_t keys)
        : bump(base), z(bump.take<T>(s.P * ld)), qkv(bump.take<T>(s.O() * ld)), state(bump, s, keys) {}
  };
  static Scratch scratch_of(void* base, const Sizes& s) {
    return Scratch(base, s, unit_ld(s), is_short(s) ? s.N : kBlockTokens);
  }

  static bool is_short(const Sizes& s) { return s.N <= kShortTokens; }
  // A group of short images, or a block of a long one.
  static int64_t units(const Sizes& s) { return is_short(s) ? Groups<T, VB>(s).count : s.B * blocks(s); }
  static int64_t unit_ld(const Sizes& s) { return is_short(s) ? Groups<T, VB>(s).ld : kBlockLd; }
  static int64_t unit_tokens(const Sizes& s, int64_t unit) {
    if (is_short(s)) return Groups<T, VB>(s).size(unit, s.B) * s.N;
    return min64(kBlockTokens, s.N - unit % blocks(s) * kBlockTokens);
  }

  // Staged projections [units, O, ld]; the moments of each block of long images, and of the projection.
  struct Workspace {
    Bump bump;
    T* qkv;
    Moments* moments;
    ChannelMoments channels;
    Workspace(void* base, const Params& a)
        : bump(base),
          qkv(bump.take<T>(units(a.sizes) * a.sizes.O() * unit_ld(a.sizes))),
          moments(is_short(a.sizes) ? nullptr : bump.take<Moments>(units(a.sizes))),
          channels{a.batch_norm.mean ? bump.take<double>(2 * units(a.sizes) * a.sizes.O()) : nullptr,
                   a.sizes.O()} {}
    T* panel(const Sizes& s, int64_t unit) const { return qkv + unit * s.O() * unit_ld(s); }
  };

  // Phases: measure, project, statistics of the projection, its normalisation, attend. Short images without
  // batch normalisation do all in one.
  static Plan plan(const Params& a) {
    const Sizes& s = a.sizes;
    Plan plan;
    plan.flops = 2 * s.B * s.N * (s.O() * s.P + s.N * (s.D + s.P)) + s.B * s.C * s.N;
    plan.scratch_bytes = scratch_of(nullptr, s).bump.used();
    plan.phases = 5;
    const bool staged = a.batch_norm.mean || !is_short(s);
    plan.tasks[4] = units(s);
    if (!staged) return plan;
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    plan.tasks[0] = is_short(s) ? 0 : units(s);
    plan.tasks[1] = units(s);
    if (!a.batch_norm.mean) return plan;
    plan.tasks[2] = 1;
    plan.tasks[3] = is_short(s) ? 0 : units(s);
    return plan;
  }

  static void run(const Params& a, int phase, int64_t unit, char* memory) {
    const Sizes& s = a.sizes;
    const Scratch scratch = scratch_of(memory, s);
    const Workspace workspace(a.workspace, a);
    if (phase == 2) {
      finish_statistics(a, workspace);
      return;
    }
    if (is_short(s)) {
      if (phase == 1) project_group(a, unit, scratch, workspace.panel(s, unit), &workspace);
      if (phase == 4) attend_group(a, unit, scratch, workspace);
      return;
    }
    const int64_t image = unit / blocks(s), block = unit % blocks(s);
    if (phase == 0) measure_block(a, image, block, scratch, workspace);
    if (phase == 1) project_block(a, image, block, scratch, workspace);
    if (phase == 3) normalise_unit(a, unit, unit_tokens(s, unit), workspace);
    if (phase == 4) attend_long(a, image, block, scratch, workspace);
  }

  static ImageView<const S> x(const Params& a, int64_t image) {
    return image_view(static_cast<const S*>(a.x), image, a.sizes.C, a.sizes.N, a.channels_last);
  }
  static ImageView<S> y(const Params& a, int64_t image) {
    const int64_t channels = a.attended_only ? a.sizes.P : a.sizes.C;
    return image_view(static_cast<S*>(a.y), image, channels, a.sizes.N, a.channels_last);
  }

  static void finish_statistics(const Params& a, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    T *mean = static_cast<T*>(a.batch_norm.mean), *variance = static_cast<T*>(a.batch_norm.variance);
    const ChannelMoments& channels = workspace.channels;
    const double count = static_cast<double>(s.B * s.N);
    if (s.B > 0) merge_channels(channels, units(s), [&](int64_t unit) { return unit_tokens(s, unit); });
    for (int64_t o = 0; o < s.O(); ++o) {
      mean[o] = s.B > 0 ? static_cast<T>(channels.mean(0)[o]) : T(0);
      variance[o] = s.B > 0 ? static_cast<T>(channels.squares(0)[o] / count) : T(0);
    }
  }

  static void normalise_unit(const Params& a, int64_t unit, int64_t columns, const Workspace& workspace) {
    T* panel = workspace.panel(a.sizes, unit);
    normalise_channels<VB>(a.batch_norm, a.sizes, a.scale, columns, unit_ld(a.sizes), panel, panel);
  }

  static void copy_x1(const Params& a, int64_t image, int64_t token, int64_t n, const T* panel, int64_t ld) {
    const Sizes& s = a.sizes;
    if (!a.x1) return;
    const auto x1 = image_view(static_cast<S*>(a.x1), image, s.P, s.N, a.channels_last);
    store_panel<VB>(panel, ld, s.P, n, x1.at(0, token));
  }

  // With batch normalisation the bare projection.
  static void project_panel(const Params& a, int64_t columns, int64_t ld, const T* z, T* qkv) {
    project<T, VB>(a.sizes, a.qkv_weight, a.qkv_bias, a.batch_norm.mean ? 1 : a.scale, columns, ld, z, qkv);
  }

  // z of a panel of n tokens, in place. The block that `saves` keeps the image's statistics for the backward.
  static void normalise_panel(const Params& a, int64_t image, const Moments& m, int64_t n, T* z, int64_t ld,
                              bool saves) {
    T mean = 0, rstd = 1;
    if (a.norm_weight) {
      mean = static_cast<T>(m.mean);
      rstd = static_cast<T>(m.rstd(a.norm_eps));
      normalise<VB>(z, z, a.sizes.P, n, ld, mean, rstd, static_cast<const T*>(a.norm_weight),
                    static_cast<const T*>(a.norm_bias));
    }
    if (saves && a.mean) {
      static_cast<T*>(a.mean)[image] = mean;
      static_cast<T*>(a.rstd)[image] = rstd;
    }
  }

  // Divide by the sums and store a block of queries.
  static void finish_queries(const Params& a, int64_t image, int64_t token, int64_t queries,
                             const QueryState<T>& state) {
    using V = Vec<T, VB>;
    const Sizes& s = a.sizes;
    if (a.row_max) {
      T* row_max = static_cast<T*>(a.row_max) + image * s.N + token;
      T* row_sum = static_cast<T*>(a.row_sum) + image * s.N + token;
      for (int64_t t = 0; t < queries; ++t) {
        row_max[t] = state.row_max[t];
        row_sum[t] = state.row_sum[t];
      }
    }
    for (int64_t j = 0; j < queries; j += W) {
      const V inverse = T(1) / load<V>(state.row_sum + j);
      for (int64_t p = 0; p < s.P; ++p) {
        T* o = state.out + p * kQueryColumns + j;
        const V v = load<V>(o) * inverse;
        store(o, a.relu ? max0(v) : v);
      }
    }
    store_panel<VB>(state.out, kQueryColumns, s.P, queries, y(a, image).at(0, token));
  }

  static void copy_rest(const Params& a, int64_t image, int64_t token, int64_t n) {
    if (a.attended_only) return;
    const Sizes& s = a.sizes;
    const auto from = x(a, image).at(s.P, token);
    const auto to = y(a, image).at(s.P, token);
    if (a.relu) {
      map_image<VB>(from, to, s.C - s.P, n, Relu{});
    } else {
      map_image<VB>(from, to, s.C - s.P, n, Identity{});
    }
  }

  // `workspace` if the moments of the projection are wanted.
  static void project_group(const Params& a, int64_t group, const Scratch& scratch, T* qkv,
                            const Workspace* workspace) {
    const Sizes& s = a.sizes;
    const Groups<T, VB> groups(s);
    const int64_t first = groups.begin(group), images = groups.size(group, s.B), ld = groups.ld;
    for (int64_t i = 0; i < images; ++i) {
      T* z = scratch.z + i * groups.distance;
      load_panel<VB>(x(a, first + i), s.P, s.N, z, ld);
      copy_x1(a, first + i, 0, s.N, z, ld);
      const Moments m = a.norm_weight ? panel_moments<VB>(z, s.P, s.N, ld) : Moments{};
      normalise_panel(a, first + i, m, s.N, z, ld, true);
    }
    project_panel(a, images * groups.distance, ld, scratch.z, qkv);
    if (workspace)
      for (int64_t i = 0; i < images; ++i)
        measure_channels<VB>(workspace->channels, group, qkv + i * groups.distance, s.N, ld, i * s.N);
  }

  static void attend_group(const Params& a, int64_t group, const Scratch& scratch, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const Groups<T, VB> groups(s);
    const int64_t first = groups.begin(group), images = groups.size(group, s.B), ld = groups.ld;
    T* panel = scratch.qkv;
    if (a.batch_norm.mean) {
      panel = workspace.panel(s, group);
      normalise_unit(a, group, images * groups.distance, workspace);
    } else {
      project_group(a, group, scratch, panel, nullptr);
    }
    for (int64_t i = 0; i < images; ++i) {
      const T* qkv = panel + i * groups.distance;
      for (int64_t t = 0; t < s.N; t += kQueryColumns) {
        const int64_t queries = min64(kQueryColumns, s.N - t);
        attend_block<T, VB>(s, qkv + t, qkv + s.D * ld, qkv + 2 * s.D * ld, ld, ld, queries, s.N, true,
                            scratch.state);
        finish_queries(a, first + i, t, queries, scratch.state);
      }
      copy_rest(a, first + i, 0, s.N);
    }
  }

  static void measure_block(const Params& a, int64_t image, int64_t block, const Scratch& scratch,
                            const Workspace& workspace) {
    if (!a.norm_weight) return;
    const Sizes& s = a.sizes;
    const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
    load_panel<VB>(x(a, image).at(0, token), s.P, n, scratch.z, kBlockLd);
    workspace.moments[image * blocks(s) + block] = panel_moments<VB>(scratch.z, s.P, n, kBlockLd);
  }

  static void project_block(const Params& a, int64_t image, int64_t block, const Scratch& scratch,
                            const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
    load_panel<VB>(x(a, image).at(0, token), s.P, n, scratch.z, kBlockLd);
    Moments m;
    if (a.norm_weight)
      for (int64_t i = 0; i < blocks(s); ++i) m.merge(workspace.moments[image * blocks(s) + i]);
    copy_x1(a, image, token, n, scratch.z, kBlockLd);
    normalise_panel(a, image, m, n, scratch.z, kBlockLd, block == 0);
    const int64_t unit = image * blocks(s) + block;
    T* panel = workspace.panel(s, unit);
    project_panel(a, n, kBlockLd, scratch.z, panel);
    if (a.batch_norm.mean) measure_channels<VB>(workspace.channels, unit, panel, n, kBlockLd, 0);
  }

  static void attend_long(const Params& a, int64_t image, int64_t block, const Scratch& scratch,
                          const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
    const T* q = workspace.panel(s, image * blocks(s) + block);
    for (int64_t t = 0; t < n; t += kQueryColumns) {
      const int64_t queries = min64(kQueryColumns, n - t);
      for (int64_t b = 0; b < blocks(s); ++b) {
        const T* k = workspace.panel(s, image * blocks(s) + b) + s.D * kBlockLd;
        attend_block<T, VB>(s, q + t, k, k + s.D * kBlockLd, kBlockLd, kBlockLd, queries,
                            min64(kBlockTokens, s.N - b * kBlockTokens), b == 0, scratch.state);
      }
      finish_queries(a, image, token + t, queries, scratch.state);
    }
    copy_rest(a, image, token, n);
  }
};

}  // namespace
