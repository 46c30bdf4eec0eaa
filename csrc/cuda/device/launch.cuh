// One way to start a kernel. tests/cuda_host holds the twin that runs it on a processor.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace shvit {

// CUDA's words for an error, nullptr without one. The runtime forgets it, or PyTorch's next call would report
// it.
inline const char* words_for(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

// Starts `kernel` on a stream (cudaStream_t); nullptr, or what went wrong in CUDA's words.
template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                   Args... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const char* error = words_for(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes)));
    if (error != nullptr) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return words_for(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

}  // namespace shvit
