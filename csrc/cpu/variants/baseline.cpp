// baseline: 128-bit vectors, on any processor.
#include <cstdint>

#include "../variant.h"

const shvit::Variant shvit::kBaseline = variant<16>("baseline");
