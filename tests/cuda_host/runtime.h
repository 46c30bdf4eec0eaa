// The CUDA execution model on a processor: what the twins of the device headers stand on (README.md).
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace cuda_host {

constexpr int kWarp = 32;

// ---------------------------------------------------------------------------------------------------------------
// The host's side

// Runs body(argument), which calls `kernel`, as every thread of the grid; nullptr, or what went wrong.
const char* run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
                const void* argument);

// The largest dynamic shared memory that a block may ask for.
size_t shared_memory_limit();

// ---------------------------------------------------------------------------------------------------------------
// A thread's side

// Gives up this launch; the words become its result.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

unsigned char* shared_memory();

int lane();

void sync_threads();
void sync_warp(unsigned mask);

// Executes one operation of several lanes of this warp: every lane in `mask` calls this with the same name and
// mask, the last one runs compute(operands of each lane, null outside the mask), and all return after it.
using Lanes = void* const[kWarp];
void together(const char* operation, unsigned mask, void* operands, void (*compute)(Lanes& lanes));

// The same where the kernel's code, which messages name, is not the caller.
void together(const char* operation, unsigned mask, void* operands, void (*compute)(Lanes& lanes),
              const void* caller);

// Copies an aligned row of 16 bytes of the block's shared memory, for the operation that `lane` takes part in.
void read_matrix_row(int lane, const void* row, uint16_t (&values)[8]);

// An asynchronous copy shows nothing but NaN bits in shared memory until it is waited for.
void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

// d += a b, and rows of matrices for it, in the fragments of csrc/cuda/device/ptx.cuh.
void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <int count, bool transposed>
void load_matrices(uint32_t (&r)[count], const void* row);

}  // namespace cuda_host
