// Many rows in blocks that fit in a cache. What multiplies a tile of them is a parameter: BytesBlocks, DecodedBlocks,
// SelectBlocks, Int8Blocks.
#pragma once

#include "sparse24_call.h"
#include "sparse24_threads.h"
#include "targets.h"

#if SPARSIFY_X86

namespace sparse24 {

constexpr int64_t kPickedBlockRows = 128;  // most rows of a block of tiles of up to 8 rows
constexpr int64_t kInt8Rows = 3;           // fewest rows of int8 without AMX: fewer are as fast without
constexpr size_t kPackedAlone = 1 << 16;   // most bytes of activations that every thread packs for itself

struct Blocking {
    int64_t rows;       // split rows of a block
    int64_t tile_rows;  // of a tile
    int64_t tiles;      // of a block
    int64_t run;        // steps of K that a piece of weights has, which serves all tiles
    int64_t chunk;      // steps of K between two passes over the pairs
    int64_t row_bytes;  // of a step of a row

    int64_t step_bytes() const { return tile_rows * row_bytes; }
    int64_t sums_rows() const { return tiles * tile_rows; }
};

// Runs of K of nearly one size, of at most `most` steps and of whole groups or parts of one.
static int64_t even_run(const Layout& l, int64_t most) {
    if (l.groups > 1 && l.steps_per_group >= most) return most;
    const int64_t runs = (l.steps + most - 1) / most, unit = l.groups > 1 ? l.steps_per_group : 1;
    return ((l.steps + runs - 1) / runs + unit - 1) / unit * unit;
}

// block_rows: most rows of a block; tile_rows, multiple: a tile has at most so many rows, and a multiple of these; cached: bytes of
// activations that are to stay in the second-level cache.
static Blocking blocking(const Layout& l, int64_t rows, int parts, int64_t block_rows, int64_t tile_rows,
                         int64_t multiple, int64_t run, int64_t row_bytes = 64, int64_t cached = 1 << 20) {
    const int64_t blocks = (rows + block_rows - 1) / block_rows,
                  unit = parts == 1 ? 16 : 48;  // parts of a row stay together
    Blocking b;
    b.rows = blocks == 1 ? rows : ((rows + blocks - 1) / blocks + unit - 1) / unit * unit;
    b.tiles = (b.rows + tile_rows - 1) / tile_rows;
    b.tile_rows = ((b.rows + b.tiles - 1) / b.tiles + multiple - 1) / multiple * multiple;
    b.run = run;
    b.row_bytes = row_bytes;
    b.chunk = std::min(l.steps, std::max<int64_t>(run, cached / (b.tiles * b.step_bytes()) / run * run));
    return b;
}

// The groups within `steps` steps from `first` on; a group longer than that is cut.
static Pieces pieces_of(const Layout& l, const uint16_t* scales, int64_t first, int64_t steps) {
    if (!l.scaled()) return {int(steps), 1, nullptr, l.stored_type};
    const uint16_t* from = scales + first / l.steps_per_group * kPair;
    if (l.steps_per_group >= steps) return {int(steps), 1, from, l.stored_type};
    return {int(l.steps_per_group), int(steps / l.steps_per_group), from, l.stored_type};
}

// Rows in blocks, K in chunks: the activations of a block and chunk stay in the second-level cache while all pairs pass by. The
// threads share the packing of activations, unless there are so few (kPackedAlone bytes) that waiting for each other costs more.
template <class Blocks>
static int run_blocks(const Call& call, const Blocks& blocks) {
    const Layout& l = call.l;
    const Blocking& b = blocks.b;
    const int parts = blocks.parts;
    const int64_t rows = call.rows * parts, padded = l.steps * kStep, tile_bytes = l.steps * b.step_bytes(),
                  c_stride = b.sums_rows() * kPanel;
    const size_t tiles_bytes = size_t(b.tiles) * tile_bytes;
    const bool alone = rows <= b.rows && tiles_bytes <= kPackedAlone;
    uint8_t* common = alone ? nullptr : shared.get(tiles_bytes);
    const Shares shares(l.pairs);
    if ((common == nullptr && !alone) || shares.failed()) return kOutOfMemory;
    const bool one_pass = b.chunk == l.steps;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        const Range pairs = part(l.pairs, thread, threads);
        const int64_t kept = one_pass ? 1 : pairs.end - pairs.begin;  // pairs whose sums wait for the next chunk
        const size_t sums_bytes = size_t(b.sums_rows()) * kPair * 4;
        const size_t split_bytes = (3 * padded * 2 + 63) / 64 * 64;
        uint8_t* mine = own.get(Blocks::kScratch + kept * sums_bytes + split_bytes + (alone ? tiles_bytes : 0));
        if (mine == nullptr) failed = true;
        uint8_t* split = mine + Blocks::kScratch + kept * sums_bytes;
        uint8_t* tiles = alone ? split + split_bytes : common;
        blocks.enter();
        for (int64_t start = 0; start < rows; start += b.rows) {
            const int64_t here = std::min(b.rows, rows - start), used_tiles = (here + b.tile_rows - 1) / b.tile_rows;
            if (mine != nullptr)
                blocks.pack(start, here, alone ? 0 : thread, alone ? 1 : threads, reinterpret_cast<uint16_t*>(split),
                            tiles);
            if (!alone) barrier();
            if (failed) break;  // behind a barrier in all threads: each has said so before it
            float* sums = reinterpret_cast<float*>(mine + Blocks::kScratch);
            const auto multiply = [&](int64_t p, int64_t chunk, float* c) {  // c: [panel][row][16]
                const int64_t end = std::min(l.steps, chunk + b.chunk);
                if (chunk == 0) std::memset(c, 0, sums_bytes);
                for (int64_t s = chunk; s < end; s += b.run) {
                    const Pieces pieces = pieces_of(l, l.scales(call.blob, p), s, std::min(b.run, end - s));
                    const uint8_t* weights = l.pair(call.blob, p) + s * 2 * l.step_bytes;
                    blocks.run(weights, s, pieces, tiles, used_tiles, tile_bytes, mine, c, c_stride);
                }
                if (end == l.steps) blocks.finish(p, start, here, c, c_stride);
            };
            if (one_pass) shares.each(thread, threads, start / b.rows, [&](int64_t p) { multiply(p, 0, sums); });
            for (int64_t chunk = 0; chunk < l.steps && !one_pass; chunk += b.chunk) {
                for (int64_t p = pairs.begin; p < pairs.end; ++p)
                    multiply(p, chunk, sums + (p - pairs.begin) * b.sums_rows() * kPair);
            }
            if (start + b.rows < rows) barrier();  // the tiles are written again
        }
        blocks.leave();
    });
    return failed ? kOutOfMemory : kOk;
}

}  // namespace sparse24

#endif  // SPARSIFY_X86
