// Images between global memory and float32: wide accesses whatever the alignment, many under way at once.
#pragma once

#include "tile.cuh"

namespace shvit::cuda {

// A matrix of `rows` times `columns` values in global memory, its rows `stride` values apart: the first P
// channels of an image, by rows of tokens (NCHW) or of channels (channels_last).
struct Extent {
  int64_t stride;
  int rows, columns;
};

template <bool ChannelsLast>
__device__ __forceinline__ Extent extent(int channels, int P, int N, int tokens) {
  return ChannelsLast ? Extent{channels, tokens, P} : Extent{N, P, tokens};
}

namespace values {

// Calls f(word, row, column, count) for the words of kValues neighbouring values, of which `count` are inside.
// Rows without a gap are one long row, so that only its end is a part of a word; a word's values may then
// continue in the next row.
struct Cut {
  int length, words_in_line, words;  // a line: a row, or all rows
  bool whole;
  __device__ Cut(const Extent& e, int word_values) {
    whole = e.stride == e.columns;
    length = whole ? e.rows * e.columns : e.columns;
    words_in_line = (length + word_values - 1) / word_values;
    words = whole ? words_in_line : words_in_line * e.rows;
  }
};

template <class Word, class T, class F>
__device__ __forceinline__ void load(const Group& group, const T* from, const Extent& e, F f) {
  constexpr int kValues = sizeof(Word) / sizeof(T), kAtOnce = 16 / kValues > 4 ? 16 / kValues : 4;
  const Cut cut(e, kValues);
  for (int first = group.rank; first < cut.words; first += kAtOnce * group.size) {
    T read[kAtOnce][kValues];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int word = first + i * group.size;
      if (word >= cut.words) break;
      const int line = word / cut.words_in_line, column = word % cut.words_in_line * kValues;
      const T* p = from + line * e.stride + column;
      if (column + kValues <= cut.length) {
        const Word bits = *reinterpret_cast<const Word*>(p);
        memcpy(read[i], &bits, sizeof(Word));
      } else {
#pragma unroll
        for (int j = 0; j < kValues; ++j) read[i][j] = column + j < cut.length ? p[j] : T();
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int word = first + i * group.size;
      if (word >= cut.words) break;
      const int line = word / cut.words_in_line, start = word % cut.words_in_line * kValues;
      int row = cut.whole ? start / e.columns : line, column = cut.whole ? start % e.columns : start;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        if (start + j >= cut.length) break;
        f(row, column, to_float(read[i][j]));
        if (++column == e.columns && cut.whole) ++row, column = 0;
      }
    }
  }
}

template <class Word, class T, class F>
__device__ __forceinline__ void store(const Group& group, T* to, const Extent& e, F f) {
  constexpr int kValues = sizeof(Word) / sizeof(T);
  const Cut cut(e, kValues);
  for (int word = group.rank; word < cut.words; word += group.size) {
    const int line = word / cut.words_in_line, start = word % cut.words_in_line * kValues;
    int row = cut.whole ? start / e.columns : line, column = cut.whole ? start % e.columns : start;
    T* p = to + line * e.stride + start;
    T written[kValues];
    int count = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      if (start + j >= cut.length) break;
      written[j] = from_float<T>(f(row, column));
      ++count;
      if (++column == e.columns && cut.whole) ++row, column = 0;
    }
    if (count == kValues) {
      Word bits;
      memcpy(&bits, written, sizeof(Word));
      *reinterpret_cast<Word*>(p) = bits;
    } else {
#pragma unroll
      for (int j = 0; j < kValues; ++j)
        if (j < count) p[j] = written[j];
    }
  }
}

template <class T>
__device__ __forceinline__ int bytes(const void* p, const Extent& e) {
  return access_bytes<T>(p, e.stride == e.columns ? 0 : e.stride);
}

}  // namespace values

// f(row, column, value) for every value of the matrix.
template <class T, class F>
__device__ void load_values(const Group& group, const T* from, const Extent& e, F f) {
  const int bytes = values::bytes<T>(from, e);
  if (bytes == 16) return values::load<uint4>(group, from, e, f);
  if (bytes == 8) return values::load<uint2>(group, from, e, f);
  if (bytes == 4) return values::load<uint32_t>(group, from, e, f);
  if constexpr (sizeof(T) == 2) values::load<uint16_t>(group, from, e, f);
}

// Every value of the matrix becomes f(row, column).
template <class T, class F>
__device__ void store_values(const Group& group, T* to, const Extent& e, F f) {
  const int bytes = values::bytes<T>(to, e);
  if (bytes == 16) return values::store<uint4>(group, to, e, f);
  if (bytes == 8) return values::store<uint2>(group, to, e, f);
  if (bytes == 4) return values::store<uint32_t>(group, to, e, f);
  if constexpr (sizeof(T) == 2) values::store<uint16_t>(group, to, e, f);
}

}  // namespace shvit::cuda
