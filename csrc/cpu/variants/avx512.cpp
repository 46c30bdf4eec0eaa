// avx512: 512-bit vectors, AVX-512 (F, VL, BW, DQ).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (32 * 64)
#define SHVIT_LANE_MASKS 1

#include "../kernels.h"
#include "../target.h"
SHVIT_BEGIN_TARGET("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")
#include "../variant.h"

const shvit::Variant shvit::kAvx512 = variant<64>("avx512");
SHVIT_END_TARGET
#endif
