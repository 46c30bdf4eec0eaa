// The face of the CUDA kernels for the code that binds them: plain parameters and functions, no CUDA header, no
// PyTorch.
//
// B images, C channels, P partial channels, D = qk_dim, N tokens, O = 2 D + P. Every function starts its
// kernels on `stream` (a cudaStream_t) and returns nullptr, or what went wrong.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shvit::cuda {

enum class Type { kFloat16, kBFloat16, kFloat32 };

struct Sizes {
  int64_t B;
  int C, P, D, N;
  int O() const { return 2 * D + P; }
};

// Arithmetic of the matrix products where the tensors are float32.
struct Precision {
  bool tf32_proj, tf32_attn;
};

// The largest shared memory of a block on the current device, in bytes.
int shared_memory_limit();

}  // namespace shvit::cuda
