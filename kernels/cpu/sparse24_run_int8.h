// Rows in int8, by the kernels of sparse24_int8.h.
#pragma once

#include "sparse24_int8.h"
#include "sparse24_run_bf16.h"

#if SPARSIFY_COMPILES_AVX512BF16

namespace sparse24 {

// Rows in int8 without AMX (sparse24_int8.h). A tile: [step][vector][row] bytes, then [piece][row] scales.
struct Int8Blocks {
    const Call& call;
    const int parts = 1;
    const int64_t piece_steps = std::min<int64_t>(call.l.steps_per_group, int8::kRunSteps),
                  pieces = (call.l.steps + piece_steps - 1) / piece_steps;
    const bool in_one_run =
        call.rows <= int8::kDotRows && call.l.steps_per_group <= int8::kRunSteps;  // no other tile reads it again
    const Blocking b = blocking(call.l, call.rows, 1, kPickedBlockRows, int8::kDotRows, 1,
                                in_one_run ? call.l.steps : int8::kRunSteps);
    const int8::DecodeRun decode = int8::run_decoder(call.l, b.tiles);  // or null
    const int8::MultiplyRun multiply =
        decode ? int8::decoded_multiplier(int(b.tile_rows)) : int8::multiplier(call.l, int(b.tile_rows));

    static constexpr int64_t kScratch = int8::kRunSteps * (2 * int8::kDecodedBytes + int8::kPieceBytes);

    void enter() const {}
    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        finish_rows(call, pair, start, rows, parts, sums, kPanel, c_stride);
    }
    void leave() const {}

    uint8_t* inputs_of(uint8_t* tile, int64_t step) const { return tile + step * b.tile_rows * kStep; }
    float* units_of(uint8_t* tile, int64_t step) const {
        return reinterpret_cast<float*>(inputs_of(tile, call.l.steps)) + step / piece_steps * b.tile_rows;
    }

    // A thread's share of the rows `start` .. start + rows; the threads share pieces.
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t*, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t size = call.type == kF32 ? 4 : 2;
        const Range mine = part(b.tiles * pieces, thread, threads);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const int64_t top = at / pieces * b.tile_rows, step = at % pieces * piece_steps, first = step * kStep;
            const int64_t steps = std::min(piece_steps, l.steps - step), inputs = std::min(steps * kStep, l.k - first);
            uint8_t* tile = tiles + at / pieces * l.steps * b.step_bytes();
            for (int64_t i = 0; i < b.tile_rows; ++i) {
                const bool real = top + i < rows;
                const uint8_t* row = static_cast<const uint8_t*>(call.row(start + (real ? top + i : 0)));
                uint8_t* to = inputs_of(tile, step) + i * (l.sparse ? 8 : 4);
                units_of(tile, step)[i] = int8::quantize_piece(l, row + first * size, call.type, real ? inputs : 0,
                                                               int(steps), int(b.tile_rows), to);
            }
        }
    }

    void run(const uint8_t* weights, int64_t step, const Pieces& some, uint8_t* tiles, int64_t count,
             int64_t tile_bytes, uint8_t* decoded, float* c, int64_t c_stride) const {
        if (decode != nullptr) {
            decode(weights, some, decoded);
            weights = decoded;
        }
        for (int64_t t = 0; t < count; ++t, tiles += tile_bytes, c += b.tile_rows * kPanel) {
            multiply(weights, some, inputs_of(tiles, step), units_of(tiles, step), c, c_stride);
        }
    }
};

#if SPARSIFY_COMPILES_AMX

// Rows in int8 in AMX tiles (sparse24_int8.h).
static int run_int8_tiles(const Call& call) {
    const Layout& l = call.l;
    const int64_t steps = (l.steps + int8::kSteps - 1) / int8::kSteps, padded = steps * int8::kSteps * kStep;
    const Blocking b = blocking(l, call.rows, 1, kBlockRows, 16, 4, bf16::kSub);
    const int64_t tile_bytes = steps * b.step_bytes(), sums_rows = b.tiles * b.tile_rows;
    uint8_t* tiles = shared.get(size_t(b.tiles) * tile_bytes + sums_rows * 4);
    const Shares shares(l.pairs);
    if (tiles == nullptr || shares.failed()) return kOutOfMemory;
    float* row_scales = reinterpret_cast<float*>(tiles + b.tiles * tile_bytes);
    const int8::Decode decode = int8::decoder(l);
    constexpr int sub = 2 * bf16::kSub;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        const size_t panel_bytes = sub / int8::kSteps * int8::kStepBytes, sums_bytes = size_t(sums_rows) * kPair * 4;
        const size_t factor_bytes = size_t(l.groups) * 128;
        uint8_t* mine = own.get(2 * panel_bytes + sums_bytes + factor_bytes + padded);
        if (mine == nullptr) failed = true;
        barrier();
        if (failed) return;
        uint8_t* decoded = mine;
        int32_t* c = reinterpret_cast<int32_t*>(mine + 2 * panel_bytes);  // [panel][row][16]
        __m512i* factors = reinterpret_cast<__m512i*>(mine + 2 * panel_bytes + sums_bytes);
        int8_t* row = reinterpret_cast<int8_t*>(mine + 2 * panel_bytes + sums_bytes + factor_bytes);
        const int64_t c_stride = sums_rows * kPanel;
        bf16::enter_amx(int(b.tile_rows));
        for (int64_t start = 0; start < call.rows; start += b.rows) {
            const int64_t here = std::min(b.rows, call.rows - start),
                          used_tiles = (here + b.tile_rows - 1) / b.tile_rows;
            const Range rows = part(sums_rows, thread, threads);
            for (int64_t m = rows.begin; m < rows.end; ++m) {
                if (m < here) row_scales[m] = int8::quantize_row(call.row(start + m), call.type, l.k, padded, row);
                uint8_t* to = tiles + m / b.tile_rows * tile_bytes + m % b.tile_rows * 64;
                for (int64_t s = 0; s < steps; ++s) {
                    if (m < here)
                        std::memcpy(to + s * b.step_bytes(), row + s * 64, 64);
                    else
                        std::memset(to + s * b.step_bytes(), 0, 64);
                }
            }
            barrier();
            shares.each(thread, threads, start / b.rows, [&](int64_t p) {
                float sw[kPair];
                int8::output_scales(l, l.scales(call.blob, p), sw, factors);
                std::memset(c, 0, sums_bytes);
                for (int64_t s = 0; s < l.steps; s += sub) {
                    const int some = int(std::min<int64_t>(sub, l.steps - s)), wide = (some + 1) / int8::kSteps;
                    decode(l, l.pair(call.blob, p) + s * 2 * l.step_bytes, s, some, factors, decoded, panel_bytes);
                    for (int64_t t = 0; t < used_tiles; ++t) {
                        const uint8_t* a = tiles + t * tile_bytes + s / int8::kSteps * b.step_bytes();
                        bf16::multiply_scaled_amx<true>(a, decoded, panel_bytes, wide, int(b.tile_rows),
                                                        c + t * b.tile_rows * kPanel, c_stride);
                    }
                }
                float* sums = reinterpret_cast<float*>(c);  // in place
                for (int64_t i = 0; i < 2 * sums_rows; ++i) {
                    const int64_t m = i % sums_rows;
                    int8::scale_row(c + i * kPanel, m < here ? row_scales[m] : 0.0f, sw + i / sums_rows * kPanel,
                                    sums + i * kPanel);
                }
                finish_rows(call, p, start, here, 1, sums, kPanel, c_stride);
            });
            barrier();
        }
        bf16::leave_amx();
    });
    return failed ? kOutOfMemory : kOk;
}

#endif  // SPARSIFY_COMPILES_AMX

// The fewest rows that int8 compute serves.
static int64_t first_int8_row(bool amx) { return amx ? bf16::kMaxDirectRows + 1 : kInt8Rows; }

static int run_int8(const Call& call, bool amx) {
#if SPARSIFY_COMPILES_AMX
    if (amx) return run_int8_tiles(call);
#endif
    (void)amx;
    return run_blocks(call, Int8Blocks{call});
}

}  // namespace sparse24

#endif  // SPARSIFY_COMPILES_AVX512BF16
