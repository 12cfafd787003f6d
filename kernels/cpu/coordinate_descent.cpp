// One pass of coordinate descent over a panel of inputs: for each group of four inputs, what every output should keep of it
// given all its other weights, so that the exact layer error e = (w - t)' H (w - t) falls.
//
// With all other weights fixed, e is a quadratic in the four weights v of a group: v'Av - 2 b'v + const, where A is the 4x4
// block of H and b = A v - g, g = H (w - t) being half the gradient at the present v. Every support of two inputs has its
// minimum in closed form; on a grid the minimum is rounded one input after the other, the second one knowing what the first
// one lost, in both orders. The best candidate is taken when it is better than what is there, so e never rises.
//
// A panel holds one input per row and one output per column, as in sweep.cpp: outputs do not depend on each other, each
// thread takes chunks of them, and the result is the same to the last bit for any number of threads and at every level.
#include "exact.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using sparsify::kAll;
using sparsify::kChunk;
using sparsify::round_to;
using sparsify::round_to_bf16;

enum class Store { kGrid, kBf16, kFloat };

// What does not change from chunk to chunk. Rows of W, G and keep are inputs of the panel.
struct Panel {
    const float* H;  // [size, size]
    int64_t ldh;
    int size;
    float low, high;  // of the codes
    Store store;
    bool select;  // choose two of four here; else stay inside `keep`, or change every input when there is none
};

constexpr int kMostInputs = 128;  // of a group whose scales are refitted

// What does not change from chunk to chunk when the scales of a group are refitted.
struct Scales {
    const float* H;  // [size, size]
    int64_t ldh;
    int size;
    int dropped;          // bits of float32's mantissa that a stored scale lacks
    float tiny, largest;  // the range of stored scales
};

// The loops over outputs below have no branch, or compilers would not vectorise them.
template <Store S>
INLINE float stored(float x, float unit, float low, float high) {
    if (S == Store::kGrid) return std::min(std::max(std::rint(x / unit), low), high) * unit;
    return S == Store::kBf16 ? round_to_bf16(x) : x;
}

// Inputs i ... i + 3 of a chunk: the best two of four. unit: the scale of each output. next: [4][kChunk], the new weights.
template <Store S>
INLINE void choose_two(const Panel& p, int i, const float* W, int64_t ldw, const float* G, int64_t ldg,
                       const float* unit, float next[4][kChunk], int n) {
    float A[4][4], b[4][kChunk], best[kChunk], first[kChunk], second[kChunk];
    int32_t support[kChunk];
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) A[r][c] = p.H[(i + r) * p.ldh + i + c];
    for (int c = 0; c < n; c++) best[c] = 0;
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < n; c++) {
            float sum = 0;
            for (int k = 0; k < 4; k++) sum += A[r][k] * W[(i + k) * ldw + c];
            b[r][c] = sum - G[(i + r) * ldg + c];
            best[c] += W[(i + r) * ldw + c] * (sum - 2 * b[r][c]);  // e of what is there, up to a constant
        }
    for (int c = 0; c < n; c++) support[c] = -1, first[c] = second[c] = 0;
    for (int r = 0; r < 4; r++)
        for (int s = 0; s < 4; s++) {
            if (r == s) continue;  // r is rounded first
            const float det = A[r][r] * A[s][s] - A[r][s] * A[r][s];
            const bool regular = det > 1e-6f * A[r][r] * A[s][s];
            if (A[s][s] <= 0) continue;
            // x = (own b_r - cross b_s) over: the minimum over both, or over r alone where s says the same as r
            const float own = regular ? A[s][s] : 1, other = regular ? A[r][s] : 0;
            const float over = regular ? 1 / det : A[r][r] > 0 ? 1 / A[r][r] : 0, over_s = 1 / A[s][s];
            const float cross = A[r][s], ar = A[r][r], as = A[s][s], low = p.low, high = p.high;
            const int32_t number = 4 * r + s;
            for (int c = 0; c < n; c++) {
                const float x = (own * b[r][c] - other * b[s][c]) * over;
                const float v = stored<S>(x, unit[c], low, high);
                const float u = stored<S>((b[s][c] - cross * v) * over_s, unit[c], low, high);
                const float e = v * (ar * v + 2 * (cross * u - b[r][c])) + u * (as * u - 2 * b[s][c]);
                const bool better = e < best[c];
                best[c] = better ? e : best[c];
                first[c] = better ? v : first[c];
                second[c] = better ? u : second[c];
                support[c] = better ? number : support[c];
            }
        }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < n; c++) {
            const float now = W[(i + r) * ldw + c], one = first[c], two = second[c];
            const float chosen = support[c] >> 2 == r ? one : (support[c] & 3) == r ? two : 0.0f;
            next[r][c] = support[c] < 0 ? now : chosen;
        }
}

// One row of the half gradient after `Step` inputs changed: g += H[j, i ... i + Step) change, one product after the other. Or
// one row of H codes, from `Step` more of them.
template <int Step>
INLINE void repair(const float* h, const float change[4][kChunk], float* g, int n) {
    for (int c = 0; c < n; c++) {
        float sum = g[c];
        for (int r = 0; r < Step; r++) sum += h[r] * change[r][c];
        g[c] = sum;
    }
}

template <Store S>
INLINE void visit_rows(const Panel& p, float* W, int64_t ldw, float* G, int64_t ldg, const float* scale,
                       const uint8_t* keep, int64_t ldk, int n) {
    float next[4][kChunk], change[4][kChunk], unit[kChunk];
    for (int c = 0; c < n; c++) unit[c] = scale ? scale[c] : 1.0f;
    const int step = p.select ? 4 : 1;
    for (int i = 0; i < p.size; i += step) {
        if (p.select) {
            choose_two<S>(p, i, W, ldw, G, ldg, unit, next, n);
        } else {
            const float h = p.H[i * (p.ldh + 1)];
            const float over = h > 0 ? 1 / h : 0, low = p.low, high = p.high;
            const uint8_t* free = keep ? keep + i * ldk : kAll.data();
            for (int c = 0; c < n; c++) {
                const float now = W[i * ldw + c], g = G[i * ldg + c];
                const float better = stored<S>(now - g * over, unit[c], low, high);
                const float gain = (better - now) * (h * (better - now) + 2 * g);  // how e changes
                next[0][c] = (free[c] != 0) & (gain < 0) ? better : now;
            }
        }
        for (int r = 0; r < step; r++)
            for (int c = 0; c < n; c++) {
                change[r][c] = next[r][c] - W[(i + r) * ldw + c];
                W[(i + r) * ldw + c] = next[r][c];
            }
        if (p.select) {
            for (int j = 0; j < p.size; j++) repair<4>(p.H + j * p.ldh + i, change, G + j * ldg, n);
        } else {
            for (int j = 0; j < p.size; j++) repair<1>(p.H + j * p.ldh + i, change, G + j * ldg, n);
        }
    }
}

INLINE void visit_chunk(const Panel& p, float* W, int64_t ldw, float* G, int64_t ldg, const float* scale,
                        const uint8_t* keep, int64_t ldk, int n) {
    if (p.store == Store::kGrid) return visit_rows<Store::kGrid>(p, W, ldw, G, ldg, scale, keep, ldk, n);
    if (p.store == Store::kBf16) return visit_rows<Store::kBf16>(p, W, ldw, G, ldg, scale, keep, ldk, n);
    visit_rows<Store::kFloat>(p, W, ldw, G, ldg, scale, keep, ldk, n);
}

// The least-squares scale of one group for every output, codes fixed: with weights c unit, e is a quadratic in unit whose slope
// is c'g and whose curvature is c'Hc. It is taken, rounded to how scales are stored, where it lowers e.
INLINE void refit_chunk(const Scales& p, float* W, int64_t ldw, const float* G, int64_t ldg, float* unit, int n) {
    alignas(64) float codes[kMostInputs][kChunk], slope[kChunk], curvature[kChunk], row[kChunk];
    for (int c = 0; c < n; c++) slope[c] = curvature[c] = 0;
    for (int i = 0; i < p.size; i++)
        for (int c = 0; c < n; c++) {
            codes[i][c] = std::rint(W[i * ldw + c] / unit[c]);
            slope[c] += codes[i][c] * G[i * ldg + c];
        }
    for (int i = 0; i < p.size; i++) {
        const float* h = p.H + i * p.ldh;
        const float diagonal = 0.5f * h[i];
        for (int c = 0; c < n; c++) row[c] = diagonal * codes[i][c];
        int j = 0;
        for (; j + 4 <= i; j += 4) repair<4>(h + j, codes + j, row, n);
        for (; j < i; j++) repair<1>(h + j, codes + j, row, n);
        for (int c = 0; c < n; c++) curvature[c] += 2 * (codes[i][c] * row[c]);
    }
    for (int c = 0; c < n; c++) {
        const float over = curvature[c] > 1e-30f ? curvature[c] : 1e-30f;
        const float best = round_to(unit[c] - slope[c] / over, p.dropped), step = best - unit[c];
        const float change = step * (2 * slope[c] + step * curvature[c]);
        unit[c] = (best > p.tiny) & (best <= p.largest) & (change < 0) ? best : unit[c];
    }
    for (int i = 0; i < p.size; i++)
        for (int c = 0; c < n; c++) W[i * ldw + c] = codes[i][c] * unit[c];
}

using VisitChunk = void (*)(const Panel& p, float* W, int64_t ldw, float* G, int64_t ldg, const float* scale,
                            const uint8_t* keep, int64_t ldk, int n);
using RefitChunk = void (*)(const Scales& p, float* W, int64_t ldw, const float* G, int64_t ldg, float* unit, int n);

void visit_portable(const Panel& p, float* W, int64_t ldw, float* G, int64_t ldg, const float* scale,
                    const uint8_t* keep, int64_t ldk, int n) {
    visit_chunk(p, W, ldw, G, ldg, scale, keep, ldk, n);
}

void refit_portable(const Scales& p, float* W, int64_t ldw, const float* G, int64_t ldg, float* unit, int n) {
    refit_chunk(p, W, ldw, G, ldg, unit, n);
}

#if SPARSIFY_X86

TARGET_AVX2
void visit_avx2(const Panel& p, float* W, int64_t ldw, float* G, int64_t ldg, const float* scale, const uint8_t* keep,
                int64_t ldk, int n) {
    visit_chunk(p, W, ldw, G, ldg, scale, keep, ldk, n);
}

TARGET_AVX2
void refit_avx2(const Scales& p, float* W, int64_t ldw, const float* G, int64_t ldg, float* unit, int n) {
    refit_chunk(p, W, ldw, G, ldg, unit, n);
}

TARGET_AVX512
void visit_avx512(const Panel& p, float* W, int64_t ldw, float* G, int64_t ldg, const float* scale, const uint8_t* keep,
                  int64_t ldk, int n) {
    visit_chunk(p, W, ldw, G, ldg, scale, keep, ldk, n);
}

TARGET_AVX512
void refit_avx512(const Scales& p, float* W, int64_t ldw, const float* G, int64_t ldg, float* unit, int n) {
    refit_chunk(p, W, ldw, G, ldg, unit, n);
}

constexpr VisitChunk kVisits[] = {visit_portable, visit_avx2, visit_avx512};
constexpr RefitChunk kRefits[] = {refit_portable, refit_avx2, refit_avx512};
#else
constexpr VisitChunk kVisits[] = {visit_portable};
constexpr RefitChunk kRefits[] = {refit_portable};
#endif

}  // namespace

// W, G: [size, outputs], weights and half gradient, both changed; H: [size, size]; scale: [outputs], or null for weights
// without a grid; keep: bool [size, outputs] or null. level: as compilation_of takes it.
extern "C" void sparsify_visit_block(float* W, int64_t ldw, float* G, int64_t ldg, const float* H, int64_t ldh,
                                     int size, int64_t outputs, const float* scale, float low, float high,
                                     const uint8_t* keep, int64_t ldk, int select, int to_bf16, int threads,
                                     int level) {
    const Store store = scale ? Store::kGrid : to_bf16 ? Store::kBf16 : Store::kFloat;
    const Panel panel{H, ldh, size, low, high, store, select != 0};
    const VisitChunk visit = kVisits[sparsify::compilation_of(level)];
    const int64_t chunks = (outputs + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t c = chunk * kChunk;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, outputs - c));
        visit(panel, W + c, ldw, G + c, ldg, scale ? scale + c : nullptr, keep ? keep + c : nullptr, ldk, n);
    }
}

// W, G: [size, outputs], weights, which change, and half gradient; H: [size, size], symmetric; unit: [outputs], the scales of
// the group, which change; size: at most 128; dropped, tiny, largest: of the type of scales. level: as above.
extern "C" void sparsify_refit_scale(float* W, int64_t ldw, const float* G, int64_t ldg, const float* H, int64_t ldh,
                                     int size, int64_t outputs, float* unit, int dropped, float tiny, float largest,
                                     int threads, int level) {
    const Scales scales{H, ldh, size, dropped, tiny, largest};
    const RefitChunk refit = kRefits[sparsify::compilation_of(level)];
    const int64_t chunks = (outputs + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t c = chunk * kChunk;
        refit(scales, W + c, ldw, G + c, ldg, unit + c, static_cast<int>(std::min<int64_t>(kChunk, outputs - c)));
    }
}
