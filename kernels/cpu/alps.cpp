// One round of ALPS between two products (sparsify/solver/masks/alps.py): of every group of four inputs the two largest of
// X = V + W become D, the others are the new V, and the right-hand side of the next system is T H + rho (D - V), all in one
// pass over the weights, in whose place it is written.
//
// Groups do not depend on each other: the result is the same to the last bit for any number of threads and at every level.
#include "exact.h"

#include <cmath>

namespace {

constexpr int kQuads = 16;  // groups that are compared at once

// What a round reads and writes, from some group on.
struct Weights {
    float* W;
    const float* pull;
    float* V;
    uint8_t* keep;
    Weights from(int64_t quad) const { return {W + 4 * quad, pull + 4 * quad, V + 4 * quad, keep + 4 * quad}; }
};

// The first n groups. Loops read and write all four of a group, or compilers would not vectorise them.
INLINE void split(const Weights& w, float rho, int n) {
    float x[4][kQuads], size[4][kQuads], kept[4][kQuads];  // kept: 1 or 0
    float* __restrict W = w.W;
    const float* __restrict pull = w.pull;
    float* __restrict V = w.V;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 4; k++) {
            x[k][i] = V[4 * i + k] + W[4 * i + k];
            size[k][i] = std::fabs(x[k][i]);
        }
    for (int i = 0; i < n; i++) {  // of each two, which comes first; of equal ones the first does
        const float a = size[0][i], b = size[1][i], c = size[2][i], d = size[3][i];
        const float ab = a >= b ? 1.0f : 0.0f, ac = a >= c ? 1.0f : 0.0f, ad = a >= d ? 1.0f : 0.0f;
        const float bc = b >= c ? 1.0f : 0.0f, bd = b >= d ? 1.0f : 0.0f, cd = c >= d ? 1.0f : 0.0f;
        kept[0][i] = ab + ac + ad >= 2 ? 1.0f : 0.0f;
        kept[1][i] = bc + bd - ab >= 1 ? 1.0f : 0.0f;
        kept[2][i] = cd - ac - bc >= 0 ? 1.0f : 0.0f;
        kept[3][i] = ad + bd + cd <= 1 ? 1.0f : 0.0f;
    }
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 4; k++) {
            V[4 * i + k] = kept[k][i] > 0 ? 0.0f : x[k][i];
            W[4 * i + k] = pull[4 * i + k] + rho * (kept[k][i] > 0 ? x[k][i] : -x[k][i]);
        }
    uint8_t* __restrict keep = w.keep;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 4; k++) keep[4 * i + k] = static_cast<uint8_t>(kept[k][i]);
}

INLINE void split_all(const Weights& w, float rho, int64_t quads) {
    int64_t q = 0;
    for (; q + kQuads <= quads; q += kQuads) split(w.from(q), rho, kQuads);
    if (q < quads) split(w.from(q), rho, static_cast<int>(quads - q));
}

using Split = void (*)(const Weights& w, float rho, int64_t quads);

void portable(const Weights& w, float rho, int64_t quads) { split_all(w, rho, quads); }

#if SPARSIFY_X86
TARGET_AVX2
void avx2(const Weights& w, float rho, int64_t quads) { split_all(w, rho, quads); }

TARGET_AVX512
void avx512(const Weights& w, float rho, int64_t quads) { split_all(w, rho, quads); }

constexpr Split kSplits[] = {portable, avx2, avx512};
#else
constexpr Split kSplits[] = {portable};
#endif

}  // namespace

// W: the free weights, which become T H + rho (D - V); pull: T H; V: their disagreement, changed; keep: bool, where D is
// kept. All [outputs, inputs], inputs a multiple of 4. level: as compilation_of takes it.
extern "C" void sparsify_alps_round(float* W, const float* pull, float rho, float* V, uint8_t* keep, int64_t outputs,
                                    int64_t inputs, int threads, int level) {
    const Split split = kSplits[sparsify::compilation_of(level)];
    const Weights all{W, pull, V, keep};
    const int64_t quads = inputs / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < outputs; n++) split(all.from(n * quads), rho, quads);
}
