// The fp32 and the byte kernels, compiled for each instruction set that runs them: `V` names the vector instructions that
// sparse24_f32.h is written in, and sparse24_bytes.h takes its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "sparse24_half.h"
#include "sparse24_layout.h"
#include "targets.h"

#if SPARSIFY_X86
#include <immintrin.h>
#endif

namespace sparse24 {

struct F32Kernels {
    void (*decode)(const Layout&, const uint8_t* p, const uint16_t* scales, int64_t first, int steps, float* out);
    void (*direct[4])(const Layout&, const uint8_t* p, const uint16_t* scales, const float* x, int64_t ldx, float* out);
    void (*multiply[4])(const float* x, int64_t ldx, const float* b, int inputs, float* c);  // 1 .. 4 rows
};

#define ALWAYS_F32 static inline __attribute__((always_inline))

namespace portable {
struct V {
    static constexpr int W = 4;
    static constexpr bool kDirectCodes = true;  // whether it serves few rows of codes
    typedef float F __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(16)));
    ALWAYS_F32 F load(const float* p) {
        F v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    ALWAYS_F32 I loadi(const void* p) {
        I v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    ALWAYS_F32 void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
    ALWAYS_F32 F set1(float f) { return F{f, f, f, f}; }
    ALWAYS_F32 F add(F a, F b) { return a + b; }
    ALWAYS_F32 F sub(F a, F b) { return a - b; }
    ALWAYS_F32 F mul(F a, F b) { return a * b; }
    ALWAYS_F32 F fma(F a, F b, F c) { return a * b + c; }
    ALWAYS_F32 F from_int(I v) { return __builtin_convertvector(v, F); }
    template <int S>
    ALWAYS_F32 I shr(I v) {
        return (I)((U)v >> S);
    }
    template <int M>
    ALWAYS_F32 I low(I v) {
        return v & M;
    }
    ALWAYS_F32 I shl16(I v) { return (I)((U)v << 16); }
    ALWAYS_F32 I high16(I v) { return (I)((U)v & 0xffff0000u); }
    ALWAYS_F32 F bits(I v) { return (F)v; }
    ALWAYS_F32 I bytes(const uint8_t* p) { return I{int8_t(p[0]), int8_t(p[1]), int8_t(p[2]), int8_t(p[3])}; }
    // A call: inlined, the branches of half_to_float took a tenth of the time to compile all kernels.
    static __attribute__((noinline)) F half(I v) {
        return F{half_to_float(uint16_t(v[0])), half_to_float(uint16_t(v[1])), half_to_float(uint16_t(v[2])),
                 half_to_float(uint16_t(v[3]))};
    }
    ALWAYS_F32 F pick(const float* four, I index) {
        I v = {};
        for (int i = 0; i < 4; ++i) v |= (index == i) & (I)set1(four[i]);
        return (F)v;
    }
    // b where ib is i, else a where ia is, else 0. (No checkpoint has two weights in one place; memory that is damaged may.)
    ALWAYS_F32 F where(I ia, F a, I ib, F b, int i) {
        return (F)(((ib == i) & (I)b) | (~(ib == i) & (ia == i) & (I)a));
    }
};
#include "sparse24_f32.h"
}  // namespace portable
}  // namespace sparse24

#if SPARSIFY_X86
TARGET_BEGIN("avx2,fma,f16c")
namespace sparse24 {
namespace avx2 {
struct V {
    static constexpr int W = 8;
    static constexpr bool kDirectCodes = false;  // whether it serves few rows of codes
    using F = __m256;
    using I = __m256i;
    ALWAYS_F32 F load(const float* p) { return _mm256_loadu_ps(p); }
    ALWAYS_F32 I loadi(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    ALWAYS_F32 void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    ALWAYS_F32 F set1(float f) { return _mm256_set1_ps(f); }
    ALWAYS_F32 F add(F a, F b) { return _mm256_add_ps(a, b); }
    ALWAYS_F32 F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    ALWAYS_F32 F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    ALWAYS_F32 F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    ALWAYS_F32 F from_int(I v) { return _mm256_cvtepi32_ps(v); }
    template <int S>
    ALWAYS_F32 I shr(I v) {
        return S ? _mm256_srli_epi32(v, S) : v;
    }
    template <int M>
    ALWAYS_F32 I low(I v) {
        return _mm256_and_si256(v, _mm256_set1_epi32(M));
    }
    ALWAYS_F32 I shl16(I v) { return _mm256_slli_epi32(v, 16); }
    ALWAYS_F32 I high16(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000u))); }
    ALWAYS_F32 F bits(I v) { return _mm256_castsi256_ps(v); }
    ALWAYS_F32 I bytes(const uint8_t* p) {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    ALWAYS_F32 F half(I v) {
        const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        return _mm256_cvtph_ps(_mm_packus_epi32(low, high));
    }
    ALWAYS_F32 F pick(const float* four, I index) {
        return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)), index);
    }
    ALWAYS_F32 F where(I ia, F a, I ib, F b, int i) {
        const I at = _mm256_set1_epi32(i);
        return _mm256_blendv_ps(_mm256_and_ps(bits(_mm256_cmpeq_epi32(ia, at)), a), b,
                                bits(_mm256_cmpeq_epi32(ib, at)));
    }
};
#include "sparse24_f32.h"
}  // namespace avx2
}  // namespace sparse24
TARGET_END

namespace sparse24 {

using MultiplyRun = void (*)(const uint8_t* weights, const Pieces& pieces, const uint8_t* x, const float* unit,
                             float* c, int64_t c_stride);

struct ByteKernels {          // sparse24_bytes.h, for a linear and a number of bytes of an activation
    int tile_rows, multiple;  // most rows of a tile, whose number is a multiple
    MultiplyRun multiply[8], multiply_decoded[8];  // by the rows, from 1 on; the second for more than one tile
    void (*decode)(const uint8_t* p, const Pieces& pieces, uint8_t* out);
    float (*quantize)(const void* from, int type, int64_t inputs, int steps, int tile_rows, uint8_t* out);
    void (*finish)(const float* sums, int64_t c_stride, int64_t rows, const void* bias, int bias_type, int type,
                   int columns, void* y, int64_t y_bytes);
};

}  // namespace sparse24

#define ALWAYS_BYTES static inline __attribute__((always_inline))
#define ALWAYS_MEMBER __attribute__((always_inline)) inline

TARGET_BEGIN("avx2,fma,f16c")
namespace sparse24 {
namespace avx2 {
#define SPARSIFY_BYTES_VNNI 0
constexpr bool kVnni = false;
#include "sparse24_bytes.h"
#undef SPARSIFY_BYTES_VNNI
}  // namespace avx2
}  // namespace sparse24
TARGET_END

#if SPARSIFY_COMPILES_AVXVNNI
TARGET_BEGIN("avx2,fma,f16c,avxvnni")
namespace sparse24 {
namespace avxvnni {
#define SPARSIFY_BYTES_VNNI 1
constexpr bool kVnni = true;
#include "sparse24_bytes.h"
#undef SPARSIFY_BYTES_VNNI
}  // namespace avxvnni
}  // namespace sparse24
TARGET_END
#endif

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
namespace sparse24 {
namespace avx512 {
struct V {
    static constexpr int W = 16;
    static constexpr bool kDirectCodes = false;  // whether it serves few rows of codes
    using F = __m512;
    using I = __m512i;
    ALWAYS_F32 F load(const float* p) { return _mm512_loadu_ps(p); }
    ALWAYS_F32 I loadi(const void* p) { return _mm512_loadu_si512(p); }
    ALWAYS_F32 void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    ALWAYS_F32 F set1(float f) { return _mm512_set1_ps(f); }
    ALWAYS_F32 F add(F a, F b) { return _mm512_add_ps(a, b); }
    ALWAYS_F32 F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    ALWAYS_F32 F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    ALWAYS_F32 F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    ALWAYS_F32 F from_int(I v) { return _mm512_cvtepi32_ps(v); }
    template <int S>
    ALWAYS_F32 I shr(I v) {
        return S ? _mm512_srli_epi32(v, S) : v;
    }
    template <int M>
    ALWAYS_F32 I low(I v) {
        return _mm512_and_si512(v, _mm512_set1_epi32(M));
    }
    ALWAYS_F32 I shl16(I v) { return _mm512_slli_epi32(v, 16); }
    ALWAYS_F32 I high16(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))); }
    ALWAYS_F32 F bits(I v) { return _mm512_castsi512_ps(v); }
    ALWAYS_F32 I bytes(const uint8_t* p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    ALWAYS_F32 F half(I v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
    ALWAYS_F32 F pick(const float* four, I index) {
        return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), index);
    }
    ALWAYS_F32 F where(I ia, F a, I ib, F b, int i) {
        const I at = _mm512_set1_epi32(i);
        return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(ia, at), a),
                                  _mm512_cmpeq_epi32_mask(ib, at), b);
    }
};
#include "sparse24_f32.h"
}  // namespace avx512
}  // namespace sparse24
TARGET_END
#endif  // SPARSIFY_X86
