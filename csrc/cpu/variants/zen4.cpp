// zen4: avx512, and products in pairs where they are large: for cores whose adders and multiply-adds work side
// by side.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (32 * 64)
#define SHVIT_LANE_MASKS 1
#define SHVIT_PAIRS 1

#include "../kernels.h"
#include "../target.h"
SHVIT_BEGIN_TARGET("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq")
#include "../variant.h"

const shvit::FusedKernels<float> shvit::kZen4Fused = fused_kernels<float, 64>();
const shvit::MixerKernels shvit::kZen4Mixer = mixer_kernels<float, 64>();
SHVIT_END_TARGET
#endif
