// Rounding to a grid inside training, and the gradient that passes straight through it: `round_to_grid` and `grid_gradient` of
// sparsify/training/qat_linear.py, each in one pass over the weights.
//
// Rows do not depend on each other. A sum over a group has one order, 16 running sums that are then added in pairs, so the
// result is the same to the last bit for any number of threads and at every level.
//
// Masks come as bits, the first input of a row in the lowest, and are spread to a byte for each input one row at a time.
#include "exact.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;

// One row of a weight: inputs in groups of `group` that share a scale. mask: a byte for each input. mask, zero: null for none.
struct Row {
    const float* W;
    const float* scale;
    const uint8_t* mask;
    const int8_t* zero;
    int64_t inputs, group;
    float low, high;  // of the codes; less the zero point of a group
};

INLINE float clamped(float x, float low, float high) { return std::min(std::max(x, low), high); }  // NaN stays NaN

INLINE void store(float x, float* to) { *to = x; }

INLINE void store(float x, uint16_t* to) {  // bfloat16, to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *to = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float load(const float* from) { return *from; }

INLINE float load(const uint16_t* from) {
    const uint32_t bits = static_cast<uint32_t>(*from) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// to = scale * clamp(rint(W / scale)) inside the mask
template <typename Out, bool Masked>
INLINE void round_groups(const Row& row, Out* to) {
    for (int64_t g = 0, first = 0; first < row.inputs; g++, first += row.group) {
        const float unit = row.scale[g], z = row.zero ? row.zero[g] : 0.0f, low = row.low - z, high = row.high - z;
        const float* W = row.W + first;
        const uint8_t* mask = row.mask + (Masked ? first : 0);
        for (int64_t k = 0; k < row.group; k++) {
            const float value = clamped(std::rint(W[k] / unit), low, high) * unit;
            store(Masked ? value * static_cast<float>(mask[k]) : value, to + first + k);
        }
    }
}

template <typename Out>
INLINE void round_row(const Row& row, Out* to) {
    row.mask ? round_groups<Out, true>(row, to) : round_groups<Out, false>(row, to);
}

// What one weight adds to the gradient of its scale; its own gradient goes to d_weight.
template <typename In, bool Masked>
INLINE float pass_through(float w, float unit, float low, float high, const In* gradient, const uint8_t* mask,
                          bool through, float* d_weight) {
    const float ratio = w / unit, code = clamped(std::rint(ratio), low, high), error = code - ratio;
    const bool inside = std::fabs(error) <= 0.5f;
    const float g = load(gradient), kept = Masked ? g * static_cast<float>(*mask) : g;
    *d_weight = (through ? g : kept) * (inside ? 1.0f : 0.0f);
    return (inside ? error : code) * kept;
}

template <typename In, bool Masked>
INLINE void gradient_of_groups(const Row& row, const In* gradient, bool through, float* d_weight, float* d_scale) {
    for (int64_t g = 0, first = 0; first < row.inputs; g++, first += row.group) {
        const float unit = row.scale[g], z = row.zero ? row.zero[g] : 0.0f, low = row.low - z, high = row.high - z;
        const float* W = row.W + first;
        const In* in = gradient + first;
        const uint8_t* mask = row.mask + (Masked ? first : 0);
        float* out = d_weight + first;
        float sums[kLanes] = {};
        int64_t k = 0;
        for (; k + kLanes <= row.group; k += kLanes)
            for (int64_t i = 0; i < kLanes; i++)
                sums[i] += pass_through<In, Masked>(W[k + i], unit, low, high, in + k + i, mask + (Masked ? k + i : 0),
                                                    through, out + k + i);
        for (int64_t i = 0; k + i < row.group; i++)
            sums[i] += pass_through<In, Masked>(W[k + i], unit, low, high, in + k + i, mask + (Masked ? k + i : 0),
                                                through, out + k + i);
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++) sums[i] += sums[i + half];
        d_scale[g] = sums[0];
    }
}

template <typename In>
INLINE void gradient_of_row(const Row& row, const In* gradient, bool through, float* d_weight, float* d_scale) {
    row.mask ? gradient_of_groups<In, true>(row, gradient, through, d_weight, d_scale)
             : gradient_of_groups<In, false>(row, gradient, through, d_weight, d_scale);
}

using RoundRow = void (*)(const Row& row, void* to, bool bf16);
using GradientRow = void (*)(const Row& row, const void* gradient, bool bf16, bool through, float* d_weight,
                             float* d_scale);

INLINE void round_any(const Row& row, void* to, bool bf16) {
    bf16 ? round_row(row, static_cast<uint16_t*>(to)) : round_row(row, static_cast<float*>(to));
}

INLINE void gradient_any(const Row& row, const void* gradient, bool bf16, bool through, float* d_weight,
                         float* d_scale) {
    bf16 ? gradient_of_row(row, static_cast<const uint16_t*>(gradient), through, d_weight, d_scale)
         : gradient_of_row(row, static_cast<const float*>(gradient), through, d_weight, d_scale);
}

void round_portable(const Row& row, void* to, bool bf16) { round_any(row, to, bf16); }

void gradient_portable(const Row& row, const void* gradient, bool bf16, bool through, float* d_weight, float* d_scale) {
    gradient_any(row, gradient, bf16, through, d_weight, d_scale);
}

#if SPARSIFY_X86

TARGET_AVX2
void round_avx2(const Row& row, void* to, bool bf16) { round_any(row, to, bf16); }

TARGET_AVX2
void gradient_avx2(const Row& row, const void* gradient, bool bf16, bool through, float* d_weight, float* d_scale) {
    gradient_any(row, gradient, bf16, through, d_weight, d_scale);
}

TARGET_AVX512
void round_avx512(const Row& row, void* to, bool bf16) { round_any(row, to, bf16); }

TARGET_AVX512
void gradient_avx512(const Row& row, const void* gradient, bool bf16, bool through, float* d_weight, float* d_scale) {
    gradient_any(row, gradient, bf16, through, d_weight, d_scale);
}

constexpr RoundRow kRounds[] = {round_portable, round_avx2, round_avx512};
constexpr GradientRow kGradients[] = {gradient_portable, gradient_avx2, gradient_avx512};
#else
constexpr RoundRow kRounds[] = {round_portable};
constexpr GradientRow kGradients[] = {gradient_portable};
#endif

// For each byte eight bytes, the i-th of which is its bit i.
using Spread = std::array<std::array<uint8_t, 8>, 256>;

constexpr Spread spread_of_all_bytes() {
    Spread spread{};
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0; i < 8; i++) spread[byte][i] = byte >> i & 1;
    return spread;
}

constexpr Spread kSpread = spread_of_all_bytes();

// The mask of one row, a byte for each input. bytes: room for it
const uint8_t* mask_of_row(const uint8_t* bits, int64_t n, std::vector<uint8_t>& bytes) {
    if (bits == nullptr) return nullptr;
    const int64_t count = static_cast<int64_t>(bytes.size()) / 8;
    for (int64_t i = 0; i < count; i++) std::memcpy(&bytes[8 * i], kSpread[bits[n * count + i]].data(), 8);
    return bytes.data();
}

Row row_at(int64_t n, const float* W, const float* scale, const uint8_t* mask, const int8_t* zero, int64_t inputs,
           int64_t group, float low, float high) {
    const int64_t groups = inputs / group;
    return {W + n * inputs, scale + n * groups, mask, zero ? zero + n * groups : nullptr, inputs, group, low, high};
}

}  // namespace

// W: [outputs, inputs]; scale: [outputs, inputs / group]; mask: bits, [outputs, ceil(inputs / 8)], or null; zero:
// [outputs, inputs / group] or null; to: [outputs, inputs] float32, or bfloat16. level: as compilation_of takes it.
extern "C" void sparsify_round_to_grid(const float* W, const float* scale, const uint8_t* mask, const int8_t* zero,
                                       int64_t outputs, int64_t inputs, int64_t group, float low, float high, void* to,
                                       int bf16, int threads, int level) {
    const RoundRow round = kRounds[sparsify::compilation_of(level)];
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> bytes(mask ? (inputs + 7) / 8 * 8 : 0);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n++)
            round(row_at(n, W, scale, mask_of_row(mask, n, bytes), zero, inputs, group, low, high),
                  static_cast<char*>(to) + n * inputs * (bf16 ? 2 : 4), bf16 != 0);
    }
}

// gradient: [outputs, inputs] float32 or bfloat16, of what sparsify_round_to_grid gave; through: not stopped by the mask;
// d_weight: [outputs, inputs]; d_scale: [outputs, inputs / group]; all else as above.
extern "C" void sparsify_grid_gradient(const void* gradient, int bf16, const float* W, const float* scale,
                                       const uint8_t* mask, const int8_t* zero, int64_t outputs, int64_t inputs,
                                       int64_t group, float low, float high, int through, float* d_weight,
                                       float* d_scale, int threads, int level) {
    const GradientRow pass = kGradients[sparsify::compilation_of(level)];
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> bytes(mask ? (inputs + 7) / 8 * 8 : 0);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n++)
            pass(row_at(n, W, scale, mask_of_row(mask, n, bytes), zero, inputs, group, low, high),
                 static_cast<const char*>(gradient) + n * inputs * (bf16 ? 2 : 4), bf16 != 0, through != 0,
                 d_weight + n * inputs, d_scale + n * (inputs / group));
    }
}
