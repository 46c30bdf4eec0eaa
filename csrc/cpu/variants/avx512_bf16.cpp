// avx512_bf16: avx512, and products of bfloat16 by AVX512_BF16 in fused models.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (32 * 64)
#define SHVIT_LANE_MASKS 1
#define SHVIT_BFLOAT16 1

#include "../kernels.h"
#include "../target.h"
SHVIT_BEGIN_TARGET("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")
#include "../variant.h"

const shvit::FusedKernels<BFloat16> shvit::kAvx512Bf16 = fused_kernels<BFloat16, 64>();
SHVIT_END_TARGET
#endif
