// Between fp32 and bf16, one number at a time. Not for the units of instruction sets, which have vectors of their own.
#pragma once

#include <cstdint>
#include <cstring>

#include "operands.h"

namespace hf_topkast {

inline float float_of(float value) { return value; }
inline float float_of(uint16_t bfloat16) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t bfloat16_of(float value) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return uint16_t((bits | 0x400000) >> 16);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void to_floats(const Array& from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = from.itemsize == 4 ? ((const float*)from.address)[i] : float_of(((const uint16_t*)from.address)[i]);
}

inline void from_floats(const float* from, int64_t count, const Array& to) {
    for (int64_t i = 0; i < count; ++i)
        if (to.itemsize == 4)
            ((float*)to.address)[i] = from[i];
        else
            ((uint16_t*)to.address)[i] = bfloat16_of(from[i]);
}

}  // namespace hf_topkast
