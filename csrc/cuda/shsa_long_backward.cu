// Gradients of shsa for any number of tokens, in three launches; norm_backward and reduce finish.
//
//   1. [k | v] and z staged again from x1, [q | dout] beside them, and of each query row_max, 1 / row_sum and
//   delta
//   2. per tile of keys over all queries  dv = a^T dout, dk = scale dl^T q,
//      per tile of queries over all keys  dq = scale dl k, and dx beyond P
//   3. dz = [dq dk dv] (factor W), and parts of dW = [dq dk dv]^T z and of its column sums db
//
// where l = scale q k^T, a = exp(l - row_max) / row_sum, dout is the gradient of y1 (under ReLU: where y > 0),
// da = dout v^T, dl = a (da - delta), and delta = the sum of dout * y1 over the channels, which is the mean of
// da under a. Logits are computed twice, because dq would otherwise need atomics or N / 64 partial sums.
//
// Budget per image: 2 N (3 O P + N (7 D + 4 P)) operations less the projection's share, at P = 72, D = 16 2 N
// (22500 + 400 N): 0.93 GFLOP at N = 1050, 2.7 us of an H100's mma.sync at 350 TFLOP/s, beside two times N^2
// exponentials (0.6 us). Bytes of main memory in float16: 2 N (2 P + 2 (D + P) + P + O) staged, read once or
// twice more from L2, 4 N P of dz and 2 N (3 (C - P)) of the rest; 3.4 MB or 1 us. Arithmetic is the limit.
#include <algorithm>

#include "long.cuh"
#include "rest.cuh"

namespace shvit::cuda {

namespace {

// Of a query; zeros behind the last token of an image.
struct alignas(16) QueryStatistics {
  float row_max, inverse_sum, delta, unused;
};

// What the launches hand on: rows of tokens, as long.cuh pads them.
template <class T>
struct BackwardWorkspace {
  Workspace memory;
  T *qd, *kv, *z, *dqkv;  // [q | dout], [k | v], z, [dq | dk | dv]
  QueryStatistics* queries;

  BackwardWorkspace(void* base, const Sizes& s) : memory(base) {
    const Staging staging(s);
    const int64_t tokens = s.B * staging.N;
    qd = memory.take<T>(tokens * (staging.D + staging.P));
    kv = memory.take<T>(tokens * (staging.D + staging.P));
    z = memory.take<T>(tokens * staging.P);
    dqkv = memory.take<T>(tokens * staging.O);
    queries = memory.take<QueryStatistics>(tokens);
  }
};

// ---------------------------------------------------------------------------------------------------------------
// 1. Staging

constexpr int kGradientChannels = 64;  // of dy and y in shared memory at a time

__host__ __device__ constexpr int gradient_tile_values() { return kTokens * row_distance(kGradientChannels); }
static_assert(kTokens == kGradientChannels, "the tile is as large in either layout");

// dout and the statistics of the queries of tile number `block` of all images. delta comes from the very
// product that makes da: where one key takes all, y is its v, delta equals da to the bit, and dl is zero, as in
// truth.
template <bool ChannelsLast, class T>
__device__ void stage_gradient(const ShsaBackwardParams& p, T* qd, QueryStatistics* statistics, int64_t block) {
  using Matrix = std::conditional_t<ChannelsLast, KContiguous<T>, KStrided<T>>;
  constexpr int kValues = Chunk<T>::kValues, kLd = row_distance(kGradientChannels);
  const Sizes& s = p.sizes;
  const Staging staging(s);
  const Group group = whole_block();
  const int64_t image = block / staging.tiles();
  const int first_token = static_cast<int>(block % staging.tiles()) * kTokens;
  const int tokens = min(kTokens, s.N - first_token), width = staging.D + staging.P;
  const int64_t first_row = image * staging.N + first_token, size = static_cast<int64_t>(s.C) * s.N;
  const int warp_row = warp_index() * kTile;
  T* dout = ptx::shared_memory<T>();
  T* y = dout + gradient_tile_values();
  Sums<1> products;  // of dout and y of 16 tokens each; the diagonal is delta
  clear<1>(products);
  for (int first = 0; first < s.P; first += kGradientChannels) {
    const int channels = min(kGradientChannels, s.P - first);
    const int rows = ChannelsLast ? tokens : channels, columns = ChannelsLast ? channels : tokens;
    const int64_t stride = ChannelsLast ? s.C : s.N;
    const int64_t at =
        image * size + (ChannelsLast ? first_token * stride + first : first * stride + first_token);
    if (first > 0) __syncthreads();
    load_matrix(group, dout, kLd, static_cast<const T*>(p.dy) + at, stride, rows, columns);
    load_matrix(group, y, kLd, static_cast<const T*>(p.y) + at, stride, rows, columns);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (p.relu) {
      for_each_entry(group, rows, columns, kValues, [&](int row, int column) {
        T* place = dout + row * kLd + column;
        Chunk<T> gradient = load_chunk(place);
        const Chunk<T> output = load_chunk(y + row * kLd + column);
#pragma unroll
        for (int i = 0; i < kValues; ++i)
          gradient.values[i] = WherePositive()(gradient.values[i], output.values[i]);
        store_chunk(place, gradient);
      });
      __syncthreads();
    }
    for_each_token([&](int token) {
      T* to = qd + (first_row + token) * width + staging.D + first;
      for (int channel = lane_index() % 4 * kValues; channel < padded(channels); channel += 4 * kValues)
        store_chunk(to + channel, token < tokens ? chunk_of(Matrix{dout, kLd}, token, channel) : Chunk<T>{});
    });
    with_op<T>(p.precision.tf32_attn, [&](auto op) {
      product<decltype(op), 1>(products, Matrix{dout, kLd}, warp_row, Matrix{y, kLd}, warp_row,
                               padded(channels));
    });
  }
  if (lane_index() % 4 != lane_index() / 8) return;  // rows g and g + 8 of the diagonal
  const bool odd = lane_index() / 4 % 2 == 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = warp_row + lane_index() / 4 + 8 * half;
    const int64_t from = image * s.N + first_token + token;
    QueryStatistics query = {};
    if (token < tokens)
      query = {p.row_max[from], 1.0f / p.row_sum[from],
               odd ? products[half][2 * half + 1] : products[half][2 * half], 0.0f};
    statistics[first_row + token] = query;
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kStageThreads, 4)
    stage_kernel(ShsaForwardParams forward, ShsaBackwardParams p, BackwardWorkspace<T> w) {
  const Staging staging(p.sizes);
  const int64_t tiles = p.sizes.B * staging.tiles();
  const Staged<T> staged = {w.qd, staging.D + staging.P, w.kv, w.z};
  if (blockIdx.x < tiles) {
    if (forward.channels_last) {
      stage_tile<Op, true>(forward, nullptr, staged, blockIdx.x);
    } else {
      stage_tile<Op, false>(forward, nullptr, staged, blockIdx.x);
    }
  } else if (p.channels_last) {
    stage_gradient<true>(p, w.qd, w.queries, blockIdx.x - tiles);
  } else {
    stage_gradient<false>(p, w.qd, w.queries, blockIdx.x - tiles);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// 2. Attention

// A block makes the gradients of `rows` tokens, its own, which meet a tile of `others` at a time: of keys,
// which meet queries, and of queries, which meet keys. Its warps stand in rows / 16 by `groups`, which share
// the others of a tile, by the kernel's Shares, which share the columns of the results.
struct Tiling {
  int rows, others, groups, stages;  // stages: tiles of others in shared memory
  int ld, own_values, tile_values;
  int64_t blocks;  // for the keys, and as many for the queries; those behind them make dx beyond P

  Tiling(const Sizes& s, int value_bytes) : ld(row_distance(padded(s.D) + padded(s.P))) {
    const Staging staging(s);
    // With few blocks multiprocessors would be idle: then a block takes fewer tokens.
    const int64_t blocks_of_64 = 2 * s.B * staging.tiles();
    rows = blocks_of_64 >= 256 ? 64 : blocks_of_64 >= 128 ? 32 : 16;
    const auto fits = [&](int tiles) {
      return (rows + tiles * others) * ld * value_bytes +
                 tiles * others * static_cast<int>(sizeof(QueryStatistics)) <=
             kSharedBytes;
    };
    others = kTokens;
    while (rows > 32 && !fits(1)) rows /= 2;
    while (!fits(1)) others /= 2;
    stages = fits(2) ? 2 : 1;
    groups = std::min(kMostWarps * kTile / rows, others / kTile);
    blocks = s.B * staging.N / rows;
    own_values = rows * ld;
    tile_values = others * ld;
  }

  static constexpr int kMostWarps = 4;  // of a share

  __host__ __device__ int row_warps() const { return rows / kTile; }
  int threads(int shares) const { return row_warps() * groups * shares * kWarp; }
  // The sums of all groups but the first go to the first through shared memory.
  size_t shared_bytes(int shares, int floats_of_lane, int value_bytes) const {
    const size_t merged = static_cast<size_t>(threads(shares) / groups * (groups - 1)) * floats_of_lane;
    return std::max(static_cast<size_t>(own_values + stages * tile_values) * value_bytes +
                        stages * others * sizeof(QueryStatistics),
                    merged * sizeof(float));
  }
};

// Tiles of 16 others whose logits a warp has at a time; float32 takes more instructions for each.
template <class Op>
constexpr int kStepsOf = Op::kStep == kTile ? 2 : 1;

// The tokens of a block, keys or queries, and their sums; QueryPairs and ValuePairs are tiles of 16 columns of
// dk or dq and of dv.
template <class Op, bool OwnKeys, int QueryPairs, int ValuePairs, int Shares, class T>
__device__ void attend(const ShsaBackwardParams& p, const Tiling& tiling, const BackwardWorkspace<T>& w,
                       int64_t block) {
  constexpr int kSteps = kStepsOf<Op>;
  const Sizes& s = p.sizes;
  const Staging staging(s);
  const Group group = whole_block();
  const int width = staging.D + staging.P, blocks_of_image = staging.N / tiling.rows;
  const int64_t image = block / blocks_of_image, first_row = image * staging.N;
  const int first_token = static_cast<int>(block % blocks_of_image) * tiling.rows;
  const int tiles = first_token < s.N ? (s.N + tiling.others - 1) / tiling.others : 0;  // the padding has zeros
  const T* own_rows = (OwnKeys ? w.kv : w.qd) + (first_row + first_token) * width;
  const T* other_rows = (OwnKeys ? w.qd : w.kv) + first_row * width;

  T* own = ptx::shared_memory<T>();
  T* tile_memory = own + tiling.own_values;
  auto* statistics_memory =
      reinterpret_cast<QueryStatistics*>(tile_memory + tiling.stages * tiling.tile_values);
  const auto load_tile = [&](int tile) {
    const int stage = tile % tiling.stages, first = tile * tiling.others;
    load_rows_async<16>(group, tile_memory + stage * tiling.tile_values, tiling.ld,
                        other_rows + static_cast<int64_t>(first) * width, width, tiling.others, width);
    if (OwnKeys)
      for (int i = group.rank; i < tiling.others; i += group.size)
        ptx::cp_async<16>(statistics_memory + stage * tiling.others + i, w.queries + first_row + first + i);
    ptx::cp_async_commit();
  };
  if (tiles > 0) {
    load_rows_async<16>(group, own, tiling.ld, own_rows, width, tiling.rows, width);
    load_tile(0);
  }

  const int row = warp_index() % tiling.row_warps() * kTile;
  const int other_group = warp_index() / tiling.row_warps() % tiling.groups;
  const int share = warp_index() / (tiling.row_warps() * tiling.groups);
  const int others_of_group = tiling.others / tiling.groups, first_other = other_group * others_of_group;
  const auto pairs_of_share = [&](int columns) { return (columns / kTile + Shares - 1) / Shares; };
  const int query_column = share * pairs_of_share(staging.D) * kTile;
  const int value_column = share * pairs_of_share(staging.P) * kTile;
  const int query_pairs = min(pairs_of_share(staging.D), (staging.D - query_column) / kTile);
  const int value_pairs = min(pairs_of_share(staging.P), (staging.P - value_column) / kTile);

  QueryStatistics of_rows[2];
  if (!OwnKeys)
    for (int half = 0; half < 2; ++half)
      of_rows[half] = w.queries[first_row + first_token + row + lane_index() / 4 + 8 * half];
  Sums<QueryPairs> dqk;
  Sums<ValuePairs> dv;
  clear<QueryPairs>(dqk);
  clear<ValuePairs>(dv);
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (tiling.stages == 2 && tile + 1 < tiles) load_tile(tile + 1);
    const int stage = tile % tiling.stages;
#pragma unroll 1
    for (int first = first_other; first < first_other + others_of_group; first += kSteps * kTile) {
      const int others = min(min(kSteps * kTile, others_of_group), s.N - tile * tiling.others - first);
      if (others <= 0) break;
      const int steps = padded(others) / kTile;
      const T* other = tile_memory + stage * tiling.tile_values + first * tiling.ld;
      const QueryStatistics* of_columns = statistics_memory + stage * tiling.others + first;
      Sums<kSteps> a, dl;
      clear<kSteps>(a);
      clear<kSteps>(dl);
      product<Op, kSteps>(a, KContiguous<T>{own, tiling.ld}, row, KContiguous<T>{other, tiling.ld}, 0,
                          staging.D, steps);
      product<Op, kSteps>(dl, KContiguous<T>{own + staging.D, tiling.ld}, row,
                          KContiguous<T>{other + staging.D, tiling.ld}, 0, staging.P, steps);
#pragma unroll
      for (int j = 0; j < 2 * kSteps; ++j) {
        if (j < 2 * steps) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = 8 * j + 2 * (lane_index() % 4) + i % 2;
            const QueryStatistics query = OwnKeys ? of_columns[column] : of_rows[i / 2];
            // Rounded as in the forward: fused with the subtraction, the probabilities would not add up to 1.
            const float logit = __fmul_rn(a[j][i], p.scale);
            const float probability = exponential<Op>(logit - query.row_max) * query.inverse_sum;
            a[j][i] = column < others ? probability : 0.0f;
            dl[j][i] = column < others ? probability * (dl[j][i] - query.delta) : 0.0f;
          }
        }
      }
      if (OwnKeys)
        product_of_sums<Op, ValuePairs, kSteps>(dv, a, KStrided<T>{other + staging.D, tiling.ld}, value_column,
                                                steps, value_pairs);
      product_of_sums<Op, QueryPairs, kSteps>(dqk, dl, KStrided<T>{other, tiling.ld}, query_column, steps,
                                              query_pairs);
    }
    if (tiling.stages == 1 && tile + 1 < tiles) {
      __syncthreads();
      load_tile(tile + 1);
    }
  }

  if (tiling.groups > 1) {
    __syncthreads();
    constexpr int kFloats = 8 * (QueryPairs + ValuePairs);
    const auto saved_by = [&](int other) {
      const int warp = (share * (tiling.groups - 1) + other - 1) * tiling.row_warps() + row / kTile;
      return ptx::shared_memory<float>() + warp * kFloats * kWarp + lane_index();
    };
    const auto each_sum = [&](float* saved, auto f) {
#pragma unroll
      for (int j = 0; j < 2 * QueryPairs; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) f(dqk[j][i], saved[(4 * j + i) * kWarp]);
      if (OwnKeys) {
#pragma unroll
        for (int j = 0; j < 2 * ValuePairs; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) f(dv[j][i], saved[(4 * (2 * QueryPairs + j) + i) * kWarp]);
      }
    };
    if (other_group > 0) each_sum(saved_by(other_group), [](float sum, float& saved) { saved = sum; });
    __syncthreads();
    if (other_group > 0) return;
    for (int other = 1; other < tiling.groups; ++other)
      each_sum(saved_by(other), [](float& sum, float saved) { sum += saved; });
  }

  const auto store = [&](auto& sums, int pairs, int column, float factor) {
    constexpr int kPairs = sizeof(sums) / sizeof(Sums<1>);
    for_each_pair<kPairs>(
        sums,
        [&](int i, int j, float one, float two) {
          const int token = first_token + row + i;
          T* to = w.dqkv + (first_row + token) * staging.O + column + j;
          const bool inside = token < s.N;
          store_pair(to, inside ? one * factor : 0.0f, inside ? two * factor : 0.0f);
        },
        pairs);
  };
  store(dqk, query_pairs, (OwnKeys ? staging.D : 0) + query_column, p.scale);
  if (OwnKeys) store(dv, value_pairs, 2 * staging.D + value_column, 1.0f);
}

template <bool ChannelsLast, class T>
__device__ void make_rest(const ShsaBackwardParams& p, int64_t block) {
  const T *dy = static_cast<const T*>(p.dy), *y = static_cast<const T*>(p.y), *nothing = nullptr;
  T* dx = static_cast<T*>(p.dx);
  if (p.relu) {
    map_rest<ChannelsLast>(p.sizes, block, dy, y, dx, WherePositive());
  } else {
    map_rest<ChannelsLast>(p.sizes, block, dy, nothing, dx, First());
  }
}

template <class Op, int QueryPairs, int ValuePairs, int Shares, class T>
__global__ void __launch_bounds__(Tiling::kMostWarps * Shares * kWarp)
    attention_kernel(ShsaBackwardParams p, Tiling tiling, BackwardWorkspace<T> w) {
  const int64_t block = blockIdx.x;
  if (block < tiling.blocks) {
    attend<Op, true, QueryPairs, ValuePairs, Shares>(p, tiling, w, block);
  } else if (block < 2 * tiling.blocks) {
    attend<Op, false, QueryPairs, ValuePairs, Shares>(p, tiling, w, block - tiling.blocks);
  } else if (p.channels_last) {
    make_rest<true, T>(p, block - 2 * tiling.blocks);
  } else {
    make_rest<false, T>(p, block - 2 * tiling.blocks);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// 3. The projection

constexpr int kOutputs = 64, kChannels = 128, kChannelPairs = kChannels / kTile;  // of a block's tile
constexpr int kProjectionThreads = 4 * kWarp;

// Tokens of dqkv and z, or rows of the weight, in shared memory at a time.
template <class T>
constexpr int kDepth = 128 / sizeof(T);

struct ProjectionTiling {
  int output_tiles, channel_tiles, parts;
  int64_t input_blocks, blocks;  // of dz, and in all

  explicit ProjectionTiling(const ShsaBackwardParams& p) {
    const Staging staging(p.sizes);
    output_tiles = (staging.O + kOutputs - 1) / kOutputs;
    channel_tiles = (staging.P + kChannels - 1) / kChannels;
    parts = shsa_long_backward_parts(p.sizes);
    input_blocks = p.dz ? p.sizes.B * staging.tiles() * channel_tiles : 0;
    const bool weight = p.dweight_parts || p.dbias_parts;
    blocks = input_blocks + (weight ? static_cast<int64_t>(parts) * output_tiles * channel_tiles : 0);
  }
};

// dz of a tile of tokens and of channels.
template <class Op, class T>
__device__ void input_gradient(const ShsaForwardParams& forward, const ShsaBackwardParams& p,
                               const ProjectionTiling& tiling, const T* dqkv, int64_t block) {
  const Sizes& s = p.sizes;
  const Staging staging(s);
  const Group group = whole_block();
  constexpr int kLdOutputs = row_distance(kDepth<T>), kLd = row_distance(kChannels);
  T* gradient = ptx::shared_memory<T>();
  T* weight = gradient + kTokens * kLdOutputs;
  const Vectors vectors(s, reinterpret_cast<float*>(weight + kDepth<T> * kLd));
  if (p.bn_mean) load_vectors<T>(forward, vectors);

  const int first_channel = static_cast<int>(block % tiling.channel_tiles) * kChannels;
  const int channels = min(kChannels, s.P - first_channel);
  const int64_t tile = block / tiling.channel_tiles, image = tile / staging.tiles();
  const int first_token = static_cast<int>(tile % staging.tiles()) * kTokens;
  Sums<kChannelPairs> sums;
  clear<kChannelPairs>(sums);
  for (int first = 0; first < staging.O; first += kDepth<T>) {
    const int outputs = min(kDepth<T>, staging.O - first);
    __syncthreads();
    load_rows_async<16>(group, gradient, kLdOutputs, dqkv + tile * kTokens * staging.O + first, staging.O,
                        kTokens, outputs);
    load_weight_rows(s, static_cast<const T*>(p.qkv_weight) + first_channel, channels, weight, kLd, first,
                     outputs);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (p.bn_mean) {
      for_each_entry(group, outputs, channels, 1, [&](int row, int column) {
        T& w = weight[row * kLd + column];
        w = from_float<T>(to_float(w) * vectors.factor[first + row]);
      });
      __syncthreads();
    }
    product<Op, kChannelPairs>(sums, KContiguous<T>{gradient, kLdOutputs}, warp_index() * kTile,
                               KStrided<T>{weight, kLd}, 0, outputs, padded(channels) / kTile);
  }
  for_each_pair<kChannelPairs>(sums, [&](int i, int j, float one, float two) {
    const int token = first_token + warp_index() * kTile + i;
    if (token >= s.N) return;
    float* to = p.dz + (image * s.P + first_channel + j) * s.N + token;
    if (j < channels) to[0] = one;
    if (j + 1 < channels) to[s.N] = two;
  });
}

// A part of dW and db, of a tile of outputs and of channels.
template <class Op, class T>
__device__ void weight_gradient(const ShsaBackwardParams& p, const ProjectionTiling& tiling, const T* dqkv,
                                const T* z, int64_t block) {
  const Sizes& s = p.sizes;
  const Staging staging(s);
  const Group group = whole_block();
  constexpr int kLdOutputs = row_distance(kOutputs), kLd = row_distance(kChannels);
  constexpr int kStageValues = kDepth<T> * (kLdOutputs + kLd);
  const int first_channel = static_cast<int>(block % tiling.channel_tiles) * kChannels;
  const int channels = min(kChannels, staging.P - first_channel);
  block /= tiling.channel_tiles;
  const int first_output = static_cast<int>(block % tiling.output_tiles) * kOutputs;
  const int outputs = min(kOutputs, staging.O - first_output),
            part = static_cast<int>(block / tiling.output_tiles);
  const int64_t depths = s.B * staging.N / kDepth<T>;
  const int64_t begin = depths * part / tiling.parts, end = depths * (part + 1) / tiling.parts;
  const auto load = [&](int64_t depth) {
    T* gradient = ptx::shared_memory<T>() + (depth - begin) % 2 * kStageValues;
    load_rows_async<16>(group, gradient, kLdOutputs, dqkv + depth * kDepth<T> * staging.O + first_output,
                        staging.O, kDepth<T>, outputs);
    load_rows_async<16>(group, gradient + kDepth<T> * kLdOutputs, kLd,
                        z + depth * kDepth<T> * staging.P + first_channel, staging.P, kDepth<T>, channels);
    ptx::cp_async_commit();
  };
  const int row = warp_index() * kTile, all_outputs = 2 * s.D + s.P;
  const bool sums_bias = p.dbias_parts && first_channel == 0 && group.rank < outputs;
  float bias = 0.0f;
  Sums<kChannelPairs> sums;
  clear<kChannelPairs>(sums);
  if (begin < end) load(begin);
  for (int64_t depth = begin; depth < end; ++depth) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (depth + 1 < end) load(depth + 1);
    const T* gradient = ptx::shared_memory<T>() + (depth - begin) % 2 * kStageValues;
    if (p.dweight_parts && row < outputs)
      product<Op, kChannelPairs>(sums, KStrided<T>{gradient, kLdOutputs}, row,
                                 KStrided<T>{gradient + kDepth<T> * kLdOutputs, kLd}, 0, kDepth<T>,
                                 channels / kTile);
    if (sums_bias) {
      float sum = 0.0f;
#pragma unroll 8
      for (int token = 0; token < kDepth<T>; ++token)
        sum += to_float(gradient[token * kLdOutputs + group.rank]);
      bias += sum;
    }
  }
  if (p.dweight_parts && row < outputs) {
    for_each_pair<kChannelPairs>(sums, [&](int i, int j, float one, float two) {
      const int output = projected_channel(s, first_output + row + i), channel = first_channel + j;
      if (output < 0) return;
      float* to = p.dweight_parts + (static_cast<int64_t>(part) * all_outputs + output) * s.P + channel;
      if (channel < s.P) to[0] = one;
      if (channel + 1 < s.P) to[1] = two;
    });
  }
  const int output = sums_bias ? projected_channel(s, first_output + group.rank) : -1;
  if (output >= 0) p.dbias_parts[static_cast<int64_t>(part) * all_outputs + output] = bias;
}

// Three blocks on a multiprocessor: without a number the compiler keeps to fewer registers, and spills.
template <class Op, class T>
__global__ void __launch_bounds__(kProjectionThreads, 3)
    projection_kernel(ShsaForwardParams forward, ShsaBackwardParams p, ProjectionTiling tiling,
                      BackwardWorkspace<T> w) {
  if (blockIdx.x < tiling.input_blocks) {
    input_gradient<Op>(forward, p, tiling, w.dqkv, blockIdx.x);
  } else {
    weight_gradient<Op>(p, tiling, w.dqkv, w.z, blockIdx.x - tiling.input_blocks);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Launches

// The forward of which z, q, k and v are staged again: of x1, an image of P channels with known statistics.
ShsaForwardParams forward_of(const ShsaBackwardParams& p) {
  ShsaForwardParams f = {};
  f.sizes = p.sizes;
  f.sizes.C = p.sizes.P;
  f.channels_last = p.x1_channels_last;
  f.statistics_given = true;
  f.bn_eps = p.bn_eps;
  f.x = p.x1;
  f.norm_weight = p.norm_weight;
  f.norm_bias = p.norm_bias;
  f.qkv_weight = p.qkv_weight;
  f.qkv_bias = p.qkv_bias;
  f.bn_weight = p.bn_weight;
  f.bn_bias = p.bn_bias;
  f.bn_mean = p.bn_mean;
  f.bn_var = p.bn_var;
  f.bn_statistics_float32 = true;
  f.mean = const_cast<float*>(p.mean);
  f.rstd = const_cast<float*>(p.rstd);
  return f;
}

template <class Op, class T>
const char* stage(const ShsaForwardParams& forward, const ShsaBackwardParams& p, const BackwardWorkspace<T>& w,
                  void* stream) {
  const Sizes& s = p.sizes;
  dim3 grid;
  if (const char* error = grid_of(2 * s.B * Staging(s).tiles(), grid)) return error;
  const size_t bytes = std::max(StageLayout(s, forward.channels_last, sizeof(T)).bytes(s, sizeof(T)),
                                2 * gradient_tile_values() * sizeof(T));
  return launch(stage_kernel<Op, T>, grid, kStageThreads, bytes, stream, forward, p, w);
}

template <class Op, int QueryPairs, int ValuePairs, int Shares, class T>
const char* attend(const ShsaBackwardParams& p, const BackwardWorkspace<T>& w, void* stream) {
  const Tiling tiling(p.sizes, sizeof(T));
  const int64_t rest = p.dx ? p.sizes.B * rest_blocks(p.sizes, p.channels_last, sizeof(T)) : 0;
  dim3 grid;
  if (const char* error = grid_of(2 * tiling.blocks + rest, grid)) return error;
  const size_t bytes = tiling.shared_bytes(Shares, 8 * (QueryPairs + ValuePairs), sizeof(T));
  return launch(attention_kernel<Op, QueryPairs, ValuePairs, Shares, T>, grid, tiling.threads(Shares), bytes,
                stream, p, tiling, w);
}

template <class Op, class T>
const char* project(const ShsaForwardParams& forward, const ShsaBackwardParams& p,
                    const BackwardWorkspace<T>& w, void* stream) {
  const ProjectionTiling tiling(p);
  if (tiling.blocks == 0) return nullptr;
  dim3 grid;
  if (const char* error = grid_of(tiling.blocks, grid)) return error;
  const size_t for_input =
      (kTokens * row_distance(kDepth<T>) + kDepth<T> * row_distance(kChannels)) * sizeof(T) +
      Vectors::floats(p.sizes) * sizeof(float);
  const size_t for_weight = 2 * kDepth<T> * (row_distance(kOutputs) + row_distance(kChannels)) * sizeof(T);
  return launch(projection_kernel<Op, T>, grid, kProjectionThreads, std::max(for_input, for_weight), stream,
                forward, p, tiling, w);
}

template <class T>
const char* run(const ShsaBackwardParams& p, const BackwardWorkspace<T>& w, void* stream) {
  const ShsaForwardParams forward = forward_of(p);
  const auto with_projection = [&](auto f) { return with_op_of_launch<T>(p.precision.tf32_proj, f); };
  const char* error = with_projection([&](auto op) { return stage<decltype(op)>(forward, p, w, stream); });
  if (error) return error;
  error = with_op_of_launch<T>(p.precision.tf32_attn, [&](auto op) {
    using Op = decltype(op);
    return p.sizes.P <= 96 && p.sizes.D <= 32 ? attend<Op, 2, 6, 1>(p, w, stream)
                                              : attend<Op, 4, 8, 2>(p, w, stream);
  });
  if (error) return error;
  return with_projection([&](auto op) { return project<decltype(op)>(forward, p, w, stream); });
}

}  // namespace

int shsa_long_backward_parts(const Sizes& s) {
  const Staging staging(s);
  // Blocks enough for any device; each writes its part of dW, which is then read once.
  constexpr int kWanted = 256;
  const int tiles = (staging.O + kOutputs - 1) / kOutputs * ((staging.P + kChannels - 1) / kChannels);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(s.B * staging.tiles(), kWanted / tiles)));
}

size_t shsa_long_backward_workspace(const Sizes& sizes, Type type) {
  return type == Type::kFloat32 ? BackwardWorkspace<float>(nullptr, sizes).memory.used()
                                : BackwardWorkspace<__half>(nullptr, sizes).memory.used();
}

const char* shsa_long_backward(const ShsaBackwardParams& params, void* workspace, Type type, void* stream) {
  if (params.sizes.B == 0) return nullptr;
  return with_type(type, [&](auto value) {
    return run(params, BackwardWorkspace<decltype(value)>(workspace, params.sizes), stream);
  });
}

}  // namespace shvit::cuda
