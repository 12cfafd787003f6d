// Rows of bf16 in fixed point, by the kernels of sparse24_fixed.h.
#pragma once

#include "sparse24_fixed.h"
#include "sparse24_run_bf16.h"

#if SPARSIFY_COMPILES_AVX512BF16

namespace sparse24 {

// One row of bf16 in fixed point (sparse24_fixed.h).
static int run_one_fixed(const Call& call) {
    const Layout& l = call.l;
    const fixed::Cut cut = fixed::cut(l);
    const int64_t padded = l.steps * kStep, expanded = l.steps * bf16::kQuadBytes;
    const Shares shares(l.pairs);
    if (shares.failed()) return kOutOfMemory;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k, [&](int thread, int threads) {
        uint8_t* x = own.get(size_t(expanded + padded * 2 + cut.pieces * 4));
        if (x == nullptr) {
            failed = true;
            return;
        }
        if (thread >= l.pairs) return;
        int16_t* words = reinterpret_cast<int16_t*>(x + expanded);
        float* units = reinterpret_cast<float*>(words + padded);
        fixed::to_words(l, cut, static_cast<const uint16_t*>(call.x), padded, 0, words, units, 1);
        bf16::expand_row(reinterpret_cast<const uint16_t*>(words), l.steps, x);
        shares.each(thread, threads, 0, [&](int64_t p) {
            float sums[kPair];
            fixed::direct_fixed(l, cut, l.pair(call.blob, p), l.scales(call.blob, p), x, units, sums);
            finish_rows(call, p, 0, 1, 1, sums, kPair, kPanel);
        });
    });
    return failed ? kOutOfMemory : kOk;
}

#if SPARSIFY_COMPILES_AMX

// Rows of bf16 in fixed point, all of them at once.
static int run_fixed(const Call& call) {
    const Layout& l = call.l;
    const fixed::Cut cut = fixed::cut(l);
    const int blocks = int((call.rows + 15) / 16), even = int((call.rows + blocks - 1) / blocks);  // rows of a block
    const int block_rows = even > 8 ? std::max((even + 3) / 4 * 4, 12) : (even + 1) / 2 * 2;
    const int64_t all_rows = int64_t(blocks) * block_rows, block_bytes = int64_t(block_rows) * 128;
    const int64_t tile_bytes = blocks * block_bytes, tiles = fixed::tiles_of(int(l.steps)),
                  padded = tiles * fixed::kTileInputs;
    uint8_t* x = shared.get(size_t(tiles * tile_bytes + cut.pieces * all_rows * 4));
    const Shares shares(l.pairs);
    if (x == nullptr || shares.failed()) return kOutOfMemory;
    float* units = reinterpret_cast<float*>(x + tiles * tile_bytes);
    const fixed::Multiply multiply = fixed::multiplier(l, block_rows);
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        const size_t sums_bytes = size_t(all_rows) * kPair * 4;
        float* sums = reinterpret_cast<float*>(own.get(sums_bytes + padded * 2));  // [panel][row][16]
        if (sums == nullptr) failed = true;
        const Range mine = sums ? part(all_rows, thread, threads) : Range{0, 0};
        int16_t* words = reinterpret_cast<int16_t*>(reinterpret_cast<uint8_t*>(sums) + sums_bytes);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            uint8_t* high = x + m / block_rows * block_bytes + m % block_rows * 64;
            uint8_t* low = high + block_rows * 64;
            if (m < call.rows) {
                const int shift = l.bits == 4 ? 4 : 0;  // 4-bit codes are decoded times 16
                fixed::to_words(l, cut, static_cast<const uint16_t*>(call.row(m)), padded, shift, words, units + m,
                                all_rows);
                fixed::to_tiles(l, words, tiles, high, low, tile_bytes);
                continue;
            }
            for (int64_t t = 0; t < tiles; ++t) {
                std::memset(high + t * tile_bytes, 0, 64);
                std::memset(low + t * tile_bytes, 0, 64);
            }
            for (int64_t piece = 0; piece < cut.pieces; ++piece) units[piece * all_rows + m] = 0;
        }
        barrier();
        if (failed) return;
        bf16::enter_amx(block_rows > 8 ? block_rows : 2 * block_rows);
        const int64_t c_stride = all_rows * kPanel;
        shares.each(thread, threads, 0, [&](int64_t p) {
            std::memset(sums, 0, sums_bytes);
            multiply(l, cut, l.pair(call.blob, p), l.scales(call.blob, p), x, units, blocks, sums, c_stride);
            finish_rows(call, p, 0, call.rows, 1, sums, kPanel, c_stride);
        });
        bf16::leave_amx();
    });
    return failed ? kOutOfMemory : kOk;
}

#endif  // SPARSIFY_COMPILES_AMX

}  // namespace sparse24

#endif  // SPARSIFY_COMPILES_AVX512BF16
