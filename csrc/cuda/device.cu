// What the kernels ask of the current device.
#include <cuda_runtime.h>

#include "kernels.h"

namespace shvit::cuda {

int shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes;
}

}  // namespace shvit::cuda
