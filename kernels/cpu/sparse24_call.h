// One product: its operands, and single rows of them in fp32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "sparse24_half.h"
#include "sparse24_layout.h"

namespace sparse24 {

enum Status { kOk = 0, kBadArgument = 1, kUnsupported = 2, kOutOfMemory = 3 };

struct Call {
    Layout l;
    const uint8_t* blob;
    const void* x;
    int type;  // of x and y
    int64_t rows, ldx;
    const void* bias;  // or null
    int bias_type;
    void* y;

    const void* row(int64_t m) const { return static_cast<const uint8_t*>(x) + m * ldx * (type == kF32 ? 4 : 2); }
    // The bias of the outputs from `n` on, or null.
    const void* bias_at(int64_t n) const {
        return bias ? static_cast<const uint8_t*>(bias) + n * (bias_type == kF32 ? 4 : 2) : nullptr;
    }
    void* result(int64_t m, int64_t n) const {
        return static_cast<uint8_t*>(y) + (m * l.n + n) * (type == kF32 ? 4 : 2);
    }
};

static void widen_row(const Call& call, int64_t m, int64_t padded, float* out) {
    for (int64_t i = 0; i < call.l.k; ++i) out[i] = to_float(call.row(m), call.type, i);
    std::fill(out + call.l.k, out + padded, 0.0f);
}

static void finish_f32(const Call& call, int64_t pair, int64_t m, const float* sums) {
    const int64_t first = pair * kPair;
    const int columns = int(std::min<int64_t>(kPair, call.l.n - first));
    for (int j = 0; j < columns; ++j) {
        const float sum = sums[j] + (call.bias ? to_float(call.bias, call.bias_type, first + j) : 0.0f);
        void* to = call.result(m, first + j);
        if (call.type == kF32) {
            std::memcpy(to, &sum, 4);
        } else {
            const uint16_t v = call.type == kBf16 ? float_to_bf16(sum) : float_to_half(sum);
            std::memcpy(to, &v, 2);
        }
    }
}

}  // namespace sparse24
