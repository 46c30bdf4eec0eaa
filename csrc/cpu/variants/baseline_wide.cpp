// baseline_wide: the 512-bit source lowered to 128-bit instructions, so that it runs everywhere.
#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (16 * 16)
#define SHVIT_PAIRS 1  // so that they are tested everywhere

#include "../variant.h"

const shvit::Variant shvit::kBaselineWide = variant<64>("baseline_wide");
