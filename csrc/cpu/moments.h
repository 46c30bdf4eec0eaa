// Mean and covariance of the normalised first P channels over all tokens, and their gradients.
//
// The covariance is a sum of products of centred values: every panel of tokens is centred by its own mean, and
// panels are merged exactly (Chan, Golub and LeVeque 1983).
#pragma once

#include "norm_backward.h"
#include "panel.h"

namespace {

// How both kernels cut the batch: a panel is a group of short images or a block of a long one.
struct Cut {
  bool is_short;
  int64_t blocks, images, panels;  // blocks per image, images per panel, panels of the batch

  explicit Cut(const Sizes& s)
      : is_short(s.N <= kShortTokens),
        blocks(is_short ? 1 : ceil_div(s.N, kBlockTokens)),
        images(is_short ? min64(max64(kGroupTokens / s.N, 1), max64(s.B, 1)) : 1),
        panels(is_short ? ceil_div(s.B, images) : s.B * blocks) {}
  // One image of a panel, or one block.
  int64_t piece_tokens(const Sizes& s) const { return is_short ? s.N : kBlockTokens; }
  Parts parts() const { return reduction_parts(panels); }

  struct Piece {
    int64_t image, block, token, n;
  };
  int64_t pieces(const Sizes& s, int64_t panel) const {
    return is_short ? min64(images, s.B - panel * images) : 1;
  }
  Piece piece(const Sizes& s, int64_t panel, int64_t i) const {
    if (is_short) return {panel * images + i, 0, 0, s.N};
    const int64_t token = panel % blocks * kBlockTokens;
    return {panel / blocks, panel % blocks, token, min64(kBlockTokens, s.N - token)};
  }
};

template <class S, int VB>
struct MomentsForward {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::MomentsForwardParams;
  static constexpr int W = kLanes<T, VB>;

  static int64_t padded(int64_t n) { return round_up(n, W); }

  struct Scratch {
    Bump bump;
    int64_t ld;
    T *image, *tokens, *mean, *shift;  // [P, ld], [tokens of a panel, P], [P], [P]
    Scratch(void* base, const Sizes& s, const Cut& cut)
        : bump(base),
          ld(padded(cut.piece_tokens(s))),
          image(bump.take<T>(s.P * ld)),
          tokens(bump.take<T>(cut.images * cut.piece_tokens(s) * padded(s.P))),
          mean(bump.take<T>(padded(s.P))),
          shift(bump.take<T>(padded(s.P))) {}
  };

  // Count, mean [P] and sum of centred products [P, P] of each part; and the moments of the blocks of long
  // images.
  struct Workspace {
    Bump bump;
    double* counts;
    T *means, *products;
    Moments* moments;
    Workspace(void* base, const Sizes& s, const Cut& cut)
        : bump(base),
          counts(bump.take<double>(cut.parts().parts)),
          means(bump.take<T>(cut.parts().parts * padded(s.P))),
          products(bump.take<T>(cut.parts().parts * s.P * padded(s.P))),
          moments(cut.is_short ? nullptr : bump.take<Moments>(cut.panels)) {}
  };

  static Plan plan(const Params& a) {
    const Cut cut(a.sizes);
    Plan plan;
    plan.flops = 2 * a.sizes.B * a.sizes.N * a.sizes.P * a.sizes.P;
    plan.scratch_bytes = Scratch(nullptr, a.sizes, cut).bump.used();
    plan.workspace_bytes = Workspace(nullptr, a.sizes, cut).bump.used();
    plan.phases = 3;
    plan.tasks[0] = cut.is_short ? 0 : cut.panels;
    plan.tasks[1] = cut.parts().parts;
    plan.tasks[2] = 1;
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Cut cut(a.sizes);
    const Scratch scratch(memory, a.sizes, cut);
    const Workspace workspace(a.workspace, a.sizes, cut);
    if (phase == 0) workspace.moments[task] = measure(a, cut.piece(a.sizes, task, 0), scratch);
    if (phase == 1) run_part(a, cut, task, scratch, workspace);
    if (phase == 2) finish(a, cut, scratch, workspace);
  }

  static void load_piece(const Params& a, const Cut::Piece& piece, const Scratch& scratch) {
    const Sizes& s = a.sizes;
    const auto x = image_view(static_cast<const S*>(a.x), piece.image, s.C, s.N, a.channels_last);
    load_panel<VB>(x.at(0, piece.token), s.P, piece.n, scratch.image, scratch.ld);
  }

  static Moments measure(const Params& a, const Cut::Piece& piece, const Scratch& scratch) {
    if (!a.norm_weight) return {};
    load_piece(a, piece, scratch);
    return panel_moments<VB>(scratch.image, a.sizes.P, piece.n, scratch.ld);
  }

  // z of a piece in scratch.image.
  static void load_z(const Params& a, const Cut& cut, const Cut::Piece& piece, const Scratch& scratch,
                     const Workspace& workspace) {
    const Sizes& s = a.sizes;
    load_piece(a, piece, scratch);
    T mean = 0, rstd = 1;
    if (a.norm_weight) {
      Moments m;
      if (cut.is_short) {
        m = panel_moments<VB>(scratch.image, s.P, piece.n, scratch.ld);
      } else {
        for (int64_t b = 0; b < cut.blocks; ++b) m.merge(workspace.moments[piece.image * cut.blocks + b]);
      }
      mean = static_cast<T>(m.mean);
      rstd = static_cast<T>(m.rstd(a.norm_eps));
      normalise<VB>(scratch.image, scratch.image, s.P, piece.n, scratch.ld, mean, rstd,
                    static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias));
    }
    if (piece.block == 0) {
      static_cast<T*>(a.image_mean)[piece.image] = mean;
      static_cast<T*>(a.image_rstd)[piece.image] = rstd;
    }
  }

  static void run_part(const Params& a, const Cut& cut, int64_t part, const Scratch& scratch,
                       const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t ld = padded(s.P);
    T* mean = workspace.means + part * ld;
    T* products = workspace.products + part * s.P * ld;
    for (int64_t i = 0; i < ld; ++i) mean[i] = 0;
    for (int64_t i = 0; i < s.P * ld; ++i) products[i] = 0;
    load_shift(a, scratch.shift);
    double count = 0;
    for (int64_t panel = cut.parts().begin(part); panel < cut.parts().end(part); ++panel) {
      int64_t tokens = 0;
      for (int64_t i = 0; i < cut.pieces(s, panel); ++i) {
        const Cut::Piece piece = cut.piece(s, panel, i);
        load_z(a, cut, piece, scratch, workspace);
        for (int64_t p = 0; p < s.P; ++p) {
          T* row = scratch.image + p * scratch.ld;
          const T shift = scratch.shift[p];
          map_row<VB>(row, row, piece.n, [&](auto z) { return z - shift; });
        }
        transpose(scratch.image, scratch.ld, s.P, piece.n, scratch.tokens + tokens * ld, ld);
        tokens += piece.n;
      }
      centre(s, tokens, scratch);
      add_products(s, tokens, scratch.tokens, products);
      merge(s, count, mean, products, static_cast<double>(tokens), scratch.mean);
      count += static_cast<double>(tokens);
    }
    workspace.counts[part] = count;
  }

  // All sums are of z less a value near its mean, the same in every task: otherwise the rounding of a large
  // mean would show in the products of differences between panels.
  static void load_shift(const Params& a, T* shift) {
    const Sizes& s = a.sizes;
    const int64_t n = min64(s.N, kGroupTokens);
    for (int64_t p = 0; p < s.P; ++p) {
      if (a.norm_weight) {
        shift[p] = a.norm_bias ? static_cast<const T*>(a.norm_bias)[p] : T(0);
        continue;
      }
      const auto x = image_view(static_cast<const S*>(a.x), 0, s.C, s.N, a.channels_last).at(p, 0);
      double sum = 0;
      for (int64_t t = 0; t < n; ++t) sum += static_cast<double>(widen(x.data[t * x.token_stride]));
      shift[p] = sum - sum == 0 ? static_cast<T>(sum / static_cast<double>(n)) : T(0);
    }
  }

  // Subtracts the mean of the panel's tokens.
  static void centre(const Sizes& s, int64_t tokens, const Scratch& scratch) {
    using V = Vec<T, VB>;
    constexpr int64_t kShort = 16;  // tokens: several short sums round less than a long one
    const int64_t ld = padded(s.P);
    for (int64_t p = 0; p < s.P; p += W) {
      V sum{};
      for (int64_t first = 0; first < tokens; first += kShort) {
        V part{};
        for (int64_t t = first; t < min64(first + kShort, tokens); ++t)
          part += load<V>(scratch.tokens + t * ld + p);
        sum += part;
      }
      store(scratch.mean + p, sum / static_cast<T>(tokens));
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t p = 0; p < s.P; ++p) scratch.tokens[t * ld + p] -= scratch.mean[p];
  }

  // products += tokens^T tokens; only rows up to the end of each stripe of columns, the rest follows by
  // symmetry.
  static constexpr int64_t kStripe = 2 * W;
  static void add_products(const Sizes& s, int64_t tokens, const T* centred, T* products) {
    const int64_t ld = padded(s.P);
    for (int64_t p = 0; p < s.P; p += kStripe)
      gemm<T, VB>(min64(s.P, p + kStripe), min64(kStripe, s.P - p), tokens, {centred, 1, ld}, centred + p, ld,
                  products + p, ld, Init::kAccumulate);
  }

  // Joins moments over `more` tokens with mean `other`, whose products are already added, to mean and products.
  static void merge(const Sizes& s, double count, T* mean, T* products, double more, const T* other) {
    if (more == 0) return;
    const int64_t ld = padded(s.P);
    const T share = static_cast<T>(more / (count + more));
    const T weight = static_cast<T>(count * more / (count + more));
    if (count > 0) {
      for (int64_t i = 0; i < s.P; ++i) {
        const T d = weight * (other[i] - mean[i]);
        for (int64_t j = i / kStripe * kStripe; j < s.P; ++j) products[i * ld + j] += d * (other[j] - mean[j]);
      }
    }
    for (int64_t i = 0; i < s.P; ++i) mean[i] = (1 - share) * mean[i] + share * other[i];
  }

  static void finish(const Params& a, const Cut& cut, const Scratch& scratch, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t ld = padded(s.P), parts = cut.parts().parts;
    T* mean = static_cast<T*>(a.mean);
    T* cov = static_cast<T*>(a.cov);
    for (int64_t p = 0; p < s.P; ++p) mean[p] = 0;
    for (int64_t i = 0; i < s.P * s.P; ++i) cov[i] = 0;
    if (parts == 0) return;
    T* products = workspace.products;
    double count = workspace.counts[0];
    for (int64_t p = 0; p < s.P; ++p) mean[p] = workspace.means[p];
    for (int64_t part = 1; part < parts; ++part) {
      const T* more = workspace.products + part * s.P * ld;
      for (int64_t i = 0; i < s.P; ++i)
        for (int64_t j = i / kStripe * kStripe; j < s.P; ++j) products[i * ld + j] += more[i * ld + j];
      merge(s, count, mean, products, workspace.counts[part], workspace.means + part * ld);
      count += workspace.counts[part];
    }
    load_shift(a, scratch.shift);
    for (int64_t p = 0; p < s.P; ++p) mean[p] += scratch.shift[p];
    const T scale = static_cast<T>(1 / count);
    for (int64_t i = 0; i < s.P; ++i)
      for (int64_t j = i; j < s.P; ++j) cov[i * s.P + j] = cov[j * s.P + i] = products[i * ld + j] * scale;
  }
};

// dz = (dmean + (dcov + dcov^T) (z - mean)) / count, then through the group normalisation.
template <class S, int VB>
struct MomentsBackward {
  using T = typename ComputeOf<S>::type;
  using Params = shvit::MomentsBackwardParams;
  static constexpr int W = kLanes<T, VB>;

  struct Scratch {
    Bump bump;
    int64_t ld;
    T *normal, *z, *dz;  // [P, ld] each
    Scratch(void* base, const Sizes& s, const Cut& cut)
        : bump(base),
          ld(round_up(cut.piece_tokens(s), W)),
          normal(bump.take<T>(s.P * ld)),
          z(bump.take<T>(s.P * ld)),
          dz(bump.take<T>(s.P * ld)) {}
  };

  // dmean / count and (dcov + dcov^T) / count; partial sums of dnorm_weight and dnorm_bias; and of long images
  // the sums of each block and its dz.
  struct Workspace {
    Bump bump;
    T *dmean, *dcov;
    double* partials;
    NormSums* sums = nullptr;
    T* dz = nullptr;
    Workspace(void* base, const Sizes& s, const Cut& cut)
        : bump(base),
          dmean(bump.take<T>(s.P)),
          dcov(bump.take<T>(s.P * s.P)),
          partials(bump.take<double>(cut.parts().parts * 2 * s.P)) {
      if (cut.is_short) return;
      sums = bump.take<NormSums>(cut.panels);
      dz = bump.take<T>(cut.panels * s.P * kBlockTokens);
    }
  };

  static Plan plan(const Params& a) {
    const Cut cut(a.sizes);
    Plan plan;
    plan.flops = 2 * a.sizes.B * a.sizes.N * a.sizes.P * a.sizes.P;
    plan.scratch_bytes = Scratch(nullptr, a.sizes, cut).bump.used();
    plan.workspace_bytes = Workspace(nullptr, a.sizes, cut).bump.used();
    plan.phases = 4;
    plan.tasks[0] = 1;
    plan.tasks[1] = cut.parts().parts;
    plan.tasks[2] = cut.is_short ? 0 : cut.panels;
    plan.tasks[3] = 1;
    return plan;
  }

  static void run(const Params& a, int phase, int64_t task, char* memory) {
    const Cut cut(a.sizes);
    const Scratch scratch(memory, a.sizes, cut);
    const Workspace workspace(a.workspace, a.sizes, cut);
    if (phase == 0) prepare(a, workspace);
    if (phase == 1) run_part(a, cut, task, scratch, workspace);
    if (phase == 2) finish_block(a, cut, task, scratch, workspace);
    if (phase == 3) finish_parameters(a, cut, workspace);
  }

  static const T* typed(const void* p) { return static_cast<const T*>(p); }

  static void prepare(const Params& a, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const T scale = static_cast<T>(1.0 / static_cast<double>(max64(s.B * s.N, 1)));
    const T *dmean = typed(a.dmean), *dcov = typed(a.dcov);
    for (int64_t i = 0; i < s.P; ++i) {
      workspace.dmean[i] = dmean[i] * scale;
      for (int64_t j = 0; j < s.P; ++j)
        workspace.dcov[i * s.P + j] = (dcov[i * s.P + j] + dcov[j * s.P + i]) * scale;
    }
  }

  static void load_normal(const Params& a, const Cut::Piece& piece, const Scratch& scratch) {
    const Sizes& s = a.sizes;
    const auto x1 = image_view(static_cast<const S*>(a.x1), piece.image, s.P, s.N, a.channels_last);
    T* target = a.norm_weight ? scratch.normal : scratch.z;
    load_panel<VB>(x1.at(0, piece.token), s.P, piece.n, target, scratch.ld);
    if (a.norm_weight)
      normalise<VB>(scratch.normal, scratch.z, s.P, piece.n, scratch.ld, typed(a.image_mean)[piece.image],
                    typed(a.image_rstd)[piece.image], typed(a.norm_weight), typed(a.norm_bias));
  }

  static void run_part(const Params& a, const Cut& cut, int64_t part, const Scratch& scratch,
                       const Workspace& workspace) {
    const Sizes& s = a.sizes;
    double* dnorm_weight = workspace.partials + part * 2 * s.P;
    double* dnorm_bias = dnorm_weight + s.P;
    for (int64_t i = 0; i < 2 * s.P; ++i) dnorm_weight[i] = 0;
    for (int64_t panel = cut.parts().begin(part); panel < cut.parts().end(part); ++panel) {
      for (int64_t i = 0; i < cut.pieces(s, panel); ++i) {
        const Cut::Piece piece = cut.piece(s, panel, i);
        load_normal(a, piece, scratch);
        for (int64_t p = 0; p < s.P; ++p) {
          T* row = scratch.z + p * scratch.ld;
          const T mean = typed(a.mean)[p];
          map_row<VB>(row, row, piece.n, [&](auto z) { return z - mean; });
        }
        gemm<T, VB>(s.P, piece.n, s.P, {workspace.dcov, s.P, 1}, scratch.z, scratch.ld, scratch.dz, scratch.ld,
                    Init::kBias, workspace.dmean);
        NormSums sums;
        if (a.norm_weight)
          sums = norm_sums<VB>(scratch.dz, scratch.normal, s.P, piece.n, scratch.ld, typed(a.norm_weight),
                               dnorm_weight, dnorm_bias);
        if (cut.is_short) {
          store_dx(a, piece, sums, scratch);
        } else {
          workspace.sums[panel] = sums;
          T* kept = workspace.dz + panel * s.P * kBlockTokens;
          for (int64_t p = 0; p < s.P; ++p)
            map_row<VB>(scratch.dz + p * scratch.ld, kept + p * kBlockTokens, piece.n, Identity{});
        }
      }
    }
  }

  // dx of a piece from scratch.dz and scratch.normal: zero beyond the first P channels.
  static void store_dx(const Params& a, const Cut::Piece& piece, const NormSums& sums, const Scratch& scratch) {
    if (!a.dx) return;
    const Sizes& s = a.sizes;
    if (a.norm_weight)
      norm_backward<VB>(scratch.dz, scratch.normal, s.P, piece.n, scratch.ld, typed(a.norm_weight),
                        typed(a.image_rstd)[piece.image], sums, static_cast<double>(s.P * s.N));
    const auto dx =
        image_view(static_cast<S*>(a.dx), piece.image, s.C, s.N, a.channels_last).at(0, piece.token);
    store_panel<VB>(scratch.dz, scratch.ld, s.P, piece.n, dx);
    const ImageView<S> rest = dx.at(s.P, 0);
    const ImageView<const S> same{rest.data, rest.channel_stride, rest.token_stride};
    map_image<VB>(same, rest, s.C - s.P, piece.n, [](auto v) { return decltype(v){}; });
  }

  static void finish_block(const Params& a, const Cut& cut, int64_t panel, const Scratch& scratch,
                           const Workspace& workspace) {
    if (!a.dx) return;
    const Sizes& s = a.sizes;
    const Cut::Piece piece = cut.piece(s, panel, 0);
    NormSums sums;
    for (int64_t b = 0; b < cut.blocks; ++b) sums.add(workspace.sums[piece.image * cut.blocks + b]);
    load_normal(a, piece, scratch);
    const T* kept = workspace.dz + panel * s.P * kBlockTokens;
    for (int64_t p = 0; p < s.P; ++p)
      map_row<VB>(kept + p * kBlockTokens, scratch.dz + p * scratch.ld, piece.n, Identity{});
    store_dx(a, piece, sums, scratch);
  }

  static void finish_parameters(const Params& a, const Cut& cut, const Workspace& workspace) {
    const Sizes& s = a.sizes;
    const int64_t parts = cut.parts().parts;
    if (a.dnorm_weight) add_parts(workspace.partials, parts, 2 * s.P, s.P, static_cast<T*>(a.dnorm_weight));
    if (a.dnorm_bias) add_parts(workspace.partials + s.P, parts, 2 * s.P, s.P, static_cast<T*>(a.dnorm_bias));
  }
};

}  // namespace
