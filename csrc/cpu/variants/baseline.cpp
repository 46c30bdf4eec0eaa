// baseline: 128-bit vectors, on any processor.
#include <cstdint>
#include <type_traits>
#include <utility>

#define SHVIT_REGISTER_BYTES (16 * 16)

#include "../variant.h"

const shvit::Variant shvit::kBaseline = variant<16>("baseline");
