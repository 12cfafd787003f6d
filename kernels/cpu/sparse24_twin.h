// The integer and rounding steps of the fixed-point and int8 kernels once more, number by number and in plain C++. It is compiled for
// every processor and serves tests alone: they hold each kernel that their machine runs against it, bit for bit, and it against
// products in double everywhere.
//
//   kTwinFixed     sparse24_bytes.h with two bytes (bf16) or three (fp16, fp32); with bf16 also sparse24_fixed.h
//   kTwinPieces    int8 without AMX: sparse24_bytes.h with one byte, sparse24_int8.h
//   kTwinRows      int8 with AMX: sparse24_int8.h
#pragma once

#include <cmath>
#include <vector>

#include "sparse24_half.h"
#include "sparse24_layout.h"

namespace sparse24 {
namespace twin {

enum Way { kTwinFixed = 0, kTwinPieces = 1, kTwinRows = 2, kTwinWays = 3 };

constexpr int kTwinFixedSteps = 8, kTwinInt8Steps = 16;  // most steps of a piece

struct Integers {
    std::vector<int32_t> u;
    float unit;
};

// Magnitudes are compared by their bits, those of Inf and NaN at the end.
static uint32_t most_of(const std::vector<float>& x) {
    uint32_t most = 0;
    for (const float value : x) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
    }
    return most;
}

static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// u = x / unit, to nearest, ties to even; zeros and a unit that is NaN where something is not finite.
static Integers rounded(const std::vector<float>& x, float factor, float unit, bool finite) {
    Integers out{std::vector<int32_t>(x.size(), 0), unit};
    for (size_t i = 0; i < x.size() && finite; ++i) out.u[i] = int32_t(std::lrintf(x[i] * factor));
    return out;
}

// bytes: 2 or 3 of an activation.
static Integers fixed_point(const std::vector<float>& x, int bytes) {
    const uint32_t most = most_of(x), places = uint32_t(8 * bytes - 2);
    const bool finite = most < 0x7f800000;
    const float widened = float_of(most) * 1.01f;
    uint32_t exponent;
    std::memcpy(&exponent, &widened, 4);
    exponent = exponent >> 23 > 32 ? exponent >> 23 : 32;
    const float unit = finite ? float_of((exponent - places) << 23) : float_of(0x7fc00000);
    return rounded(x, finite ? float_of((254 + places - exponent) << 23) : 0.0f, unit, finite);
}

static Integers int8_of(const std::vector<float>& x) {
    const uint32_t most = most_of(x);
    const bool finite = most < 0x7f800000;
    const float scale = float_of(most) / 127.0f;
    return rounded(x, finite && scale >= 1e-37f ? 1.0f / scale : 0.0f, finite ? scale : float_of(0x7fc00000), finite);
}

// The code of a weight, 0 where none is kept.
static int code_at(const Layout& l, const uint8_t* blob, int64_t output, int64_t input) {
    const int64_t step = input / kStep, j = output % kPanel;
    const uint8_t* p = l.pair(blob, output / kPair) + (2 * step + output % kPair / kPanel) * l.step_bytes;
    const int i = int(input % kStep);
    if (!l.sparse) {
        if (l.bits == 8) return int8_t(p[i * kPanel + j]);
        uint16_t word;
        std::memcpy(&word, p + i / 8 * 64 + j * 4 + i % 2 * 2, 2);
        return (word >> (4 * (i / 2 % 4)) & 15) - 8;
    }
    const int quad = i / 4, t = quad % 4;
    for (int slot = 0; slot < 2; ++slot) {
        uint16_t positions, word;
        std::memcpy(&positions, p + j * 4 + slot * 2, 2);
        if ((positions >> (4 * t + 2 * (quad / 4)) & 3) != i % 4) continue;
        if (l.bits == 8) return int8_t(p[kMetaBytes + quad * 32 + slot * kPanel + j]);
        std::memcpy(&word, p + kMetaBytes + quad / 4 * 64 + j * 4 + slot * 2, 2);
        return (word >> (4 * t) & 15) - 8;
    }
    return 0;
}

// Codes of one output on one scale, as AMX multiplies them: v = round(code x scale / unit), by a factor of 15 places.
struct Rescaled {
    std::vector<int32_t> v;
    float unit;
};

static Rescaled rescaled(const Layout& l, const std::vector<int32_t>& codes, const std::vector<float>& scales) {
    float most = 0;
    for (const float scale : scales) most = std::fabs(scale) > most ? std::fabs(scale) : most;
    const float unit = most * ((l.bits == 4 ? 8.0f : 128.0f) / 127.0f);
    Rescaled out{std::vector<int32_t>(codes.size()), unit};
    for (size_t i = 0; i < codes.size(); ++i) {
        const float ratio = unit > 0 ? scales[i / size_t(l.group)] / unit : 0.0f;
        const int32_t factor = int32_t(std::lrintf(ratio * (l.bits == 4 ? 2048.0f : 32768.0f)));
        const int32_t product = codes[i] * (l.bits == 4 ? 16 : 1) * factor;
        out.v[i] = ((product >> 14) + 1) >> 1;
    }
    return out;
}

// out[N] = a row x[K] of fp32 times the weights of a layout.
static void multiply(const Layout& l, const uint8_t* blob, const std::vector<float>& x, int way, int bytes,
                     float* out) {
    const int64_t most = (way == kTwinPieces ? kTwinInt8Steps : kTwinFixedSteps) * kStep;
    const int64_t piece = way == kTwinRows ? l.k : l.group < most ? l.group : most;
    std::vector<Integers> pieces;
    for (int64_t at = 0; at < l.k; at += piece) {
        const std::vector<float> some(x.begin() + at, x.begin() + (at + piece < l.k ? at + piece : l.k));
        pieces.push_back(way == kTwinFixed ? fixed_point(some, bytes) : int8_of(some));
    }
    for (int64_t n = 0; n < l.n; ++n) {
        std::vector<int32_t> codes(size_t(l.k), 0);
        std::vector<float> scales(static_cast<size_t>(l.groups));
        for (int64_t i = 0; i < l.k; ++i) codes[size_t(i)] = code_at(l, blob, n, i);
        for (int64_t g = 0; g < l.groups; ++g)
            scales[size_t(g)] = to_float(l.scales(blob, n / kPair), l.stored_type, g * kPair + n % kPair);
        const Rescaled weights = way == kTwinRows ? rescaled(l, codes, scales) : Rescaled{codes, 1.0f};
        float total = 0;
        for (size_t p = 0; p < pieces.size(); ++p) {
            const Integers& a = pieces[p];
            int64_t whole = 0, rest = 0;
            for (size_t i = 0; i < a.u.size(); ++i) {
                const int32_t low = bytes == 3 && way == kTwinFixed ? ((a.u[i] + 128) & 255) - 128 : 0;
                whole += int64_t(weights.v[p * size_t(piece) + i]) *
                         ((a.u[i] - low) / (bytes == 3 && way == kTwinFixed ? 256 : 1));
                rest += int64_t(weights.v[p * size_t(piece) + i]) * low;
            }
            const float sum = float(int32_t(whole)), scale = scales[p * size_t(piece) / size_t(l.group)];
            if (way == kTwinRows) {
                total = sum * (a.unit * weights.unit);
            } else if (way == kTwinPieces) {
                total = std::fmaf(sum * scale, a.unit, total);
            } else {
                total =
                    std::fmaf(bytes == 3 ? std::fmaf(sum, 256.0f, float(int32_t(rest))) : sum, scale * a.unit, total);
            }
        }
        out[n] = total;
    }
}

}  // namespace twin
}  // namespace sparse24
