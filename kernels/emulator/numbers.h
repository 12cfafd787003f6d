// The 16-bit floating point types of CUDA, bit for bit: round to nearest even, denormals kept, one NaN (0x7fff) as result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// `value` rounded to `mantissa` explicit bits and an exponent field of `exponent` bits, as the bits of that format. One
// rounding, to nearest even. `value` may stand for a number that a double cannot hold if it was rounded to odd.
template <int exponent, int mantissa>
inline uint16_t round_to_bits(double value) {
    constexpr int bias = (1 << (exponent - 1)) - 1;
    const uint64_t bits = bit_cast<uint64_t>(value);
    const uint16_t sign = uint16_t((bits >> 63) << 15);
    const int field = int((bits >> 52) & 0x7ff);
    uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
    if (field == 0x7ff) return fraction ? 0x7fff : uint16_t(sign | (((1 << exponent) - 1) << mantissa));
    int power = field - 1023 + bias;  // exponent field of the result while it is above 0
    if (field) fraction |= uint64_t(1) << 52;
    int drop = 52 - mantissa;
    if (power <= 0) {  // a denormal of the result: the unit is fixed
        drop += 1 - power;
        power = 0;
    }
    if (drop > 54) return sign;  // less than half the least number
    uint64_t kept = fraction >> drop;
    const uint64_t rest = fraction & ((uint64_t(1) << drop) - 1), half = uint64_t(1) << (drop - 1);
    kept += rest > half || (rest == half && (kept & 1));
    // Adding the mantissa with its leading one carries into the exponent where rounding does.
    const uint64_t result = (uint64_t(power ? power - 1 : 0) << mantissa) + kept;
    constexpr uint64_t infinity = uint64_t((1 << exponent) - 1) << mantissa;
    return uint16_t(sign | (result > infinity ? infinity : result));
}

inline float half_bits_to_float(uint16_t bits) {
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
    if ((bits & 0x7c00) == 0x7c00) return bit_cast<float>(sign | magnitude | 0x7f800000);
    return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));  // exact, denormals too
}

inline float bfloat16_bits_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// a * b + c rounded to odd: the last bit is set when the double is not exact, so that rounding again to at most 51 bits
// gives what one rounding would have given. a, b and c have at most 24 bits, so the product is exact.
inline double fma_to_odd(double a, double b, double c) {
    const double product = a * b, sum = product + c;
    if (!std::isfinite(sum)) return sum;
    const double shadow = sum - product, error = (product - (sum - shadow)) + (c - shadow);  // Knuth's TwoSum
    if (error == 0) return sum;
    const uint64_t bits = bit_cast<uint64_t>(sum);
    if (bits & 1) return sum;
    const bool away = (error > 0) == (sum > 0);
    return bit_cast<double>(away ? bits + 1 : bits - 1);
}

}  // namespace emulator

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;

inline float __bfloat162float(__nv_bfloat16 v) { return emulator::bfloat16_bits_to_float(v.bits); }
inline float __half2float(__half v) { return emulator::half_bits_to_float(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {emulator::round_to_bits<8, 7>(v)}; }
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
inline __half __float2half_rn(float v) { return {emulator::round_to_bits<5, 10>(v)}; }
inline __half __float2half(float v) { return __float2half_rn(v); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return {v}; }
inline __half __ushort_as_half(unsigned short v) { return {v}; }
inline unsigned __float_as_uint(float v) { return emulator::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulator::bit_cast<float>(v); }

namespace emulator {

template <class T>
struct Number;  // what the warp instructions need to know about a type of 16 bits
template <>
struct Number<__nv_bfloat16> {
    static constexpr const char* mma_name = "mma_sp of bf16, selector";
    static float widen(uint16_t bits) { return bfloat16_bits_to_float(bits); }
    static uint16_t round(double value) { return round_to_bits<8, 7>(value); }
};
template <>
struct Number<__half> {
    static constexpr const char* mma_name = "mma_sp of f16, selector";
    static float widen(uint16_t bits) { return half_bits_to_float(bits); }
    static uint16_t round(double value) { return round_to_bits<5, 10>(value); }
};

}  // namespace emulator
