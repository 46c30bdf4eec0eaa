// Attention over the first P channels of the images of a block, everything on chip: what shsa_forward and
// shsa_mixer share.
//
//   z = norm(x1);   [q k v] = factor * (W z) + offset;   a = softmax(scale * q k^T);   a v
//
// One image, or several where N <= 16, each with a group of warps of its own. A warp's unit of work is 16
// tokens: its rows of q, k, v, its logits (in registers, for all keys), its probabilities (the same registers),
// its rows of a v.
#pragma once

#include "norm.cuh"
#include "projection.cuh"

namespace shvit::cuda {

constexpr int kMostShortTokens = 256, kFewTokens = 64;
constexpr int kColumnPairs = 4;  // 16-column tiles that a warp sums at a time

// Where things lie in the shared memory of a block. In the projection's rows queries, keys and values start at
// multiples of 16.
struct ShortLayout {
  int images, warps;
  int D, P, O;  // padded; O = 2 D + P
  int ld_weight, ld_z, ld_qkv;
  int z_values, qkv_values;  // of an image
  int weight_values;

  __host__ __device__ ShortLayout(const Sizes& s, bool channels_last, int images, int warps)
      : images(images),
        warps(warps),
        D(padded(s.D)),
        P(padded(s.P)),
        O(2 * D + P),
        ld_weight(row_distance(s.P)),
        ld_z(row_distance(channels_last ? s.P : s.N)),
        ld_qkv(row_distance(O)),
        z_values((channels_last ? padded(s.N) : P) * ld_z),
        qkv_values(padded(s.N) * ld_qkv),
        weight_values(O * ld_weight) {}

  // Values in front of the vectors and two floats per warp.
  __host__ __device__ int matrix_values() const { return weight_values + images * (z_values + qkv_values); }

  template <class T>
  __host__ __device__ size_t bytes(const Sizes& s) const {
    return matrix_values() * sizeof(T) + (Vectors::floats(s) + 2 * warps) * sizeof(float);
  }
};

template <class T>
struct ShortMemory : Vectors {
  T *weight, *z, *qkv;  // z and qkv of this thread's image
  T* out;               // a v, in the order of z: in its place, unless the kernel gives it another
  int ld_out;
  float* scratch;

  __device__ ShortMemory(const Sizes& s, const ShortLayout& layout, T* base, int image)
      : Vectors(s, reinterpret_cast<float*>(base + layout.matrix_values())),
        weight(base),
        z(weight + layout.weight_values + image * layout.z_values),
        qkv(weight + layout.weight_values + layout.images * layout.z_values + image * layout.qkv_values),
        out(z),
        ld_out(layout.ld_z),
        scratch(norm_bias + layout.P) {}
};

// The parts of W with f = start_matrix or finish_matrix: f(tile, its rows in global memory, their number).
template <class T, class F>
__device__ __forceinline__ void for_each_part(const ShsaForwardParams& p, const ShortLayout& layout,
                                              const ShortMemory<T>& m, F f) {
  const Sizes& s = p.sizes;
  const T* weight = static_cast<const T*>(p.qkv_weight);
#pragma unroll 1  // one copy of the code
  for (int part = 0; part < 3; ++part)
    f(m.weight + part * layout.D * layout.ld_weight, weight + part * s.D * s.P, part < 2 ? s.D : s.P);
}

template <class T>
__device__ void start_projection(const ShsaForwardParams& p, const ShortLayout& layout,
                                 const ShortMemory<T>& m) {
  for_each_part(p, layout, m, [&](T* tile, const T* from, int count) {
    start_matrix(whole_block(), tile, layout.ld_weight, from, p.sizes.P, count, p.sizes.P);
  });
}

template <class T>
__device__ void finish_projection(const ShsaForwardParams& p, const ShortLayout& layout,
                                  const ShortMemory<T>& m) {
  for_each_part(p, layout, m, [&](T* tile, const T* from, int count) {
    finish_matrix(whole_block(), tile, layout.ld_weight, from, p.sizes.P, count, p.sizes.P);
  });
}

// The first P channels of an image with `channels` in all, into a tile like z.
template <bool ChannelsLast, class T>
__device__ void start_image(const Group& group, const Sizes& s, const ShortLayout& layout, T* tile,
                            const void* images, int64_t image, int channels) {
  const T* from = static_cast<const T*>(images) + image * channels * s.N;
  start_matrix(group, tile, layout.ld_z, from, ChannelsLast ? channels : s.N, ChannelsLast ? s.N : s.P,
               ChannelsLast ? s.P : s.N);
}

template <bool ChannelsLast, class T>
__device__ void finish_image(const Group& group, const Sizes& s, const ShortLayout& layout, T* tile,
                             const void* images, int64_t image, int channels) {
  const T* from = static_cast<const T*>(images) + image * channels * s.N;
  finish_matrix(group, tile, layout.ld_z, from, ChannelsLast ? channels : s.N, ChannelsLast ? s.N : s.P,
                ChannelsLast ? s.P : s.N);
}

// x1 to z, in place. `saves`: this thread's image is one of the batch, not a stand-in behind its end.
template <bool ChannelsLast, class T>
__device__ void normalise_image(const ShsaForwardParams& p, const Group& group, const ShortLayout& layout,
                                const ShortMemory<T>& m, int64_t image, bool saves) {
  const int rows = ChannelsLast ? p.sizes.N : p.sizes.P, columns = ChannelsLast ? p.sizes.P : p.sizes.N;
  Statistics statistics = {0.0f, 1.0f};
  if (p.norm_weight) {
    if (p.statistics_given) {
      statistics = {p.mean[image], p.rstd[image]};
    } else {
      statistics = image_statistics(group, m.z, layout.ld_z, rows, columns, p.norm_eps, m.scratch);
    }
    normalise<!ChannelsLast>(group, m.z, layout.ld_z, rows, columns, statistics, m.norm_weight, m.norm_bias);
  }
  if (saves && p.mean && !p.statistics_given && group.rank == 0) {
    p.mean[image] = statistics.mean;
    p.rstd[image] = statistics.rstd;
  }
}

// qkv[token, o] = factor[o] * sum_c z[token, c] W[o, c] + offset[o]; zero in the padding, which later products
// sum over.
template <class Op, bool ChannelsLast, class T>
__device__ void project_image(const Sizes& s, const Group& group, const ShortLayout& layout,
                              const ShortMemory<T>& m) {
  using Left = std::conditional_t<ChannelsLast, KContiguous<T>, KStrided<T>>;
  const int tiles = padded(s.N) / kTile, all_pairs = layout.O / kTile;
  const int pairs = min(kColumnPairs, (all_pairs * tiles + group.warps() - 1) / group.warps());
  const int strips = (all_pairs + pairs - 1) / pairs;
  for (int task = group.rank / kWarp; task < tiles * strips; task += group.warps()) {
    const int row = task % tiles * kTile, column = task / tiles * pairs * kTile;
    const int here = min(pairs, all_pairs - column / kTile);
    Sums<kColumnPairs> sums;
    clear<kColumnPairs>(sums);
    product<Op, kColumnPairs>(sums, Left{m.z, layout.ld_z}, row, KContiguous<T>{m.weight, layout.ld_weight},
                              column, layout.P, here);
    for_each_pair<kColumnPairs>(
        sums,
        [&](int i, int j, float first, float second) {
          const int token = row + i, o = column + j;
          const bool inside = token < s.N;
          first = inside && projected_channel(s, o) >= 0 ? first * m.factor[o] + m.offset[o] : 0.0f;
          second =
              inside && projected_channel(s, o + 1) >= 0 ? second * m.factor[o + 1] + m.offset[o + 1] : 0.0f;
          store_pair(m.qkv + token * layout.ld_qkv + o, first, second);
        },
        here);
  }
}

// A warp's logits of 16 queries and the block of 64 keys from `first` on: scale * q k^T, -inf behind the last
// key.
template <class Op, class T>
__device__ __forceinline__ void logits_of_block(Sums<kColumnPairs>& logits, const ShsaForwardParams& p,
                                                const ShortLayout& layout, const ShortMemory<T>& m, int row,
                                                int first) {
  const int t = lane_index() % 4, keys = p.sizes.N - first;
  const KContiguous<T> q{m.qkv, layout.ld_qkv}, k{m.qkv + layout.D, layout.ld_qkv};
  clear<kColumnPairs>(logits);
  product<Op, kColumnPairs>(logits, q, row, k, first, layout.D, min(kColumnPairs, padded(keys) / kTile));
#pragma unroll
  for (int j = 0; j < 2 * kColumnPairs; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logits[j][i] = 8 * j + 2 * t + i % 2 < keys ? logits[j][i] * p.scale : -INFINITY;
}

// Raises the maxima of a lane's two rows to those of its logits.
__device__ __forceinline__ void raise(float (&row_max)[2], const Sums<kColumnPairs>& logits) {
#pragma unroll
  for (int j = 0; j < 2 * kColumnPairs; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) row_max[i / 2] = ptx::max_nan(row_max[i / 2], logits[j][i]);
}

// Logits become exp(logit - maximum), and 0 behind the last key even if the maximum is not finite.
__device__ __forceinline__ void exponentiate(Sums<kColumnPairs>& logits, const float (&row_max)[2], int keys) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int j = 0; j < 2 * kColumnPairs; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logits[j][i] =
          8 * j + 2 * t + i % 2 < keys ? ptx::exp2_approx((logits[j][i] - row_max[i / 2]) * kLog2E) : 0.0f;
}

__device__ __forceinline__ void add_rows(float (&row_sum)[2], const Sums<kColumnPairs>& terms) {
#pragma unroll
  for (int j = 0; j < 2 * kColumnPairs; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) row_sum[i / 2] += terms[j][i];
}

// a v (through ReLU) to the place of z, which no warp may need any more. Few: up to 64 keys, whose logits stay
// in registers; of more they are computed again, D being small, for the sum and for each strip of values.
template <class Op, bool ChannelsLast, bool Few, class T>
__device__ void attend_image(const ShsaForwardParams& p, const Group& group, const ShortLayout& layout,
                             const ShortMemory<T>& m, int64_t image, bool saves) {
  const Sizes& s = p.sizes;
  constexpr int kBlock = kColumnPairs * kTile;
  const int tiles = padded(s.N) / kTile, value_pairs = layout.P / kTile;
  // Warps beyond the number of tiles share the columns of a tile.
  const int sharers = max(1, group.warps() / tiles);
  const int pairs_each = (value_pairs + sharers - 1) / sharers;
  for (int task = group.rank / kWarp; task < tiles * sharers; task += group.warps()) {
    const int row = task % tiles * kTile, share = task / tiles;
    Sums<kColumnPairs> terms;
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
    for (int first = 0; first < (Few ? 1 : s.N); first += kBlock) {
      logits_of_block<Op>(terms, p, layout, m, row, first);
      raise(row_max, terms);
    }
    for (float& highest : row_max) highest = row_max_of_lanes(highest);
    for (int first = 0; first < (Few ? 1 : s.N); first += kBlock) {
      if (!Few) logits_of_block<Op>(terms, p, layout, m, row, first);
      exponentiate(terms, row_max, s.N - first);
      add_rows(row_sum, terms);
    }
    for (float& sum : row_sum) sum = row_sum_of_lanes(sum);
    if (saves && p.row_max && share == 0 && lane_index() % 4 == 0) {
      for (int half = 0; half < 2; ++half) {
        const int token = row + lane_index() / 4 + 8 * half;
        if (token < s.N) {
          p.row_max[image * s.N + token] = row_max[half];
          p.row_sum[image * s.N + token] = row_sum[half];
        }
      }
    }

    const float inverse[2] = {1.0f / row_sum[0], 1.0f / row_sum[1]};
    LeftSums<Op, kColumnPairs> probabilities(terms);
    const int begin = share * pairs_each, end = min(value_pairs, begin + pairs_each);
    for (int pair = begin; pair < end; pair += kColumnPairs) {
      const int here = min(kColumnPairs, end - pair), column = pair * kTile;
      Sums<kColumnPairs> sums;
      clear<kColumnPairs>(sums);
      for (int first = 0; first < (Few ? 1 : s.N); first += kBlock) {
        if (!Few) {
          logits_of_block<Op>(terms, p, layout, m, row, first);
          exponentiate(terms, row_max, s.N - first);
          probabilities = LeftSums<Op, kColumnPairs>(terms);
        }
        const KStrided<T> v{m.qkv + 2 * layout.D + first * layout.ld_qkv, layout.ld_qkv};
        product_of_sums<Op, kColumnPairs>(sums, probabilities, v, column,
                                          min(kColumnPairs, padded(s.N - first) / kTile), here);
      }
      for_each_pair<kColumnPairs>(
          sums,
          [&](int i, int j, float one, float two) {
            one *= inverse[i / 8];
            two *= inverse[i / 8];
            if (p.relu) {
              one = ptx::max_nan(one, 0.0f);
              two = ptx::max_nan(two, 0.0f);
            }
            const int token = row + i, channel = column + j;
            if (ChannelsLast) {
              T* to = m.out + token * m.ld_out + channel;
              if (channel + 1 < s.P) {
                store_pair(to, one, two);
              } else if (channel < s.P) {
                *to = from_float<T>(one);
              }
            } else {
              T* to = m.out + channel * m.ld_out + token;
              if (channel < s.P) to[0] = from_float<T>(one);
              if (channel + 1 < s.P) to[m.ld_out] = from_float<T>(two);
            }
          },
          here);
    }
  }
}

// From global memory to a v, complete after a barrier. `meanwhile` starts further asynchronous copies, `Groups`
// of them; all but the last `Late` are complete before a v is written.
template <bool ChannelsLast, bool Few, int Groups, int Late, class T, class F>
__device__ void attend(const ShsaForwardParams& p, const Group& group, const ShortLayout& layout,
                       const ShortMemory<T>& m, int64_t image, bool saves, F meanwhile) {
  const Sizes& s = p.sizes;
  start_projection(p, layout, m);
  start_image<ChannelsLast>(group, s, layout, m.z, p.x, image, s.C);
  ptx::cp_async_commit();
  meanwhile();
  load_vectors<T>(p, m);
  ptx::cp_async_wait<Groups>();
  __syncthreads();
  finish_projection(p, layout, m);
  finish_image<ChannelsLast>(group, s, layout, m.z, p.x, image, s.C);
  __syncthreads();
  normalise_image<ChannelsLast>(p, group, layout, m, image, saves);
  __syncthreads();
  with_op<T>(p.precision.tf32_proj,
             [&](auto op) { project_image<decltype(op), ChannelsLast>(s, group, layout, m); });
  ptx::cp_async_wait<Late>();
  __syncthreads();
  with_op<T>(p.precision.tf32_attn, [&](auto op) {
    attend_image<decltype(op), ChannelsLast, Few>(p, group, layout, m, image, saves);
  });
}

}  // namespace shvit::cuda
