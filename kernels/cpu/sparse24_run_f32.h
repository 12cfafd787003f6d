// Rows in fp32: few directly, many by decoding a piece of a panel, which then serves all of them.
#pragma once

#include "sparse24_call.h"
#include "sparse24_simd.h"
#include "sparse24_threads.h"

namespace sparse24 {

constexpr int kF32Sub = 8;         // steps decoded at once: 16 KB
constexpr int kF32Block = 64;      // rows that a decoded piece serves
constexpr int kF32DirectRows = 4;  // with more, decoding once pays

static int run_f32(const Call& call, const F32Kernels& kernels) {
    const Layout& l = call.l;
    const int64_t padded = l.steps * kStep, block = std::min<int64_t>(call.rows, kF32Block);
    float* x = reinterpret_cast<float*>(shared.get(size_t(block) * padded * 4));
    const Shares shares(l.pairs);
    if (x == nullptr || shares.failed()) return kOutOfMemory;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        float* mine = reinterpret_cast<float*>(own.get((kF32Sub * kStep * kPanel + kF32Block * kPair) * 4));
        if (mine == nullptr) failed = true;
        barrier();
        if (failed) return;
        float *decoded = mine, *sums = mine + kF32Sub * kStep * kPanel;
        for (int64_t start = 0; start < call.rows; start += block) {
            const int64_t rows = std::min(block, call.rows - start);
            const Range to_widen = part(rows, thread, threads);
            for (int64_t m = to_widen.begin; m < to_widen.end; ++m) widen_row(call, start + m, padded, x + m * padded);
            barrier();
            shares.each(thread, threads, start / block, [&](int64_t p) {
                std::fill(sums, sums + rows * kPair, 0.0f);
                for (int half = 0; half < 2; ++half) {
                    const uint8_t* data = l.pair(call.blob, p) + half * l.step_bytes;
                    const uint16_t* scales = l.scales(call.blob, p) + half * kPanel;
                    float* c = sums + half * kPanel;
                    if (kernels.direct[0] != nullptr && rows <= kF32DirectRows) {
                        kernels.direct[rows - 1](l, data, scales, x, padded, c);
                        continue;
                    }
                    for (int64_t s = 0; s < l.steps; s += kF32Sub) {
                        const int steps = int(std::min<int64_t>(kF32Sub, l.steps - s));
                        kernels.decode(l, data + s * 2 * l.step_bytes, scales, s, steps, decoded);
                        for (int64_t m = 0; m < rows; m += 4) {
                            const int some = int(std::min<int64_t>(4, rows - m));
                            kernels.multiply[some - 1](x + m * padded + s * kStep, padded, decoded, steps * kStep,
                                                       c + m * kPair);
                        }
                    }
                }
                for (int64_t m = 0; m < rows; ++m) finish_f32(call, p, start + m, sums + m * kPair);
            });
            barrier();
        }
    });
    return failed ? kOutOfMemory : kOk;
}

}  // namespace sparse24
