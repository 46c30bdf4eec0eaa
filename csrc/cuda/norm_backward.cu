// What every backward ends with: from the gradient of z = norm(x1) to those of x1 and of the norm's parameters.
//
//     dz_total = dz + (dz_mean + (dz_cov + dz_cov^T) (z - z_mean)) / (B N)
//     dnorm_weight = sum dz_total normal   dnorm_bias = sum dz_total   with normal = (x1 - mean) rstd
//     dx1 = rstd (w dz_total - a - normal b), a and b the image's means of w dz_total and of w dz_total normal
//
// A block has one or several images, a warp 16 tokens. Images of more than 64 tokens take two launches over
// tiles of tokens, the first for a and b, the second for dx1: both compute dz_total, which costs less than
// keeping it. The products are nearly exact (split.cuh) also where the tensors are of 16 bits: what passes the
// normalisation can be the small difference of large values.
//
// Bytes: x1 and dz read, dx1 written, dz_cov from L2 once per block: about 8 N P per image. Operations: 2 N P^2
// per image.
#include <algorithm>
#include <launch.cuh>

#include "long.cuh"
#include "rest.cuh"
#include "split.cuh"
#include "values.cuh"

namespace shvit::cuda {

namespace {

constexpr int kMostWarps = 4;
constexpr int kMostParts = 512;  // beyond that, blocks take several tasks
constexpr int kPairs = 4;        // 16-column tiles that a warp sums at a time

// A task of a block: whole images, each with a group of warps, or a tile of an image.
struct Cut {
  int images, warps;  // of a task; warps of an image
  int tokens;         // of an image or its tile
  int image_tiles;
  int64_t tasks;
  int parts;

  __host__ __device__ explicit Cut(const Sizes& s) {
    const int most = s.P <= 128 ? kMostWarps * kTile : kTile;  // many channels: that much fits anywhere
    tokens = s.N < most ? s.N : most;
    image_tiles = (s.N + tokens - 1) / tokens;
    warps = padded(tokens) / kTile;
    images = image_tiles == 1 ? most / padded(tokens) : 1;
    tasks = image_tiles == 1 ? (s.B + images - 1) / images : s.B * image_tiles;
    parts = static_cast<int>(tasks < kMostParts ? tasks : kMostParts);
  }
  __host__ __device__ int all_warps() const { return images * warps; }
};

// Sums over a tile that the gradient of its image's normalisation needs: of w dz, and of w dz normal.
struct NormSums {
  float gradient, projected;
};

enum class Phase { kWhole, kSums, kStore };

// The shared memory of a block: per image normal and dz_total, rows of tokens or of channels as in memory; a
// strip of columns of dz_cov; four vectors [padded P], channel sums [warps, 2, P], image sums [2, warps]. The
// distance of rows, 4 more than a multiple of 16, keeps the products' reads apart.
template <bool ChannelsLast>
struct Layout {
  int ld, tile_values, strip, ld_cov;

  __host__ __device__ Layout(const Sizes& s, const Cut& cut)
      : ld(padded(ChannelsLast ? s.P : cut.tokens) + 4),
        tile_values(padded(ChannelsLast ? cut.tokens : s.P) * ld),
        strip(s.P <= 80 ? padded(s.P) : kPairs * kTile),
        ld_cov(strip + 4) {
    while (strip > kTile && floats(s, cut) * static_cast<int>(sizeof(float)) > kSharedBytes) {
      strip /= 2;
      ld_cov = strip + 4;
    }
  }
  __host__ __device__ int floats(const Sizes& s, const Cut& cut) const {
    return 2 * cut.images * tile_values + padded(s.P) * (ld_cov + 4) + 2 * cut.all_warps() * (s.P + 1);
  }
};

// 2 (z - z_mean) / (B N) as the left operand of a product.
template <bool ChannelsLast>
struct Centred {
  const float *normal, *weight, *shift;
  int ld;
  __device__ float at(int token, int channel) const {
    const float x = normal[ChannelsLast ? token * ld + channel : channel * ld + token];
    return fmaf(x, weight[channel], shift[channel]);
  }
  __device__ Centred from(int channel) const {
    return {normal + (ChannelsLast ? channel : channel * ld), weight + channel, shift + channel, ld};
  }
};

template <bool ChannelsLast, class T>
struct Backward {
  using Op = NearlyExact<T>;

  const NormBackwardParams& p;
  const Sizes& s;
  const Cut cut;
  const Layout<ChannelsLast> layout;
  const Group group;
  float *const normal, *const gradient, *const cov, *const weight, *const cov_weight, *const cov_shift;
  float *const constant, *const channel_sums, *const scratch;
  NormSums* const sums;  // [B, image_tiles], of long images

  __device__ Backward(const NormBackwardParams& p, NormSums* sums)
      : p(p),
        s(p.sizes),
        cut(s),
        layout(s, cut),
        group(group_of_warps(cut.warps)),
        normal(ptx::shared_memory<float>() + 2 * group.index * layout.tile_values),
        gradient(normal + layout.tile_values),
        cov(ptx::shared_memory<float>() + 2 * cut.images * layout.tile_values),
        weight(cov + padded(s.P) * layout.ld_cov),
        cov_weight(weight + padded(s.P)),
        cov_shift(cov_weight + padded(s.P)),
        constant(cov_shift + padded(s.P)),
        channel_sums(constant + padded(s.P)),
        scratch(channel_sums + 2 * cut.all_warps() * s.P),
        sums(sums) {}

  __device__ int at(int token, int channel) const {
    return ChannelsLast ? token * layout.ld + channel : channel * layout.ld + token;
  }

  // The norm's weight; what makes 2 (z - z_mean) / (B N) of normal; and what the mean's gradient adds to dz.
  __device__ void load_vectors() const {
    const float scale = 1.0f / (static_cast<float>(s.B) * static_cast<float>(s.N));
    for (int c = threadIdx.x; c < padded(s.P); c += blockDim.x) {
      const bool inside = c < s.P;
      const float w = !inside ? 0.0f : p.norm_weight ? parameter<T>(p.norm_weight, c, 1.0f) : 1.0f;
      const float b = inside ? parameter<T>(p.norm_bias, c, 0.0f) - (p.z_mean ? p.z_mean[c] : 0.0f) : 0.0f;
      weight[c] = w;
      cov_weight[c] = 2.0f * scale * w;
      cov_shift[c] = 2.0f * scale * b;
      constant[c] = inside && p.dz_mean ? p.dz_mean[c] * scale : 0.0f;
    }
  }

  __device__ Extent extent(int tokens, int channels) const {
    return ChannelsLast ? Extent{channels, tokens, s.P} : Extent{s.N, s.P, tokens};
  }

  // Starts to load columns first..first + strip of dz_cov.
  __device__ void load_cov(int first) const {
    load_matrix(whole_block(), cov, layout.ld_cov, p.dz_cov + first, s.P, s.P, min(layout.strip, s.P - first));
    ptx::cp_async_commit();
  }

  __device__ void load_normal(int64_t image, int first, int tokens) const {
    const T* x1 = static_cast<const T*>(p.x1) + image * s.P * s.N + (ChannelsLast ? first * s.P : first);
    const float mean = p.norm_weight ? p.mean[image] : 0.0f, rstd = p.norm_weight ? p.rstd[image] : 1.0f;
    load_values(group, x1, extent(tokens, s.P), [&](int row, int column, float value) {
      normal[row * layout.ld + column] = (value - mean) * rstd;
    });
    // Channels behind the last are summed over.
    for (int i = group.rank; i < (padded(s.P) - s.P) * padded(tokens); i += group.size)
      normal[at(i % padded(tokens), s.P + i / padded(tokens))] = 0.0f;
  }

  // dz_total of 16 tokens, and their sums.
  __device__ NormSums differentiate(int64_t image, int first, int row, int tokens, bool counts) const {
    NormSums mine = {0.0f, 0.0f};
    const float* dz = p.dz ? p.dz + image * s.P * s.N + first : nullptr;
    const Centred<ChannelsLast> z = {normal, cov_weight, cov_shift, layout.ld};
    for (int start = 0; start < padded(s.P); start += layout.strip) {
      const int width = min(layout.strip, padded(s.P) - start);
      if (start > 0 && p.dz_cov) {
        __syncthreads();
        load_cov(start);
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      for (int column = 0; column < width; column += kPairs * kTile) {
        const int pairs = min(kPairs, (width - column) / kTile);
        const int end = min(s.P, start + column + pairs * kTile);
        Sums<kPairs> gradients;
        for_each_sum(gradients, row, start + column, [&](int token, int channel, float& sum) {
          const bool inside = token < tokens && channel < end;
          sum = inside ? (dz ? dz[channel * s.N + token] : 0.0f) + constant[channel] : 0.0f;
        });
        if (p.dz_cov)
          add_product<Op, kPairs>(gradients, z, row, KStrided<float>{cov, layout.ld_cov}, column, padded(s.P),
                                  pairs);
        for_each_sum(gradients, row, start + column, [&](int token, int channel, float& sum) {
          if (token >= tokens || channel >= end) return;
          gradient[at(token, channel)] = sum;
          const float weighted = weight[channel] * sum;
          mine.gradient += weighted;
          mine.projected += weighted * normal[at(token, channel)];
        });
        if (p.dnorm_parts) sum_channels(gradients, row, start + column, end, counts ? tokens : 0);
      }
    }
    return mine;
  }

  // f(token, channel, sum) for the sums of a lane.
  template <class F>
  __device__ __forceinline__ void for_each_sum(Sums<kPairs>& gradients, int row, int column, F f) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(row + g + i / 2 * 8, column + 8 * j + 2 * t + i % 2, gradients[j][i]);
  }

  // A warp's sums of dz_total normal and of dz_total over its tokens.
  __device__ void sum_channels(const Sums<kPairs>& gradients, int row, int column, int end, int tokens) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    float* mine = channel_sums + warp_index() * 2 * s.P;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = column + 8 * j + 2 * t + i;
        float sum = 0.0f, projected = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = row + g + 8 * half;
          if (token < tokens && channel < end) {
            sum += gradients[j][2 * half + i];
            projected += gradients[j][2 * half + i] * normal[at(token, channel)];
          }
        }
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, distance);
          projected += __shfl_xor_sync(0xffffffffu, projected, distance);
        }
        if (g == 0 && channel < end) {
          mine[channel] = projected;
          mine[s.P + channel] = sum;
        }
      }
    }
  }

  // Adds the warps' sums to the block's part, or starts it.
  __device__ void add_channel_sums(bool starts) const {
    float* part = p.dnorm_parts + static_cast<int64_t>(blockIdx.x) * 2 * s.P;
    for (int i = threadIdx.x; i < 2 * s.P; i += blockDim.x) {
      float sum = starts ? 0.0f : part[i];
      for (int warp = 0; warp < cut.all_warps(); ++warp) sum += channel_sums[warp * 2 * s.P + i];
      part[i] = sum;
    }
  }

  __device__ void run(Phase phase, int64_t task, bool starts) const {
    const bool whole = cut.image_tiles == 1;
    const int64_t wanted = whole ? task * cut.images + group.index : task / cut.image_tiles;
    const bool present = wanted < s.B;
    const int64_t image = present ? wanted : s.B - 1;  // a stand-in, so that all threads meet at the barriers
    const int first = whole ? 0 : static_cast<int>(task % cut.image_tiles) * cut.tokens;
    const int tokens = min(cut.tokens, s.N - first);

    if (p.dz_cov) load_cov(0);
    load_vectors();
    load_normal(image, first, tokens);
    ptx::cp_async_wait<0>();
    __syncthreads();
    NormSums total = differentiate(image, first, group.rank / kWarp * kTile, tokens, present);
    __syncthreads();
    if (p.dnorm_parts && phase != Phase::kStore) add_channel_sums(starts);
    total = {group_sum(group, total.gradient, scratch),
             group_sum(group, total.projected, scratch + cut.all_warps())};
    if (phase == Phase::kSums && group.rank == 0) sums[task] = total;
    if (phase == Phase::kSums || !p.dx || !present) return;

    if (phase == Phase::kStore && p.norm_weight) {
      total = {0.0f, 0.0f};
      for (int i = 0; i < cut.image_tiles; ++i) {
        const NormSums& more = sums[image * cut.image_tiles + i];
        total.gradient += more.gradient;
        total.projected += more.projected;
      }
    }
    float a = 0.0f, b = 0.0f, rstd = 1.0f;
    if (p.norm_weight) {
      const float scale = 1.0f / (static_cast<float>(s.P) * static_cast<float>(s.N));
      a = total.gradient * scale;
      b = total.projected * scale;
      rstd = p.rstd[image];
    }
    T* dx =
        static_cast<T*>(p.dx) + image * s.C * s.N + (ChannelsLast ? static_cast<int64_t>(first) * s.C : first);
    store_values(group, dx, extent(tokens, s.C), [&](int row, int column) {
      const int i = row * layout.ld + column;
      return rstd * (weight[ChannelsLast ? column : row] * gradient[i] - a - normal[i] * b);
    });
  }
};

template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2)
    norm_backward_kernel(NormBackwardParams p, NormSums* sums, Phase phase) {
  const Cut cut(p.sizes);
  if (blockIdx.x >= cut.parts) {
    const T* none = nullptr;
    map_rest<ChannelsLast>(p.sizes, blockIdx.x - cut.parts, none, none, static_cast<T*>(p.dx), Zero());
    return;
  }
  const Backward<ChannelsLast, T> backward(p, sums);
  for (int64_t task = blockIdx.x; task < cut.tasks; task += cut.parts) {
    if (task != blockIdx.x) __syncthreads();
    backward.run(phase, task, task == blockIdx.x);
  }
}

// (matrix + matrix^T) / 2.
__global__ void __launch_bounds__(kMostWarps* kWarp)
    symmetrise_kernel(const float* matrix, float* result, int P) {
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < P; i += blockDim.x)
    result[row * P + i] = 0.5f * (matrix[row * P + i] + matrix[i * P + row]);
}

struct Buffers {
  NormSums* sums;
  float* symmetric;
  size_t bytes;
  Buffers(void* base, const Sizes& s) {
    const Cut cut(s);
    Workspace workspace(base);
    sums = workspace.take<NormSums>(cut.image_tiles == 1 ? 0 : cut.tasks);
    symmetric = workspace.take<float>(s.P * s.P);
    bytes = workspace.used();
  }
};

template <bool ChannelsLast, class T>
const char* start(const NormBackwardParams& p, NormSums* sums, Phase phase, void* stream) {
  const Sizes& s = p.sizes;
  const Cut cut(s);
  const bool clears = p.dx && p.clear_rest && phase != Phase::kSums;
  const int64_t blocks = cut.parts + (clears ? s.B * rest_blocks(s, ChannelsLast, sizeof(T)) : 0);
  if (blocks > INT32_MAX) return "more images than a grid has blocks";
  return launch(norm_backward_kernel<ChannelsLast, T>, dim3(static_cast<unsigned>(blocks)),
                cut.all_warps() * kWarp, Layout<ChannelsLast>(s, cut).floats(s, cut) * sizeof(float), stream, p,
                sums, phase);
}

}  // namespace

int norm_backward_parts(const Sizes& sizes) { return Cut(sizes).parts; }

size_t norm_backward_workspace(const Sizes& sizes) { return Buffers(nullptr, sizes).bytes; }

const char* norm_backward(const NormBackwardParams& params, Type type, void* stream) {
  const Sizes& s = params.sizes;
  if (const char* error = check_format(params.channels_last, params.x1_channels_last, s)) return error;
  const Buffers buffers(params.workspace, s);
  NormBackwardParams p = params;
  if (p.dz_cov && !p.dz_cov_symmetric) {
    p.dz_cov = buffers.symmetric;
    const char* error = launch(symmetrise_kernel, dim3(s.P), kMostWarps * kWarp, 0, stream, params.dz_cov,
                               buffers.symmetric, s.P);
    if (error) return error;
  }
  return with_type(type, [&](auto value) -> const char* {
    using T = decltype(value);
    const auto run = [&](Phase phase) {
      return p.channels_last ? start<true, T>(p, buffers.sums, phase, stream)
                             : start<false, T>(p, buffers.sums, phase, stream);
    };
    if (Cut(s).image_tiles == 1) return run(Phase::kWhole);
    if (p.norm_weight)
      if (const char* error = run(Phase::kSums)) return error;
    return p.dx ? run(Phase::kStore) : nullptr;
  });
}

}  // namespace shvit::cuda
