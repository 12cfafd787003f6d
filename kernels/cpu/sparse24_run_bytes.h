// Rows as integers of some bytes, by the kernels of sparse24_bytes.h.
#pragma once

#include "sparse24_blocks.h"
#include "sparse24_simd.h"

#if SPARSIFY_X86

namespace sparse24 {

// Rows as integers of `Bytes` bytes (sparse24_bytes.h). A tile: [step][vector][row][part] bytes, then [piece][row] units.
struct BytesBlocks {
    const Call& call;
    const ByteKernels kernels;
    const int bytes;  // of an activation
    const int parts = 1;
    const int64_t most_steps = bytes == 1 ? avx2::kInt8Steps : avx2::kFixedSteps;
    const int64_t piece_steps = std::min(call.l.steps_per_group, most_steps),
                  pieces = (call.l.steps + piece_steps - 1) / piece_steps;
    const bool in_one_run =
        call.rows <= kernels.tile_rows && call.l.steps_per_group <= most_steps;  // no other tile reads it again
    const Blocking b = blocking(call.l, call.rows, 1, kPickedBlockRows, kernels.tile_rows, kernels.multiple,
                                in_one_run ? call.l.steps : most_steps, 32 * bytes + 32, kCachedBytes);
    const MultiplyRun multiply = (b.tiles > 1 ? kernels.multiply_decoded : kernels.multiply)[b.tile_rows - 1];

    static constexpr int64_t kCachedBytes = 1 << 18, kScratch = avx2::kInt8Steps * (avx2::kOffsetBytes + 4 * 8 * 64);

    void enter() const {}
    void leave() const {}

    uint8_t* inputs_of(uint8_t* tile, int64_t step) const { return tile + step * b.tile_rows * kStep * bytes; }
    float* units_of(uint8_t* tile, int64_t step) const {
        return reinterpret_cast<float*>(inputs_of(tile, call.l.steps)) + step / piece_steps * b.tile_rows;
    }

    // A thread's share of the rows `start` .. start + rows; the threads share pieces.
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t*, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t size = call.type == kF32 ? 4 : 2, width = (l.sparse ? 8 : 4) * bytes;
        const Range mine = part(b.tiles * pieces, thread, threads);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const int64_t top = at / pieces * b.tile_rows, step = at % pieces * piece_steps, first = step * kStep;
            const int64_t steps = std::min(piece_steps, l.steps - step), inputs = std::min(steps * kStep, l.k - first);
            uint8_t* tile = tiles + at / pieces * l.steps * b.step_bytes();
            for (int64_t i = 0; i < b.tile_rows; ++i) {
                const bool real = top + i < rows;
                const uint8_t* row = static_cast<const uint8_t*>(call.row(start + (real ? top + i : 0)));
                uint8_t* to = inputs_of(tile, step) + i * width;
                units_of(tile, step)[i] = kernels.quantize(row + first * size, call.type, real ? inputs : 0, int(steps),
                                                           int(b.tile_rows), to);
            }
        }
    }

    void run(const uint8_t* weights, int64_t step, const Pieces& some, uint8_t* tiles, int64_t count,
             int64_t tile_bytes, uint8_t* decoded, float* c, int64_t c_stride) const {
        if (b.tiles > 1) {
            kernels.decode(weights, some, decoded);
            weights = decoded;
        }
        for (int64_t t = 0; t < count; ++t, tiles += tile_bytes, c += b.tile_rows * kPanel) {
            multiply(weights, some, inputs_of(tiles, step), units_of(tiles, step), c, c_stride);
        }
    }

    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        const int64_t first = pair * kPair;
        kernels.finish(sums, c_stride, rows, call.bias_at(first), call.bias_type, call.type,
                       int(std::min<int64_t>(kPair, call.l.n - first)), call.result(start, first),
                       call.l.n * (call.type == kF32 ? 4 : 2));
    }
};

}  // namespace sparse24

#endif  // SPARSIFY_X86
