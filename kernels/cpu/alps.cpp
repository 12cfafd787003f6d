// One round of ALPS between two products (sparsify/solver/masks/alps.py): of every group of four inputs the two largest of
// X = V + W become D, the others are the new V, and the right-hand side of the next system is T H + rho (D - V), all in one
// pass over the weights.
//
// Groups do not depend on each other: the result is the same to the last bit for any number of threads and at every level.
#include "exact.h"

#include <cmath>

namespace {

constexpr int kQuads = 16;  // groups that are compared at once

// W, pull: 4 n values; V: changed; next: the right-hand side; keep: where D is not zero, or null.
INLINE void split(const float* W, const float* pull, float rho, float* V, float* next, uint8_t* keep, int n) {
    float x[4][kQuads], size[4][kQuads];
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 4; k++) {
            x[k][i] = V[4 * i + k] + W[4 * i + k];
            size[k][i] = std::fabs(x[k][i]);
        }
    for (int k = 0; k < 4; k++) {
        float larger[kQuads] = {};  // how many of the others come before this one; of equal ones the first
        for (int other = 0; other < 4; other++)
            for (int i = 0; i < n; i++)
                larger[i] += other < k   ? (size[other][i] >= size[k][i] ? 1.0f : 0.0f)
                             : other > k ? (size[other][i] > size[k][i] ? 1.0f : 0.0f)
                                         : 0.0f;
        for (int i = 0; i < n; i++) {
            const bool kept = larger[i] < 2;
            V[4 * i + k] = kept ? 0.0f : x[k][i];
            next[4 * i + k] = pull[4 * i + k] + rho * (kept ? x[k][i] : -x[k][i]);
            if (keep) keep[4 * i + k] = kept;
        }
    }
}

INLINE void split_all(const float* W, const float* pull, float rho, float* V, float* next, uint8_t* keep,
                      int64_t quads) {
    int64_t q = 0;
    for (; q + kQuads <= quads; q += kQuads)
        split(W + 4 * q, pull + 4 * q, rho, V + 4 * q, next + 4 * q, keep ? keep + 4 * q : nullptr, kQuads);
    if (q < quads)
        split(W + 4 * q, pull + 4 * q, rho, V + 4 * q, next + 4 * q, keep ? keep + 4 * q : nullptr, int(quads - q));
}

using Split = void (*)(const float*, const float*, float, float*, float*, uint8_t*, int64_t);

void portable(const float* W, const float* pull, float rho, float* V, float* next, uint8_t* keep, int64_t quads) {
    split_all(W, pull, rho, V, next, keep, quads);
}

#if SPARSIFY_X86
TARGET_AVX2
void avx2(const float* W, const float* pull, float rho, float* V, float* next, uint8_t* keep, int64_t quads) {
    split_all(W, pull, rho, V, next, keep, quads);
}

TARGET_AVX512
void avx512(const float* W, const float* pull, float rho, float* V, float* next, uint8_t* keep, int64_t quads) {
    split_all(W, pull, rho, V, next, keep, quads);
}

constexpr Split kSplits[] = {portable, avx2, avx512};
#else
constexpr Split kSplits[] = {portable};
#endif

}  // namespace

// W: the free weights; pull: T H; V: their disagreement, changed; next: T H + rho (D - V); keep: bool, D != 0, or null.
// All [outputs, inputs], inputs a multiple of 4. level: as compilation_of takes it.
extern "C" void sparsify_alps_round(const float* W, const float* pull, float rho, float* V, float* next, uint8_t* keep,
                                    int64_t outputs, int64_t inputs, int threads, int level) {
    const Split split = kSplits[sparsify::compilation_of(level)];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t n = 0; n < outputs; n++)
        split(W + n * inputs, pull + n * inputs, rho, V + n * inputs, next + n * inputs,
              keep ? keep + n * inputs : nullptr, inputs / 4);
}
