// Mean and covariance of z = norm(x1) over all tokens, float32 throughout, in two launches (and one of
// statistics where an image is more than a tile); a third makes of them the batch statistics of the projection
// W z.
//
//   1. tiles of at most 128 tokens: z, centred by the tile's own mean, and the products of its channels; a part
//   of the
//      tiles each block, merged exactly (Chan, Golub and LeVeque 1983)
//   2. parts: mean = sum n_i m_i / n, cov = sum (products_i + n_i (m_i - mean)(m_i - mean)^T) / n
//   3. W mean and diag(W cov W^T)
//
// Budget at P = 72, N = 64, B = 256: reads 2.4 MB of x1 and writes a copy; 42 M multiply-adds (the upper
// triangle), on the general units as tensor cores would round z: about 3 us of an H100's; 2.6 MB of parts,
// written and read in L2.
#include <algorithm>
#include <launch.cuh>

#include "long.cuh"
#include "projection.cuh"
#include "split.cuh"
#include "values.cuh"

namespace shvit::cuda {

namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kMostParts = 256;
constexpr int kPairs = 4;              // 16-column tiles of products that a warp sums at a time
constexpr int kManyTokens = 64 * 132;  // enough for tiles of 128 tokens on every multiprocessor of an H100

// How the batch is cut: whole images side by side in a tile, or tiles of an image.
struct Cut {
  int images;       // of a tile: 1, 2, 4 or 8
  int tokens;       // of a whole tile
  int image_tiles;  // tiles of an image, where images is 1
  int64_t tiles;
  int parts;

  __host__ __device__ explicit Cut(const Sizes& s) {
    const int most = s.P <= 128 && s.B * s.N > kManyTokens ? 128 : 64;
    images = 1;
    while (2 * images <= kWarps && 2 * images * s.N <= most) images *= 2;
    tokens = s.N <= most ? images * s.N : most;
    image_tiles = (s.N + most - 1) / most;
    tiles = image_tiles == 1 ? (s.B + images - 1) / images : s.B * image_tiles;
    parts = static_cast<int>(tiles < kMostParts ? tiles : kMostParts);
  }
};

// A tile in shared memory: x1, then z, then z less its mean; rows of tokens or of channels, as in memory. The
// distance of rows, 4 more than a multiple of 16, keeps the products' reads apart.
template <bool ChannelsLast>
struct Tile {
  int ld, values;
  __host__ __device__ Tile(const Sizes& s, int tokens)
      : ld(padded(ChannelsLast ? s.P : tokens) + 4), values(padded(ChannelsLast ? tokens : s.P) * ld) {}
  __device__ int at(int channel, int token) const {
    return ChannelsLast ? token * ld + channel : channel * ld + token;
  }
};

struct Part {
  float *products, *mean, *count;  // [P, P] from the diagonal on, [P], [1]
  static __host__ __device__ int64_t values(const Sizes& s) {
    return static_cast<int64_t>(s.P) * s.P + s.P + 1;
  }
  __device__ Part(const Sizes& s, float* parts, int64_t index)
      : products(parts + index * values(s)),
        mean(products + static_cast<int64_t>(s.P) * s.P),
        count(mean + s.P) {}
};

// What every sum is of: z less a value near its mean, the same in all blocks. Otherwise the rounding of a large
// mean would show in the differences of the tiles' means.
template <bool ChannelsLast, class T>
__device__ __forceinline__ float shift_of(const MomentsParams& p, int channel) {
  if (p.norm_weight) return parameter<T>(p.norm_bias, channel, 0.0f);
  return to_float(
      static_cast<const T*>(p.x)[ChannelsLast ? channel : static_cast<int64_t>(channel) * p.sizes.N]);
}

// f(channel, token) for all of a tile, lanes along the memory's rows.
template <bool ChannelsLast, class F>
__device__ __forceinline__ void for_each_value(const Group& group, int channels, int tokens, F f) {
  for_each_entry(group, ChannelsLast ? tokens : channels, ChannelsLast ? channels : tokens, 1,
                 [&](int row, int column) { f(ChannelsLast ? column : row, ChannelsLast ? row : column); });
}

template <bool ChannelsLast, class T>
struct Accumulate {
  using Matrix = std::conditional_t<ChannelsLast, KStrided<float>, KContiguous<float>>;

  const MomentsParams& p;
  const PartStatistics* statistics;
  const Sizes& s;
  const Cut cut;
  const Tile<ChannelsLast> tile;
  const Group group;  // of this thread's image
  // The tile; mean of the tile, of the part, the norm's weight and what is taken from z, [P] each; [2, warps].
  float *const z, *const mean, *const running, *const weight, *const shift, *const scratch;

  __device__ Accumulate(const MomentsParams& p, const PartStatistics* statistics)
      : p(p),
        statistics(statistics),
        s(p.sizes),
        cut(s),
        tile(s, cut.tokens),
        group(group_of_warps(kWarps / cut.images)),
        z(ptx::shared_memory<float>()),
        mean(z + tile.values),
        running(mean + s.P),
        weight(running + s.P),
        shift(weight + s.P),
        scratch(shift + s.P) {}

  static size_t bytes(const Sizes& s) {
    return (Tile<ChannelsLast>(s, Cut(s).tokens).values + 4 * s.P + 2 * kWarps) * sizeof(float);
  }

  // z of `tokens` tokens of an image from `first` on, less the shift, from column `column` of the tile on.
  __device__ void load(int64_t image, int first, int tokens, int column, bool present) const {
    const int64_t stride = ChannelsLast ? s.C : s.N;
    const T* x = static_cast<const T*>(p.x) + image * s.C * s.N + (ChannelsLast ? first * stride : first);
    const Extent extent = {stride, ChannelsLast ? tokens : s.P, ChannelsLast ? s.P : tokens};
    float sum = 0.0f;
    load_values(group, x, extent, [&](int row, int c, float value) {
      const int channel = ChannelsLast ? c : row, token = ChannelsLast ? row : c;
      z[tile.at(channel, column + token)] = value;
      sum += value;
    });
    const bool whole = cut.image_tiles == 1;
    const float scale = 1.0f / (static_cast<float>(s.P) * static_cast<float>(s.N));
    Statistics image_statistics = {0.0f, 1.0f};
    if (p.norm_weight && whole) {
      const float image_mean = group_sum(group, sum, scratch) * scale;
      __syncwarp();  // a group of one warp has met no barrier
      float squares = 0.0f;
      for_each_value<ChannelsLast>(group, s.P, tokens, [&](int channel, int token) {
        const float centred = z[tile.at(channel, column + token)] - image_mean;
        squares += centred * centred;
      });
      const float variance = group_sum(group, squares, scratch + kWarps) * scale;
      image_statistics = {image_mean, __frsqrt_rn(variance + p.norm_eps)};
    } else {
      if (p.norm_weight)
        image_statistics = merge_statistics(statistics + image * statistics_parts(s), s, p.norm_eps);
      __syncthreads();
    }
    if (present && first == 0 && group.rank == 0) {
      p.image_mean[image] = image_statistics.mean;
      p.image_rstd[image] = image_statistics.rstd;
    }
    if (p.x1 && present) {
      T* x1 = static_cast<T*>(p.x1) + image * s.P * s.N + (ChannelsLast ? first * s.P : first);
      store_values(group, x1, Extent{ChannelsLast ? s.P : s.N, extent.rows, extent.columns},
                   [&](int row, int c) {
                     return z[tile.at(ChannelsLast ? c : row, column + (ChannelsLast ? row : c))];
                   });
    }
    // Other threads stored some of these values above.
    __syncthreads();
    for_each_value<ChannelsLast>(group, s.P, tokens, [&](int channel, int token) {
      float& value = z[tile.at(channel, column + token)];
      value = p.norm_weight ? (value - image_statistics.mean) * (image_statistics.rstd * weight[channel])
                            : value - shift[channel];
    });
  }

  // Takes the tile's mean from its tokens; zeros behind them.
  __device__ void centre(int tokens) const {
    for (int channel = warp_index(); channel < s.P; channel += kWarps) {
      float sum = 0.0f;
      for (int token = lane_index(); token < tokens; token += kWarp) sum += z[tile.at(channel, token)];
      const float tile_mean = warp_sum(sum) / static_cast<float>(tokens);
      for (int token = lane_index(); token < padded(cut.tokens); token += kWarp) {
        float& value = z[tile.at(channel, token)];
        value = token < tokens ? value - tile_mean : 0.0f;
      }
      if (lane_index() == 0) mean[channel] = tile_mean;
    }
  }

  // Adds the tile's products and mean to the part's, which hold `count` tokens so far.
  __device__ void add(const Part& part, float count, int tokens) const {
    const float total = count + static_cast<float>(tokens), weight = count * static_cast<float>(tokens) / total;
    const int tiles = padded(s.P) / kTile;
    int task = 0;
    for (int i = 0; i < tiles; ++i) {
      for (int j = i; j < tiles; j += kPairs, ++task) {
        if (task % kWarps != warp_index()) continue;
        const int here = min(kPairs, tiles - j);
        Sums<kPairs> sums;
        clear<kPairs>(sums);
        add_product<NearlyExact<T>, kPairs>(sums, Matrix{z, tile.ld}, i * kTile, Matrix{z, tile.ld}, j * kTile,
                                            padded(cut.tokens), here);
        const auto put = [&](int row, int column, float sum) {
          if (row >= s.P || column >= s.P) return;
          float& product = part.products[row * s.P + column];
          if (count > 0.0f)
            sum += product + weight * (mean[row] - running[row]) * (mean[column] - running[column]);
          product = sum;
        };
        for_each_pair<kPairs>(
            sums,
            [&](int row, int column, float first, float second) {
              put(i * kTile + row, j * kTile + column, first);
              put(i * kTile + row, j * kTile + column + 1, second);
            },
            here);
      }
    }
    __syncthreads();
    const float share = static_cast<float>(tokens) / total;
    for (int channel = threadIdx.x; channel < s.P; channel += kThreads)
      running[channel] =
          count > 0.0f ? (1.0f - share) * running[channel] + share * mean[channel] : mean[channel];
  }

  __device__ void run(const Part& part) const {
    for (int channel = threadIdx.x; channel < s.P; channel += kThreads) {
      weight[channel] = parameter<T>(p.norm_weight, channel, 1.0f);
      shift[channel] = shift_of<ChannelsLast, T>(p, channel);
    }
    float count = 0.0f;
    for (int64_t t = blockIdx.x; t < cut.tiles; t += cut.parts) {
      // Whole images, a group of warps each; behind the batch's end a stand-in meets the others at the
      // barriers, and centre clears its place. Or a tile of one image, for the whole block.
      const bool whole = cut.image_tiles == 1;
      const int64_t image = whole ? t * cut.images + group.index : t / cut.image_tiles;
      const int first = whole ? 0 : static_cast<int>(t % cut.image_tiles) * cut.tokens;
      const int tokens_each = min(whole ? s.N : cut.tokens, s.N - first);
      const bool present = image < s.B;
      load(present ? image : s.B - 1, first, tokens_each, group.index * tokens_each, present);
      const int images =
          whole ? static_cast<int>(min(static_cast<int64_t>(cut.images), s.B - t * cut.images)) : 1;
      const int tokens = images * tokens_each;
      __syncthreads();
      centre(tokens);
      __syncthreads();
      add(part, count, tokens);
      count += static_cast<float>(tokens);
    }
    for (int channel = threadIdx.x; channel < s.P; channel += kThreads) part.mean[channel] = running[channel];
    if (threadIdx.x == 0) *part.count = count;
  }
};

template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(MomentsParams p, const PartStatistics* statistics, float* parts) {
  Accumulate<ChannelsLast, T>(p, statistics).run(Part(p.sizes, parts, blockIdx.x));
}

// ---------------------------------------------------------------------------------------------------------------
// Merging the parts: a block has 32 neighbouring entries of a row of cov, its warps slices of the parts.

template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(MomentsParams p, float* parts, int count_of_parts) {
  const Sizes& s = p.sizes;
  const int chunks = (s.P + kWarp - 1) / kWarp;
  const int row = blockIdx.x / chunks, column = blockIdx.x % chunks * kWarp + lane_index();
  if (blockIdx.x % chunks * kWarp + kWarp <= row) return;  // below the diagonal
  const bool inside = column < s.P;
  float* scratch = ptx::shared_memory<float>();  // [3, kThreads]
  const int each = (count_of_parts + kWarps - 1) / kWarps;
  const int begin = min(warp_index() * each, count_of_parts), end = min(begin + each, count_of_parts);
  const float scale = 1.0f / (static_cast<float>(s.B) * static_cast<float>(s.N));
  const auto total = [&](float sum, float* sums) {
    sums[threadIdx.x] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += sums[i * kWarp + lane_index()];
    return sum * scale;
  };

  float row_sum = 0.0f, column_sum = 0.0f;
#pragma unroll 8
  for (int i = begin; i < end; ++i) {
    const Part part(s, parts, i);
    row_sum += *part.count * part.mean[row];
    column_sum += inside ? *part.count * part.mean[column] : 0.0f;
  }
  const float row_mean = total(row_sum, scratch), column_mean = total(column_sum, scratch + kThreads);
  float products = 0.0f;
#pragma unroll 8
  for (int i = begin; i < end; ++i) {
    const Part part(s, parts, i);
    if (inside && column >= row)
      products += part.products[row * s.P + column] +
                  *part.count * (part.mean[row] - row_mean) * (part.mean[column] - column_mean);
  }
  const float cov = total(products, scratch + 2 * kThreads);
  if (warp_index() > 0 || !inside || column < row) return;
  p.z_cov[row * s.P + column] = p.z_cov[column * s.P + row] = cov;
  if (column == row) p.z_mean[row] = row_mean + shift_of<ChannelsLast, T>(p, row);
}

// ---------------------------------------------------------------------------------------------------------------
// Mean and variance of the projection: a block has a row of W, its warps rows of cov.

template <class T>
__global__ void __launch_bounds__(kThreads) project_kernel(MomentsParams p) {
  const int P = p.sizes.P;
  const Group block = whole_block();
  float* scratch = ptx::shared_memory<float>();  // [2, warps]
  const T* w = static_cast<const T*>(p.weight) + static_cast<int64_t>(blockIdx.x) * P;
  float mean = 0.0f, variance = 0.0f;
  for (int i = threadIdx.x; i < P; i += kThreads) mean += to_float(w[i]) * p.z_mean[i];
  for (int row = warp_index(); row < P; row += kWarps) {
    float sum = 0.0f;
    for (int i = lane_index(); i < P; i += kWarp) sum += p.z_cov[row * P + i] * to_float(w[i]);
    variance += to_float(w[row]) * sum;
  }
  mean = group_sum(block, mean, scratch);
  variance = group_sum(block, variance, scratch + kWarps);
  if (threadIdx.x > 0) return;
  p.bn_mean[blockIdx.x] = mean;
  p.bn_var[blockIdx.x] = variance < 0.0f ? 0.0f : variance;
}

// ---------------------------------------------------------------------------------------------------------------
// Launches

struct Buffers {
  PartStatistics* statistics;  // of images of more than a tile
  float* parts;
  size_t bytes;
  Buffers(void* base, const Sizes& s) {
    const Cut cut(s);
    Workspace workspace(base);
    statistics = workspace.take<PartStatistics>(cut.image_tiles == 1 ? 0 : s.B * statistics_parts(s));
    parts = workspace.take<float>(cut.parts * Part::values(s));
    bytes = workspace.used();
  }
};

template <bool ChannelsLast, class T>
const char* start(const MomentsParams& p, Type type, void* stream) {
  const Sizes& s = p.sizes;
  const Cut cut(s);
  const Buffers buffers(p.workspace, s);
  const char* error = nullptr;
  if (p.norm_weight && cut.image_tiles > 1)
    error = measure_images(p.x, s, ChannelsLast, buffers.statistics, type, stream);
  if (!error)
    error = launch(accumulate_kernel<ChannelsLast, T>, dim3(cut.parts), kThreads,
                   Accumulate<ChannelsLast, T>::bytes(s), stream, p, buffers.statistics, buffers.parts);
  if (!error)
    error = launch(merge_kernel<ChannelsLast, T>, dim3(s.P * ((s.P + kWarp - 1) / kWarp)), kThreads,
                   3 * kThreads * sizeof(float), stream, p, buffers.parts, cut.parts);
  if (!error && p.weight)
    error = launch(project_kernel<T>, dim3(s.O()), kThreads, 2 * kWarps * sizeof(float), stream, p);
  return error;
}

}  // namespace

size_t moments_workspace(const Sizes& sizes) { return Buffers(nullptr, sizes).bytes; }

const char* moments(const MomentsParams& params, Type type, void* stream) {
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return params.channels_last ? start<true, T>(params, type, stream) : start<false, T>(params, type, stream);
  });
}

}  // namespace shvit::cuda
