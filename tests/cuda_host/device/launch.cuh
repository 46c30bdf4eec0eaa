// Twin of csrc/cuda/device/launch.cuh: starts a kernel on the processor and waits for its end.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

namespace shvit {

template <class... Params, class... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void*,
                   Args... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "kernel parameters are limited to 4 KB");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  };
  const Call call = {kernel, {static_cast<Params>(args)...}};
  const auto body = [](const void* c) {
    std::apply(static_cast<const Call*>(c)->kernel, static_cast<const Call*>(c)->params);
  };
  return cuda_host::run(reinterpret_cast<const void*>(kernel), grid, dim3(threads), shared_bytes, body, &call);
}

}  // namespace shvit
