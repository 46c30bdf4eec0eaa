// Gradients of shsa for short images, in one launch: from dy to dz, the gradient of z = norm(x1), to parts of
// the sums that make the gradients of the projection, and to dx beyond P.
//
// With l = scale q k^T, a = softmax(l), y1 = a v, and dout the gradient of y1 (under ReLU: where y > 0):
//
//   dv = a^T dout       da = dout v^T        dl = a (da - delta), delta = the mean of da under a
//   dq = scale dl k     dk = scale dl^T q    dz = [dq dk dv] (factor W)    dW = [dq dk dv]^T z, db its column
//   sums
//
// q, k, v and a are recomputed from x1 and its statistics exactly as the forward computes them; a whole row of
// logits is at hand, so neither its saved maximum and sum nor y are needed for delta. Where one key takes all,
// delta then equals da to the bit and dl is zero, as in truth.
//
// Bytes of global memory: dy, y and dx once, x1 once, dz (float32) written, W and the parts of dW once per
// block. Per image 2 N (3 O P + N (3 D + 2 P)) floating-point operations: a few percent of a tensor core's time
// of the bytes. The first blocks of the grid attend, the others make dx beyond P meanwhile.
#include <algorithm>
#include <launch.cuh>

#include "rest.cuh"
#include "shsa_block.cuh"

namespace shvit::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kMostTokens = kWarps * kTile;  // a warp has 16 tokens
constexpr int kKeyPairs = kColumnPairs;      // 16-column tiles of a row of logits
constexpr int kQueryPairs = 4;               // the same of dq and of dk
constexpr int kMostQueryChannels = kQueryPairs * kTile;
constexpr int kMostParts = 256;  // beyond that, blocks take several groups of images

struct Grid {
  int images;  // of a group, which an attending block works on at a time
  int parts;   // attending blocks
};

int images_per_group(const Sizes& s) { return std::max(1, kMostTokens / padded(s.N)); }

int parts_of(const Sizes& s) {
  const int64_t images = images_per_group(s);
  return static_cast<int>(std::min<int64_t>((s.B + images - 1) / images, kMostParts));
}

// dlogits lie in the place of v where they fit there.
__host__ __device__ bool replaces_values(const Sizes& s) { return padded(s.P) >= padded(s.N); }

// The forward's layout with more room per image: dout behind z; probabilities and, if need be, dlogits behind
// q, k and v. y lies in the place of q, k and v until it has masked dout.
__host__ __device__ ShortLayout layout_of(const Sizes& s, bool channels_last, int images) {
  ShortLayout layout(s, channels_last, images, kWarps);
  const int logits = (replaces_values(s) ? 1 : 2) * padded(s.N) * row_distance(s.N);
  layout.qkv_values =
      layout.qkv_values + logits > layout.z_values ? layout.qkv_values + logits : layout.z_values;
  layout.z_values *= 2;
  return layout;
}

template <bool ChannelsLast, class T>
struct Backward {
  // Matrices of tokens and channels in the image's own order, with the sum over channels or over tokens.
  using OverChannels = std::conditional_t<ChannelsLast, KContiguous<T>, KStrided<T>>;
  using OverTokens = std::conditional_t<ChannelsLast, KStrided<T>, KContiguous<T>>;

  const ShsaBackwardParams& p;
  const ShsaForwardParams& forward;
  const Sizes& s;
  const ShortLayout& layout;
  const Group group;
  const ShortMemory<T> m;
  T *const dout, *const probabilities, *const dlogits;
  const int outputs, tokens, ld_probabilities, ld_dlogits;

  __device__ Backward(const ShsaBackwardParams& p, const ShsaForwardParams& forward, const ShortLayout& layout)
      : p(p),
        forward(forward),
        s(p.sizes),
        layout(layout),
        group(group_of_warps(kWarps / layout.images)),
        m(s, layout, ptx::shared_memory<T>(), group.index),
        dout(m.z + layout.z_values / 2),
        probabilities(m.qkv + padded(s.N) * layout.ld_qkv),
        dlogits(replaces_values(s) ? m.qkv + 2 * layout.D : probabilities + padded(s.N) * row_distance(s.N)),
        outputs(2 * s.D + s.P),
        tokens(padded(s.N)),
        ld_probabilities(row_distance(s.N)),
        ld_dlogits(replaces_values(s) ? layout.ld_qkv : row_distance(s.N)) {}

  // f(tile, images, channels of an image) of x1, dy and y.
  template <class F>
  __device__ void for_each_image(F f) const {
#pragma unroll 1  // one copy of the code of a load
    for (int i = 0; i < (p.relu ? 3 : 2); ++i)
      f(i == 0 ? m.z : i == 1 ? dout : m.qkv, i == 0 ? p.x1 : i == 1 ? p.dy : p.y, i == 0 ? s.P : s.C);
  }

  // z, dout, W, q, k and v.
  __device__ void recompute(int64_t image) const {
    T* y = m.qkv;
    start_projection(forward, layout, m);
    for_each_image([&](T* tile, const void* images, int channels) {
      start_image<ChannelsLast>(group, s, layout, tile, images, image, channels);
    });
    ptx::cp_async_commit();
    load_vectors<T>(forward, m);
    ptx::cp_async_wait<0>();
    __syncthreads();
    finish_projection(forward, layout, m);
    for_each_image([&](T* tile, const void* images, int channels) {
      finish_image<ChannelsLast>(group, s, layout, tile, images, image, channels);
    });
    __syncthreads();
    normalise_image<ChannelsLast>(forward, group, layout, m, image, false);
    if (p.relu) {
      const int rows = ChannelsLast ? s.N : s.P, columns = ChannelsLast ? s.P : s.N;
      for_each_entry(group, rows, padded(columns), Chunk<T>::kValues, [&](int row, int column) {
        const int at = row * layout.ld_z + column;
        Chunk<T> gradient = load_chunk(dout + at);
        const Chunk<T> output = load_chunk(y + at);
#pragma unroll
        for (int i = 0; i < Chunk<T>::kValues; ++i)
          gradient.values[i] = WherePositive()(gradient.values[i], output.values[i]);
        store_chunk(dout + at, gradient);
      });
    }
    __syncthreads();
    with_op<T>(p.precision.tf32_proj,
               [&](auto op) { project_image<decltype(op), ChannelsLast>(s, group, layout, m); });
    __syncthreads();
  }

  // probabilities and dlogits [queries, keys] of a warp's 16 queries, zero in the padding. All threads must
  // call it.
  template <class Op>
  __device__ void differentiate_softmax(int row, bool works) const {
    const KContiguous<T> v = {m.qkv + 2 * layout.D, layout.ld_qkv};
    const int pairs = tokens / kTile;
    Sums<kKeyPairs> weights, gradients;
    clear<kKeyPairs>(gradients);
    if (works) product<Op, kKeyPairs>(gradients, OverChannels{dout, layout.ld_z}, row, v, 0, layout.P, pairs);
    __syncthreads();  // v has been read
    if (!works) return;
    logits_of_block<Op>(weights, forward, layout, m, row, 0);
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
    raise(row_max, weights);
    for (float& highest : row_max) highest = row_max_of_lanes(highest);
    exponentiate(weights, row_max, s.N);
    add_rows(row_sum, weights);
    for (float& sum : row_sum) sum = row_sum_of_lanes(sum);
    const int t = lane_index() % 4;
    float delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 2 * kKeyPairs; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * j + 2 * t + i < s.N) sum += weights[j][2 * half + i] * gradients[j][2 * half + i];
      delta[half] = row_sum_of_lanes(sum) / row_sum[half];
    }
    const float inverse[2] = {1.0f / row_sum[0], 1.0f / row_sum[1]};
    const auto weight_at = [&](int i, int column, float weight) {
      return row + i < s.N && column < s.N ? weight * inverse[i / 8] : 0.0f;
    };
    for_each_pair<kKeyPairs>(
        weights,
        [&](int i, int column, float first, float second) {
          store_pair(probabilities + (row + i) * ld_probabilities + column, weight_at(i, column, first),
                     weight_at(i, column + 1, second));
        },
        pairs);
#pragma unroll
    for (int j = 0; j < 2 * kKeyPairs; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = lane_index() / 4 + i / 2 * 8, key = 8 * j + 2 * t + i % 2;
        const bool inside = row + query < s.N && key < s.N;
        const float weight = weights[j][i] * inverse[i / 2];
        gradients[j][i] = inside ? weight * (gradients[j][i] - delta[i / 2]) * p.scale : 0.0f;
      }
    }
    for_each_pair<kKeyPairs>(
        gradients,
        [&](int i, int column, float first, float second) {
          store_pair(dlogits + (row + i) * ld_dlogits + column, first, second);
        },
        pairs);
  }

  // sums of `left` and `right` over tokens, from column 16 * first on.
  template <class Op, int Pairs, class Left, class Right>
  __device__ void over_tokens(Sums<Pairs>& sums, Left left, int row, Right right, int first, int pairs) const {
    clear<Pairs>(sums);
    product<Op, Pairs>(sums, left, row, right, first * kTile, tokens, pairs);
  }

  __device__ void store_dqkv(const Sums<kColumnPairs>& sums, int row, int column, int pairs) const {
    for_each_pair<kColumnPairs>(
        sums,
        [&](int i, int j, float first, float second) {
          store_pair(m.qkv + (row + i) * layout.ld_qkv + column + j, first, second);
        },
        pairs);
  }

  // dq, dk and dv in the places of q, k and v. All threads must call it; of every image each warp has one row
  // of tiles.
  template <class Op>
  __device__ void differentiate_attention(int row, bool works) const {
    static_assert(kQueryPairs == kColumnPairs);
    const T *q = m.qkv, *k = m.qkv + layout.D;
    const int ld = layout.ld_qkv, query_pairs = layout.D / kTile, value_pairs = layout.P / kTile;
    Sums<kQueryPairs> dq, dk;
    if (works) {
      over_tokens<Op, kQueryPairs>(dq, KContiguous<T>{dlogits, ld_dlogits}, row, KStrided<T>{k, ld}, 0,
                                   query_pairs);
      over_tokens<Op, kQueryPairs>(dk, KStrided<T>{dlogits, ld_dlogits}, row, KStrided<T>{q, ld}, 0,
                                   query_pairs);
    }
    __syncthreads();
    if (!works) return;
    store_dqkv(dq, row, 0, query_pairs);
    store_dqkv(dk, row, layout.D, query_pairs);
    for (int first = 0; first < value_pairs; first += kColumnPairs) {
      const int here = min(kColumnPairs, value_pairs - first);
      Sums<kColumnPairs> dv;
      over_tokens<Op, kColumnPairs>(dv, KStrided<T>{probabilities, ld_probabilities}, row,
                                    OverTokens{dout, layout.ld_z}, first, here);
      store_dqkv(dv, row, 2 * layout.D + first * kTile, here);
    }
  }

  // W becomes factor * W, rounded as a folded weight would be.
  __device__ void scale_projection() const {
    for_each_entry(whole_block(), layout.O, layout.P, Chunk<T>::kValues, [&](int row, int column) {
      T* at = m.weight + row * layout.ld_weight + column;
      Chunk<T> chunk = load_chunk(at);
#pragma unroll
      for (T& w : chunk.values) w = from_float<T>(to_float(w) * m.factor[row]);
      store_chunk(at, chunk);
    });
  }

  template <class Op>
  __device__ void store_dz(int64_t image) const {
    const int tiles = tokens / kTile, all_pairs = layout.P / kTile;
    const int strips = (all_pairs + kColumnPairs - 1) / kColumnPairs;
    for (int task = group.rank / kWarp; task < tiles * strips; task += group.warps()) {
      const int row = task % tiles * kTile, first = task / tiles * kColumnPairs;
      const int here = min(kColumnPairs, all_pairs - first);
      Sums<kColumnPairs> sums;
      clear<kColumnPairs>(sums);
      product<Op, kColumnPairs>(sums, KContiguous<T>{m.qkv, layout.ld_qkv}, row,
                                KStrided<T>{m.weight, layout.ld_weight}, first * kTile, layout.O, here);
      float* dz = p.dz + image * s.P * s.N;
      for_each_pair<kColumnPairs>(
          sums,
          [&](int i, int j, float one, float two) {
            const int token = row + i, channel = first * kTile + j;
            if (token >= s.N) return;
            if (channel < s.P) dz[channel * s.N + token] = one;
            if (channel + 1 < s.P) dz[(channel + 1) * s.N + token] = two;
          },
          here);
    }
  }

  // Adds the first `images` of the group to this block's part of dW, or starts it.
  template <class Op>
  __device__ void add_dweight(int images, bool starts) const {
    // Of image 0: the others follow at equal distances.
    const ShortMemory<T> first_image(s, layout, ptx::shared_memory<T>(), 0);
    float* part = p.dweight_parts + static_cast<int64_t>(blockIdx.x) * outputs * s.P;
    const int tiles = layout.O / kTile, all_pairs = layout.P / kTile;
    const int strips = (all_pairs + kColumnPairs - 1) / kColumnPairs;
    for (int task = warp_index(); task < tiles * strips; task += kWarps) {
      const int row = task % tiles * kTile, first = task / tiles * kColumnPairs;
      const int here = min(kColumnPairs, all_pairs - first);
      Sums<kColumnPairs> sums;
      clear<kColumnPairs>(sums);
      for (int i = 0; i < images; ++i) {
        const T *dqkv = first_image.qkv + i * layout.qkv_values, *z = first_image.z + i * layout.z_values;
        product<Op, kColumnPairs>(sums, KStrided<T>{dqkv, layout.ld_qkv}, row, OverTokens{z, layout.ld_z},
                                  first * kTile, tokens, here);
      }
      for_each_pair<kColumnPairs>(
          sums,
          [&](int i, int j, float one, float two) {
            const int o = projected_channel(s, row + i), channel = first * kTile + j;
            if (o < 0) return;
            float* to = part + o * s.P + channel;
            if (channel < s.P) to[0] = starts ? one : to[0] + one;
            if (channel + 1 < s.P) to[1] = starts ? two : to[1] + two;
          },
          here);
    }
  }

  __device__ void add_dbias(int images, bool starts) const {
    const ShortMemory<T> first_image(s, layout, ptx::shared_memory<T>(), 0);
    float* part = p.dbias_parts + static_cast<int64_t>(blockIdx.x) * outputs;
    for (int column = threadIdx.x; column < layout.O; column += blockDim.x) {
      const int o = projected_channel(s, column);
      if (o < 0) continue;
      float sum = starts ? 0.0f : part[o];
      for (int i = 0; i < images; ++i) {
        const T* dqkv = first_image.qkv + i * layout.qkv_values + column;
#pragma unroll 8
        for (int token = 0; token < s.N; ++token) sum += to_float(dqkv[token * layout.ld_qkv]);
      }
      part[o] = sum;
    }
  }

  // Images first..first + images of the batch.
  __device__ void run(int64_t first, int images, bool starts) const {
    const bool present =
        group.index < images;  // otherwise a stand-in, so that all threads meet at the barriers
    const int64_t image = first + (present ? group.index : 0);
    const int row = group.rank / kWarp * kTile;
    const bool works = row < tokens;
    recompute(image);
    with_op<T>(p.precision.tf32_attn, [&](auto op) {
      differentiate_softmax<decltype(op)>(row, works);
      if (p.bn_mean) scale_projection();
      __syncthreads();
      differentiate_attention<decltype(op)>(row, works);
    });
    __syncthreads();
    with_op<T>(p.precision.tf32_proj, [&](auto op) {
      if (p.dz && present) store_dz<decltype(op)>(image);
      if (p.dweight_parts) add_dweight<decltype(op)>(images, starts);
    });
    if (p.dbias_parts) add_dbias(images, starts);
  }
};

// Two blocks on a multiprocessor: without a number the compiler keeps to fewer registers, and spills.
template <bool ChannelsLast, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    shsa_backward_kernel(ShsaBackwardParams p, ShsaForwardParams forward, Grid grid) {
  const Sizes& s = p.sizes;
  if (blockIdx.x >= grid.parts) {
    const T *dy = static_cast<const T*>(p.dy), *y = static_cast<const T*>(p.y);
    T* dx = static_cast<T*>(p.dx);
    const int64_t block = blockIdx.x - grid.parts;
    if (p.relu) {
      map_rest<ChannelsLast>(s, block, dy, y, dx, WherePositive());
    } else {
      map_rest<ChannelsLast>(s, block, dy, static_cast<const T*>(nullptr), dx, First());
    }
    return;
  }
  const ShortLayout layout = layout_of(s, ChannelsLast, grid.images);
  const Backward<ChannelsLast, T> backward(p, forward, layout);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * grid.images;
  for (int64_t first = start; first < s.B; first += static_cast<int64_t>(grid.parts) * grid.images) {
    if (first != start) __syncthreads();
    backward.run(first, static_cast<int>(min(static_cast<int64_t>(grid.images), s.B - first)), first == start);
  }
}

// What the recomputation needs of the forward's parameters.
ShsaForwardParams forward_of(const ShsaBackwardParams& p) {
  ShsaForwardParams f = {};
  f.sizes = p.sizes;
  f.statistics_given = true;
  f.bn_eps = p.bn_eps;
  f.scale = p.scale;
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

template <bool ChannelsLast, class T>
const char* start(const ShsaBackwardParams& p, void* stream) {
  const Sizes& s = p.sizes;
  const bool attends = p.dz || p.dweight_parts || p.dbias_parts;
  const Grid grid = {images_per_group(s), attends ? parts_of(s) : 0};
  const int64_t blocks = grid.parts + (p.dx ? s.B * rest_blocks(s, ChannelsLast, sizeof(T)) : 0);
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more images than a grid has blocks";
  const size_t bytes = attends ? layout_of(s, ChannelsLast, grid.images).template bytes<T>(s) : 0;
  return launch(shsa_backward_kernel<ChannelsLast, T>, dim3(static_cast<unsigned>(blocks)), kWarps * kWarp,
                bytes, stream, p, forward_of(p), grid);
}

}  // namespace

bool shsa_backward_fits(const Sizes& s, Type type) {
  if (s.N > kMostTokens || s.D > kMostQueryChannels) return false;
  size_t bytes = 0;
  for (const bool channels_last : {false, true}) {
    const ShortLayout layout = layout_of(s, channels_last, images_per_group(s));
    bytes = std::max(bytes, type == Type::kFloat32 ? layout.bytes<float>(s) : layout.bytes<__half>(s));
  }
  return bytes <= static_cast<size_t>(shared_memory_limit());
}

int shsa_backward_parts(const Sizes& s) { return parts_of(s); }

const char* shsa_backward(const ShsaBackwardParams& params, Type type, void* stream) {
  if (const char* error = check_format(params.channels_last, params.x1_channels_last, params.sizes))
    return error;
  return with_type(type, [&](auto zero) {
    using T = decltype(zero);
    return params.channels_last ? start<true, T>(params, stream) : start<false, T>(params, stream);
  });
}

}  // namespace shvit::cuda
