// A warp multiplies marlin-24 bytes as they lie in a checkpoint, with the operands in the lanes where the Sparse-Marlin kernel
// had them (Frantar et al., arXiv 2408.11743; vLLM 0.15, csrc/quantization/marlin/sparse). Real GPUs executed that layout for
// two years, so what this computes checks the emulator's reading of mma.sp against them and not against ourselves.
#include <stdint.h>

#include "../emulator/cuda_emulator.h"

namespace {

// codes: [K/32][N/64][lane] four words; meta: [K/32][N/64][16] four words; x: [8][K] fp16; y: [8][N] float, without scales.
// A block has one warp and makes 64 outputs.
__global__ void multiply(const uint32_t* codes, const uint8_t* meta, const uint8_t* x, float* y, int n, int k) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, warps = n / 64;
    uint8_t* tokens = extern_shared();      // 8 rows of 32 inputs, 16-byte chunks side by side: [4][8]
    uint8_t* positions = tokens + 4 * 128;  // of one step: [16] chunks, twice so that four matrices can be loaded
    float sums[4][4] = {};
    for (int step = 0; step < k / 32; ++step) {
        block_barrier();
        const int from = step * warps + blockIdx.x;
        cp_async_16(tokens + lane * 16, x + ((lane % 8) * k + step * 32 + lane / 8 * 8) * 2, true);
        cp_async_16(positions + lane * 16, meta + (from * 16 + lane % 16) * 16, true);
        cp_async_commit();
        cp_async_wait<0>();
        block_barrier();
        uint32_t b[4], e[4];
        ldmatrix_x4(b, tokens + lane * 16);
        ldmatrix_x4(e, positions + lane * 16);
        const uint4 four = load_nc_u128(codes + (from * 32 + lane) * 4);
        const uint32_t words[4] = {four.x, four.y, four.z, four.w};
        for (int block = 0; block < 4; ++block) {
            uint32_t a[4];
            const int nibble[4] = {0, 2, 1, 3};  // of matrix register r; its second value four nibbles above
            for (int r = 0; r < 4; ++r) {
                const auto value = [&](int at) {
                    return uint32_t(__half_as_ushort(__float2half_rn(float(int(words[block] >> 4 * at & 15) - 8))));
                };
                a[r] = value(nibble[r]) | value(nibble[r] + 4) << 16;
            }
            block % 2 ? mma_sp<__half, 1>(sums[block], a, b, e[block / 2])
                      : mma_sp<__half, 0>(sums[block], a, b, e[block / 2]);
        }
    }
    for (int block = 0; block < 4; ++block)
        for (int i = 0; i < 4; ++i)  // row g or g + 8 of the instruction, token 2 t or 2 t + 1
            global_store<float>(y + (2 * t + i % 2) * n + blockIdx.x * 64 + 8 * g + 4 * (i / 2) + block,
                                sums[block][i]);
}

}  // namespace

extern "C" int marlin24_product(const void* codes, const void* meta, const void* x, void* y, int n, int k) {
    SPARSIFY_LAUNCH(multiply, dim3(n / 64), dim3(32), 4 * 128 + 512, nullptr, static_cast<const uint32_t*>(codes),
                    static_cast<const uint8_t*>(meta), static_cast<const uint8_t*>(x), static_cast<float*>(y), n, k);
    return cudaGetLastError();
}
