// What blocks of GGUF tensors are made of.
#pragma once
#include "simd.h"

namespace quire::QUIRE_NS {

QUIRE_INLINE float half_at(const uint8_t* p) {
    f16 x;
    std::memcpy(&x, p, 2);
    return to_float(x);
}

// A power of two, 2^-127 to 2^127, or NaN (E8M0 of the OCP Microscaling specification).
QUIRE_INLINE float power_at(const uint8_t* p) {
    return from_bits(*p == 255 ? 0x7fc00000u : *p ? static_cast<uint32_t>(*p) << 23 : 0x00400000u);
}

// Scale and minimum of group j (of 8), 6 bits each, in the 12 bytes of Q4_K and Q5_K.
QUIRE_INLINE void scale_and_least(const uint8_t* p, int j, int& scale, int& least) {
    scale = j < 4 ? p[j] & 63 : (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
    least = j < 4 ? p[j + 4] & 63 : p[j + 4] >> 4 | (p[j] >> 6) << 4;
}

}  // namespace quire::QUIRE_NS
