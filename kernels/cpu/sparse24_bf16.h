// Kernels for processors that multiply bf16 pairs (AVX512-BF16 with VBMI), with AMX tiles where they exist.
//
// All arithmetic is on bf16 activations and small exact integers, summed in fp32 per group and then scaled, so weights are
// never rounded. fp16 and fp32 activations are cut into two or three bf16 rows whose sum is exact (see `split_row`).
//
// Few rows (`direct`): for each output the kept activations are picked from the four of a quad by a permute with the stored
// positions; nothing dense is ever built. Many rows (`decode` + `multiply`): a panel becomes dense bf16 pairs in L1, which
// serve all rows.
#pragma once

#include "sparse24_layout.h"
#include "targets.h"

#if SPARSIFY_COMPILES_AVX512BF16
#include <immintrin.h>

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,f16c,fma,bmi2")
namespace sparse24 {
namespace bf16 {

#define ALWAYS static inline __attribute__((always_inline))

constexpr int kMaxDirectRows = 8;
constexpr int kSub = 16;            // steps decoded at once: 16 KB of bf16 pairs
constexpr int kStepBytes = 1024;    // of a decoded step, and of 16 rows of activations: 32 inputs x 16 x 2 bytes
constexpr int kQuadBytes = 160;     // of a step of one row of activations, expanded for `direct`

ALWAYS __m512 load_scales(const uint16_t* s, int type) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
    if (type == kF16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// code + 8 -> code as bf16; with `holes`, indices 16 .. 31 give zero, without them bit 4 of an index is ignored.
ALWAYS __m512i code_table(bool holes) {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; ++i) {
        const float value = holes && i >= 16 ? 0.0f : float((i & 15) - 8);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        table[i] = uint16_t(bits >> 16);
    }
    return _mm512_load_si512(table);
}

// 16 signed bytes for the low and 16 for the high words -> pairs of bf16. Integers up to 128 are exact in bf16.
ALWAYS __m512i pair_of_bytes(const uint8_t* low, const uint8_t* high) {
    const __m512i l = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m512i h = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(l)), 16),
                           _mm512_castps_si512(_mm512_cvtepi32_ps(h)));
}

ALWAYS __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// ------------------------------------------------------------------------------------------- rows of activations

// Row of K inputs -> `parts` rows of bf16 (1 for bf16, 2 for fp16, 3 for fp32) that sum to it exactly, `stride` elements
// apart, zero up to `padded`. Truncation leaves a remainder that the next part holds; what is not finite goes into the first.
static void split_row(const void* x, int type, int64_t k, int64_t padded, uint16_t* out, int64_t stride) {
    for (int64_t i = 0; i < padded; i += 16) {
        const int64_t left = k - i;
        const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
        if (type == kBf16) {
            const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), v);
            continue;
        }
        __m512 rest = type == kF16
                          ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i))
                          : _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
        // A NaN whose payload lies in the lower half would be truncated to infinity.
        const __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
        const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(rest), _mm512_set1_ps(3.4028235e38f), _CMP_LE_OQ);
        for (int part = 0; part < (type == kF16 ? 2 : 3); ++part) {
            __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(rest), 16);
            if (part == 0) bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part * stride + i), _mm512_cvtepi32_epi16(bits));
            rest = _mm512_maskz_sub_ps(finite, rest, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
        }
    }
}

// 32 bf16 of a row -> what `direct` reads of a step of a 2:4 panel: quads 0-3 as they are (they are broadcast and picked by
// index bits 0-1), then quads 4-7 with every input four times (picked by index bits 2-3).
ALWAYS void expand_step(const uint16_t* x, uint8_t* out) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 64; ++i) order[i / 32][i % 32] = uint16_t(16 + i / 4);
    const __m512i v = _mm512_loadu_si512(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(v));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(_mm512_load_si512(order[0]), v));
    _mm512_storeu_si512(out + 96, _mm512_permutexvar_epi16(_mm512_load_si512(order[1]), v));
}

static void expand_row(const uint16_t* x, int64_t steps, uint8_t* out) {
    for (int64_t s = 0; s < steps; ++s) expand_step(x + s * kStep, out + s * kQuadBytes);
}

// --------------------------------------------------------------------------------------------- few rows: direct

// The pair of kept values of quad Q as bf16, slot 0 in the low words.
template <int BITS, int Q>
ALWAYS __m512i kept_pair(const uint8_t* codes, __m512i c, __m512i table, __m512i by_eight) {
    if constexpr (BITS == 4) {
        constexpr int t = Q & 3;
        __m512i index = c;
        if constexpr (t == 1) index = _mm512_srli_epi16(c, 4);
        if constexpr (t == 2) index = _mm512_multishift_epi64_epi8(by_eight, c);  // as >> 8, on another port
        if constexpr (t == 3) index = _mm512_srli_epi16(c, 12);
        return _mm512_permutexvar_epi16(index, table);
    } else if constexpr (BITS == 8) {
        return pair_of_bytes(codes + Q * 32, codes + Q * 32 + 16);
    } else {
        return _mm512_loadu_si512(codes + Q * 64);
    }
}

template <int BITS, int Q, int R, int CHAINS>
ALWAYS void direct_quad(const uint8_t* codes, __m512i c, __m512i meta, __m512i table, __m512i by_eight, const uint8_t* x,
                        int64_t x_stride, __m512 (&sum)[R][CHAINS]) {
    constexpr int t = Q & 3, high = Q >> 2;
    const __m512i w = kept_pair<BITS, Q>(codes, c, table, by_eight);
    const __m512i index = t == 0 ? meta : _mm512_srli_epi16(meta, 4 * t);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const uint8_t* at = x + r * x_stride;
        __m512i four;
        if constexpr (high) {
            four = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 + 32 * t)));
        } else {
            int64_t quad;
            std::memcpy(&quad, at + 8 * t, 8);
            four = _mm512_set1_epi64(quad);
        }
        sum[r][Q % CHAINS] = dot(sum[r][Q % CHAINS], w, _mm512_permutexvar_epi16(index, four));
    }
}

// out[r] = 16 outputs of R rows. x: expanded rows, x_stride bytes apart.
template <int BITS, int R>
static void direct_sparse(const Layout& l, const uint8_t* p, const uint16_t* scales, const uint8_t* x, int64_t x_stride,
                          float* out) {
    constexpr int CHAINS = R == 1 ? 4 : R == 2 ? 2 : 1;
    const __m512i table = code_table(false);
    alignas(64) uint8_t shifted[64];
    for (int i = 0; i < 64; ++i) shifted[i] = uint8_t(8 * (i % 8) + 8);
    const __m512i by_eight = _mm512_load_si512(shifted);
    __m512 total[R];
    for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l.groups; ++g) {
        __m512 sum[R][CHAINS];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < CHAINS; ++c) sum[r][c] = _mm512_setzero_ps();
        }
        for (int64_t s = 0; s < l.steps_per_group; ++s) {
            constexpr int bytes = kMetaBytes + 16 * BITS * 2;
#pragma GCC unroll 9
            for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + 3072 + line), _MM_HINT_T0);
            const __m512i meta = _mm512_loadu_si512(p);
            const uint8_t* codes = p + kMetaBytes;
            __m512i c0 = meta, c1 = meta;
            if constexpr (BITS == 4) {
                c0 = _mm512_loadu_si512(codes);
                c1 = _mm512_loadu_si512(codes + 64);
            }
            direct_quad<BITS, 0>(codes, c0, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 4>(codes, c1, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 1>(codes, c0, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 5>(codes, c1, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 2>(codes, c0, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 6>(codes, c1, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 3>(codes, c0, meta, table, by_eight, x, x_stride, sum);
            direct_quad<BITS, 7>(codes, c1, meta, table, by_eight, x, x_stride, sum);
            p += bytes;
            x += kQuadBytes;
        }
        const __m512 scale = BITS == 16 ? _mm512_set1_ps(1.0f) : load_scales(scales + g * kPanel, l.stored_type);
        for (int r = 0; r < R; ++r) {
            __m512 group = sum[r][0];
            for (int c = 1; c < CHAINS; ++c) group = _mm512_add_ps(group, sum[r][c]);
            total[r] = _mm512_fmadd_ps(group, scale, total[r]);
        }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(out + r * kPanel, total[r]);
}

// The dense pair of inputs 2 P and 2 P + 1 of a step as bf16.
template <int BITS, int P>
ALWAYS __m512i dense_pair(const uint8_t* codes, __m512i table) {
    if constexpr (BITS == 4) {
        const __m512i c = _mm512_loadu_si512(codes + P / 4 * 64);
        constexpr int t = P % 4;
        return _mm512_permutexvar_epi16(t ? _mm512_srli_epi16(c, 4 * t) : c, table);
    } else {
        return pair_of_bytes(codes + P * 32, codes + P * 32 + 16);
    }
}

template <int BITS, int P, int R, int CHAINS>
ALWAYS void direct_pairs(const uint8_t* codes, __m512i table, const uint8_t* x, int64_t x_stride, __m512 (&sum)[R][CHAINS]) {
    if constexpr (P < 16) {
        if constexpr (BITS == 8) {  // fp32 multiply-adds: making bf16 pairs of bytes would cost more than they save
            const __m512 w0 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + P * 32))));
            const __m512 w1 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + P * 32 + 16))));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                float two[2];
                std::memcpy(two, x + r * x_stride + 8 * P, 8);
                sum[r][0] = _mm512_fmadd_ps(w0, _mm512_set1_ps(two[0]), sum[r][0]);
                sum[r][CHAINS - 1] = _mm512_fmadd_ps(w1, _mm512_set1_ps(two[1]), sum[r][CHAINS - 1]);
            }
        } else {
            const __m512i w = dense_pair<BITS, P>(codes, table);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, x + r * x_stride + 4 * P, 4);
                sum[r][P % CHAINS] = dot(sum[r][P % CHAINS], w, _mm512_set1_epi32(two));
            }
        }
        direct_pairs<BITS, P + 1>(codes, table, x, x_stride, sum);
    }
}

// As direct_sparse, for a dense panel. x: rows of bf16 (4 bits) or of fp32 (8 bits).
template <int BITS, int R>
static void direct_dense(const Layout& l, const uint8_t* p, const uint16_t* scales, const uint8_t* x, int64_t x_stride,
                         float* out) {
    constexpr int CHAINS = R == 1 ? 4 : R <= 4 ? 2 : 1;
    const __m512i table = code_table(false);
    __m512 total[R];
    for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < l.groups; ++g) {
        __m512 sum[R][CHAINS];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < CHAINS; ++c) sum[r][c] = _mm512_setzero_ps();
        }
        for (int64_t s = 0; s < l.steps_per_group; ++s) {
            constexpr int bytes = kStep * kPanel * BITS / 8;
#pragma GCC unroll 8
            for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + 3072 + line), _MM_HINT_T0);
            direct_pairs<BITS, 0>(p, table, x, x_stride, sum);
            p += bytes;
            x += kStep * (BITS == 8 ? 4 : 2);
        }
        const __m512 scale = load_scales(scales + g * kPanel, l.stored_type);
        for (int r = 0; r < R; ++r) {
            __m512 group = sum[r][0];
            for (int c = 1; c < CHAINS; ++c) group = _mm512_add_ps(group, sum[r][c]);
            total[r] = _mm512_fmadd_ps(group, scale, total[r]);
        }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(out + r * kPanel, total[r]);
}

// --------------------------------------------------------------------------------------- many rows: decode a panel

// Four quads of 4-bit codes -> 8 rows of pairs. `codes`: those of the values to place at this half of the quads (positions
// 0, 1 or 2, 3); `even`, `odd`: where bit 4 (and 12) is set nothing is placed, for quads 0, 2 and 1, 3.
ALWAYS void store_half(__m512i codes, __m512i even, __m512i odd, __m512i table, uint8_t* out) {
    const __m512i low_nibbles = _mm512_set1_epi16(0x0f0f);
    const __m512i e = _mm512_ternarylogic_epi32(low_nibbles, codes, even, 0xca);  // low_nibbles ? codes : even
    const __m512i o = _mm512_ternarylogic_epi32(low_nibbles, _mm512_srli_epi16(codes, 4), odd, 0xca);
    _mm512_store_si512(out, _mm512_permutexvar_epi16(e, table));
    _mm512_store_si512(out + 128, _mm512_permutexvar_epi16(o, table));
    _mm512_store_si512(out + 256, _mm512_permutexvar_epi16(_mm512_srli_epi16(e, 8), table));
    _mm512_store_si512(out + 384, _mm512_permutexvar_epi16(_mm512_srli_epi16(o, 8), table));
}

// Where the two values of every quad go. After `slot_order` a value at position 0 or 1 is in its slot; one at position 2 or
// 3 may have to move to the other slot ("crosses"). Bits are per quad at the low bit of its index (4 t + 2 high).
struct Places {
    __m512i upper;  // set: this slot's value is at position 2 or 3, so positions 0 and 1 get nothing from it
    __m512i empty;  // set: nothing lands in this slot's lane of positions 2 and 3
    __m512i moved;  // set: what lands there is the value of the other slot
};

ALWAYS Places places(__m512i meta) {
    const __m512i x = _mm512_xor_si512(meta, _mm512_set1_epi32(0x55550000));  // 0 and 2: position = slot (+ 2);  3: crosses
    Places p;
    p.moved = _mm512_rol_epi32(x, 16);
    p.upper = _mm512_srli_epi16(x, 1);
    p.empty = _mm512_ternarylogic_epi32(p.upper, x, p.moved, 0x45);  // ~((upper & ~x) | moved)
    return p;
}

// f: a bit per nibble at its lowest bit -> all four bits.
ALWAYS __m512i fill_nibbles(__m512i f) {
    f = _mm512_and_si512(f, _mm512_set1_epi16(0x1111));
    return _mm512_sub_epi16(_mm512_slli_epi16(f, 4), f);
}

ALWAYS void decode_sparse4(const uint8_t* p, __m512i table, uint8_t* out) {
    const Places at = places(_mm512_loadu_si512(p));
    const __m512i c0 = _mm512_loadu_si512(p + 64), c1 = _mm512_loadu_si512(p + 128);
    store_half(c0, _mm512_slli_epi16(at.upper, 4), at.upper, table, out);
    store_half(c1, _mm512_slli_epi16(at.upper, 2), _mm512_srli_epi16(at.upper, 2), table, out + 512);
    const __m512i m0 = fill_nibbles(at.moved), m1 = fill_nibbles(_mm512_srli_epi16(at.moved, 2));
    const __m512i d0 = _mm512_ternarylogic_epi32(m0, _mm512_rol_epi32(c0, 16), c0, 0xca);
    const __m512i d1 = _mm512_ternarylogic_epi32(m1, _mm512_rol_epi32(c1, 16), c1, 0xca);
    store_half(d0, _mm512_slli_epi16(at.empty, 4), at.empty, table, out + 64);
    store_half(d1, _mm512_slli_epi16(at.empty, 2), _mm512_srli_epi16(at.empty, 2), table, out + 576);
}

template <int BITS, int Q>
ALWAYS void decode_quads(const uint8_t* codes, const Places& at, uint8_t* out) {
    if constexpr (Q < 8) {
        const __m512i bit = _mm512_set1_epi16(short(1 << (4 * (Q & 3) + 2 * (Q >> 2))));
        const __m512i zero = _mm512_setzero_si512();
        const __m512i w = kept_pair<BITS, Q>(codes, zero, zero, zero);
        _mm512_store_si512(out + Q * 128, _mm512_maskz_mov_epi16(_mm512_testn_epi16_mask(at.upper, bit), w));
        const __m512i landed = _mm512_mask_mov_epi16(w, _mm512_test_epi16_mask(at.moved, bit), _mm512_rol_epi32(w, 16));
        _mm512_store_si512(out + Q * 128 + 64, _mm512_maskz_mov_epi16(_mm512_testn_epi16_mask(at.empty, bit), landed));
        decode_quads<BITS, Q + 1>(codes, at, out);
    }
}

template <int BITS, int P>
ALWAYS void decode_pairs(const uint8_t* codes, __m512i table, uint8_t* out) {
    if constexpr (P < 16) {
        _mm512_store_si512(out + P * 64, dense_pair<BITS, P>(codes, table));
        decode_pairs<BITS, P + 1>(codes, table, out);
    }
}

// One step -> 16 rows of 64 bytes: row r holds inputs 2 r and 2 r + 1 of the 16 outputs, the right operand of tdpbf16ps.
template <int BITS, bool SPARSE>
static void decode(const uint8_t* p, int steps, uint8_t* out) {
    const __m512i table = code_table(SPARSE);
    constexpr int bytes = SPARSE ? kMetaBytes + 32 * BITS : 64 * BITS;
    for (int s = 0; s < steps; ++s, p += bytes, out += kStepBytes) {
#pragma GCC unroll 9
        for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + 4096 + line), _MM_HINT_T0);
        if constexpr (SPARSE && BITS == 4) {
            decode_sparse4(p, table, out);
        } else if constexpr (SPARSE) {
            decode_quads<BITS, 0>(p + kMetaBytes, places(_mm512_loadu_si512(p)), out);
        } else {
            decode_pairs<BITS, 0>(p, table, out);
        }
    }
}

using Decode = void (*)(const uint8_t* p, int steps, uint8_t* out);
using Direct = void (*)(const Layout& l, const uint8_t* p, const uint16_t* scales, const uint8_t* x, int64_t x_stride, float* out);

static Decode decoder(const Layout& l) {
    if (l.sparse) return l.bits == 4 ? decode<4, true> : l.bits == 8 ? decode<8, true> : decode<16, true>;
    return l.bits == 4 ? decode<4, false> : decode<8, false>;
}

template <int R>
static Direct direct_of(const Layout& l) {
    if (l.sparse) return l.bits == 4 ? direct_sparse<4, R> : l.bits == 8 ? direct_sparse<8, R> : direct_sparse<16, R>;
    return l.bits == 4 ? direct_dense<4, R> : direct_dense<8, R>;
}

static Direct direct(const Layout& l, int rows) {
    return rows == 1 ? direct_of<1>(l) : rows == 2 ? direct_of<2>(l) : rows == 3 ? direct_of<3>(l) : direct_of<4>(l);
}

// --------------------------------------------------------------------------------------- many rows: multiply

// The groups of a run of steps: a whole group, or the part of one that is longer than the run.
struct Pieces {
    int steps_per_piece, pieces;
    const uint16_t* scales;  // of the first piece; null: no scales
    int scale_type;
};

// c[i][16] += sum over pieces of scale * (sum over their steps of a x b);  i < ROWS.
// a: [step][16 rows][32] bf16, b: [step][16 pairs of inputs][16 outputs][2].
template <int ROWS>
static void multiply_dot(const uint8_t* a, const uint8_t* b, const Pieces& pieces, float* c) {
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        __m512 sum[ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i] = _mm512_setzero_ps();
        for (int s = 0; s < pieces.steps_per_piece; ++s, a += kStepBytes, b += kStepBytes) {
            for (int r = 0; r < 16; ++r) {
                const __m512i w = _mm512_load_si512(b + r * 64);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; ++i) {
                    int32_t two;
                    std::memcpy(&two, a + i * 64 + r * 4, 4);
                    sum[i] = dot(sum[i], w, _mm512_set1_epi32(two));
                }
            }
        }
        const __m512 scale = pieces.scales ? load_scales(pieces.scales + piece * kPanel, pieces.scale_type) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            _mm512_storeu_ps(c + i * kPanel, _mm512_fmadd_ps(sum[i], scale, _mm512_loadu_ps(c + i * kPanel)));
        }
    }
}

using Multiply = void (*)(const uint8_t* a, const uint8_t* b, const Pieces& pieces, float* c);

static Multiply multiplier_dot(int rows) {
    return rows <= 4 ? multiply_dot<4> : rows <= 8 ? multiply_dot<8> : rows <= 12 ? multiply_dot<12> : multiply_dot<16>;
}

// ------------------------------------------------------------------------------------------------------ results

// 16 sums of one row, plus bias, as `columns` numbers of `type`.
static void store_row(__m512 sum, int type, int columns, void* y) {
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    if (type == kF32) {
        _mm512_mask_storeu_ps(y, mask, sum);
    } else {
        const __m256i v = type == kBf16 ? (__m256i)_mm512_cvtneps_pbh(sum) : _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(y, mask, v);
    }
}

// parts: rows of `sums` (16 floats each) that belong to one row of the result.
static void finish_row(const float* sums, int parts, const void* bias, int bias_type, int type, int columns, void* y) {
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    __m512 sum = _mm512_loadu_ps(sums);
    for (int p = 1; p < parts; ++p) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + p * kPanel));
    if (bias != nullptr && bias_type == kF32) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias));
    } else if (bias != nullptr) {
        const __m256i raw = _mm256_maskz_loadu_epi16(mask, bias);
        sum = _mm512_add_ps(sum, bias_type == kF16 ? _mm512_cvtph_ps(raw)
                                                   : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
    }
    store_row(sum, type, columns, y);
}

}  // namespace bf16
}  // namespace sparse24
TARGET_END

#if SPARSIFY_COMPILES_AMX
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,f16c,fma,bmi2,amx-tile,amx-bf16,amx-int8")
namespace sparse24 {
namespace bf16 {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0, 1: sums of `rows` rows; 2, 4: activations; 3, 5: weights.
static void enter_amx(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 6; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = uint8_t(tile == 3 || tile == 5 ? 16 : rows);
    }
    __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic declares only the first 8 bytes as read
    _tile_loadconfig(&config);
}

static void leave_amx() { _tile_release(); }

#define SPARSE24_PIECE(TILE, BUFFER)                          \
    _tile_zero(TILE);                                         \
    for (int s = 0; s < pieces.steps_per_piece; ++s) {        \
        _tile_loadd(2, a, 64);                                \
        _tile_loadd(3, b, 64);                                \
        _tile_dpbf16ps(TILE, 2, 3);                           \
        a += kStepBytes, b += kStepBytes;                     \
    }                                                         \
    _tile_stored(TILE, BUFFER, 64);

// As multiply_dot. The sums of a piece leave the tile through memory; they are read one piece later, when they have arrived.
template <int ROWS>
static void multiply_amx(const uint8_t* a, const uint8_t* b, const Pieces& pieces, float* c) {
    alignas(64) float buffer[2][16 * kPanel];
    __m512 total[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) total[i] = _mm512_loadu_ps(c + i * kPanel);
    for (int piece = 0; piece <= pieces.pieces; ++piece) {
        if (piece < pieces.pieces) {
            if (piece % 2) {
                SPARSE24_PIECE(1, buffer[1])
            } else {
                SPARSE24_PIECE(0, buffer[0])
            }
        }
        if (piece == 0) continue;
        const float* arrived = buffer[(piece - 1) % 2];
        const __m512 scale = pieces.scales ? load_scales(pieces.scales + (piece - 1) * kPanel, pieces.scale_type) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) total[i] = _mm512_fmadd_ps(_mm512_load_ps(arrived + i * kPanel), scale, total[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) _mm512_storeu_ps(c + i * kPanel, total[i]);
}
#undef SPARSE24_PIECE

static Multiply multiplier_amx(int rows) {
    return rows <= 4 ? multiply_amx<4> : rows <= 8 ? multiply_amx<8> : rows <= 12 ? multiply_amx<12> : multiply_amx<16>;
}

}  // namespace bf16
}  // namespace sparse24
TARGET_END
#endif  // SPARSIFY_COMPILES_AMX
#endif  // SPARSIFY_COMPILES_AVX512BF16
