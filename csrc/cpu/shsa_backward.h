// Gradients of shsa. q, k, v and the probabilities are recomputed from x1 and the saved statistics.
//
// With S = scale k^T q, A = softmax(S), O = v A^T and dO the gradient of O (under ReLU: where y > 0):
//
//     dv = dO A        dA = dO^T v       dS = A * (dA - delta), delta = sum_p dO * y per query
//     dq = scale k dS  dk = scale q dS   dz = W^T dqkv   dW = dqkv z^T   db = sum dqkv
//
// and dx1 follows from dz through the group normalisation. Scores are [queries, keys] here: probabilities then
// only need the saved row maximum and sum, and every product but dq has tokens as columns. With batch
// normalisation of the projection, dqkv of all images is staged until the sums that its gradient needs are
// known.
#pragma once

#include "batch_norm.h"
#include "norm_backward.h"
#include "panel.h"

namespace {

constexpr int64_t kQueryRows = 32;

template <class S, int VB>
struct ShsaBackward {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::ShsaBackwardParams;
  using V = Vec<T, VB>;
  static constexpr int W = kLanes<T, VB>;

  static bool is_short(const Sizes& s) { return s.N <= kShortTokens; }
  static int64_t blocks(const Sizes& s) { return ceil_div(s.N, kBlockTokens); }
  static int64_t padded(int64_t n) { return round_up(n, W); }
  static int64_t units(const Sizes& s) { return is_short(s) ? Groups<T, VB>(s).count : s.B * blocks(s); }
  static int64_t unit_ld(const Sizes& s) { return is_short(s) ? Groups<T, VB>(s).ld : kBlockLd; }
  static bool stages(const Params& a) { return a.batch_norm.mean || !is_short(a.sizes); }

  // Sums over tokens of all images are made in parts and added at the end. Short images: parts of the groups.
  // Long images: each image has parts of its blocks of tokens.
  static Parts parts(const Sizes& s) {
    return is_short(s) ? reduction_parts(Groups<T, VB>(s).count) : Parts{blocks(s), min64(blocks(s), 8)};
  }
  static int64_t total_parts(const Sizes& s) { return is_short(s) ? parts(s).parts : s.B * parts(s).parts; }

  // Panels of one group of short images, or of one block of a long image: the same columns in each. `staged`
  // are those that are kept from phase to phase: `normal` with batch normalisation, `qkv` where y is made.
  struct Staged {
    T *dqkv, *normal, *qkv;  // [O, ld] each
    Staged(Bump& bump, const Params& a, int64_t ld)
        : dqkv(bump.take<T>(a.sizes.O() * ld)),
          normal(a.batch_norm.mean ? bump.take<T>(a.sizes.O() * ld) : nullptr),
          qkv(a.makes_y ? bump.take<T>(a.sizes.O() * ld) : nullptr) {}
  };
  struct Panels {
    int64_t ld;
    T *qkv, *dout, *delta, *dz;  // [O, ld], [P, ld], [ld], [P, ld]
    Panels(Bump& bump, const Sizes& s, int64_t ld)
        : ld(ld),
          qkv(bump.take<T>(s.O() * ld)),
          dout(bump.take<T>(s.P * ld)),
          delta(bump.take<T>(ld)),
          dz(bump.take<T>(s.P * ld)) {}
  };

  struct Scratch {
    Bump bump;
    T *normal, *z, *zt, *y;                 // [P, ld], [P, ld], [ld, P], [P, ld]
    T *probabilities, *dscores, *kt, *dqt;  // [32, keys], [32, keys], [keys, D], [ld or 32, D]
    T *columns, *made;                      // [keys, 32], [P, 32]
    Scratch(void* base, const Sizes& s, int64_t ld, int64_t keys)
        : bump(base),
          normal(bump.take<T>(s.P * ld)),
          z(bump.take<T>(s.P * ld)),
          zt(bump.take<T>(ld * padded(s.P))),
          y(bump.take<T>(s.P * ld)),
          probabilities(bump.take<T>(kQueryRows * padded(keys))),
          dscores(bump.take<T>(kQueryRows * padded(keys))),
          kt(bump.take<T>(keys * padded(s.D))),
          dqt(bump.take<T>(kQueryRows * padded(s.D))),
          columns(bump.take<T>(keys * kQueryColumns)),
          made(bump.take<T>(s.P * kQueryColumns)) {}
  };
  static Scratch scratch_of(Bump& bump, void* base, const Sizes& s) {
    const int64_t ld = is_short(s) ? Groups<T, VB>(s).ld : kBlockLd;
    Scratch scratch(base, s, ld, is_short(s) ? s.N : kBlockTokens);
    bump = scratch.bump;
    return scratch;
  }

  // Partial sums [total_parts] of dW [O, padded P], of dqkv (db, or dbeta) and dqkv n (dgamma) [O], of
  // dnorm_weight and dnorm_bias [P]; and for long images the panels of every block, the sums of its
  // normalisation, and dq [N, D] for each part of the keys.
  struct Partials {
    T* dweight;
    double *dbias, *dgamma, *dnorm_weight, *dnorm_bias;
    static int64_t matrix(const Sizes& s) { return s.O() * padded(s.P); }
    static int64_t vectors(const Sizes& s) { return 2 * s.O() + 2 * s.P; }
    Partials(T* matrices, double* all_vectors, const Sizes& s, int64_t part)
        : dweight(matrices + part * matrix(s)),
          dbias(all_vectors + part * vectors(s)),
          dgamma(dbias + s.O()),
          dnorm_weight(dgamma + s.O()),
          dnorm_bias(dnorm_weight + s.P) {}
    void clear(const Sizes& s) const {
      for (int64_t i = 0; i < matrix(s); ++i) dweight[i] = 0;
      for (int64_t i = 0; i < vectors(s); ++i) dbias[i] = 0;
    }
  };
  struct Workspace {
    Bump bump;
    T* partial_matrices;
    double* partial_vectors;
    double* channel_sums;  // [2, O]: of all parts
    NormSums* sums = nullptr;
    T* dq_parts = nullptr;
    char *panels = nullptr, *all_staged = nullptr;
    int64_t panels_bytes = 0, staged_bytes = 0;
    Workspace(void* base, const Params& a)
        : bump(base),
          partial_matrices(bump.take<T>(total_parts(a.sizes) * Partials::matrix(a.sizes))),
          partial_vectors(bump.take<double>(total_parts(a.sizes) * Partials::vectors(a.sizes))),
          channel_sums(bump.take<double>(2 * a.sizes.O())) {
      const Sizes& s = a.sizes;
      if (stages(a)) {
        Bump measure(nullptr);
        Staged(measure, a, unit_ld(s));
        staged_bytes = measure.used();
        all_staged = bump.take<char>(units(s) * staged_bytes);
      }
      if (is_short(s)) return;
      sums = bump.take<NormSums>(s.B * blocks(s));
      dq_parts = bump.take<T>(s.B * parts(s).parts * s.N * padded(s.D));
      Bump measure(nullptr);
      Panels(measure, s, kBlockLd);
      panels_bytes = measure.used();
      panels = bump.take<char>(s.B * blocks(s) * panels_bytes);
    }
    Staged staged(const Params& a, int64_t unit) const {
      Bump at(all_staged + unit * staged_bytes);
      return Staged(at, a, unit_ld(a.sizes));
    }
    Partials partials(const Sizes& s, int64_t part) const {
      return Partials(partial_matrices, partial_vectors, s, part);
    }
    Panels block(const Sizes& s, int64_t image, int64_t block) const {
      Bump at(panels + (image * blocks(s) + block) * panels_bytes);
      return Panels(at, s, kBlockLd);
    }
    T* dq_part(const Sizes& s, int64_t image, int64_t part) const {
      return dq_parts + (image * parts(s).parts + part) * s.N * padded(s.D);
    }
  };

  // Phases: y once more, recompute, attend, sums over channels, their total, project, store, parameters. Short
  // images recompute, attend and project in one phase or, with batch normalisation, attend and then project.
  static constexpr int kMakeY = 0, kRecompute = 1, kAttend = 2, kSums = 3, kTotal = 4, kProject = 5, kStore = 6,
                       kParameters = 7;

  static Plan plan(const Params& a) {
    const Sizes& s = a.sizes;
    const bool batch_norm = a.batch_norm.mean;
    Plan plan;
    plan.flops = 2 * s.B * s.N * (3 * s.O() * s.P + s.N * (3 * s.D + 2 * s.P)) + s.B * s.C * s.N;
    Bump bump(nullptr);
    scratch_of(bump, nullptr, s);
    if (is_short(s)) {
      Panels(bump, s, unit_ld(s));
      Staged(bump, a, unit_ld(s));
    }
    plan.scratch_bytes = bump.used();
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    plan.phases = 8;
    plan.tasks[kParameters] = 1;
    plan.tasks[kProject] = total_parts(s);
    if (batch_norm) plan.tasks[kTotal] = 1;
    if (batch_norm || !is_short(s)) plan.tasks[kAttend] = total_parts(s);
    if (a.makes_y) plan.tasks[kMakeY] = units(s);
    if (is_short(s)) return plan;
    plan.tasks[kRecompute] = plan.tasks[kStore] = s.B * blocks(s);
    plan.tasks[kSums] = total_parts(s);
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Sizes& s = a.sizes;
    Bump bump(nullptr);
    const Scratch scratch = scratch_of(bump, memory, s);
    const Workspace workspace(a.workspace, a);
    if (phase == kMakeY) make_group(a, task, scratch, workspace.staged(a, task));
    if (phase == kTotal) total_channels(a, workspace);
    if (phase == kParameters) finish_parameters(a, workspace);
    if (is_short(s)) {
      if (phase == kAttend || phase == kProject) run_part(a, phase == kProject, task, scratch, bump, workspace);
      return;
    }
    const int64_t block = task % blocks(s), part = task % parts(s).parts;
    if (phase == kRecompute) recompute_block(a, task / blocks(s), block, scratch, workspace);
    if (phase == kAttend) attend_part(a, task / parts(s).parts, part, scratch, workspace);
    if (phase == kSums) sum_part(a, task / parts(s).parts, part, workspace);
    if (phase == kProject) project_part(a, task / parts(s).parts, part, scratch, workspace);
    if (phase == kStore) store_block(a, task / blocks(s), block, scratch, workspace);
  }

  static const T* typed(const void* p) { return static_cast<const T*>(p); }
  static bool needs_z(const Params& a) { return a.dx || a.dnorm_weight || a.dnorm_bias; }

  static ImageView<const S> whole(const Params& a, const void* data, int64_t image) {
    return image_view(static_cast<const S*>(data), image, a.sizes.C, a.sizes.N, a.channels_last);
  }
  // dy or y from a token on: whole images, or their first P channels.
  static ImageView<const S> attended(const Params& a, const void* data, int64_t image, int64_t token) {
    const int64_t channels = a.attended_only ? a.sizes.P : a.sizes.C;
    return image_view(static_cast<const S*>(data), image, channels, a.sizes.N, a.channels_last).at(0, token);
  }

  // normal and z of n tokens, from x1 and the saved statistics.
  static void load_z(const Params& a, int64_t image, int64_t token, int64_t n, int64_t ld, T* normal, T* z) {
    const Sizes& s = a.sizes;
    const auto x1 =
        image_view(static_cast<const S*>(a.x1), image, a.x1_channels, s.N, a.x1_channels_last).at(0, token);
    if (!a.norm_weight) {
      load_panel<VB>(x1, s.P, n, z, ld);
      return;
    }
    load_panel<VB>(x1, s.P, n, normal, ld);
    normalise<VB>(normal, z, s.P, n, ld, typed(a.mean)[image], typed(a.rstd)[image], typed(a.norm_weight),
                  typed(a.norm_bias));
    clear_columns<VB>(z, s.P, ld, n);
  }

  // dout, the gradient of the attention's output, and delta.
  static void load_dout(const Params& a, int64_t image, int64_t token, int64_t n, int64_t ld, T* y, T* dout,
                        T* delta) {
    const Sizes& s = a.sizes;
    load_panel<VB>(attended(a, a.dy, image, token), s.P, n, dout, ld);
    load_panel<VB>(attended(a, a.y, image, token), s.P, n, y, ld);
    const Parts depth{s.P, depth_pieces(s.P)};
    over_columns<T, VB>(n, [&](auto lanes, int64_t t) SHVIT_INLINE_LAMBDA {
      auto sum = lanes;
      // In the pieces and order of gemm: where one key takes all, delta then equals its dA and no noise is
      // left.
      for (int64_t piece = 0; piece < depth.parts; ++piece) {
        auto part = lanes;
        for (int64_t p = depth.begin(piece); p < depth.end(piece); ++p) {
          auto d = load_as(dout + p * ld + t, lanes);
          const auto o = load_as(y + p * ld + t, lanes);
          if (a.relu) d = o <= 0 ? lanes : d;
          store(dout + p * ld + t, d);
          part += d * o;
        }
        sum += part;
      }
      store(delta + t, sum);
    });
  }

  // q, k, v and y of a group, before dy is known; y is ours then.
  static void make_group(const Params& a, int64_t group, const Scratch& scratch, const Staged& staged) {
    const Groups<T, VB> groups(a.sizes);
    load_group(a, groups, group, scratch);
    const int64_t images = groups.size(group, a.sizes.B);
    project_panel(a, images * groups.distance, groups.ld, scratch.z, staged.qkv, staged.normal);
    for (int64_t i = 0; i < images; ++i)
      make_y(a, groups.begin(group) + i, staged.qkv + i * groups.distance, groups.ld, scratch.y, scratch);
  }

  // y of a short image, from its panel of q, k and v and the saved statistics.
  static void make_y(const Params& a, int64_t image, const T* qkv, int64_t ld, T* y, const Scratch& scratch) {
    const Sizes& s = a.sizes;
    const T *k = qkv + s.D * ld, *v = k + s.D * ld;
    for (int64_t t = 0; t < s.N; t += kQueryColumns) {
      const int64_t queries = min64(kQueryColumns, s.N - t), offset = image * s.N + t;
      T highest[kQueryColumns], inverse[kQueryColumns];  // of no query: probabilities of zero
      for (int64_t j = 0; j < kQueryColumns; ++j) {
        highest[j] = j < queries ? typed(a.row_max)[offset + j] : static_cast<T>(__builtin_inf());
        inverse[j] = j < queries ? T(1) / typed(a.row_sum)[offset + j] : T(0);
      }
      gemm<T, VB>(s.N, queries, s.D, {k, 1, ld}, qkv + t, ld, scratch.columns, kQueryColumns);
      for (int64_t i = 0; i < s.N; ++i)
        for (int64_t j = 0; j < queries; j += W) {
          T* score = scratch.columns + i * kQueryColumns + j;
          store(score, exp_nonpositive<T, VB>(load<V>(score) - load<V>(highest + j)));
        }
      gemm<T, VB>(s.P, queries, s.N, {v, ld, 1}, scratch.columns, kQueryColumns, scratch.made, kQueryColumns);
      for (int64_t p = 0; p < s.P; ++p)
        over_columns<T, VB>(queries, [&](auto lanes, int64_t j) SHVIT_INLINE_LAMBDA {
          const T* value = scratch.made + p * kQueryColumns + j;
          store(y + p * ld + t + j, max0(load_as(value, lanes) * load_as(inverse + j, lanes)));
        });
    }
    store_panel<VB>(y, ld, s.P, s.N,
                    image_view(static_cast<S*>(const_cast<void*>(a.y)), image, s.P, s.N, a.channels_last));
  }

  // All queries of a panel against one block of keys: adds to dk and dv of the keys and to dq [queries, D].
  // `first` starts the sums of dk and dv, `first_dq` those of dq.
  struct Queries {  // delta is null where the block holds all keys
    const T *q, *dout, *delta, *row_max, *row_sum;
    int64_t count, ld;
  };
  struct Keys {
    const T *k, *v;
    T *dk, *dv;
    int64_t count, ld;
  };
  // delta of a query with all its keys at hand: the mean of dA under A. Dividing by the sum of A, which is one
  // but for rounding, takes the rounding of the saved row_sum out of dA - delta.
  static T mean_under(const T* A, const T* dA, int64_t keys) {
    const double sum = sum_row<VB, T>(keys, [&](auto lane, int64_t j) { return load_as(A + j, lane); });
    const double product = sum_row<VB, T>(
        keys, [&](auto lane, int64_t j) { return load_as(A + j, lane) * load_as(dA + j, lane); });
    return static_cast<T>(product / sum);
  }

  template <class DqSink>
  static void attend(const Sizes& s, const Queries& queries, const Keys& keys, bool first,
                     const Scratch& scratch, DqSink dq_sink) {
    const int64_t ld = padded(keys.count), d_ld = padded(s.D);
    T* A = scratch.probabilities;
    T* dS = scratch.dscores;
    // Even pieces, but for tiles of four rows.
    const int64_t most = round_up(ceil_div(queries.count, ceil_div(queries.count, kQueryRows)), 4);
    for (int64_t row = 0; row < queries.count; row += most) {
      const int64_t rows = min64(most, queries.count - row);
      const Init init = first && row == 0 ? Init::kZero : Init::kAccumulate;
      gemm<T, VB>(rows, keys.count, s.D, {queries.q + row, 1, queries.ld}, keys.k, keys.ld, A, ld);
      gemm<T, VB>(rows, keys.count, s.P, {queries.dout + row, 1, queries.ld}, keys.v, keys.ld, dS, ld);
      for (int64_t i = 0; i < rows; ++i) {
        T *a = A + i * ld, *d = dS + i * ld;
        const T highest = queries.row_max[row + i], inverse = T(1) / queries.row_sum[row + i];
        for (int64_t j = 0; j < keys.count; j += W)
          store(a + j, exp_nonpositive<T, VB>(load<V>(a + j) - highest) * inverse);
        const T delta = queries.delta ? queries.delta[row + i] : mean_under(a, d, keys.count);
        for (int64_t j = 0; j < keys.count; j += W) store(d + j, load<V>(a + j) * (load<V>(d + j) - delta));
      }
      gemm<T, VB>(s.P, keys.count, rows, {queries.dout + row, queries.ld, 1}, A, ld, keys.dv, keys.ld, init);
      gemm<T, VB>(s.D, keys.count, rows, {queries.q + row, queries.ld, 1}, dS, ld, keys.dk, keys.ld, init);
      dq_sink(row, rows, MatrixView<T>{dS, ld, 1}, d_ld);
    }
  }

  // dW += dqkv z^T, db += sum dqkv, and dz = W^T dqkv.
  static void project_backward(const Params& a, int64_t columns, int64_t ld, const T* dqkv, const T* z, T* dz,
                               const Scratch& scratch, const Partials& partials) {
    const Sizes& s = a.sizes;
    if (a.dqkv_weight) {
      transpose(z, ld, s.P, columns, scratch.zt, padded(s.P));
      gemm<T, VB>(s.O(), s.P, columns, {dqkv, ld, 1}, scratch.zt, padded(s.P), partials.dweight, padded(s.P),
                  Init::kAccumulate);
    }
    if (a.dqkv_bias)
      for (int64_t o = 0; o < s.O(); ++o)
        partials.dbias[o] +=
            sum_row<VB, T>(columns, [&](auto lane, int64_t t) { return load_as(dqkv + o * ld + t, lane); });
    if (needs_z(a)) gemm<T, VB>(s.P, columns, s.O(), {typed(a.qkv_weight), 1, s.P}, dqkv, ld, dz, ld);
  }

  // q, k and v of a panel; with batch normalisation also its normal form.
  static void project_panel(const Params& a, int64_t columns, int64_t ld, const T* z, T* qkv, T* normal) {
    if (a.batch_norm.mean) {
      project<T, VB>(a.sizes, a.qkv_weight, nullptr, 1, columns, ld, z, normal);
      normalise_channels<VB>(a.batch_norm, a.sizes, a.scale, columns, ld, normal, qkv);
    } else {
      project<T, VB>(a.sizes, a.qkv_weight, a.qkv_bias, a.scale, columns, ld, z, qkv);
    }
  }

  static void total_channels(const Params& a, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    // dgamma follows dbias (which here is dbeta) in the parts and in the total.
    add_parts(workspace.partials(s, 0).dbias, total_parts(s), Partials::vectors(s), 2 * s.O(),
              workspace.channel_sums);
    T *dbeta = static_cast<T*>(a.dbn_bias), *dgamma = static_cast<T*>(a.dbn_weight);
    for (int64_t o = 0; o < s.O(); ++o) {
      if (dbeta) dbeta[o] = static_cast<T>(workspace.channel_sums[o]);
      if (dgamma) dgamma[o] = static_cast<T>(workspace.channel_sums[s.O() + o]);
    }
  }

  // From the gradient behind the batch normalisation to that of the bare projection, in n columns.
  static void through_batch_norm(const Params& a, int64_t n, int64_t ld, const Staged& staged,
                                 const Workspace& workspace) {
    const Sizes& s = a.sizes;
    channel_backward<VB>(a.batch_norm, workspace.channel_sums, workspace.channel_sums + s.O(),
                         static_cast<double>(s.B * s.N), s.O(), n, ld, staged.dqkv, staged.normal);
  }

  // dx of the channels beyond P, and of the first P from their panel.
  static void store_dx(const Params& a, int64_t image, int64_t token, int64_t n, const T* dx1, int64_t ld) {
    const Sizes& s = a.sizes;
    const auto dx = image_view(static_cast<S*>(a.dx), image, s.C, s.N, a.channels_last).at(0, token);
    store_panel<VB>(dx1, ld, s.P, n, dx);
    if (a.attended_only) {
      if (a.residual) add_image<VB>(whole(a, a.residual, image).at(0, token), dx, s.P, n);
      return;
    }
    const auto dy = whole(a, a.dy, image).at(s.P, token), y = whole(a, a.y, image).at(s.P, token);
    const auto rest = dx.at(s.P, 0);
    if (a.relu) {
      mask_image<VB>(dy, y, rest, s.C - s.P, n);
    } else {
      map_image<VB>(dy, rest, s.C - s.P, n, Identity{});
    }
  }

  // With batch normalisation either attends or, when `finishes`, does the rest.
  static void run_part(const Params& a, bool finishes, int64_t part, const Scratch& scratch, Bump bump,
                       const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const Groups<T, VB> groups(s);
    const Panels panels(bump, s, groups.ld);
    const Staged own(bump, a, groups.ld);
    const Partials partials = workspace.partials(s, part);
    const bool batch_norm = a.batch_norm.mean;
    if (!batch_norm || !finishes) partials.clear(s);
    const Parts cut = parts(s);
    for (int64_t group = cut.begin(part); group < cut.end(part); ++group) {
      const Staged staged = batch_norm ? workspace.staged(a, group) : own;
      if (!batch_norm || !finishes) attend_group(a, groups, group, scratch, panels, staged, partials);
      if (!batch_norm || finishes)
        project_group(a, groups, group, scratch, panels, staged, partials, workspace);
    }
  }

  static void load_group(const Params& a, const Groups<T, VB>& groups, int64_t group, const Scratch& scratch) {
    for (int64_t i = 0; i < groups.size(group, a.sizes.B); ++i) {
      const int64_t column = i * groups.distance;
      load_z(a, groups.begin(group) + i, 0, a.sizes.N, groups.ld, scratch.normal + column, scratch.z + column);
    }
  }

  static void attend_group(const Params& a, const Groups<T, VB>& groups, int64_t group, const Scratch& scratch,
                           const Panels& panels, const Staged& staged, const Partials& partials) {
    const Sizes& s = a.sizes;
    const int64_t first = groups.begin(group), images = groups.size(group, s.B), ld = groups.ld;
    const T* all_qkv = a.makes_y ? staged.qkv : panels.qkv;
    if (!a.makes_y) {
      load_group(a, groups, group, scratch);
      project_panel(a, images * groups.distance, ld, scratch.z, panels.qkv, staged.normal);
    }
    for (int64_t i = 0; i < images; ++i) {
      const int64_t column = i * groups.distance;
      load_dout(a, first + i, 0, s.N, ld, scratch.y + column, panels.dout + column, panels.delta + column);
    }
    for (int64_t i = 0; i < images; ++i) {
      const int64_t column = i * groups.distance, offset = (first + i) * s.N;
      const T* qkv = all_qkv + column;
      T* dqkv = staged.dqkv + column;
      transpose(qkv + s.D * ld, ld, s.D, s.N, scratch.kt, padded(s.D));
      const Queries queries{
          qkv, panels.dout + column, nullptr, typed(a.row_max) + offset, typed(a.row_sum) + offset, s.N, ld};
      const Keys keys{qkv + s.D * ld, qkv + 2 * s.D * ld, dqkv + s.D * ld, dqkv + 2 * s.D * ld, s.N, ld};
      attend(s, queries, keys, true, scratch, [&](int64_t row, int64_t rows, MatrixView<T> dS, int64_t d_ld) {
        gemm<T, VB>(rows, s.D, s.N, dS, scratch.kt, d_ld, scratch.dqt, d_ld);
        transpose(scratch.dqt, d_ld, rows, s.D, dqkv + row, ld);
      });
      scale_rows(s, a.scale, s.N, ld, dqkv);
      if (a.batch_norm.mean)
        channel_sums<VB>(dqkv, staged.normal + column, s.O(), s.N, ld, partials.dbias, partials.dgamma);
    }
  }

  static void project_group(const Params& a, const Groups<T, VB>& groups, int64_t group, const Scratch& scratch,
                            const Panels& panels, const Staged& staged, const Partials& partials,
                            const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t first = groups.begin(group), images = groups.size(group, s.B), ld = groups.ld;
    const int64_t columns = images * groups.distance;
    if (a.batch_norm.mean) {
      load_group(a, groups, group, scratch);
      through_batch_norm(a, columns, ld, staged, workspace);
    }
    for (int64_t i = 0; i < images; ++i) clear_columns<VB>(staged.dqkv + i * groups.distance, s.O(), ld, s.N);
    project_backward(a, columns, ld, staged.dqkv, scratch.z, panels.dz, scratch, partials);
    if (!needs_z(a)) return;
    for (int64_t i = 0; i < images; ++i) {
      const int64_t column = i * groups.distance;
      T* dz = panels.dz + column;
      if (a.norm_weight) {
        const T* normal = scratch.normal + column;
        const NormSums sums = norm_sums<VB>(dz, normal, s.P, s.N, ld, typed(a.norm_weight),
                                            partials.dnorm_weight, partials.dnorm_bias);
        norm_backward<VB>(dz, normal, s.P, s.N, ld, typed(a.norm_weight), typed(a.rstd)[first + i], sums,
                          static_cast<double>(s.P * s.N));
      }
      if (a.dx) store_dx(a, first + i, 0, s.N, dz, ld);
    }
  }

  static void recompute_block(const Params& a, int64_t image, int64_t block, const Scratch& scratch,
                              const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
    const Panels panels = workspace.block(s, image, block);
    load_z(a, image, token, n, kBlockLd, scratch.normal, scratch.z);
    project_panel(a, n, kBlockLd, scratch.z, panels.qkv, workspace.staged(a, image * blocks(s) + block).normal);
    load_dout(a, image, token, n, kBlockLd, scratch.y, panels.dout, panels.delta);
  }

  // dk and dv of a part of the keys, and that part's share of dq of all queries.
  static void attend_part(const Params& a, int64_t image, int64_t part, const Scratch& scratch,
                          const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const Parts cut = parts(s);
    T* dq = workspace.dq_part(s, image, part);
    for (int64_t kb = cut.begin(part); kb < cut.end(part); ++kb) {
      const Panels key_panels = workspace.block(s, image, kb);
      const int64_t key_count = min64(kBlockTokens, s.N - kb * kBlockTokens), ld = kBlockLd;
      const T* k = key_panels.qkv + s.D * ld;
      T* dk = workspace.staged(a, image * blocks(s) + kb).dqkv + s.D * ld;
      const Keys keys{k, k + s.D * ld, dk, dk + s.D * ld, key_count, ld};
      transpose(k, ld, s.D, key_count, scratch.kt, padded(s.D));
      for (int64_t qb = 0; qb < blocks(s); ++qb) {
        const Panels panels = workspace.block(s, image, qb);
        const int64_t token = qb * kBlockTokens, offset = image * s.N + token;
        const Queries queries{panels.qkv,
                              panels.dout,
                              panels.delta,
                              typed(a.row_max) + offset,
                              typed(a.row_sum) + offset,
                              min64(kBlockTokens, s.N - token),
                              ld};
        attend(s, queries, keys, qb == 0, scratch,
               [&](int64_t row, int64_t rows, MatrixView<T> dS, int64_t d_ld) {
                 gemm<T, VB>(rows, s.D, key_count, dS, scratch.kt, d_ld, dq + (token + row) * d_ld, d_ld,
                             kb == cut.begin(part) ? Init::kZero : Init::kAccumulate);
               });
      }
    }
  }

  // dqkv of a part complete, and its sums over tokens.
  static void sum_part(const Params& a, int64_t image, int64_t part, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const Parts cut = parts(s);
    const int64_t d_ld = padded(s.D);
    const Partials partials = workspace.partials(s, image * cut.parts + part);
    partials.clear(s);
    for (int64_t block = cut.begin(part); block < cut.end(part); ++block) {
      const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
      const Staged staged = workspace.staged(a, image * blocks(s) + block);
      T* dq = workspace.dq_part(s, image, 0) + token * d_ld;
      for (int64_t other = 1; other < cut.parts; ++other) {
        const T* more = workspace.dq_part(s, image, other) + token * d_ld;
        for (int64_t i = 0; i < n * d_ld; ++i) dq[i] += more[i];
      }
      transpose(dq, d_ld, n, s.D, staged.dqkv, kBlockLd);
      scale_rows(s, a.scale, n, kBlockLd, staged.dqkv);
      if (a.batch_norm.mean)
        channel_sums<VB>(staged.dqkv, staged.normal, s.O(), n, kBlockLd, partials.dbias, partials.dgamma);
    }
  }

  static void project_part(const Params& a, int64_t image, int64_t part, const Scratch& scratch,
                           const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const Parts cut = parts(s);
    const Partials partials = workspace.partials(s, image * cut.parts + part);
    for (int64_t block = cut.begin(part); block < cut.end(part); ++block) {
      const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
      const Panels panels = workspace.block(s, image, block);
      const Staged staged = workspace.staged(a, image * blocks(s) + block);
      if (a.batch_norm.mean) through_batch_norm(a, n, kBlockLd, staged, workspace);
      clear_columns<VB>(staged.dqkv, s.O(), kBlockLd, n);
      if (a.dqkv_weight || a.norm_weight) load_z(a, image, token, n, kBlockLd, scratch.normal, scratch.z);
      project_backward(a, n, kBlockLd, staged.dqkv, scratch.z, panels.dz, scratch, partials);
      if (needs_z(a) && a.norm_weight)
        workspace.sums[image * blocks(s) + block] =
            norm_sums<VB>(panels.dz, scratch.normal, s.P, n, kBlockLd, typed(a.norm_weight),
                          partials.dnorm_weight, partials.dnorm_bias);
    }
  }

  static void store_block(const Params& a, int64_t image, int64_t block, const Scratch& scratch,
                          const Workspace& workspace) {
    if (!a.dx) return;
    const Sizes& s = a.sizes;
    const int64_t token = block * kBlockTokens, n = min64(kBlockTokens, s.N - token);
    const Panels panels = workspace.block(s, image, block);
    if (a.norm_weight) {
      NormSums sums;
      for (int64_t i = 0; i < blocks(s); ++i) sums.add(workspace.sums[image * blocks(s) + i]);
      load_z(a, image, token, n, kBlockLd, scratch.normal, scratch.z);
      norm_backward<VB>(panels.dz, scratch.normal, s.P, n, kBlockLd, typed(a.norm_weight), typed(a.rstd)[image],
                        sums, static_cast<double>(s.P * s.N));
    }
    store_dx(a, image, token, n, panels.dz, kBlockLd);
  }

  static void finish_parameters(const Params& a, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const Partials p = workspace.partials(s, 0);
    const int64_t parts = total_parts(s), stride = Partials::vectors(s);
    if (a.dqkv_weight)
      for (int64_t o = 0; o < s.O(); ++o)
        add_parts(p.dweight + o * padded(s.P), parts, Partials::matrix(s), s.P,
                  static_cast<T*>(a.dqkv_weight) + o * s.P);
    if (a.dqkv_bias) add_parts(p.dbias, parts, stride, s.O(), static_cast<T*>(a.dqkv_bias));
    if (a.dnorm_weight) add_parts(p.dnorm_weight, parts, stride, s.P, static_cast<T*>(a.dnorm_weight));
    if (a.dnorm_bias) add_parts(p.dnorm_bias, parts, stride, s.P, static_cast<T*>(a.dnorm_bias));
  }
};

}  // namespace
