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
#include <limits>

namespace {

using sparsify::kAll;
using sparsify::kChunk;
using sparsify::kNoZeros;
using sparsify::round_to;
using sparsify::round_to_bf16;

constexpr int kMaxGroup = 128;  // inputs per scale: SEARCHED_NATIVELY in sparsify/solver/column_sweep.py

// What does not change from chunk to chunk. Rows of P, E, codes, keep and (unless shared) of scale and zero are inputs of the
// panel.
struct Span {
    const float* U;  // [panel, panel], row i says how inputs i + 1, ... repair an error at i
    int64_t ldu;
    int panel, first, last;  // the span is inputs first ... last - 1
    float low, high;         // of the codes
    bool select;             // decide 2:4 here: keep the two of four whose removal costs most
    bool to_bf16;            // without codes: store kept values as bf16
};

// Keep two of four: rank by (w / d)^2, earlier inputs first among equals. P: the four rows; d: that of input j at j * step.
// kept: [4][kChunk].
INLINE void select_two(const float* P, int64_t ldp, const float* d, int64_t step, uint8_t* kept, int n) {
    float loss[4][kChunk];
    for (int j = 0; j < 4; j++) {
        const float by = d[j * step];
        const float* p = P + j * ldp;
        for (int c = 0; c < n; c++) loss[j][c] = (p[c] / by) * (p[c] / by);
    }
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < n; c++) {
            int ahead = 0;
            for (int k = 0; k < 4; k++) ahead += k < j ? loss[k][c] >= loss[j][c] : loss[k][c] > loss[j][c];
            kept[j * kChunk + c] = ahead < 2;
        }
}

INLINE void sweep_chunk(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale,
                        const float* zero, int64_t lds, int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk,
                        int n) {
    uint8_t kept[4 * kChunk];
    float error[kChunk], stored[kChunk];
    for (int i = s.first; i < s.last; i++) {
        float* p = P + i * ldp;
        const float d = s.U[i * (s.ldu + 1)];
        const uint8_t* stays = keep ? keep + i * ldk : nullptr;
        if (s.select) {
            const int of_four = (i - s.first) % 4;
            if (of_four == 0) select_two(p, ldp, s.U + i * (s.ldu + 1), s.ldu + 1, kept, n);
            stays = kept + of_four * kChunk;
        }
        if (codes) {
            const float* unit = scale + (i - s.first) * lds;
            const float* z = zero ? zero + (i - s.first) * lds : kNoZeros.data();
            int8_t* q = codes + i * ldc;
            for (int c = 0; c < n; c++) {  // code: less its zero point
                float code = std::min(std::max(std::rint(p[c] / unit[c]), s.low - z[c]), s.high - z[c]);
                if (stays) code = stays[c] ? code : 0.0f;
                const float stands = code + z[c];  // NaN, which no int8 stands for, becomes 0
                q[c] = static_cast<int8_t>(stands == stands ? stands : 0.0f);
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

// The scale of one group of inputs for every output: of the clipping ratios the one with the least weighed error, the first
// among equals. Scales are tried as they are stored, rounded to `drop` bits fewer than float32 has. With zero points the range
// from the smallest weight to the largest is shrunk, zero included.
struct Search {
    int size;  // inputs of the group
    const float* ratios;
    int tries;
    const float* weight;  // [size], what an error at each input costs
    float low, high;
    int drop;
    float smallest, largest;  // positive scales that can be stored
};

// d: [size], the diagonal of U, by which `select` chooses two of four; else the mask is `keep`, or nothing is pruned.
// found: [n], the scales; zero: [n], the zero points, or null for a symmetric grid.
INLINE void search_chunk(const Search& s, const float* P, int64_t ldp, const float* d, const uint8_t* keep, int64_t ldk,
                         int select, float* found, float* zero, int n) {
    float most[kChunk], least[kChunk], best[kChunk], scale[kChunk], total[kChunk];
    float down[kChunk], low[kChunk], high[kChunk], z[kChunk], best_z[kChunk];
    uint8_t kept[4 * kChunk];
    alignas(64) float rows[kMaxGroup * kChunk];
    for (int c = 0; c < n; c++) most[c] = down[c] = z[c] = best_z[c] = 0;
    for (int i = 0; i < s.size; i++) {
        const float* p = P + i * ldp;
        float* row = rows + i * kChunk;
        if (select && i % 4 == 0) select_two(P + i * ldp, ldp, d + i, 1, kept, n);
        const uint8_t* stays = select ? kept + i % 4 * kChunk : keep ? keep + i * ldk : kAll.data();
        for (int c = 0; c < n; c++) {
            const float value = p[c];
            row[c] = stays[c] ? value : 0.0f;
        }
        if (zero) {
            for (int c = 0; c < n; c++) most[c] = std::max(most[c], row[c]);
            for (int c = 0; c < n; c++) down[c] = std::min(down[c], row[c]);
        } else {
            for (int c = 0; c < n; c++) most[c] = std::max(most[c], std::fabs(row[c]));
        }
    }
    const float steps = zero ? s.high - s.low : s.high + 0.5f;
    for (int c = 0; c < n; c++) most[c] = (most[c] - down[c]) / steps;
    for (int t = 0; t < s.tries; t++) {
        const float ratio = s.ratios[t], first = s.low, last = s.high, largest = s.largest, smallest = s.smallest;
        const int drop = s.drop;
        for (int c = 0; c < n; c++) {
            const float rounded = std::max(round_to(most[c] * ratio, drop), smallest);
            scale[c] = rounded > largest ? std::numeric_limits<float>::infinity() : rounded;
            total[c] = 0;
        }
        if (zero)
            for (int c = 0; c < n; c++)
                z[c] = std::min(std::max(std::rint(first - down[c] * ratio / scale[c]), first), last);
        for (int c = 0; c < n; c++) low[c] = first - z[c], high[c] = last - z[c];
        for (int i = 0; i < s.size; i++) {
            const float* row = rows + i * kChunk;
            const float weight = s.weight[i];
            for (int c = 0; c < n; c++) {
                const float code = std::min(std::max(std::rint(row[c] / scale[c]), low[c]), high[c]);
                const float error = code * scale[c] - row[c];
                total[c] += error * error * weight;
            }
        }
        for (int c = 0; c < n; c++) {
            const float now = total[c], tried = scale[c];
            const bool better = (t == 0) | (now < least[c]);
            least[c] = better ? now : least[c];
            best[c] = better ? tried : best[c];
            best_z[c] = better ? z[c] : best_z[c];
        }
    }
    for (int c = 0; c < n; c++) found[c] = best[c];
    if (zero)
        for (int c = 0; c < n; c++) zero[c] = best_z[c];
}

using SweepChunk = void (*)(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale,
                            const float* zero, int64_t lds, int8_t* codes, int64_t ldc, const uint8_t* keep,
                            int64_t ldk, int n);

void sweep_portable(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, const float* zero,
                    int64_t lds, int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    sweep_chunk(s, P, ldp, E, lde, scale, zero, lds, codes, ldc, keep, ldk, n);
}

using SearchChunk = void (*)(const Search& s, const float* P, int64_t ldp, const float* d, const uint8_t* keep,
                             int64_t ldk, int select, float* found, float* zero, int n);

void search_portable(const Search& s, const float* P, int64_t ldp, const float* d, const uint8_t* keep, int64_t ldk,
                     int select, float* found, float* zero, int n) {
    search_chunk(s, P, ldp, d, keep, ldk, select, found, zero, n);
}

#if SPARSIFY_X86

TARGET_AVX2
void sweep_avx2(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, const float* zero,
                int64_t lds, int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    sweep_chunk(s, P, ldp, E, lde, scale, zero, lds, codes, ldc, keep, ldk, n);
}

TARGET_AVX512
void sweep_avx512(const Span& s, float* P, int64_t ldp, float* E, int64_t lde, const float* scale, const float* zero,
                  int64_t lds, int8_t* codes, int64_t ldc, const uint8_t* keep, int64_t ldk, int n) {
    sweep_chunk(s, P, ldp, E, lde, scale, zero, lds, codes, ldc, keep, ldk, n);
}

TARGET_AVX2
void search_avx2(const Search& s, const float* P, int64_t ldp, const float* d, const uint8_t* keep, int64_t ldk,
                 int select, float* found, float* zero, int n) {
    search_chunk(s, P, ldp, d, keep, ldk, select, found, zero, n);
}

TARGET_AVX512
void search_avx512(const Search& s, const float* P, int64_t ldp, const float* d, const uint8_t* keep, int64_t ldk,
                   int select, float* found, float* zero, int n) {
    search_chunk(s, P, ldp, d, keep, ldk, select, found, zero, n);
}

constexpr SweepChunk kSweeps[] = {sweep_portable, sweep_avx2, sweep_avx512};
constexpr SearchChunk kSearches[] = {search_portable, search_avx2, search_avx512};
#else
constexpr SweepChunk kSweeps[] = {sweep_portable};
constexpr SearchChunk kSearches[] = {search_portable};
#endif

}  // namespace

// P, E: [panel, outputs]; U: [panel, panel]; scale: [last - first, outputs], or one row when lds is 0; zero: the zero points
// alike, or null for a symmetric grid; codes: int8 [panel, outputs] or null; keep: bool [panel, outputs] or null. Rows
// first ... last - 1 of P become what is stored, those of E the errors that whoever calls spreads over the inputs after the
// panel. level: as compilation_of takes it.
extern "C" void sparsify_sweep_block(float* P, int64_t ldp, float* E, int64_t lde, const float* U, int64_t ldu,
                                     int panel, int first, int last, int64_t outputs, const float* scale,
                                     const float* zero, int64_t lds, float low, float high, int8_t* codes, int64_t ldc,
                                     const uint8_t* keep, int64_t ldk, int select, int to_bf16, int threads,
                                     int level) {
    const Span span{U, ldu, panel, first, last, low, high, select != 0, to_bf16 != 0};
    const SweepChunk sweep = kSweeps[sparsify::compilation_of(level)];
    const int64_t chunks = (outputs + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t c = chunk * kChunk;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, outputs - c));
        sweep(span, P + c, ldp, E + c, lde, scale ? scale + c : nullptr, zero ? zero + c : nullptr, lds,
              codes ? codes + c : nullptr, ldc, keep ? keep + c : nullptr, ldk, n);
    }
}

// P: [size, outputs], the inputs of one group; d, weight: [size]; keep: bool [size, outputs] or null. found: [outputs],
// the scales; zero: [outputs], receives the zero points, or null for a symmetric grid.
extern "C" void sparsify_search_scale(const float* P, int64_t ldp, int size, int64_t outputs, const float* d,
                                      const float* weight, const float* ratios, int tries, float low, float high,
                                      int drop, float smallest, float largest, const uint8_t* keep, int64_t ldk,
                                      int select, float* found, float* zero, int threads, int level) {
    const Search settings{size, ratios, tries, weight, low, high, drop, smallest, largest};
    const SearchChunk search = kSearches[sparsify::compilation_of(level)];
    const int64_t chunks = (outputs + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t c = chunk * kChunk;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, outputs - c));
        search(settings, P + c, ldp, d, keep ? keep + c : nullptr, ldk, select, found + c, zero ? zero + c : nullptr,
               n);
    }
}
