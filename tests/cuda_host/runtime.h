// The CUDA execution model on a processor: what the twins of the device headers stand on (README.md).
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace cuda_host {

constexpr int kWarp = 32;

// ---------------------------------------------------------------------------------------------------------------
// The host's side

// Runs body(argument) as every thread of the grid; nullptr, or what went wrong.
const char* run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* argument);

// The largest dynamic shared memory that a block may ask for.
size_t shared_memory_limit();

// ---------------------------------------------------------------------------------------------------------------
// A thread's side

// Gives up this launch; the words become its result.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

unsigned char* shared_memory();

int lane();

// Copies an aligned row of 16 bytes of the block's shared memory, for the operation that `lane` takes part in.
void read_matrix_row(int lane, const void* row, uint16_t (&values)[8]);

void sync_threads();

// Executes one operation of several lanes of this warp: every lane in `mask` calls this with the same name and
// mask, the last one runs compute(operands of each lane, null outside the mask), and all return after it.
using Lanes = void* const[kWarp];
void together(const char* operation, unsigned mask, void* operands, void (*compute)(Lanes& lanes));

// An asynchronous copy shows nothing but NaN bits in shared memory until it is waited for.
void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int pending);

// d += a b in float32: sums start at d and add the exact products in the order of rising k.
// a is [16][K], b is [K][8], d is [16][8].
void multiply(float* d, const float* a, const float* b, int K);

}  // namespace cuda_host
