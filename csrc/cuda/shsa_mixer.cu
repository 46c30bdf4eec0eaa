// y = x + W_proj relu(shsa(x)) + b: the residual layer, for inference.
//
// Short images of 16-bit values in one launch: a block attends for one or several images, up to 128 tokens in
// all (shsa_block.cuh), with the channels beyond P beside the result, and multiplies with the projection's
// weights, which stream from L2 in strips of output channels. Where there are few images, several blocks share
// the output channels of an image and each attends for itself. Everything else: shsa_forward into a workspace,
// then the same product with both operands streamed.
//
// Bytes of global memory: x and y once; of L2: W_proj (2 C^2) once per block, x again for the residual. 2 N C^2
// floating-point operations per image, which a tensor core needs about as long for as the memory for x and y.
#include <algorithm>
#include <launch.cuh>
#include <optional>

#include "shsa_block.cuh"

namespace shvit::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kRowTiles = 4, kPairs = 2;  // of a warp: 64 tokens by 32 outputs
constexpr int kDepth = 32, kStages = 3;   // channels of a step of the sum, steps in shared memory
constexpr int kBlocks = 132;              // about as many as a large device runs side by side

// A block's work: slabs of tokens (an image, or up to 64 tokens of one) by output channels, strip by strip.
struct MixerLayout {
  int C, N;
  int slabs, slab_tokens, slab_tiles;
  int row_groups;              // the warps of a block are row_groups x kWarps / row_groups
  int splits, columns, strip;  // blocks of the same slabs; output channels of each, and at a time
  int ld_left, left_values;    // of a slab, and where streamed of a step
  int ld_out, out_values;      // of a slab
  int weight_values;           // of a step
  int middle;                  // bytes between the left operand and the steps: attention, then results

  MixerLayout(const Sizes& s, bool channels_last, int slab_tokens, int row_groups, int64_t all_slabs,
              int most_columns)
      : C(s.C),
        N(s.N),
        slab_tokens(slab_tokens),
        slab_tiles(padded(slab_tokens) / kTile),
        row_groups(row_groups) {
    slabs = row_groups * (kRowTiles / slab_tiles);
    const int64_t groups = (all_slabs + slabs - 1) / slabs;
    const int column_tiles = padded(C) / kTile;
    const auto wanted = std::clamp<int64_t>(kBlocks / groups, 1, (column_tiles + kPairs - 1) / kPairs);
    columns = static_cast<int>((column_tiles + wanted - 1) / wanted) * kTile;
    columns = std::min(columns, most_columns);
    splits = (C + columns - 1) / columns;
    strip = std::min(columns, kWarps / row_groups * kPairs * kTile);
    ld_out = row_distance(channels_last ? strip : slab_tokens);
    out_values = (channels_last ? padded(slab_tokens) : strip) * ld_out;
    weight_values = strip * row_distance(kDepth);
    ld_left = left_values = middle = 0;
  }

  // The left operand of a slab on chip as a whole, attention's memory and the results' in the same place.
  size_t keep(const Sizes& s, bool channels_last, size_t attention_bytes) {
    ld_left = row_distance(channels_last ? C : N);
    left_values = (channels_last ? padded(N) : std::max(padded(C), s.P + padded(C - s.P))) * ld_left;
    middle = static_cast<int>((std::max(attention_bytes, slabs * out_values * sizeof(__half)) + 15) / 16 * 16);
    return (static_cast<size_t>(slabs) * left_values + kStages * weight_values) * sizeof(__half) + middle;
  }

  // The left operand in steps, behind the weights of each.
  size_t stream(bool channels_last, size_t value_bytes) {
    ld_left = row_distance(channels_last ? kDepth : slab_tokens);
    left_values = (channels_last ? padded(slab_tokens) : kDepth) * ld_left;
    middle = static_cast<int>(slabs * out_values * value_bytes);
    return middle + static_cast<size_t>(kStages) * (weight_values + slabs * left_values) * value_bytes;
  }
};

// The product of a block. A group of warps loads and stores its own slab.
template <bool ChannelsLast, bool Streamed, class T>
struct Product {
  const MixerLayout& l;
  const T *weight, *bias;  // [C, C], [C] or null
  const T *x, *streamed;   // of the group's slab; the left operand where it is streamed
  T* y;                    // null: the slab is a stand-in behind the end of the batch
  int tokens;              // of a slab
  int first, end;          // output channels of the block
  T *left, *out, *stages;  // shared memory of the block
  const Group group;

  __device__ int64_t stride() const { return ChannelsLast ? l.C : l.N; }
  __device__ int chunks() const { return (l.C + kDepth - 1) / kDepth; }
  __device__ int steps() const { return (end - first + l.strip - 1) / l.strip * chunks(); }
  __device__ T* stage(int step) const {
    return stages + step % kStages * (l.weight_values + (Streamed ? l.slabs * l.left_values : 0));
  }

  // Starts to load what a step multiplies; one group of asynchronous copies.
  __device__ void start(int step) const {
    if (step < steps()) {
      const int n = first + step / chunks() * l.strip, k = step % chunks() * kDepth;
      const int depth = min(kDepth, l.C - k);
      T* to = stage(step);
      load_matrix(whole_block(), to, row_distance(kDepth), weight + static_cast<int64_t>(n) * l.C + k, l.C,
                  min(l.strip, end - n), depth);
      if (Streamed) {
        load_matrix(group, to + l.weight_values + group.index * l.left_values, l.ld_left,
                    streamed + (ChannelsLast ? k : k * stride()), stride(), ChannelsLast ? tokens : depth,
                    ChannelsLast ? depth : tokens);
      }
    }
    ptx::cp_async_commit();
  }

  // Outputs n... of the slab: f(its tile of results, the same place in an image tensor, rows, columns).
  template <class Image, class F>
  __device__ void with_outputs(Image* image, int n, F f) const {
    const int outputs = min(l.strip, end - n);
    f(out + group.index * l.out_values, image + (ChannelsLast ? n : n * stride()),
      ChannelsLast ? tokens : outputs, ChannelsLast ? outputs : tokens);
  }

  // A warp's part of a strip: row tiles from `tile` on, and 16-column tiles from `column` on.
  struct Part {
    int tile, tiles, column, pairs;
  };

  __device__ Part part(int n) const {
    const int across = kWarps / l.row_groups;
    const int tile = warp_index() / across * kRowTiles, column = warp_index() % across * kPairs * kTile;
    return {tile, min(kRowTiles, l.slabs * l.slab_tiles - tile), column,
            max(0, min(kPairs, (padded(min(l.strip, end - n)) - column) / kTile))};
  }

  // sums += left[:, k...] weight[n..., k...]^T.
  template <class Op>
  __device__ void multiply(Sums<kPairs> (&sums)[kRowTiles], int step, const Part& part) const {
    using Left = std::conditional_t<ChannelsLast, KContiguous<T>, KStrided<T>>;
    const int k = step % chunks() * kDepth, depth = padded(min(kDepth, l.C - k));
    const KContiguous<T> right{stage(step), row_distance(kDepth)};
    const T* rows[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int slab = (part.tile + i) / l.slab_tiles, row = (part.tile + i) % l.slab_tiles * kTile;
      rows[i] = (Streamed ? stage(step) + l.weight_values : left) + slab * l.left_values +
                row * (ChannelsLast ? l.ld_left : 1);
    }
#pragma unroll 1
    for (int j = 0; j < depth; j += Op::kStep) {
      typename Op::Right b[kPairs];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
        b[pair] = Op::right(right, part.column + (pair < part.pairs ? pair : 0) * kTile, j);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (i < part.tiles) {
          typename Op::Left a = Op::left(Left{rows[i], l.ld_left}, 0, (Streamed ? 0 : k) + j);
          if constexpr (!Streamed)
            for (uint32_t& word : a.r) word = ptx::relu2<T>(word);
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            if (pair < part.pairs) {
              Op::multiply(sums[i][2 * pair], a, b[pair], 0);
              Op::multiply(sums[i][2 * pair + 1], a, b[pair], 1);
            }
          }
        }
      }
    }
  }

  // Adds sums and bias to x, which lies in `out`.
  __device__ void add(const Sums<kPairs> (&sums)[kRowTiles], int n, const Part& part) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if (i >= part.tiles) break;
      const int slab = (part.tile + i) / l.slab_tiles, first_token = (part.tile + i) % l.slab_tiles * kTile;
      T* results = out + slab * l.out_values;
      for_each_pair<kPairs>(
          sums[i],
          [&](int row, int column, float one, float two) {
            const int token = first_token + row;
            const auto add_one = [&](int output, float sum) {
              if (token >= tokens || n + output >= end) return;
              T* at = results + (ChannelsLast ? token * l.ld_out + output : output * l.ld_out + token);
              const float shift = bias ? to_float(bias[n + output]) : 0.0f;
              *at = from_float<T>(to_float(*at) + (sum + shift));
            };
            add_one(part.column + column, one);
            add_one(part.column + column + 1, two);
          },
          part.pairs);
    }
  }

  // Steps 0 to kStages - 2 must have been started.
  template <class Op>
  __device__ void run() const {
    Sums<kPairs> sums[kRowTiles];
    for (auto& tile : sums) clear<kPairs>(tile);
    const int all = steps(), per_strip = chunks();
    for (int step = 0; step < all; ++step) {
      const int n = first + step / per_strip * l.strip, chunk = step % per_strip;
      const Part part = this->part(n);
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (chunk == 0) {
        with_outputs(x, n, [&](T* tile, const T* from, int rows, int columns) {
          start_matrix(group, tile, l.ld_out, from, stride(), rows, columns);
        });
      }
      start(step + kStages - 1);
      if (part.pairs > 0) multiply<Op>(sums, step, part);
      if (chunk < per_strip - 1) continue;

      if (per_strip < kStages) {  // x came with a later step
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      with_outputs(x, n, [&](T* tile, const T* from, int rows, int columns) {
        finish_matrix(group, tile, l.ld_out, from, stride(), rows, columns);
      });
      __syncthreads();
      add(sums, n, part);
      for (auto& tile : sums) clear<kPairs>(tile);
      __syncthreads();
      if (y) {
        with_outputs(y, n, [&](const T* tile, T* to, int rows, int columns) {
          store_matrix(group, tile, l.ld_out, to, stride(), rows, columns);
        });
      }
    }
  }
};

template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    shsa_mixer_kernel(ShsaMixerParams params, ShortLayout attention, MixerLayout l) {
  const ShsaForwardParams& p = params.attention;
  const Sizes& s = p.sizes;
  const Group group = group_of_warps(kWarps / l.slabs);
  T* left = ptx::shared_memory<T>();
  T* middle = left + l.slabs * l.left_values;
  ShortMemory<T> memory(s, attention, middle, group.index);
  memory.out = left + group.index * l.left_values;
  memory.ld_out = l.ld_left;

  const int64_t wanted = static_cast<int64_t>(blockIdx.x / l.splits) * l.slabs + group.index;
  const int64_t image = min(wanted, s.B - 1);  // behind the end: all threads take part in the barriers
  const int64_t offset = image * s.C * s.N;
  const T* x = static_cast<const T*>(p.x) + offset;
  const int first = static_cast<int>(blockIdx.x) % l.splits * l.columns;
  const Product<ChannelsLast, false, T> product{l,
                                                static_cast<const T*>(params.proj_weight),
                                                static_cast<const T*>(params.proj_bias),
                                                x,
                                                nullptr,
                                                wanted == image ? static_cast<T*>(p.y) + offset : nullptr,
                                                s.N,
                                                first,
                                                min(s.C, first + l.columns),
                                                left,
                                                middle,
                                                middle + l.middle / sizeof(T),
                                                group};

  // Channels beyond P beside attention's result. Those of channels_last would start at no 16-byte boundary: the
  // rows come whole, and attention's result replaces their first channels.
  T* rest = memory.out + s.P * l.ld_left;
  const T* rest_of_x = x + static_cast<int64_t>(s.P) * s.N;
  attend<ChannelsLast, true, kStages, kStages - 1>(p, group, attention, memory, image, false, [&] {
    if (ChannelsLast) {
      load_matrix(group, memory.out, l.ld_left, x, s.C, s.N, s.C);
    } else {
      start_matrix(group, rest, l.ld_left, rest_of_x, s.N, s.C - s.P, s.N);
    }
    ptx::cp_async_commit();
    for (int step = 0; step < kStages - 1; ++step) product.start(step);
  });
  if (!ChannelsLast) {
    finish_matrix(group, rest, l.ld_left, rest_of_x, s.N, s.C - s.P, s.N);
    const int zeroed = s.P + padded(s.C - s.P);
    for_each_entry(group, padded(s.C) - zeroed, l.ld_left, 1, [&](int row, int column) {
      memory.out[(zeroed + row) * l.ld_left + column] = from_float<T>(0.0f);
    });
  }
  product.template run<Half<T>>();
}

template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    projection_kernel(ShsaMixerParams params, const void* attended, MixerLayout l, int slabs_per_image) {
  const Group group = group_of_warps(kWarps / l.slabs);
  const ShsaForwardParams& p = params.attention;
  const Sizes& s = p.sizes;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x / l.splits) * l.slabs + group.index;
  const int64_t slab = min(wanted, s.B * slabs_per_image - 1), image = slab / slabs_per_image;
  const int token = static_cast<int>(slab % slabs_per_image) * l.slab_tokens;
  const int64_t offset = image * s.C * s.N + (ChannelsLast ? static_cast<int64_t>(token) * s.C : token);
  const int first = static_cast<int>(blockIdx.x) % l.splits * l.columns;
  T* memory = ptx::shared_memory<T>();
  const Product<ChannelsLast, true, T> product{l,
                                               static_cast<const T*>(params.proj_weight),
                                               static_cast<const T*>(params.proj_bias),
                                               static_cast<const T*>(p.x) + offset,
                                               static_cast<const T*>(attended) + offset,
                                               wanted == slab ? static_cast<T*>(p.y) + offset : nullptr,
                                               min(l.slab_tokens, s.N - token),
                                               first,
                                               min(s.C, first + l.columns),
                                               nullptr,
                                               memory,
                                               memory + l.middle / sizeof(T),
                                               group};
  for (int step = 0; step < kStages - 1; ++step) product.start(step);
  with_op<T>(p.precision.tf32_proj, [&](auto op) { product.template run<decltype(op)>(); });
}

struct Fused {
  ShortLayout attention;
  MixerLayout layout;
  size_t bytes;

  Fused(const Sizes& s, bool channels_last, int row_groups)
      : attention(s, channels_last, 1, kWarps), layout(s, channels_last, s.N, row_groups, s.B, s.C + kTile) {
    attention = ShortLayout(s, channels_last, layout.slabs, kWarps);
    bytes = layout.keep(s, channels_last, attention.bytes<__half>(s));
  }
};

// How to run a call in one launch: with 128 tokens to a block, which halves the traffic from L2, if there are
// images enough to keep a device busy.
std::optional<Fused> fused(const ShsaForwardParams& p, Type type) {
  const Sizes& s = p.sizes;
  if (type == Type::kFloat32 || s.N > kFewTokens) return std::nullopt;
  for (const int row_groups : {2, 1}) {
    const Fused f(s, p.channels_last, row_groups);
    const int64_t groups = (s.B + f.layout.slabs - 1) / f.layout.slabs;
    if (row_groups == 2 && groups < kBlocks * 2 / 3) continue;
    if (f.bytes <= static_cast<size_t>(shared_memory_limit())) return f;
  }
  return std::nullopt;
}

size_t image_bytes(const Sizes& s, Type type) {
  const size_t bytes = static_cast<size_t>(s.B) * s.C * s.N * (type == Type::kFloat32 ? 4 : 2);
  return (bytes + 255) / 256 * 256;
}

const char* grid_of(int64_t blocks, dim3& grid) {
  if (blocks > INT32_MAX) return "more images than a grid has blocks";
  grid = dim3(static_cast<unsigned>(blocks));
  return nullptr;
}

template <class T>
const char* start_fused(const ShsaMixerParams& p, const Fused& f, void* stream) {
  const MixerLayout& l = f.layout;
  dim3 grid;
  if (const char* error = grid_of((p.attention.sizes.B + l.slabs - 1) / l.slabs * l.splits, grid)) return error;
  const auto kernel = p.attention.channels_last ? shsa_mixer_kernel<true, T> : shsa_mixer_kernel<false, T>;
  return launch(kernel, grid, kWarps * kWarp, f.bytes, stream, p, f.attention, l);
}

template <class T>
const char* start_projection(const ShsaMixerParams& p, const void* attended, void* stream) {
  const Sizes& s = p.attention.sizes;
  const bool channels_last = p.attention.channels_last;
  const int slab_tokens = std::min(s.N, kRowTiles * kTile),
            slabs_per_image = (s.N + slab_tokens - 1) / slab_tokens;
  // As many output channels at a time as there is room for.
  int most_columns = kWarps * kPairs * kTile;
  const auto layout_of = [&] {
    return MixerLayout(s, channels_last, slab_tokens, 1, s.B * slabs_per_image, most_columns);
  };
  MixerLayout l = layout_of();
  size_t bytes = l.stream(channels_last, sizeof(T));
  while (bytes > static_cast<size_t>(shared_memory_limit()) && most_columns > kTile) {
    most_columns /= 2;
    l = layout_of();
    bytes = l.stream(channels_last, sizeof(T));
  }
  dim3 grid;
  if (const char* error = grid_of((s.B * slabs_per_image + l.slabs - 1) / l.slabs * l.splits, grid))
    return error;
  const auto kernel = channels_last ? projection_kernel<true, T> : projection_kernel<false, T>;
  return launch(kernel, grid, kWarps * kWarp, bytes, stream, p, attended, l, slabs_per_image);
}

}  // namespace

size_t shsa_mixer_workspace(const ShsaMixerParams& p, Type type) {
  const Sizes& s = p.attention.sizes;
  if (fused(p.attention, type)) return 0;
  return image_bytes(s, type) + (shsa_forward_fits(s, type) ? 0 : shsa_long_forward_workspace(s, type));
}

const char* shsa_mixer(const ShsaMixerParams& params, Type type, void* stream) {
  const Sizes& s = params.attention.sizes;
  if (s.B == 0) return nullptr;
  if (const auto f = fused(params.attention, type)) {
    return type == Type::kFloat16 ? start_fused<__half>(params, *f, stream)
                                  : start_fused<__nv_bfloat16>(params, *f, stream);
  }
  ShsaForwardParams attention = params.attention;
  attention.y = params.workspace;
  void* rest = static_cast<char*>(params.workspace) + image_bytes(s, type);
  const char* error = shsa_forward_fits(s, type) ? shsa_forward(attention, type, stream)
                                                 : shsa_long_forward(attention, rest, type, stream);
  if (error) return error;
  return with_type(
      type, [&](auto zero) { return start_projection<decltype(zero)>(params, params.workspace, stream); });
}

}  // namespace shvit::cuda
