// bf16, fp16 and fp32 numbers into each other, one at a time, rounded to the nearest and ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse24_layout.h"

namespace sparse24 {

static inline float bf16_to_float(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline float half_to_float(uint16_t v) {
    const uint32_t sign = uint32_t(v & 0x8000) << 16, rest = v & 0x7fff;
    uint32_t bits = (rest << 13) + (112u << 23);  // the exponent's bias is 15 there and 127 here
    float f;
    if (rest >= 0x7c00) {
        bits = rest << 13 | 0x7f800000;  // Inf and NaN
    } else if (rest < 0x0400) {          // zero and denormals: a multiple of 2^-24
        f = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // a NaN stays one
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x47800000) return sign | 0x7c00;  // 65536 and more; what rounds up to it carries into Inf below
    if (bits < 0x38800000) {                       // a denormal: count of 2^-24, rounded by the addition of 1.5 * 2^23
        float magnitude, magic = 0x1.8p23f;
        std::memcpy(&magnitude, &bits, 4);
        volatile float sum = magnitude * 0x1p24f + magic;
        const float rounded = sum;
        uint32_t count;
        std::memcpy(&count, &rounded, 4);
        return uint16_t(sign | (count & 0x7ff));
    }
    return uint16_t(sign | (bits - (112u << 23) + 0x0fff + (bits >> 13 & 1)) >> 13);
}

static inline float to_float(const void* x, int type, int64_t i) {
    if (type == kF32) return static_cast<const float*>(x)[i];
    const uint16_t v = static_cast<const uint16_t*>(x)[i];
    return type == kBf16 ? bf16_to_float(v) : half_to_float(v);
}

}  // namespace sparse24
