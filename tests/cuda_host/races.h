// Finds accesses of two threads to the same memory, at least one a write, that no barrier orders; and accesses
// of shared memory outside what the launch asked for, or under an asynchronous copy.
//
// g++ -fsanitize=thread calls a function before every access of memory in the kernels; races.cpp has these
// functions, in place of ThreadSanitizer's. What orders accesses is __syncthreads, for all threads of a block,
// and
// __syncwarp, for the lanes in its mask. Shuffles, votes, mma and ldmatrix order nothing (CUDA gives them no
// memory ordering), nor does anything order the blocks of a launch.
#pragma once

#include <runtime.h>

namespace cuda_host::races {

enum class Access { kRead, kWrite };

extern bool enabled;

struct Region {
  const unsigned char *begin, *end;
  bool has(const void* p) const { return p >= begin && p < end; }
};

// `ignored` holds the stacks of the threads; `window` nothing but the shared memory.
void start_launch(Region ignored, Region window, int threads);
void start_block(Region shared);

void barrier();
void warp_barrier(int first_thread, Lanes& lanes);

// An access by a thread; fails if it is wrong.
void access(int thread, const void* address, size_t bytes, Access kind, const void* caller);

// A write of a thread that is under way from the first call to the second.
void start_copy(int thread, const void* shared, size_t bytes, const void* caller);
void finish_copy(int thread, const void* shared, size_t bytes);

}  // namespace cuda_host::races
