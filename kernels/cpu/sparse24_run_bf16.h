// Rows in bf16, by the kernels of sparse24_bf16.h: few directly, many in blocks.
#pragma once

#include "sparse24_bf16.h"
#include "sparse24_blocks.h"

#if SPARSIFY_COMPILES_AVX512BF16

namespace sparse24 {

static inline int parts_of(int type) { return type == kBf16 ? 1 : type == kF16 ? 2 : 3; }

// The column of sparse24_crossovers.h, whose rows are counted after splitting.
static int scheme_index(const Layout& l) { return (l.bits == 4 ? 0 : l.bits == 8 ? 1 : 2) + (l.sparse ? 0 : 3); }

// Rows `start` .. of the result from the sums of a pair; `stride` floats between rows of sums, `parts` of which make one, and
// `half_stride` between its panels.
static void finish_rows(const Call& call, int64_t pair, int64_t start, int64_t rows, int parts, const float* sums,
                        int64_t stride, int64_t half_stride) {
    const int64_t first = pair * kPair;
    const int columns = int(std::min<int64_t>(kPair, call.l.n - first));
    bf16::finish_rows(sums, stride, half_stride, rows / parts, parts, call.bias_at(first), call.bias_type, call.type,
                      columns, call.result(start / parts, first), call.l.n * (call.type == kF32 ? 4 : 2));
}

static int run_direct(const Call& call) {
    const Layout& l = call.l;
    const bool floats = !l.sparse && l.bits == 8;  // that kernel multiplies in fp32
    const int parts = floats ? 1 : parts_of(call.type);
    const int64_t rows = call.rows * parts, padded = l.steps * kStep;
    const int64_t stride = floats ? padded * 4 : l.sparse ? l.steps * bf16::kQuadBytes : padded * 2;
    const bool as_it_is = !floats && !l.sparse && call.type == kBf16 && padded == l.k;
    const Shares shares(l.pairs);
    if (shares.failed()) return kOutOfMemory;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        uint8_t* x = own.get(size_t(rows) * stride + 3 * padded * 2);
        if (x == nullptr) {
            failed = true;
            return;
        }
        if (thread >= l.pairs) return;
        uint16_t* split = reinterpret_cast<uint16_t*>(x + rows * stride);
        for (int64_t m = 0; m < call.rows && !as_it_is; ++m) {
            if (floats) {
                widen_row(call, m, padded, reinterpret_cast<float*>(x + m * stride));
            } else if (l.sparse) {
                bf16::split_row(call.row(m), call.type, l.k, padded, split, padded);
                for (int p = 0; p < parts; ++p)
                    bf16::expand_row(split + p * padded, l.steps, x + (m * parts + p) * stride);
            } else {
                bf16::split_row(call.row(m), call.type, l.k, padded,
                                reinterpret_cast<uint16_t*>(x + m * parts * stride), padded);
            }
        }
        const uint8_t* from = as_it_is ? static_cast<const uint8_t*>(call.x) : x;
        const int64_t step = as_it_is ? call.ldx * 2 : stride;
        float sums[bf16::kMaxDirectRows * kPair];
        shares.each(thread, threads, 0, [&](int64_t p) {
            for (int64_t r = 0; r < rows; r += 4) {
                const int some = int(std::min<int64_t>(4, rows - r));
                bf16::direct(l, some)(l, l.pair(call.blob, p), l.scales(call.blob, p), from + r * step, step,
                                      sums + r * kPair);
            }
            finish_rows(call, p, 0, rows, parts, sums, kPair, kPanel);
        });
    });
    return failed ? kOutOfMemory : kOk;
}

constexpr int64_t kBlockRows = 288;  // most rows of a block, which a decoded piece of dense weights serves

// With more rows of bf16 than this, multiplying the decoded weights by their scales costs less than scaling sums per group.
// It rounds each weight to bf16, as storing the model densely would.
constexpr int64_t kFoldRows = 64;

static bool folds(const Call& call) { return call.l.scaled() && call.type == kBf16 && call.rows > kFoldRows; }

// Whether runs are to be short. Dense 8-bit codes are so many bytes that memory should bring what is prefetched while a run is
// decoded while few rows are multiplied with that run, and not all at once.
static bool wants_short_runs(const Call& call) { return !call.l.sparse && call.l.bits == 8 && call.rows <= 32; }

// Many rows by decoded panels: tiles of rows that AMX (up to 16) or vdpbf16ps (up to 12) multiplies with dense pairs of bf16.
struct DecodedBlocks {
    const Call& call;
    const bool amx;
    const int parts = parts_of(call.type);
    const Blocking b = blocking(call.l, call.rows* parts, parts, kBlockRows, amx ? 16 : bf16::kDotRows, 4,
                                !amx && wants_short_runs(call) ? bf16::kSub / 2 : even_run(call.l, bf16::kSub));
    const bool folded = folds(call), unscaled = folded || !call.l.scaled();
    const bf16::Decode decode = bf16::decoder(call.l);
#if SPARSIFY_COMPILES_AMX
    const bf16::MultiplyTile multiply =
        amx ? bf16::multiplier_amx(int(b.tile_rows)) : bf16::multiplier_dot(int(b.tile_rows));
#else
    const bf16::MultiplyTile multiply = bf16::multiplier_dot(int(b.tile_rows));
#endif

    static constexpr int64_t kPanelBytes = bf16::kSub * bf16::kStepBytes, kScratch = 2 * kPanelBytes;

    void enter() const {
#if SPARSIFY_COMPILES_AMX
        if (amx) bf16::enter_amx(int(b.tile_rows));
#endif
    }

    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        finish_rows(call, pair, start, rows, parts, sums, kPanel, c_stride);
    }
    void leave() const {
#if SPARSIFY_COMPILES_AMX
        if (amx) bf16::leave_amx();
#endif
    }

    // A thread's share of the rows `start` .. start + rows -> [tile][step][row of the tile][32 inputs]
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t* split, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t padded = l.steps * kStep;
        const Range mine = part((b.sums_rows() + parts - 1) / parts, thread, threads);
        if (parts == 1) {
            for (int64_t m = mine.begin, last; m < mine.end; m = last) {
                last = std::min(mine.end, (m / b.tile_rows + 1) * b.tile_rows);
                const int real = int(std::max<int64_t>(0, std::min(last, rows) - m));
                uint8_t* to = tiles + m / b.tile_rows * l.steps * b.step_bytes() + m % b.tile_rows * 64;
                const void* from = real ? call.row(start + m) : nullptr;
                bf16::pack_rows(static_cast<const uint16_t*>(from), call.ldx, real, int(last - m) - real, l.k, to,
                                b.step_bytes());
            }
            return;
        }
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const bool real = m * parts < rows;
            if (real) bf16::split_row(call.row(start / parts + m), call.type, l.k, padded, split, padded);
            for (int p = 0; p < parts; ++p) {
                const int64_t r = m * parts + p;
                if (r >= b.sums_rows()) continue;
                uint8_t* to = tiles + r / b.tile_rows * l.steps * b.step_bytes() + r % b.tile_rows * 64;
                for (int64_t s = 0; s < l.steps; ++s) {
                    if (real) {
                        std::memcpy(to + s * b.step_bytes(), split + p * padded + s * kStep, 64);
                    } else {
                        std::memset(to + s * b.step_bytes(), 0, 64);
                    }
                }
            }
        }
    }

    // Sums of `count` tiles of activations, tile_bytes apart, += their products with the run of weights that begins with `step`.
    // c: [panel][row][16]
    void run(const uint8_t* weights, int64_t step, const Pieces& pieces, uint8_t* tiles, int64_t count,
             int64_t tile_bytes, uint8_t* decoded, float* c, int64_t c_stride) const {
        const int steps = pieces.pieces * pieces.steps_per_piece;
        decode(weights, steps, decoded, kPanelBytes);
        for (int half = 0; half < 2 && folded; ++half) bf16::scale_decoded(decoded + half * kPanelBytes, pieces, half);
        const Pieces left = unscaled ? Pieces{steps, 1, nullptr, 0} : pieces;
        const uint8_t* a = tiles + step * b.step_bytes();
        for (int64_t t = 0; t < count; ++t, a += tile_bytes, c += b.tile_rows * kPanel) {
#if SPARSIFY_COMPILES_AMX
            if (amx && unscaled) {
                bf16::multiply_scaled_amx<false>(a, decoded, kPanelBytes, steps, int(b.tile_rows), c, c_stride);
                continue;
            }
#endif
            multiply(a, decoded, kPanelBytes, left, c, c_stride);
        }
    }
};

// Rows of a 2:4 linear without AMX: tiles of up to 8 rows, from which permutes pick what the weights kept.
struct SelectBlocks {
    const Call& call;
    const int parts = parts_of(call.type);
    const bool in_one_run = call.rows * parts <= bf16::kSelectRows;  // no other tile reads it again
    const Blocking b = blocking(call.l, call.rows* parts, parts, kPickedBlockRows, bf16::kSelectRows, 1,
                                in_one_run ? call.l.steps : even_run(call.l, bf16::kSelectSteps));
    const bool folded = folds(call);
    const bf16::Select select = bf16::selector(folded ? 16 : call.l.bits, int(b.tile_rows));

    static constexpr int64_t kScratch = bf16::kSelectSteps * 2 * bf16::kFoldedBytes;

    void enter() const {}
    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        finish_rows(call, pair, start, rows, parts, sums, kPanel, c_stride);
    }
    void leave() const {}

    // A thread's share of the rows `start` .. start + rows -> [tile][step][quad][row of the tile][4 inputs]. The threads share steps,
    // not rows, so that no two of them write to one cache line.
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t* split, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t size = call.type == kF32 ? 4 : 2;
        const Range mine = part(b.tiles * l.steps, thread, threads);
        for (int64_t at = mine.begin, end; at < mine.end; at = end) {  // what of them is in one tile
            const int64_t tile = at / l.steps, top = tile * b.tile_rows, given = std::min(b.tile_rows, rows - top);
            const uint8_t* row[bf16::kSelectRows];
            for (int64_t i = 0; i < given; ++i)
                row[i] = static_cast<const uint8_t*>(call.row((start + top + i) / parts));
            end = std::min(mine.end, (tile + 1) * l.steps);
            for (int64_t s = at; s < end; ++s) {
                const int64_t first = (s - tile * l.steps) * kStep, inputs = std::min<int64_t>(kStep, l.k - first);
                uint8_t* to = tiles + s * b.step_bytes();
                if (given == bf16::kSelectRows && parts == 1 && inputs == kStep) {
                    bf16::transpose_quads(row, first * size, to);
                    continue;
                }
                for (int64_t i = 0; i < given; ++i) {
                    const uint8_t* from = row[i] + first * size;
                    if (parts > 1 || inputs < kStep) {
                        if (i == 0 || (top + i) % parts == 0)
                            bf16::split_row(from, call.type, inputs, kStep, split, kStep);
                        from = reinterpret_cast<const uint8_t*>(split + (top + i) % parts * kStep);
                    }
                    for (int q = 0; q < 8; ++q) std::memcpy(to + (q * b.tile_rows + i) * 8, from + q * 8, 8);
                }
                for (int64_t i = given; i < b.tile_rows; ++i) {
                    for (int q = 0; q < 8; ++q) std::memset(to + (q * b.tile_rows + i) * 8, 0, 8);
                }
            }
        }
    }

    void run(const uint8_t* weights, int64_t step, Pieces pieces, uint8_t* tiles, int64_t count, int64_t tile_bytes,
             uint8_t* scratch, float* c, int64_t c_stride) const {
        if (folded) {
            bf16::folder(call.l)(weights, pieces, scratch);
            weights = scratch;
            pieces = {pieces.steps_per_piece * pieces.pieces, 1, nullptr, 0};
        }
        const uint8_t* a = tiles + step * b.step_bytes();
        for (int64_t t = 0; t < count; ++t)
            select(weights, pieces, a + t * tile_bytes, c + t * b.tile_rows * kPanel, c_stride);
    }
};

static int run_tiles(const Call& call, bool amx) {
    if (amx || !call.l.sparse) return run_blocks(call, DecodedBlocks{call, amx});
    return run_blocks(call, SelectBlocks{call});
}

}  // namespace sparse24

#endif  // SPARSIFY_COMPILES_AVX512BF16
