// The inner loop of the column sweep (SparseGPT, GPTQ, both): for each input of a span, decide what every output keeps of
// it, and let the inputs that follow in the panel repair the error.
//
// A panel holds one input per row and one output per column. Outputs do not depend on each other, so each thread takes
// chunks of them, small enough that a chunk of the whole panel stays in the L1 cache; the result is the same to the last
// bit for any number of threads and at every level. The compiler vectorises the loops over a chunk.
#include "exact.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kChunk = 64;  // outputs: 128 inputs x 64 outputs x 4 bytes fill 32 KiB

// What does not change from chunk to chunk. Rows of P, E, codes, keep and (unless shared) scale are inputs of the panel.
struct Span {
    const float* U;  // [panel, panel], row i says how inputs i + 1, ... repair an error at i
    int64_t ldu;
    int panel, first, last;  // the span is inputs first ... last - 1
    float low, high;         // of the codes
    bool select;             // decide 2:4 here: keep the two of four whose removal costs most
    bool to_bf16;            // without codes: store kept values as bf16
};

INLINE float round_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Keep two of four: rank by (w / d)^2, earlier inputs first among equals. kept: [4][kChunk].
INLINE void select_two(const float* P, int64_t ldp, const float* U, int64_t ldu, int i, uint8_t* kept, int n) {
    float loss[4][kChunk];
    for (int j = 0; j < 4; j++) {
        const float d = U[(i + j) * (ldu + 1)];
        const float* p = P + (i + j) * ldp;
        for (int c = 0; c < n; c++) loss[j][c] = (p[c] / d) * (p[c] / d);
    }
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < n; c++) {
            int ahead = 0;
            for (int k = 0; k < 4; k++) ahead += k < j ? loss[k][c] >= loss[j][c] : loss[k][c] > loss[j][c];
            kept[j * kChunk + c] = ahead < 2;
        }
}

INLINE void sweep_chunk(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, int64_t lds,
                        int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    uint8_t kept[4 * kChunk];
    float error[kChunk], stored[kChunk];
    for (int i = s.first; i < s.last; i++) {
        float* p = P + i * ldp;
        const float d = s.U[i * (s.ldu + 1)];
        const uint8_t* stays = keep ? keep + i * ldk : nullptr;
        if (s.select) {
            const int of_four = (i - s.first) % 4;
            if (of_four == 0) select_two(P, ldp, s.U, s.ldu, i, kept, n);
            stays = kept + of_four * kChunk;
        }
        if (codes) {
            const float* unit = scale + (i - s.first) * lds;
            int8_t* q = codes + i * ldc;
            for (int c = 0; c < n; c++) {
                float code = std::min(std::max(std::rint(p[c] / unit[c]), s.low), s.high);
                if (stays) code = stays[c] ? code : 0.0f;
                q[c] = static_cast<int8_t>(code);
                stored[c] = code * unit[c];
            }
        } else {
            for (int c = 0; c < n; c++) {
                const float value = s.to_bf16 ? round_to_bf16(p[c]) : p[c];
                stored[c] = !stays || stays[c] ? value : 0.0f;
            }
        }
        float* e = E + i * lde;
        for (int c = 0; c < n; c++) {
            error[c] = (p[c] - stored[c]) / d;
            e[c] = error[c];
            p[c] = stored[c];
        }
        for (int j = i + 1; j < s.panel; j++) {
            const float u = s.U[i * s.ldu + j];
            float* later = P + j * ldp;
            for (int c = 0; c < n; c++) later[c] -= u * error[c];
        }
    }
}

using SweepChunk = void (*)(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, int64_t lds,
                            int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n);

void sweep_portable(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, int64_t lds,
                    int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    sweep_chunk(s, P, ldp, E, lde, scale, lds, codes, ldc, keep, ldk, n);
}

#if SPARSIFY_X86

TARGET_AVX2
void sweep_avx2(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, int64_t lds,
                int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    sweep_chunk(s, P, ldp, E, lde, scale, lds, codes, ldc, keep, ldk, n);
}

TARGET_AVX512
void sweep_avx512(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, int64_t lds,
                  int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    sweep_chunk(s, P, ldp, E, lde, scale, lds, codes, ldc, keep, ldk, n);
}

constexpr SweepChunk kSweeps[] = {sweep_portable, sweep_avx2, sweep_avx512};
#else
constexpr SweepChunk kSweeps[] = {sweep_portable};
#endif

}  // namespace

// P, E: [panel, outputs]; U: [panel, panel]; scale: [last - first, outputs], or one row when lds is 0; codes: int8
// [panel, outputs] or null; keep: bool [panel, outputs] or null. Rows first ... last - 1 of P become what is stored,
// those of E the errors that whoever calls spreads over the inputs after the panel. level: as compilation_of takes it.
extern "C" void sparsify_sweep_span(float* P, int64_t ldp, float* E, int64_t lde, const float* U, int64_t ldu, int panel,
                                    int first, int last, int64_t outputs, const float* scale, int64_t lds, float low,
                                    float high, int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int select,
                                    int to_bf16, int threads, int level) {
    const Span span{U, ldu, panel, first, last, low, high, select != 0, to_bf16 != 0};
    const SweepChunk sweep = kSweeps[sparsify::compilation_of(level)];
    const int64_t chunks = (outputs + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t c = chunk * kChunk;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, outputs - c));
        sweep(span, P + c, ldp, E + c, lde, scale ? scale + c : nullptr, lds, codes ? codes + c : nullptr, ldc,
              keep ? keep + c : nullptr, ldk, n);
    }
}
