// y = concat(attention over the first P channels, the others), then ReLU: any number of tokens, in three
// launches.
//
//   1. statistics of x1 in parts of 4096 values (none without norm, or where they are given)
//   2. z = norm(x1), [q k v] = factor * (W z) + offset, staged in the storage type (long.cuh)
//   3. attention with an online softmax over tiles of keys; behind its blocks those that copy the other
//   channels
//
// Staging against projecting k and v again for each block of 64 queries: an image has N / 64 such blocks, and
// to project a tile of 64 keys takes 64 P (D + P) multiply-adds beside the 64 * 64 (D + P) of its attention, so
// twice the arithmetic at P = 64; staging costs 2 N (2 D + P) values written once and read from L2 N / 64
// times, which attention without staging would read as x1 all the same.
//
// Budget at P = 72, D = 16, float16, per image: 2 N (O P + N (D + P)) = 2 N (7488 + 88 N) operations; bytes of
// main memory 2 N (P for statistics + P for staging + 2 O staged + P for y1 + 2 (C - P) copied). N = 1050: 0.21
// GFLOP and 1.6 MB, on an H100 0.5 us of main memory and about 0.6 us of mma.sync at 350 TFLOP/s per image,
// with the N^2 exponentials (16 a clock on each multiprocessor: 0.3 us) beside it: arithmetic is the limit from
// there on.
#include <algorithm>

#include "long.cuh"
#include "rest.cuh"

namespace shvit::cuda {

namespace {

template <class Op, bool ChannelsLast, class T>
__global__ void __launch_bounds__(kStageThreads, 4)
    stage_kernel(ShsaForwardParams p, const PartStatistics* parts, Staged<T> staged) {
  stage_tile<Op, ChannelsLast>(p, parts, staged, blockIdx.x);
}

// ---------------------------------------------------------------------------------------------------------------
// Attention

constexpr int kMostKeys = 64, kWarpsOfShare = 4;

// Tiles of 16 keys whose logits a warp has at a time; float32 takes more instructions for each.
template <class Op>
constexpr int kStepsOf = Op::kStep == kTile ? 4 : 2;

// A block attends for `rows` queries, a tile of `keys` at a time. Its warps stand in rows / 16 by key_groups,
// which share the keys of a tile, by the kernel's Shares, which share the columns of the output.
struct Tiling {
  int rows, keys, key_groups, stages;  // stages: tiles of keys in shared memory
  int ld_q, ld_kv, ld_y;
  int q_values, tile_values, y_values;
  int64_t blocks;  // that attend; those behind them copy

  Tiling(const Sizes& s, bool channels_last, int value_bytes)
      : ld_q(row_distance(s.D)), ld_kv(row_distance(padded(s.D) + padded(s.P))) {
    // With few blocks multiprocessors would be idle: then a block takes fewer queries.
    const int64_t blocks_of_64 = s.B * ((s.N + 63) / 64);
    rows = blocks_of_64 >= 256 ? 64 : blocks_of_64 >= 128 ? 32 : 16;
    blocks = s.B * ((s.N + rows - 1) / rows);
    ld_y = row_distance(channels_last ? s.P : rows);
    q_values = rows * ld_q;
    y_values = (channels_last ? rows : padded(s.P)) * ld_y;
    const auto fits = [&](int tiles) {
      return (q_values + tiles * keys * ld_kv) * value_bytes <= static_cast<int>(kSharedBytes);
    };
    keys = kMostKeys;
    while (!fits(1)) keys /= 2;
    stages = fits(2) ? 2 : 1;
    tile_values = keys * ld_kv;
    key_groups = std::min(kWarpsOfShare * kTile / rows, keys / kTile);
  }

  __host__ __device__ int row_warps() const { return rows / kTile; }
  int threads(int shares) const { return row_warps() * key_groups * shares * kWarp; }
  // The sums of all groups of keys but the first go to the first through shared memory.
  size_t shared_bytes(int shares, int floats_of_lane, int value_bytes) const {
    const size_t merged = static_cast<size_t>(threads(shares) / key_groups * (key_groups - 1)) * floats_of_lane;
    return std::max(static_cast<size_t>(q_values + stages * tile_values) * value_bytes,
                    y_values * value_bytes + merged * sizeof(float));
  }
};

// Two rows of a lane's queries, g and g + 8: what an online softmax carries from tile to tile. The sum is over
// the lane's own keys.
template <class Op, int Pairs>
struct Attending {
  static constexpr int kSteps = kStepsOf<Op>;

  float row_max[2], row_sum[2];
  Sums<Pairs> out;

  // exp(logit - shift) is never NaN because a whole tile, or all so far, was -infinity.
  static __device__ float shift_of(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }

  __device__ void start() {
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
    clear<Pairs>(out);
  }

  __device__ __forceinline__ void rescale(int half, float highest) {
    const float factor = exponential<Op>(row_max[half] - shift_of(highest));
    row_max[half] = highest;
    row_sum[half] *= factor;
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j) {
      out[j][2 * half] *= factor;
      out[j][2 * half + 1] *= factor;
    }
  }

  // Logits q^T k of `keys` keys, in `steps` tiles of 16, become exp(scale * logit - row_max).
  __device__ __forceinline__ void update(Sums<kSteps>& logits, int keys, int steps, float scale) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = row_max[half];
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j) {
        if (j < 2 * steps) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& logit = logits[j][2 * half + i];
            logit = 8 * j + 2 * t + i < keys ? __fmul_rn(logit, scale) : -INFINITY;
            highest = ptx::max_nan(highest, logit);
          }
        }
      }
      highest = row_max_of_lanes(highest);
      rescale(half, highest);
      const float shift = shift_of(highest);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j) {
        if (j < 2 * steps) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& logit = logits[j][2 * half + i];
            logit = exponential<Op>(logit - shift);
            sum += logit;
          }
        }
      }
      row_sum[half] += sum;
    }
  }

  // out += probabilities times values, of the first `pairs` of 16 columns. Float sums the keys at hand first: a
  // chain of sums over all keys would round more than eager, which the backward takes for a gradient of every
  // logit.
  template <class Matrix>
  __device__ __forceinline__ void add(const Sums<kSteps>& probabilities, Matrix values, int column, int steps,
                                      int pairs) {
    if constexpr (std::is_same_v<Op, Float>) {
#pragma unroll
      for (int pair = 0; pair < Pairs; ++pair) {
        if (pair < pairs) {
          Sums<1> part;
          clear<1>(part);
          product_of_sums<Op, 1, kSteps>(part, probabilities, values, column + pair * kTile, steps);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            out[2 * pair][i] += part[0][i];
            out[2 * pair + 1][i] += part[1][i];
          }
        }
      }
    } else {
      product_of_sums<Op, Pairs, kSteps>(out, probabilities, values, column, steps, pairs);
    }
  }

  static constexpr int kFloats = 8 * Pairs + 4;
  static constexpr int kStride = kWarp;  // lanes side by side

  __device__ void save(float* to) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[half * kStride] = row_max[half];
      to[(2 + half) * kStride] = row_sum[half];
    }
#pragma unroll
    for (int j = 0; j < 2 * Pairs; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(4 + 4 * j + i) * kStride] = out[j][i];
  }

  // Adds what the same lane of another warp has saved.
  __device__ void merge(const float* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float other = from[half * kStride];
      rescale(half, ptx::max_nan(row_max[half], other));
      const float factor = exponential<Op>(other - shift_of(row_max[half]));
      row_sum[half] += from[(2 + half) * kStride] * factor;
#pragma unroll
      for (int j = 0; j < 2 * Pairs; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) out[j][i] += from[(4 + 4 * j + i) * kStride] * factor;
    }
  }
};

template <bool ChannelsLast, class T>
__device__ void copy_rest(const ShsaForwardParams& p, int64_t block) {
  const T *x = static_cast<const T*>(p.x), *nothing = nullptr;
  T* y = static_cast<T*>(p.y);
  if (p.relu) {
    map_rest<ChannelsLast>(p.sizes, block, x, nothing, y, Relu());
  } else {
    map_rest<ChannelsLast>(p.sizes, block, x, nothing, y, First());
  }
}

// Shares warps share the columns of the output, each Pairs tiles of 16.
template <class Op, int Pairs, int Shares, class T>
__global__ void __launch_bounds__(kWarpsOfShare * Shares * kWarp, Shares == 1 ? 3 : 1)
    attention_kernel(ShsaForwardParams p, Tiling tiling, Staged<const T> staged) {
  constexpr int kSteps = kStepsOf<Op>;
  const Sizes& s = p.sizes;
  if (blockIdx.x >= tiling.blocks) {
    const int64_t block = blockIdx.x - tiling.blocks;
    return p.channels_last ? copy_rest<true, T>(p, block) : copy_rest<false, T>(p, block);
  }
  const Staging staging(s);
  const Group group = whole_block();
  const int blocks_of_image = (s.N + tiling.rows - 1) / tiling.rows;
  const int64_t image = blockIdx.x / blocks_of_image;
  const int first_query = static_cast<int>(blockIdx.x % blocks_of_image) * tiling.rows;
  const int queries = min(tiling.rows, s.N - first_query);
  const int tiles = (s.N + tiling.keys - 1) / tiling.keys;
  const int width = staging.D + staging.P;
  const T* kv = staged.kv + image * staging.N * width;

  T* q = ptx::shared_memory<T>();
  T* tile_memory = q + tiling.q_values;
  const auto load_tile = [&](int tile) {
    load_rows_async<16>(group, tile_memory + tile % tiling.stages * tiling.tile_values, tiling.ld_kv,
                        kv + static_cast<int64_t>(tile) * tiling.keys * width, width, tiling.keys, width);
    ptx::cp_async_commit();
  };
  load_rows_async<16>(group, q, tiling.ld_q, staged.q + (image * staging.N + first_query) * staging.D,
                      staging.D, tiling.rows, staging.D);
  load_tile(0);

  const int row = warp_index() % tiling.row_warps() * kTile;
  const int key_group = warp_index() / tiling.row_warps() % tiling.key_groups;
  const int share = warp_index() / (tiling.row_warps() * tiling.key_groups);
  const int keys_of_group = tiling.keys / tiling.key_groups, first_key = key_group * keys_of_group;
  const int value_pairs = staging.P / kTile, pairs_of_share = (value_pairs + Shares - 1) / Shares;
  const int column = share * pairs_of_share * kTile;
  const int pairs = min(pairs_of_share, value_pairs - share * pairs_of_share);

  Attending<Op, Pairs> attending;
  attending.start();
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (tiling.stages == 2 && tile + 1 < tiles) load_tile(tile + 1);
    const T* tile_rows = tile_memory + tile % tiling.stages * tiling.tile_values;
#pragma unroll 1
    for (int first = first_key; first < first_key + keys_of_group; first += kSteps * kTile) {
      const int keys = min(min(kSteps * kTile, keys_of_group), s.N - tile * tiling.keys - first);
      if (keys <= 0) break;
      const int steps = padded(keys) / kTile;
      const T* k = tile_rows + first * tiling.ld_kv;
      Sums<kSteps> logits;
      clear<kSteps>(logits);
      product<Op, kSteps>(logits, KContiguous<T>{q, tiling.ld_q}, row, KContiguous<T>{k, tiling.ld_kv}, 0,
                          staging.D, steps);
      attending.update(logits, keys, steps, p.scale);
      attending.add(logits, KStrided<T>{k + staging.D, tiling.ld_kv}, column, steps, pairs);
    }
    if (tiling.stages == 1 && tile + 1 < tiles) {
      __syncthreads();
      load_tile(tile + 1);
    }
  }
  __syncthreads();

  T* y_tile = ptx::shared_memory<T>();
  if (tiling.key_groups > 1) {
    float* saved = reinterpret_cast<float*>(y_tile + tiling.y_values);
    const auto saved_by = [&](int other_group) {
      const int warp = (share * (tiling.key_groups - 1) + other_group - 1) * tiling.row_warps() + row / kTile;
      return saved + warp * Attending<Op, Pairs>::kFloats * kWarp + lane_index();
    };
    if (key_group > 0) attending.save(saved_by(key_group));
    __syncthreads();
    if (key_group == 0)
      for (int other = 1; other < tiling.key_groups; ++other) attending.merge(saved_by(other));
  }
  if (key_group == 0) {
    float inverse[2];
    for (int half = 0; half < 2; ++half) {
      const int token = row + lane_index() / 4 + 8 * half;
      const float sum = row_sum_of_lanes(attending.row_sum[half]);
      inverse[half] = 1.0f / sum;
      if (p.row_max && share == 0 && lane_index() % 4 == 0 && token < queries) {
        p.row_max[image * s.N + first_query + token] = attending.row_max[half];
        p.row_sum[image * s.N + first_query + token] = sum;
      }
    }
    for_each_pair<Pairs>(
        attending.out,
        [&](int i, int j, float one, float two) {
          one *= inverse[i / 8];
          two *= inverse[i / 8];
          if (p.relu) {
            one = ptx::max_nan(one, 0.0f);
            two = ptx::max_nan(two, 0.0f);
          }
          if (p.channels_last) {
            store_pair(y_tile + (row + i) * tiling.ld_y + column + j, one, two);
          } else {
            y_tile[(column + j) * tiling.ld_y + row + i] = from_float<T>(one);
            y_tile[(column + j + 1) * tiling.ld_y + row + i] = from_float<T>(two);
          }
        },
        pairs);
  }
  __syncthreads();
  T* y = static_cast<T*>(p.y) + image * s.C * s.N;
  if (p.channels_last) {
    store_matrix(group, y_tile, tiling.ld_y, y + static_cast<int64_t>(first_query) * s.C, s.C, queries, s.P);
  } else {
    store_matrix(group, y_tile, tiling.ld_y, y + first_query, s.N, s.P, queries);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Launches

template <class T>
struct ForwardWorkspace {
  Workspace memory;
  PartStatistics* parts;
  T *q, *kv;

  ForwardWorkspace(void* base, const Sizes& s) : memory(base) {
    const Staging staging(s);
    parts = memory.take<PartStatistics>(s.B * statistics_parts(s));
    q = memory.take<T>(s.B * staging.N * staging.D);
    kv = memory.take<T>(s.B * staging.N * (staging.D + staging.P));
  }
};

template <class Op, bool ChannelsLast, class T>
const char* stage(const ShsaForwardParams& p, const PartStatistics* parts, const Staged<T>& staged,
                  void* stream) {
  dim3 grid;
  if (const char* error = grid_of(p.sizes.B * Staging(p.sizes).tiles(), grid)) return error;
  const size_t bytes = StageLayout(p.sizes, ChannelsLast, sizeof(T)).bytes(p.sizes, sizeof(T));
  return launch(stage_kernel<Op, ChannelsLast, T>, grid, kStageThreads, bytes, stream, p, parts, staged);
}

template <class Op, int Pairs, int Shares, class T>
const char* attend(const ShsaForwardParams& p, const Staged<T>& staged, void* stream) {
  const Tiling tiling(p.sizes, p.channels_last, sizeof(T));
  dim3 grid;
  const int64_t copying = p.sizes.B * rest_blocks(p.sizes, p.channels_last, sizeof(T));
  if (const char* error = grid_of(tiling.blocks + copying, grid)) return error;
  const size_t bytes = tiling.shared_bytes(Shares, Attending<Op, Pairs>::kFloats, sizeof(T));
  return launch(attention_kernel<Op, Pairs, Shares, T>, grid, tiling.threads(Shares), bytes, stream, p, tiling,
                Staged<const T>{staged.q, staged.ld_q, staged.kv, nullptr});
}

template <bool ChannelsLast, class T>
const char* run(const ShsaForwardParams& p, void* memory, Type type, void* stream) {
  const ForwardWorkspace<T> workspace(memory, p.sizes);
  const Staged<T> staged = {workspace.q, padded(p.sizes.D), workspace.kv, nullptr};
  const char* error = nullptr;
  if (p.norm_weight && !p.statistics_given)
    error = measure_images(p.x, p.sizes, ChannelsLast, workspace.parts, type, stream);
  if (error) return error;
  error = with_op_of_launch<T>(p.precision.tf32_proj, [&](auto op) {
    return stage<decltype(op), ChannelsLast>(p, workspace.parts, staged, stream);
  });
  if (error) return error;
  return with_op_of_launch<T>(p.precision.tf32_attn, [&](auto op) {
    using Op = decltype(op);
    return p.sizes.P <= 96 ? attend<Op, 6, 1>(p, staged, stream) : attend<Op, 8, 2>(p, staged, stream);
  });
}

}  // namespace

size_t shsa_long_forward_workspace(const Sizes& sizes, Type type) {
  return type == Type::kFloat32 ? ForwardWorkspace<float>(nullptr, sizes).memory.used()
                                : ForwardWorkspace<__half>(nullptr, sizes).memory.used();
}

const char* shsa_long_forward(const ShsaForwardParams& params, void* workspace, Type type, void* stream) {
  if (params.sizes.B == 0) return nullptr;
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return params.channels_last ? run<true, T>(params, workspace, type, stream)
                                : run<false, T>(params, workspace, type, stream);
  });
}

}  // namespace shvit::cuda
