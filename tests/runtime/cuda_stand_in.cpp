// Stands in for the library that nvcc makes of kernels/cuda/sparse24.cu: the same C interface on the processor, by plain
// loops. A packed weight is the checkpoint's own tensors, one after the other, at 16-byte boundaries.
#include <cstdint>
#include <cstring>

static int64_t up(int64_t n) { return (n + 15) / 16 * 16; }

static float widen(uint16_t bits, int type) {
    if (type == 0) {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

static uint16_t narrow(float value, int type) {
    uint16_t bits;
    if (type == 1) {
        _Float16 half = _Float16(value);
        std::memcpy(&bits, &half, 2);
        return bits;
    }
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    return uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

static int last[4];  // rows, distance of rows, configuration, whether there was a workspace: for the tests

extern "C" {

const int* last_call() { return last; }

int64_t sparse24_cuda_packed_bytes(int64_t n, int64_t k, int64_t group) {
    if (n % 64 || k % 64 || k % group) return -1;
    return up(n * k / 4) + up(n * k / 8) + up(n * (k / group) * 2);
}

int sparse24_cuda_pack(int64_t n, int64_t k, int64_t group, int, const void* words, const void* meta, const void* scale,
                       void* packed, void* stream) {
    if (stream) return 2;
    char* to = static_cast<char*>(packed);
    std::memcpy(to, words, n * k / 4);
    std::memcpy(to + up(n * k / 4), meta, n * k / 8);
    std::memcpy(to + up(n * k / 4) + up(n * k / 8), scale, n * (k / group) * 2);
    return 0;
}

int sparse24_cuda_config_count() { return 2; }
int sparse24_cuda_rounds_weights(int64_t, int64_t, int64_t, int64_t, int, int, int) { return 0; }

const char* sparse24_cuda_config_name(int config) { return config ? "one" : "zero"; }

int sparse24_cuda_decode(const void* packed, int64_t n, int64_t k, int64_t group, int scale_type, int type,
                         void* weight, void* stream) {
    if (stream) return 2;
    last[2] = -2;
    const char* at = static_cast<const char*>(packed);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
    const uint8_t* meta = reinterpret_cast<const uint8_t*>(at + up(n * k / 4));
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(at + up(n * k / 4) + up(n * k / 8));
    std::memset(weight, 0, n * k * 2);
    for (int64_t out = 0; out < n; ++out) {
        for (int64_t kept = 0; kept < k / 2; ++kept) {
            const int nibble = meta[out * (k / 8) + kept / 4] >> (4 * (kept / 2 % 2)) & 15;
            const int64_t input = kept / 2 * 4 + (nibble >> (2 * (kept % 2)) & 3);
            const int code = int(words[out * (k / 16) + kept / 8] >> (4 * (kept % 8)) & 15) - 8;
            const float value = code * widen(scale[out * (k / group) + input / group], scale_type);
            static_cast<uint16_t*>(weight)[out * k + input] = narrow(value, type);
        }
    }
    return 0;
}

// Odd numbers of rows are given a workspace.
int64_t sparse24_cuda_workspace_bytes(int64_t m, int64_t n, int64_t, int64_t, int, int) {
    return m % 2 ? m * n * 4 : 0;
}

int sparse24_cuda_linear(const void* x, int64_t ldx, int type, int64_t m, const void* packed, int64_t n, int64_t k,
                         int64_t group, int scale_type, const void* bias, void* y, void* workspace, int config,
                         int sm_count, void* stream) {
    if (stream || sm_count != 7 || ldx % 8 || ldx < k || reinterpret_cast<uintptr_t>(x) % 16 || (m % 2 && !workspace))
        return 1;
    last[0] = int(m), last[1] = int(ldx), last[2] = config, last[3] = workspace != nullptr;
    if (workspace) std::memset(workspace, 0xFF, m * n * 4);
    const char* at = static_cast<const char*>(packed);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
    const uint8_t* meta = reinterpret_cast<const uint8_t*>(at + up(n * k / 4));
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(at + up(n * k / 4) + up(n * k / 8));
    const uint16_t* in = static_cast<const uint16_t*>(x);
    for (int64_t row = 0; row < m; ++row) {
        for (int64_t out = 0; out < n; ++out) {
            double sum = bias ? widen(static_cast<const uint16_t*>(bias)[out], type) : 0.0;
            for (int64_t kept = 0; kept < k / 2; ++kept) {
                const int64_t quad = kept / 2;
                const int nibble = meta[out * (k / 8) + quad / 2] >> (4 * (quad % 2)) & 15;
                const int64_t input = 4 * quad + (nibble >> (2 * (kept % 2)) & 3);
                const int code = int(words[out * (k / 16) + kept / 8] >> (4 * (kept % 8)) & 15) - 8;
                sum += double(code) * widen(scale[out * (k / group) + input / group], scale_type) *
                       widen(in[row * ldx + input], type);
            }
            static_cast<uint16_t*>(y)[row * n + out] = narrow(float(sum), type);
        }
    }
    return 0;
}
}
