// Images of any size: q, k and v are projected once and staged in global memory, in the storage type, so that
// every later kernel reads aligned rows of tokens. What shsa_long and shsa_long_backward share.
//
// A block projects kTokens tokens. Rows [q | k | v] are padded as in shared memory: D and P to multiples of 16,
// with zeros, and the tokens of an image to a multiple of kTokens, with zeros.
#pragma once

#include <launch.cuh>

#include "norm.cuh"
#include "projection.cuh"

namespace shvit::cuda {

constexpr int kTokens = 64;
constexpr int kStageThreads = kTokens / kTile * kWarp;

// A block's shared memory that every device since sm_80 has; the kernels for any size keep within it.
constexpr int kSharedBytes = 99 << 10;

struct Staging {
  int D, P, O, N;  // padded; O = 2 D + P

  __host__ __device__ explicit Staging(const Sizes& s)
      : D(padded(s.D)), P(padded(s.P)), O(2 * D + P), N((s.N + kTokens - 1) / kTokens * kTokens) {}

  __host__ __device__ int tiles() const { return N / kTokens; }  // of an image
};

// Hands out parts of a workspace; without a base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlign = 256;
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// exp(x) as exactly as the arithmetic of the products deserves: the product with log2(e) rounds in proportion
// to x.
template <class Op>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (std::is_same_v<Op, Float>) {
    return expf(x);
  } else {
    return ptx::exp2_approx(x * kLog2E);
  }
}

// f(the arithmetic of a product of T), chosen before the launch.
template <class T, class F>
const char* with_op_of_launch(bool tf32, F f) {
  if constexpr (sizeof(T) == 2) {
    return f(Half<T>());
  } else {
    return tf32 ? f(Tf32()) : f(Float());
  }
}

inline const char* grid_of(int64_t blocks, dim3& grid) {
  if (blocks > INT32_MAX) return "more images than a grid has blocks";
  grid = dim3(static_cast<unsigned>(blocks));
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------
// Statistics of an image, in parts of kPartValues neighbouring values of its first P channels, in memory's
// order.

constexpr int kPartThreads = 256, kPartValuesEach = 16, kPartValues = kPartThreads * kPartValuesEach;

struct PartStatistics {
  float mean, squares;  // the sum of squares of centred values
};

__host__ __device__ inline int64_t statistics_parts(const Sizes& s) {
  return (static_cast<int64_t>(s.P) * s.N + kPartValues - 1) / kPartValues;
}

// statistics.cu: of all images [B, C, N], their first P channels.
const char* measure_images(const void* x, const Sizes& s, bool channels_last, PartStatistics* parts, Type type,
                           void* stream);

// The statistics of an image from its parts, by one warp.
__device__ __forceinline__ Statistics merge_statistics(const PartStatistics* parts, const Sizes& s, float eps) {
  const int64_t count = static_cast<int64_t>(s.P) * s.N,
                count_of_parts = (count + kPartValues - 1) / kPartValues;
  const auto values = [&](int64_t part) {
    return static_cast<float>(min(static_cast<int64_t>(kPartValues), count - part * kPartValues));
  };
  const float near = parts[0].mean;  // so that large means do not round
  float sum = 0.0f;
  for (int64_t i = lane_index(); i < count_of_parts; i += kWarp) sum += values(i) * (parts[i].mean - near);
  const float mean = near + warp_sum(sum) / static_cast<float>(count);
  float squares = 0.0f;
  for (int64_t i = lane_index(); i < count_of_parts; i += kWarp) {
    const float distance = parts[i].mean - mean;
    squares += parts[i].squares + values(i) * distance * distance;
  }
  return {mean, __frsqrt_rn(warp_sum(squares) / static_cast<float>(count) + eps)};
}

// ---------------------------------------------------------------------------------------------------------------
// Projection of a tile of tokens

// The shared memory of a block: z, rows of the weight, the vectors.
struct StageLayout {
  int ld_weight, ld_z, z_values;
  int chunk;  // rows of the weight at a time

  __host__ __device__ StageLayout(const Sizes& s, bool channels_last, int value_bytes)
      : ld_weight(row_distance(s.P)), ld_z(row_distance(channels_last ? s.P : kTokens)) {
    const Staging staging(s);
    z_values = (channels_last ? kTokens : staging.P) * ld_z;
    constexpr int kWanted = 72 << 10;  // three blocks on a multiprocessor; a huge P leaves one
    const int left = kWanted - z_values * value_bytes - Vectors::floats(s) * static_cast<int>(sizeof(float));
    const int rows = left / (ld_weight * value_bytes) / kTile * kTile;
    chunk = rows < kTile ? kTile : rows < staging.O ? rows : staging.O;
  }

  size_t bytes(const Sizes& s, int value_bytes) const {
    return static_cast<size_t>(z_values + chunk * ld_weight) * value_bytes + Vectors::floats(s) * sizeof(float);
  }
};

// Where the rows of tokens go: q, in rows of ld_q; [k | v]; and z, null but for a backward.
template <class T>
struct Staged {
  T* q;
  int ld_q;
  T *kv, *z;
};

// Starts to load rows first..first + count of the padded projection's weight, `columns` from `weight` on.
template <class T>
__device__ void load_weight_rows(const Sizes& s, const T* weight, int columns, T* tile, int ld, int first,
                                 int count) {
  const int D = padded(s.D);
  const int starts[4] = {0, D, 2 * D, 2 * D + padded(s.P)}, sources[3] = {0, s.D, 2 * s.D};
  const int sizes[3] = {s.D, s.D, s.P};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int begin = max(first, starts[i]), end = min(first + count, starts[i + 1]);
    if (begin >= end) continue;
    const int skipped = begin - starts[i];
    const T* rows = weight + static_cast<int64_t>(sources[i] + skipped) * s.P;
    load_matrix(whole_block(), tile + (begin - first) * ld, ld, rows, s.P, min(end - begin, sizes[i] - skipped),
                columns);
  }
}

// f(token) for the tokens of a tile, by four neighbouring lanes each.
template <class F>
__device__ __forceinline__ void for_each_token(F f) {
  for (int token = threadIdx.x / 4; token < kTokens; token += kStageThreads / 4) f(token);
}

// kValues neighbouring channels of a token, of a tile in shared memory.
template <class Matrix>
__device__ __forceinline__ auto chunk_of(Matrix m, int token, int channel) {
  using T = decltype(m.at(0, 0));
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kValues; ++i) chunk.values[i] = m.at(token, channel + i);
  return chunk;
}

// Projects tile number `block` of all images. p.x is an image of p.sizes.C channels.
template <class Op, bool ChannelsLast, class T>
__device__ void stage_tile(const ShsaForwardParams& p, const PartStatistics* parts, const Staged<T>& staged,
                           int64_t block) {
  using Left = std::conditional_t<ChannelsLast, KContiguous<T>, KStrided<T>>;
  const Sizes& s = p.sizes;
  const Staging staging(s);
  const StageLayout layout(s, ChannelsLast, sizeof(T));
  T* z = ptx::shared_memory<T>();
  T* weight = z + layout.z_values;
  const Vectors vectors(s, reinterpret_cast<float*>(weight + layout.chunk * layout.ld_weight));
  const Group group = whole_block();
  const int64_t image = block / staging.tiles();
  const int first_token = static_cast<int>(block % staging.tiles()) * kTokens;
  const int tokens = min(kTokens, s.N - first_token);
  const int rows = ChannelsLast ? tokens : s.P, columns = ChannelsLast ? s.P : tokens;

  const T* x = static_cast<const T*>(p.x) + image * s.C * s.N;
  const int64_t stride = ChannelsLast ? s.C : s.N;
  load_matrix(group, z, layout.ld_z, x + (ChannelsLast ? first_token * stride : first_token), stride, rows,
              columns);
  load_weight_rows(s, static_cast<const T*>(p.qkv_weight), s.P, weight, layout.ld_weight, 0, layout.chunk);
  ptx::cp_async_commit();
  load_vectors<T>(p, vectors);
  Statistics statistics = {0.0f, 1.0f};
  if (p.norm_weight) {
    statistics = p.statistics_given ? Statistics{p.mean[image], p.rstd[image]}
                                    : merge_statistics(parts + image * statistics_parts(s), s, p.norm_eps);
  }
  if (p.mean && !p.statistics_given && first_token == 0 && group.rank == 0) {
    p.mean[image] = statistics.mean;
    p.rstd[image] = statistics.rstd;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (p.norm_weight) {
    normalise<!ChannelsLast>(group, z, layout.ld_z, rows, columns, statistics, vectors.norm_weight,
                             vectors.norm_bias);
    __syncthreads();
  }

  const int64_t first_row = image * staging.N + first_token;
  const int row = warp_index() * kTile, kv_columns = staging.D + staging.P;
  for (int first = 0; first < staging.O; first += layout.chunk) {
    const int count = min(layout.chunk, staging.O - first);
    if (first > 0) {
      __syncthreads();
      load_weight_rows(s, static_cast<const T*>(p.qkv_weight), s.P, weight, layout.ld_weight, first, count);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    constexpr int kPairs = 2;
    for (int column = 0; column < count; column += kPairs * kTile) {
      const int pairs = min(kPairs, (count - column) / kTile);
      Sums<kPairs> sums;
      clear<kPairs>(sums);
      product<Op, kPairs>(sums, Left{z, layout.ld_z}, row, KContiguous<T>{weight, layout.ld_weight}, column,
                          staging.P, pairs);
      for_each_pair<kPairs>(
          sums,
          [&](int i, int j, float one, float two) {
            const int token = row + i, o = first + column + j;
            const bool inside = token < tokens;
            const auto value = [&](float sum, int o) {
              return inside && projected_channel(s, o) >= 0 ? sum * vectors.factor[o] + vectors.offset[o]
                                                            : 0.0f;
            };
            const int64_t to = first_row + token;
            T* pair =
                o < staging.D ? staged.q + to * staged.ld_q + o : staged.kv + to * kv_columns + o - staging.D;
            store_pair(pair, value(one, o), value(two, o + 1));
          },
          pairs);
    }
  }

  if (!staged.z) return;
  for_each_token([&](int token) {
    T* to = staged.z + (first_row + token) * staging.P;
    constexpr int kValues = Chunk<T>::kValues;
    for (int channel = lane_index() % 4 * kValues; channel < staging.P; channel += 4 * kValues)
      store_chunk(to + channel, token < tokens ? chunk_of(Left{z, layout.ld_z}, token, channel) : Chunk<T>{});
  });
}

}  // namespace shvit::cuda
