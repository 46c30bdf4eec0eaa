// avx2: 256-bit vectors, AVX2 and FMA.
#if defined(__x86_64__)
#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (16 * 32)

#include "../kernels.h"
#include "../target.h"
SHVIT_BEGIN_TARGET("avx2,fma")
#include "../variant.h"

const shvit::Variant shvit::kAvx2 = variant<32>("avx2");
SHVIT_END_TARGET
#endif
