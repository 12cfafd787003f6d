// A product with few rows in fp32: Y = X W', X: [rows, inputs], W: [outputs, inputs], as in a step of generation and in the
// half gradient of a block of inputs. Libraries for matrix products copy W into an order of their own at every call, which
// pays off for hundreds of rows; here only X, which is small, is packed, and W is read where it lies, once.
//
// Each sum is one chain of fused multiply-adds over the inputs, so the result is the same to the last bit for any number of
// threads, at both levels (AVX2 and AVX-512), and for a row whatever rows are beside it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "targets.h"

#if SPARSIFY_X86
#include <immintrin.h>
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLine = 16;  // floats in a cache line

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Floats {
    float* data;
    explicit Floats(int64_t count)
        : data(static_cast<float*>(std::aligned_alloc(64, size_t(divide_up(count, kLine)) * 64))) {}
    ~Floats() { std::free(data); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
};

struct Linear {
    const float* x;
    int64_t ldx, rows;
    const float* w;
    int64_t ldw, outputs, inputs;
    float* y;
    int64_t ldy;
};

TARGET_BEGIN("avx2,fma")
namespace avx2 {
struct V {
    static constexpr int kWidth = 8, kMost = 3;
    typedef __m256 F;
    static INLINE F load(const float* p) { return _mm256_load_ps(p); }
    static INLINE void store(float* p, F v) { _mm256_store_ps(p, v); }
    static INLINE F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};
#include "few_rows_tiles.h"
}  // namespace avx2
TARGET_END

TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
struct V {
    static constexpr int kWidth = 16, kMost = 4;
    typedef __m512 F;
    static INLINE F load(const float* p) { return _mm512_load_ps(p); }
    static INLINE void store(float* p, F v) { _mm512_store_ps(p, v); }
    static INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};
#include "few_rows_tiles.h"
}  // namespace avx512
TARGET_END

const sparsify::CpuFeatures& cpu() {
    static const sparsify::CpuFeatures features = sparsify::detect_cpu();
    return features;
}

}  // namespace
#endif

extern "C" {

// Y[rows, outputs] = X[rows, inputs] W[outputs, inputs]', row strides in elements. level: as sparsify/processor.py counts
// them, -1 for the fastest; the portable one computes with AVX2, so that the bits do not depend on it.
// 0: done, 1: this build or this processor does not have it, 2: out of memory.
int sparsify_few_rows(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t ldw, int64_t outputs,
                      int64_t inputs, float* y, int64_t ldy, int threads, int level) {
#if SPARSIFY_X86
    if (!cpu().avx2) return 1;
    const Linear linear{x, ldx, rows, w, ldw, outputs, inputs, y, ldy};
    const bool wide = cpu().avx512 && (level < 0 || level >= 3);
    return (wide ? avx512::compute(linear, threads) : avx2::compute(linear, threads)) ? 0 : 2;
#else
    return 1;
#endif
}

}  // extern "C"
