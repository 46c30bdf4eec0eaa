// avx2_wide: the 512-bit source lowered to AVX2 and FMA, so that it is tested where AVX-512 is absent.
#if defined(__x86_64__)
#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (16 * 32)
#define SHVIT_PAIRS 1  // so that they are tested everywhere

#include "../kernels.h"
#include "../target.h"
SHVIT_BEGIN_TARGET("avx2,fma")
#include "../variant.h"

const shvit::Variant shvit::kAvx2Wide = variant<64>("avx2_wide");
SHVIT_END_TARGET
#endif
