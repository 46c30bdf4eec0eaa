// Matrices in shared memory, and products of them by one warp: the parts that all kernels are built from.
//
// A matrix in shared memory is padded to multiples of 16 rows and columns, and its rows are kLd = padded
// columns
// + 8 values apart, which keeps ldmatrix free of bank conflicts and rows 16-byte aligned. Along the summed
// dimension the padding of both operands must be zeros; elsewhere it is computed with and then thrown away.
#pragma once

#include <cstring>
#include <ptx.cuh>
#include <type_traits>

#include "kernels.h"

namespace shvit::cuda {

constexpr int kWarp = 32;
constexpr int kTile = 16;  // rows of a warp's product, and the multiple that shared matrices are padded to
constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int padded(int n) { return (n + kTile - 1) / kTile * kTile; }

// Distance of rows in shared memory of a matrix with n columns.
__host__ __device__ constexpr int row_distance(int n) { return padded(n) + 8; }

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }

// ---------------------------------------------------------------------------------------------------------------
// Storage types

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two 16-bit values in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// Two neighbouring values, the first at an even index of an aligned row.
template <class T>
__device__ __forceinline__ void store_pair(T* p, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(p) = make_float2(first, second);
  } else {
    *reinterpret_cast<uint32_t*>(p) = pack<T>(first, second);
  }
}

// 16 bytes of neighbouring values.
template <class T>
struct Chunk {
  static constexpr int kValues = 16 / sizeof(T);
  T values[kValues];
};

template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  Chunk<T> chunk;
  memcpy(&chunk, &bits, sizeof(bits));
  return chunk;
}

template <class T>
__device__ __forceinline__ void store_chunk(T* p, const Chunk<T>& chunk) {
  uint4 bits;
  memcpy(&bits, &chunk, sizeof(bits));
  *reinterpret_cast<uint4*>(p) = bits;
}

// ---------------------------------------------------------------------------------------------------------------
// Operands in shared memory: entry (i, k), where k is the summed index and i a row of the left or a column of
// the right operand.

template <class T>
struct KContiguous {  // entry (i, k) at p[i * ld + k]
  const T* p;
  int ld;
  __device__ T at(int i, int k) const { return p[i * ld + k]; }
  __device__ KContiguous from(int k) const { return {p + k, ld}; }
};

template <class T>
struct KStrided {  // entry (i, k) at p[k * ld + i]
  const T* p;
  int ld;
  __device__ T at(int i, int k) const { return p[k * ld + i]; }
  __device__ KStrided from(int k) const { return {p + k * ld, ld}; }
};

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic of a product. Each has kStep, the depth of one step; Left, the fragment of 16 rows; Right, of 16
// columns; and multiply, which adds a step to the sums of 8 columns (the `half` of Right). The sums of a lane
// are, with g = lane / 4 and t = lane % 4, rows g (0, 1) and g + 8 (2, 3), columns 2t (0, 2) and 2t + 1 (1, 3).

// 16-bit values on tensor cores.
template <class T>
struct Half {
  using Value = T;
  static constexpr int kStep = 16;
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[4];  // [half][2]
  };

  static __device__ __forceinline__ Left left(KContiguous<T> m, int i, int k) {
    const int l = lane_index();
    Left f;
    ptx::ldmatrix_x4(f.r, m.p + (i + l % 16) * m.ld + k + l / 16 * 8);
    return f;
  }
  static __device__ __forceinline__ Left left(KStrided<T> m, int i, int k) {
    const int l = lane_index();
    Left f;
    ptx::ldmatrix_x4_trans(f.r, m.p + (k + l % 8 + l / 16 * 8) * m.ld + i + l / 8 % 2 * 8);
    return f;
  }
  // 16 columns of sums as the left operand of the next product.
  static __device__ __forceinline__ Left left(const float (&low)[4], const float (&high)[4]) {
    return {{pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
             pack<T>(high[2], high[3])}};
  }
  static __device__ __forceinline__ Right right(KContiguous<T> m, int i, int k) {
    const int l = lane_index();
    Right f;
    ptx::ldmatrix_x4(f.r, m.p + (i + l % 8 + l / 16 * 8) * m.ld + k + l / 8 % 2 * 8);
    return f;
  }
  static __device__ __forceinline__ Right right(KStrided<T> m, int i, int k) {
    const int l = lane_index();
    Right f;
    ptx::ldmatrix_x4_trans(f.r, m.p + (k + l % 16) * m.ld + i + l / 16 * 8);
    return f;
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Left& a, const Right& b, int half) {
    const uint32_t column[2] = {b.r[2 * half], b.r[2 * half + 1]};
    ptx::mma_m16n8k16<T>(sum, a.r, column);
  }
};

// float32 rounded to TF32. Both operands take k in the order 0, 2, 4, 6, 1, 3, 5, 7, which makes a lane's two
// entries neighbours, as they are in sums that become a left operand.
struct Tf32 {
  using Value = float;
  static constexpr int kStep = 8;
  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[4];  // [half][2]
  };

  template <class Matrix>
  static __device__ __forceinline__ Left left(Matrix m, int i, int k) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    return {{ptx::to_tf32(m.at(i + g, k + 2 * t)), ptx::to_tf32(m.at(i + g + 8, k + 2 * t)),
             ptx::to_tf32(m.at(i + g, k + 2 * t + 1)), ptx::to_tf32(m.at(i + g + 8, k + 2 * t + 1))}};
  }
  static __device__ __forceinline__ Left left(const float (&sums)[4]) {
    return {{ptx::to_tf32(sums[0]), ptx::to_tf32(sums[2]), ptx::to_tf32(sums[1]), ptx::to_tf32(sums[3])}};
  }
  template <class Matrix>
  static __device__ __forceinline__ Right right(Matrix m, int i, int k) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    return {{ptx::to_tf32(m.at(i + g, k + 2 * t)), ptx::to_tf32(m.at(i + g, k + 2 * t + 1)),
             ptx::to_tf32(m.at(i + g + 8, k + 2 * t)), ptx::to_tf32(m.at(i + g + 8, k + 2 * t + 1))}};
  }
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Left& a, const Right& b, int half) {
    const uint32_t column[2] = {b.r[2 * half], b.r[2 * half + 1]};
    ptx::mma_m16n8k8_tf32(sum, a.r, column);
  }
};

// float32 exactly, by fused multiply-adds in the places where a tensor core would leave the sums.
struct Float {
  using Value = float;
  static constexpr int kStep = 8;
  struct Left {
    float r[2][8];  // rows g and g + 8
  };
  struct Right {
    float r[8][4];  // columns 2t, 2t + 1, 2t + 8, 2t + 9
  };

  template <class Matrix>
  static __device__ __forceinline__ Left left(Matrix m, int i, int k) {
    const int g = lane_index() / 4;
    Left f;
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      f.r[0][j] = m.at(i + g, k + j);
      f.r[1][j] = m.at(i + g + 8, k + j);
    }
    return f;
  }
  static __device__ __forceinline__ Left left(const float (&sums)[4]) {
    Left f;
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      const int source = lane_index() / 4 * 4 + j / 2;
      f.r[0][j] = __shfl_sync(0xffffffffu, sums[j % 2], source);
      f.r[1][j] = __shfl_sync(0xffffffffu, sums[2 + j % 2], source);
    }
    return f;
  }
  template <class Matrix>
  static __device__ __forceinline__ Right right(Matrix m, int i, int k) {
    const int t = lane_index() % 4;
    Right f;
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      f.r[j][0] = m.at(i + 2 * t, k + j);
      f.r[j][1] = m.at(i + 2 * t + 1, k + j);
      f.r[j][2] = m.at(i + 2 * t + 8, k + j);
      f.r[j][3] = m.at(i + 2 * t + 9, k + j);
    }
    return f;
  }
  // A step is summed for itself: sums of sums round less than one long chain.
  static __device__ __forceinline__ void multiply(float (&sum)[4], const Left& a, const Right& b, int half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float part = a.r[i / 2][0] * b.r[0][2 * half + i % 2];
#pragma unroll
      for (int j = 1; j < kStep; ++j) part = fmaf(a.r[i / 2][j], b.r[j][2 * half + i % 2], part);
      sum[i] += part;
    }
  }
};

// f(a value of the storage type).
template <class F>
auto with_type(Type type, F f) {
  switch (type) {
    case Type::kFloat16:
      return f(__half());
    case Type::kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(0.0f);
  }
}

// f(the arithmetic of a product of T), chosen while the kernel runs: fewer kernels to compile than by
// Arithmetic.
template <class T, class F>
__device__ __forceinline__ void with_op(bool tf32, F f) {
  if constexpr (sizeof(T) == 2) {
    f(Half<T>());
  } else if (tf32) {
    f(Tf32());
  } else {
    f(Float());
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Products of one warp

// Sums of 16 rows and 16 * Pairs columns: [2 * Pairs] tiles of 8 columns.
template <int Pairs>
using Sums = float[2 * Pairs][4];

template <int Pairs>
__device__ __forceinline__ void clear(Sums<Pairs>& sums) {
#pragma unroll
  for (int j = 0; j < 2 * Pairs; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
}

// sums += left[row..row+16, :depth] right[:depth, column..], for the first `pairs` of 16 columns.
template <class Op, int Pairs, class LeftMatrix, class RightMatrix>
__device__ __forceinline__ void product(Sums<Pairs>& sums, LeftMatrix left, int row, RightMatrix right,
                                        int column, int depth, int pairs = Pairs) {
#pragma unroll 1  // more would cost registers that the sums need
  for (int k = 0; k < depth; k += Op::kStep) {
    const typename Op::Left a = Op::left(left, row, k);
#pragma unroll
    for (int j = 0; j < Pairs; ++j) {
      if (j < pairs) {
        const typename Op::Right b = Op::right(right, column + j * kTile, k);
        Op::multiply(sums[2 * j], a, b, 0);
        Op::multiply(sums[2 * j + 1], a, b, 1);
      }
    }
  }
}

// Sums on their way to be the left operand of the next product.
template <class Op, int Steps>
struct LeftSums {
  float sums[2 * Steps][4];
  __device__ explicit LeftSums(const float (&from)[2 * Steps][4]) { memcpy(sums, from, sizeof(sums)); }
  __device__ typename Op::Left at(int step, int part) const { return Op::left(sums[2 * step + part]); }
};

template <class T, int Steps>
struct LeftSums<Half<T>, Steps> {
  typename Half<T>::Left fragments[Steps];  // half the registers
  __device__ explicit LeftSums(const float (&from)[2 * Steps][4]) {
#pragma unroll
    for (int s = 0; s < Steps; ++s) fragments[s] = Half<T>::left(from[2 * s], from[2 * s + 1]);
  }
  __device__ typename Half<T>::Left at(int step, int) const { return fragments[step]; }
};

// The same with earlier sums as the left operand: column 16 j of `left` meets k = 16 j, for the first `steps`
// j.
template <class Op, int Pairs, int Steps, class RightMatrix>
__device__ __forceinline__ void product_of_sums(Sums<Pairs>& sums, const LeftSums<Op, Steps>& left,
                                                RightMatrix right, int column, int steps = Steps,
                                                int pairs = Pairs) {
#pragma unroll
  for (int s = 0; s < Steps; ++s) {
    if (s < steps) {
#pragma unroll
      for (int part = 0; part < kTile / Op::kStep; ++part) {
        const typename Op::Left a = left.at(s, part);
#pragma unroll
        for (int j = 0; j < Pairs; ++j) {
          if (j < pairs) {
            const typename Op::Right b = Op::right(right, column + j * kTile, s * kTile + part * Op::kStep);
            Op::multiply(sums[2 * j], a, b, 0);
            Op::multiply(sums[2 * j + 1], a, b, 1);
          }
        }
      }
    }
  }
}

template <class Op, int Pairs, int Steps, class RightMatrix>
__device__ __forceinline__ void product_of_sums(Sums<Pairs>& sums, const float (&left)[2 * Steps][4],
                                                RightMatrix right, int column, int steps = Steps,
                                                int pairs = Pairs) {
  product_of_sums<Op, Pairs>(sums, LeftSums<Op, Steps>(left), right, column, steps, pairs);
}

// f(row, column, first, second) for each pair of neighbouring sums of a lane, counted from the tile's corner.
template <int Pairs, class F>
__device__ __forceinline__ void for_each_pair(const Sums<Pairs>& sums, F f, int pairs = Pairs) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int j = 0; j < 2 * Pairs; ++j) {
    if (j < 2 * pairs) {
      f(g, 8 * j + 2 * t, sums[j][0], sums[j][1]);
      f(g + 8, 8 * j + 2 * t, sums[j][2], sums[j][3]);
    }
  }
}

// Over the four lanes that hold a row of sums.
__device__ __forceinline__ float row_max_of_lanes(float x) {
  x = ptx::max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return ptx::max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum_of_lanes(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---------------------------------------------------------------------------------------------------------------
// Groups of threads that share work: a number of whole warps of the block.

struct Group {
  int rank, size;  // of this thread
  int index;       // of the group in the block
  __device__ int warps() const { return size / kWarp; }
};

__device__ __forceinline__ Group whole_block() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), 0};
}

__device__ __forceinline__ Group group_of_warps(int warps) {
  const int size = warps * kWarp, t = threadIdx.x;
  return {t % size, size, t / size};
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The sum over a group, in the same order in every run. All threads of the block must call it; `scratch` holds
// a float per warp of the block, and may be used again after the next barrier.
__device__ __forceinline__ float group_sum(const Group& group, float x, float* scratch) {
  x = warp_sum(x);
  if (group.warps() == 1) return x;
  if (lane_index() == 0) scratch[warp_index()] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < group.warps(); ++i) sum += scratch[group.index * group.warps() + i];
  return sum;
}

// f(row, column) for the entries of a matrix with rows of `columns`, `step` apart, a group's threads side by
// side. No division: threads stand in rows of a power of two, and those that do not fill a row have no entries.
template <class F>
__device__ __forceinline__ void for_each_entry(const Group& group, int rows, int columns, int step, F f) {
  int shift = 0;
  while ((step << shift) < columns && (2 << shift) <= group.size) ++shift;
  const int across = 1 << shift, down = group.size >> shift;
  if (group.rank >= down << shift) return;
  for (int row = group.rank >> shift; row < rows; row += down)
    for (int column = (group.rank & (across - 1)) * step; column < columns; column += across * step)
      f(row, column);
}

// ---------------------------------------------------------------------------------------------------------------
// Between global and shared memory

// How wide the accesses to rows that are `stride` values apart may be: 16, 8, 4 or 2 bytes.
template <class T>
__device__ __forceinline__ int access_bytes(const void* p, int64_t stride) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p) | static_cast<uint64_t>(stride) * sizeof(T);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

template <int Bytes, class T>
__device__ __forceinline__ void load_rows_async(const Group& group, T* tile, int ld, const T* rows,
                                                int64_t stride, int count, int columns) {
  constexpr int kStep = Bytes / sizeof(T);
  for_each_entry(group, padded(count), padded(columns), kStep, [&](int row, int column) {
    const int left = row < count ? columns - column : 0;
    const int valid = left <= 0 ? 0 : left < kStep ? left * static_cast<int>(sizeof(T)) : Bytes;
    ptx::cp_async<Bytes>(tile + row * ld + column, valid ? rows + row * stride + column : rows, valid);
  });
}

// Starts to load a matrix of `count` rows, `stride` values apart, into shared memory, padded with zeros to
// multiples of 16 in both directions. The copy is complete after cp_async_wait and a barrier.
template <class T>
__device__ void load_matrix(const Group& group, T* tile, int ld, const T* rows, int64_t stride, int count,
                            int columns) {
  const int bytes = access_bytes<T>(rows, stride);
  if (bytes == 16) return load_rows_async<16>(group, tile, ld, rows, stride, count, columns);
  if (bytes == 8) return load_rows_async<8>(group, tile, ld, rows, stride, count, columns);
  if (bytes == 4) return load_rows_async<4>(group, tile, ld, rows, stride, count, columns);
  if constexpr (sizeof(T) == 2) {
    // No asynchronous copy is that narrow. Many loads are under way before the first is needed.
    constexpr int kAtOnce = 16;
    const int width = padded(columns), entries = padded(count) * width;
    for (int first = group.rank; first < entries; first += kAtOnce * group.size) {
      T values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int entry = first + i * group.size, row = entry / width, column = entry % width;
        const bool inside = row < count && column < columns;
        values[i] = inside ? rows[row * stride + column] : from_float<T>(0.0f);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int entry = first + i * group.size;
        if (entry < entries) tile[entry / width * ld + entry % width] = values[i];
      }
    }
  }
}

// Rows of an odd number of 16-bit values, one behind the other: no asynchronous copy can set them apart.
template <class T>
__device__ __forceinline__ bool is_packed(int64_t stride, int columns) {
  return sizeof(T) == 2 && columns % 2 == 1 && stride == columns;
}

// Where such rows wait to be set apart: at the end of their tile, at the distance from a 16-byte boundary that
// they have in global memory. Set apart in order, no row reaches one that still waits, as ld exceeds columns by
// 8 or more.
template <class T>
__device__ __forceinline__ T* packed_place(T* tile, int ld, const T* rows, int count, int columns) {
  T* place = tile + padded(count) * ld - count * columns;
  const uint64_t excess = reinterpret_cast<uint64_t>(place) - reinterpret_cast<uint64_t>(rows);
  return place - excess % 16 / sizeof(T);
}

template <class T>
__device__ void load_packed(const Group& group, T* tile, int ld, const T* rows, int count, int columns) {
  constexpr int kStep = Chunk<T>::kValues;
  T* place = packed_place(tile, ld, rows, count, columns);
  const int entries = count * columns;
  const int before = min(entries, static_cast<int>(-reinterpret_cast<uint64_t>(rows) % 16 / sizeof(T)));
  for (int i = group.rank; i < before; i += group.size) place[i] = rows[i];
  for (int i = before + group.rank * kStep; i < entries; i += group.size * kStep)
    ptx::cp_async<16>(place + i, rows + i, min(kStep, entries - i) * static_cast<int>(sizeof(T)));
}

template <class T>
__device__ void set_apart(const Group& group, T* tile, int ld, const T* rows, int count, int columns) {
  constexpr int kAtOnce = 16;
  const T* place = packed_place(tile, ld, rows, count, columns);
  const int entries = count * columns;
  int row = group.rank / columns, column = group.rank % columns;
  for (int first = group.rank; first - group.rank < entries; first += kAtOnce * group.size) {
    T values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      values[i] = first + i * group.size < entries ? place[first + i * group.size] : from_float<T>(0.0f);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * group.size < entries) tile[row * ld + column] = values[i];
      row += group.size / columns;
      column += group.size % columns;
      if (column >= columns) {
        column -= columns;
        ++row;
      }
    }
  }
  const int width = padded(columns);
  for_each_entry(group, padded(count), width - columns, 1,
                 [&](int r, int c) { tile[r * ld + columns + c] = from_float<T>(0.0f); });
  for_each_entry(group, padded(count) - count, columns, 1,
                 [&](int r, int c) { tile[(count + r) * ld + c] = from_float<T>(0.0f); });
}

// load_matrix in two parts, which is quicker for packed rows: start_matrix, then cp_async_wait and a barrier,
// then finish_matrix with the same arguments by all threads of the block, and a barrier.
template <class T>
__device__ void start_matrix(const Group& group, T* tile, int ld, const T* rows, int64_t stride, int count,
                             int columns) {
  if (is_packed<T>(stride, columns)) return load_packed(group, tile, ld, rows, count, columns);
  load_matrix(group, tile, ld, rows, stride, count, columns);
}

template <class T>
__device__ void finish_matrix(const Group& group, T* tile, int ld, const T* rows, int64_t stride, int count,
                              int columns) {
  if (is_packed<T>(stride, columns)) set_apart(group, tile, ld, rows, count, columns);
}

template <class Word, class T>
__device__ __forceinline__ void store_rows(const Group& group, const T* tile, int ld, T* rows, int64_t stride,
                                           int count, int columns) {
  constexpr int kStep = sizeof(Word) / sizeof(T);
  for_each_entry(group, count, columns, kStep, [&](int row, int column) {
    const T* from = tile + row * ld + column;
    T* to = rows + row * stride + column;
    if (column + kStep <= columns) {
      *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(from);
    } else {
      for (int i = 0; i < columns - column; ++i) to[i] = from[i];
    }
  });
}

// Stores a matrix of shared memory, its rows 16-byte aligned, into rows `stride` values apart.
template <class T>
__device__ void store_matrix(const Group& group, const T* tile, int ld, T* rows, int64_t stride, int count,
                             int columns) {
  const int bytes = access_bytes<T>(rows, stride);
  if (bytes == 16) return store_rows<uint4>(group, tile, ld, rows, stride, count, columns);
  if (bytes == 8) return store_rows<uint2>(group, tile, ld, rows, stride, count, columns);
  if (bytes == 4) return store_rows<uint32_t>(group, tile, ld, rows, stride, count, columns);
  if constexpr (sizeof(T) == 2) store_rows<T>(group, tile, ld, rows, stride, count, columns);
}

}  // namespace shvit::cuda
