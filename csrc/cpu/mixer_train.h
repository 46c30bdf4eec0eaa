// The residual attention layer in training: out = (x +) BN(W y), y = relu(shsa(x)), both batch normalisations by
// the statistics of the batch (design section 2, mixer_train).
//
//     forward    p = W y   n = (p - mean) rstd   out = (x +) gamma n + beta
//     backward   dgamma = sum dout n   dbeta = sum dout   dp = gamma rstd (dout - (dbeta + n dgamma) / count)
//                dy = W^T dp   dW = sum dp y^T   dx = dy through the attention (+ dout)
//
// Around the projection tokens are rows of channels, whatever the order of the images. The forward keeps p; the
// backward makes y once more.
#pragma once

#include "shsa_backward.h"
#include "shsa_forward.h"

namespace {

// Blocks of rows that stay in the second-level cache: some short images, or tokens of one long image. Their number
// is that of the partial sums.
struct RowBlocks {
  static constexpr int64_t kMostRows = 128, kFewestRows = 48;
  int64_t B, N, images, parts, count;  // images of a block, or blocks of an image; blocks

  explicit RowBlocks(const Sizes& s) : B(s.B), N(s.N), images(1), parts(ceil_div(s.N, kMostRows)) {
    const int64_t rows = max64(kFewestRows, min64(kMostRows, B * N / 8));  // enough blocks for some threads
    if (parts == 1) images = max64(rows / N, 1);
    count = parts == 1 ? ceil_div(B, images) : B * parts;
  }
  int64_t most_rows() const { return images * ceil_div(N, parts); }

  struct Block {
    int64_t image, images, token, n;  // n tokens of each image
    int64_t rows() const { return images * n; }
  };
  Block block(int64_t i) const {
    const Parts tokens{N, parts};
    if (parts == 1) return {i * images, min64(images, B - i * images), 0, N};
    return {i / parts, 1, tokens.begin(i % parts), tokens.end(i % parts) - tokens.begin(i % parts)};
  }
  int64_t first_row(int64_t i) const { return block(i).image * N + block(i).token; }
};

// Rows an odd number of cache lines apart, so that columns do not share cache sets.
template <class T>
SHVIT_INLINE int64_t row_distance(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(columns, kLine) | 1) * kLine;
}

// Into rows, of which only `columns` are there.
template <class T>
struct RowsFinish {
  static constexpr bool kDeep = true;
  T* c;
  int64_t columns, ld;

  template <class V>
  SHVIT_INLINE void operator()(int64_t row, int64_t column, V v) const {
    constexpr int64_t W = sizeof(V) / sizeof(T);
    T* p = c + row * ld + column;
    if (columns - column >= W) {
      store(p, v);
    } else {
      T lanes[W];
      store(lanes, v);
      for (int64_t i = 0; i < columns - column; ++i) p[i] = lanes[i];
    }
  }
};

template <class T, int VB>
__attribute__((noinline)) void product_of_rows(int64_t M, int64_t C, const T* rows, int64_t ld, const T* packed,
                                               RowsFinish<T> finish) {
  gemm_packed<T, VB>(M, C, {rows, ld, 1}, packed, 0, C, finish);
}

// Adds to (or starts) a matrix in cache.
template <class T>
struct SumFinish {
  static constexpr bool kDeep = true;
  T* c;
  int64_t ld;
  bool first;

  template <class V>
  SHVIT_INLINE void operator()(int64_t row, int j, V v) const {
    T* p = c + row * ld + j * static_cast<int64_t>(sizeof(V) / sizeof(T));
    store(p, first ? v : load<V>(p) + v);
  }
};

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
    for (int64_t k = 0; k < C; ++k)
      for (int64_t i = 0; i < n; ++i) to[k * kPanel + i] = weight[k * C + first + i];
  }
}

// f(vector or scalar, column) for all columns; some columns come twice.
template <int VB, class T, class F>
SHVIT_INLINE void for_columns(int64_t C, F f) {
  constexpr int64_t W = kLanes<T, VB>;
  if (C < W) {
    for (int64_t c = 0; c < C; ++c) f(T(0), c);
    return;
  }
  for (int64_t c = 0; c + W <= C; c += W) f(Vec<T, VB>{}, c);
  if (C % W) f(Vec<T, VB>{}, C - W);
}

template <class T, class V>
SHVIT_INLINE void add_double(V v, double factor, double* to) {
  T lanes[sizeof(V) / sizeof(T)];
  store(lanes, v);
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) to[i] += factor * static_cast<double>(lanes[i]);
}

// Mean and sum of squared deviations of each column of n rows.
template <int VB, class T>
__attribute__((noinline)) void measure_columns(const ChannelMoments& moments, int64_t block, const T* rows,
                                               int64_t n, int64_t ld) {
  double *mean = moments.mean(block), *squares = moments.squares(block);
  const T share = T(1) / static_cast<T>(n);
  for_columns<VB, T>(moments.O, [&](auto lane, int64_t c) {
    using V = decltype(lane);
    V sums[2] = {}, more[2] = {}, products[2] = {};  // several short sums round less than a long one
    for (int64_t t = 0; t < n; ++t) sums[t % 2] += load_as(rows + t * ld + c, lane);
    const V centre = (sums[0] + sums[1]) * share;
    for (int64_t t = 0; t < n; ++t) {
      const V d = load_as(rows + t * ld + c, lane) - centre;
      more[t % 2] += d;
      products[t % 2] += d * d;
    }
    // What rounding left of the mean in the centred values.
    const V rest = (more[0] + more[1]) * share;
    for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) mean[c + i] = squares[c + i] = 0;
    add_double<T>(centre, 1, mean + c);
    add_double<T>(rest, 1, mean + c);
    add_double<T>(products[0] + products[1] - rest * rest * static_cast<T>(n), 1, squares + c);
  });
}

// ReLU of channels of an image, in rows.
template <int VB, class T>
SHVIT_INLINE void rest_rows(ImageView<const T> x, int64_t channels, int64_t n, T* rows, int64_t ld) {
  if (x.token_stride == 1) transpose(x.data, x.channel_stride, channels, n, rows, ld);
  for (int64_t t = 0; t < n; ++t) {
    T* row = rows + t * ld;
    map_row<VB>(x.token_stride == 1 ? row : x.data + t * x.token_stride, row, channels, Relu{});
  }
}

template <class T, int VB>
struct MixerTrainForward {
  using Params = shvit::MixerTrainForwardParams;
  using Attention = ShsaForward<T, VB>;

  struct Workspace {
    Bump bump;
    char* attention;
    T *attended, *packed, *factor;  // [B * N, P], the weight, [C]
    ChannelMoments channels;
    Workspace(void* base, const Params& a)
        : bump(base),
          attention(bump.take<char>(Attention::plan(attention_of(a)).workspace_bytes)),
          attended(bump.take<T>(sizes(a).B * sizes(a).N * sizes(a).P)),
          packed(bump.take<T>(sizes(a).C * round_up(sizes(a).C, kPanel))),
          factor(bump.take<T>(sizes(a).C)),
          channels{bump.take<double>(2 * RowBlocks(sizes(a)).count * sizes(a).C), sizes(a).C} {}
  };

  static const Sizes& sizes(const Params& a) { return a.attention.sizes; }
  static shvit::ShsaForwardParams attention_of(const Params& a) {
    shvit::ShsaForwardParams attention = a.attention;
    attention.y_row = a.attention.sizes.P;
    return attention;
  }
  static int64_t ld(const Params& a) { return row_distance<T>(sizes(a).C); }

  // Phases: pack, those of the attention, project, statistics, normalise.
  static constexpr int kAttention = 1, kProject = 6, kStatistics = 7, kNormalise = 8;

  static Plan plan(const Params& a) {
    const Sizes& s = sizes(a);
    const Plan attention = Attention::plan(attention_of(a));
    const int64_t blocks = RowBlocks(s).count;
    Plan plan;
    plan.phases = 9;
    plan.flops = attention.flops + 2 * s.B * s.N * s.C * s.C;
    plan.tasks[0] = s.B == 0 ? 0 : ceil_div(s.C, kPanel);
    for (int phase = 0; phase < attention.phases; ++phase) plan.tasks[kAttention + phase] = attention.tasks[phase];
    plan.tasks[kProject] = plan.tasks[kNormalise] = blocks;
    plan.tasks[kStatistics] = 1;
    Bump bump(nullptr);
    bump.take<T>(RowBlocks(s).most_rows() * ld(a));
    plan.scratch_bytes = max64(bump.used(), attention.scratch_bytes);
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Workspace workspace(a.workspace, a);
    if (phase == 0) pack_panel(static_cast<const T*>(a.proj_weight), true, sizes(a).C, task, workspace.packed);
    if (phase >= kAttention && phase < kProject) {
      auto attention = attention_of(a);
      attention.y = workspace.attended;
      attention.workspace = workspace.attention;
      Attention::run(attention, phase - kAttention, task, memory);
    }
    if (phase == kProject) project_block(a, task, Bump(memory).take<T>(0), workspace);
    if (phase == kStatistics) finish_statistics(a, workspace);
    if (phase == kNormalise) normalise_block(a, task, workspace);
  }

  static void project_block(const Params& a, int64_t task, T* rows, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks(s);
    const auto block = blocks.block(task);
    for (int64_t i = 0; i < block.images; ++i)
      rest_rows<VB>(Attention::x(a.attention, block.image + i).at(s.P, block.token), s.C - s.P, block.n,
                    rows + i * block.n * ld(a) + s.P, ld(a));
    const int64_t first = blocks.first_row(task);
    for (int64_t t = 0; t < block.rows(); ++t)
      map_row<VB>(workspace.attended + (first + t) * s.P, rows + t * ld(a), s.P, Identity{});
    T* projected = static_cast<T*>(a.projected) + first * s.C;
    product_of_rows<T, VB>(block.rows(), s.C, rows, ld(a), workspace.packed, {projected, s.C, s.C});
    measure_columns<VB>(workspace.channels, task, projected, block.rows(), s.C);
  }

  static void finish_statistics(const Params& a, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks(s);
    T *mean = static_cast<T*>(a.proj_norm.mean), *variance = static_cast<T*>(a.proj_norm.variance);
    if (blocks.count > 0)
      merge_channels(workspace.channels, blocks.count, [&](int64_t block) { return blocks.block(block).rows(); });
    for (int64_t c = 0; c < s.C; ++c) {
      mean[c] = s.B > 0 ? static_cast<T>(workspace.channels.mean(0)[c]) : T(0);
      variance[c] =
          s.B > 0 ? static_cast<T>(workspace.channels.squares(0)[c] / static_cast<double>(s.B * s.N)) : T(0);
      workspace.factor[c] = channel_gamma<T>(a.proj_norm, c) * channel_rstd<T>(a.proj_norm, c);
    }
  }

  static void normalise_block(const Params& a, int64_t task, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const auto block = RowBlocks(s).block(task);
    const T *mean = static_cast<const T*>(a.proj_norm.mean), *beta = static_cast<const T*>(a.proj_norm.bias);
    const T* projected = static_cast<const T*>(a.projected);
    for (int64_t i = 0; i < block.images; ++i) {
      const int64_t image = block.image + i;
      const T* rows = projected + (image * s.N + block.token) * s.C;
      const auto x = Attention::x(a.attention, image).at(0, block.token);
      const auto out = image_view(static_cast<T*>(a.out), image, s.C, s.N, a.attention.channels_last).at(0, block.token);
      if (a.attention.channels_last) {
        for (int64_t t = 0; t < block.n; ++t) {
          const T *p = rows + t * s.C, *more = x.data + t * s.C;
          make_row<VB>(out.data + t * s.C, s.C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA {
            auto v = (load_as(p + c, lane) - load_as(mean + c, lane)) * load_as(workspace.factor + c, lane);
            if (beta) v += load_as(beta + c, lane);
            return a.residual ? load_as(more + c, lane) + v : v;
          });
        }
        continue;
      }
      transpose(rows, s.C, block.n, s.C, out.data, out.channel_stride);
      for (int64_t c = 0; c < s.C; ++c) {
        T* to = out.data + c * out.channel_stride;
        const T* more = x.data + c * x.channel_stride;
        const T centre = mean[c], factor = workspace.factor[c], offset = beta ? beta[c] : T(0);
        make_row<VB>(to, block.n, [&](auto lane, int64_t t) SHVIT_INLINE_LAMBDA {
          const auto v = (load_as(to + t, lane) - centre) * factor + offset;
          return a.residual ? load_as(more + t, lane) + v : v;
        });
      }
    }
  }
};

template <class T, int VB>
struct MixerTrainBackward {
  using Params = shvit::MixerTrainBackwardParams;
  using Forward = ShsaForward<T, VB>;
  using Attention = ShsaBackward<T, VB>;
  static constexpr int W = kLanes<T, VB>;

  static const Sizes& sizes(const Params& a) { return a.attention.sizes; }
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
    forward.y_row = ld(a);
    return forward;
  }
  static shvit::ShsaBackwardParams attention_of(const Params& a) {
    shvit::ShsaBackwardParams attention = a.attention;
    attention.dy_row = a.attention.sizes.P;
    attention.y_row = ld(a);
    attention.residual = a.residual ? a.dout : nullptr;
    return attention;
  }

  struct Workspace {
    Bump bump;
    char* attention;
    T *y, *dp, *dattended;           // [B * N, ld] both, [B * N, P]
    T *packed, *factor, *shift, *slope;  // the weight, [C] each
    double* partials;                // [blocks, 2, C]: dbeta, dgamma
    Workspace(void* base, const Params& a)
        : bump(base),
          attention(bump.take<char>(max64(Forward::plan(forward_of(a)).workspace_bytes,
                                          Attention::plan(attention_of(a)).workspace_bytes))),
          y(bump.take<T>(sizes(a).B * sizes(a).N * ld(a))),
          dp(bump.take<T>(sizes(a).B * sizes(a).N * ld(a))),
          dattended(bump.take<T>(sizes(a).B * sizes(a).N * sizes(a).P)),
          packed(bump.take<T>(sizes(a).C * round_up(sizes(a).C, kPanel))),
          factor(bump.take<T>(sizes(a).C)),
          shift(bump.take<T>(sizes(a).C)),
          slope(bump.take<T>(sizes(a).C)),
          partials(bump.take<double>(RowBlocks(sizes(a)).count * 2 * sizes(a).C)) {}
  };

  // Rows of dW are summed by one task each.
  static Parts weight_parts(const Sizes& s) { return {s.C, ceil_div(s.C, 96)}; }
  static int64_t sum_ld(const Params& a) { return round_up(sizes(a).C, 2 * W) + W; }

  static bool needs_attention(const Params& a) {
    const shvit::ShsaBackwardParams& b = a.attention;
    return b.dx || b.dnorm_weight || b.dnorm_bias || b.dqkv_weight || b.dbn_weight || b.dbn_bias;
  }

  // Phases: sums over channels, their total, pack, through the projection, y once more, those of the attention,
  // the projection's weight.
  static constexpr int kTotal = 1, kPack = 2, kProject = 3, kForward = 4, kAttention = 9, kWeight = 16;

  static Plan plan(const Params& a) {
    const Sizes& s = sizes(a);
    const Plan forward = Forward::plan(forward_of(a)), attention = Attention::plan(attention_of(a));
    const RowBlocks blocks(s);
    const bool attends = needs_attention(a), weighs = a.dproj_weight;
    Plan plan;
    plan.phases = 17;
    plan.flops = forward.flops + attention.flops + 4 * s.B * s.N * s.C * s.C;
    plan.tasks[0] = blocks.count;
    plan.tasks[kTotal] = 1;
    if (attends && s.B > 0) plan.tasks[kPack] = ceil_div(s.C, kPanel);
    if (attends || weighs) {
      plan.tasks[kProject] = blocks.count;
      for (int phase = 0; phase < forward.phases; ++phase) plan.tasks[kForward + phase] = forward.tasks[phase];
      plan.tasks[kForward + 2] = 0;  // the statistics are known
    }
    if (attends)
      for (int phase = 0; phase < attention.phases; ++phase)
        plan.tasks[kAttention + phase] = attention.tasks[phase];
    if (weighs) plan.tasks[kWeight] = weight_parts(s).parts;
    Bump rows(nullptr), sums(nullptr);
    rows.take<T>(blocks.most_rows() * ld(a));
    sums.take<T>(ceil_div(s.C, weight_parts(s).parts) * sum_ld(a));
    plan.scratch_bytes =
        max64(max64(rows.used(), sums.used()), max64(forward.scratch_bytes, attention.scratch_bytes));
    plan.workspace_bytes = Workspace(nullptr, a).bump.used();
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Workspace workspace(a.workspace, a);
    if (phase == 0) sum_block(a, task, workspace);
    if (phase == kTotal) total_channels(a, workspace);
    if (phase == kPack) pack_panel(typed(a.proj_weight), false, sizes(a).C, task, workspace.packed);
    if (phase == kProject) project_block(a, task, Bump(memory).take<T>(0), workspace);
    if (phase >= kForward && phase < kAttention) {
      auto forward = forward_of(a);
      forward.y = workspace.y;
      forward.workspace = workspace.attention;
      Forward::run(forward, phase - kForward, task, memory);
    }
    if (phase >= kAttention && phase < kWeight) {
      auto attention = attention_of(a);
      attention.dy = workspace.dattended;
      attention.y = workspace.y;
      attention.workspace = workspace.attention;
      Attention::run(attention, phase - kAttention, task, memory);
    }
    if (phase == kWeight) sum_weight(a, task, Bump(memory).take<T>(0), workspace);
  }

  // Rows of dout: its own, or a copy where dp will be.
  struct Rows {
    const T* data;
    int64_t ld;
  };
  static Rows dout_rows(const Params& a, int64_t row, const Workspace& workspace) {
    if (a.attention.channels_last) return {typed(a.dout) + row * sizes(a).C, sizes(a).C};
    return {workspace.dp + row * ld(a), ld(a)};
  }

  static void sum_block(const Params& a, int64_t task, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks(s);
    const auto block = blocks.block(task);
    const int64_t first = blocks.first_row(task);
    if (!a.attention.channels_last)
      for (int64_t i = 0; i < block.images; ++i)
        transpose(typed(a.dout) + (block.image + i) * s.C * s.N + block.token, s.N, s.C, block.n,
                  workspace.dp + (first + i * block.n) * ld(a), ld(a));
    sum_columns(a, dout_rows(a, first, workspace), typed(a.projected) + first * s.C, block.rows(),
                workspace.partials + task * 2 * s.C);
  }

  static __attribute__((noinline)) void sum_columns(const Params& a, Rows dout, const T* projected, int64_t n,
                                                    double* dbeta) {
    const Sizes& s = sizes(a);
    double* dgamma = dbeta + s.C;
    const T* mean = typed(a.proj_norm.mean);
    for_columns<VB, T>(s.C, [&](auto lane, int64_t c) {
      using V = decltype(lane);
      V sums[2] = {}, products[2] = {};
      const V centre = load_as(mean + c, lane);
      for (int64_t t = 0; t < n; ++t) {
        const V d = load_as(dout.data + t * dout.ld + c, lane);
        sums[t % 2] += d;
        products[t % 2] += d * (load_as(projected + t * s.C + c, lane) - centre);
      }
      for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) dbeta[c + i] = dgamma[c + i] = 0;
      add_double<T>(sums[0] + sums[1], 1, dbeta + c);
      add_double<T>(products[0] + products[1], 1, dgamma + c);
    });
  }

  static void total_channels(const Params& a, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const int64_t blocks = RowBlocks(s).count;
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

  static void project_block(const Params& a, int64_t task, T* rows, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const RowBlocks blocks(s);
    const auto block = blocks.block(task);
    const int64_t first = blocks.first_row(task);
    const Rows dout = dout_rows(a, first, workspace);
    const T *projected = typed(a.projected) + first * s.C, *mean = typed(a.proj_norm.mean);
    T* dp = workspace.dp + first * ld(a);
    for (int64_t t = 0; t < block.rows(); ++t) {
      const T *d = dout.data + t * dout.ld, *p = projected + t * s.C;
      make_row<VB>(dp + t * ld(a), s.C, [&](auto lane, int64_t c) SHVIT_INLINE_LAMBDA {
        const auto n = load_as(p + c, lane) - load_as(mean + c, lane);
        return load_as(workspace.factor + c, lane) *
               (load_as(d + c, lane) - load_as(workspace.shift + c, lane) - n * load_as(workspace.slope + c, lane));
      });
    }
    if (a.dproj_weight)
      for (int64_t i = 0; i < block.images; ++i)
        rest_rows<VB>(rest_of(a, a.attention.x1, block.image + i, block.token), s.C - s.P, block.n,
                      workspace.y + (first + i * block.n) * ld(a) + s.P, ld(a));
    if (!needs_attention(a)) return;
    product_of_rows<T, VB>(block.rows(), s.C, dp, ld(a), workspace.packed, {rows, s.C, ld(a)});
    for (int64_t t = 0; t < block.rows(); ++t)
      map_row<VB>(rows + t * ld(a), workspace.dattended + (first + t) * s.P, s.P, Identity{});
    if (!a.attention.dx) return;
    for (int64_t i = 0; i < block.images; ++i)
      store_rest(a, block.image + i, block.token, block.n, rows + i * block.n * ld(a) + s.P);
  }

  // The channels beyond the partial ones, of an image in the order of dx.
  static ImageView<const T> rest_of(const Params& a, const void* images, int64_t image, int64_t token) {
    return image_view(typed(images), image, sizes(a).C, sizes(a).N, a.attention.channels_last)
        .at(sizes(a).P, token);
  }

  // dx of those channels from rows of dy.
  static void store_rest(const Params& a, int64_t image, int64_t token, int64_t n, const T* rows) {
    const Sizes& s = sizes(a);
    const auto x = rest_of(a, a.attention.x1, image, token), dout = rest_of(a, a.dout, image, token);
    T* dx = static_cast<T*>(a.attention.dx) + (x.data - typed(a.attention.x1));
    const bool by_channel = !a.attention.channels_last;
    if (by_channel) transpose(rows, ld(a), n, s.C - s.P, dx, s.N);
    const int64_t count = by_channel ? s.C - s.P : n, length = by_channel ? n : s.C - s.P;
    const int64_t stride = by_channel ? s.N : s.C;
    for (int64_t r = 0; r < count; ++r) {
      const T *from = x.data + r * stride, *more = dout.data + r * stride;
      T* to = dx + r * stride;
      const T* gradient = by_channel ? to : rows + r * ld(a);
      make_row<VB>(to, length, [&](auto lane, int64_t i) SHVIT_INLINE_LAMBDA {
        const auto v = load_as(from + i, lane) <= 0 ? decltype(lane){} : load_as(gradient + i, lane);
        return a.residual ? v + load_as(more + i, lane) : v;
      });
    }
  }

  // Some rows of dW, over all tokens in the same order.
  static void sum_weight(const Params& a, int64_t task, T* sums, const Workspace& workspace) {
    const Sizes& s = sizes(a);
    const int64_t first = weight_parts(s).begin(task), rows = weight_parts(s).end(task) - first;
    const Parts pieces{s.B * s.N, ceil_div(s.B * s.N, RowBlocks::kMostRows)};
    for (int64_t piece = 0; piece < pieces.parts; ++piece) {
      const int64_t row = pieces.begin(piece);
      add_products(rows, s.C, pieces.end(piece) - row, workspace.dp + row * ld(a) + first,
                   workspace.y + row * ld(a), ld(a), sums, sum_ld(a), piece == 0);
    }
    T* dweight = static_cast<T*>(a.dproj_weight) + first * s.C;
    for (int64_t c = 0; c < rows; ++c)
      make_row<VB>(dweight + c * s.C, s.C, [&](auto lane, int64_t k) SHVIT_INLINE_LAMBDA {
        return pieces.parts ? load_as(sums + c * sum_ld(a) + k, lane) : decltype(lane){};
      });
  }

  static __attribute__((noinline)) void add_products(int64_t rows, int64_t columns, int64_t n, const T* dp,
                                                     const T* y, int64_t ld, T* sums, int64_t sum_ld,
                                                     bool first) {
    constexpr int MR = kTileRows<VB, true>;
    int64_t k = 0;
    for (; columns - k > W; k += 2 * W)
      gemm_column<T, VB, 2, MR>(rows, n, {dp, 1, ld}, {y + k, ld, W}, SumFinish<T>{sums + k, sum_ld, first});
    if (columns > k)
      gemm_column<T, VB, 1, MR>(rows, n, {dp, 1, ld}, {y + k, ld, W}, SumFinish<T>{sums + k, sum_ld, first});
  }
};

}  // namespace
