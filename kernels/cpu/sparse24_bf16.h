// Kernels for processors that multiply bf16 pairs (AVX512-BF16 with VBMI), with AMX tiles where they exist.
//
// All arithmetic is on bf16 activations and small exact integers, summed in fp32 per group and then scaled, so weights are not
// rounded; the exception is many rows of bf16 (`scale_pairs`). Few of them may become fixed point: sparse24_fixed.h. fp16 and
// fp32 activations are cut into two or three bf16 rows whose sum is exact (see `split_row`).
//
// Few rows (`direct`): for each output the kept activations are picked from the four of a quad by a permute with the stored
// positions; nothing dense is ever built. Many rows: `decode` + `multiply`, where a panel becomes dense bf16 pairs in L1, which
// serve all rows; or `select`, which picks as `direct` does, a tile of rows at a time.
#pragma once

#include "amx.h"
#include "sparse24_layout.h"
#include "targets.h"

#if SPARSIFY_COMPILES_AVX512BF16
#include <immintrin.h>

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,bmi2")
namespace sparse24 {
namespace bf16 {

#define ALWAYS static inline __attribute__((always_inline))

constexpr int kMaxDirectRows = 8;
constexpr int kSub = 8;           // steps decoded at once: 8 KB of bf16 pairs per panel
constexpr int kStepBytes = 1024;  // of a decoded step: 32 inputs x 16 outputs x 2 bytes
constexpr int kQuadBytes = 160;   // of a step of one row of activations, expanded for `direct`

// 16 numbers of `type` from x[i] on, as fp32; zero where `mask` is not set, which is not read.
ALWAYS __m512 load_widened(const void* x, int type, int64_t i, __mmask16 mask) {
    if (type == kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
    if (type == kF16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// The lanes of 16 from `i` on that lie below `k`.
ALWAYS __mmask16 lanes_below(int64_t k, int64_t i) {
    return i + 16 <= k ? 0xffff : i >= k ? 0 : __mmask16((1u << (k - i)) - 1);
}

ALWAYS __m512 load_scales(const uint16_t* s, int type) { return load_widened(s, type, 0, 0xffff); }

// code + 8 -> code as bf16; with `holes`, indices 16 .. 31 give zero, without them bit 4 of an index is ignored.
ALWAYS __m512i code_table(bool holes) {
#define CODES                                                                                                       \
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, \
        0x40c0, 0x40e0
    alignas(64) static const uint16_t tables[2][32] = {{CODES, CODES}, {CODES}};
#undef CODES
    return _mm512_load_si512(tables[holes]);
}

// 16 signed bytes for the low and 16 for the high words -> pairs of bf16. Integers up to 128 are exact in bf16.
ALWAYS __m512i pair_of_bytes(const uint8_t* low, const uint8_t* high) {
    const __m512i l = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m512i h = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(l)), 16),
                           _mm512_castps_si512(_mm512_cvtepi32_ps(h)));
}

ALWAYS __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// (Assembly, because GCC 12 copies the sums around these two intrinsics.)
ALWAYS __m512i dot(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// a: unsigned bytes, b: signed
ALWAYS __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// For byte shuffles: in every byte of a dword, the index of the dword's byte `offset` within its 128 bits.
ALWAYS __m512i first_of_dwords(int offset) {
    return _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)),
                           _mm512_set1_epi8(char(offset)));
}

// ------------------------------------------------------------------------------------------- rows of activations

// Row of K inputs -> `parts` rows of bf16 (1 for bf16, 2 for fp16, 3 for fp32) that sum to it exactly, `stride` elements
// apart, zero up to `padded`. Truncation leaves a remainder that the next part holds; what is not finite goes into the first.
static void split_row(const void* x, int type, int64_t k, int64_t padded, uint16_t* out, int64_t stride) {
    for (int64_t i = 0; i < padded; i += 16) {
        const __mmask16 mask = lanes_below(k, i);
        if (type == kBf16) {
            const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), v);
            continue;
        }
        __m512 rest = load_widened(x, type, i, mask);
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

// Some rows of bf16, `ldx` apart, -> lines of 32 inputs, row after row within a step of a tile; zeros for `empty` rows more.
static void pack_rows(const uint16_t* x, int64_t ldx, int rows, int empty, int64_t k, uint8_t* out,
                      int64_t step_bytes) {
    for (int64_t i = 0; i < k; i += kStep, out += step_bytes) {
        const __mmask32 mask = i + kStep <= k ? ~0u : (1u << (k - i)) - 1;
        for (int r = 0; r < rows; ++r)
            _mm512_store_si512(out + r * 64, _mm512_maskz_loadu_epi16(mask, x + r * ldx + i));
        for (int r = rows; r < rows + empty; ++r) _mm512_store_si512(out + r * 64, _mm512_setzero_si512());
    }
}

// 32 bf16 of a row -> what `direct` reads of a step of a 2:4 panel: quads 0-3 as they are (they are broadcast and picked by
// index bits 0-1), then quads 4-7 with every input four times (picked by index bits 2-3).
ALWAYS void expand_step(const uint16_t* x, uint8_t* out) {
#define FOUR(i) i, i, i, i
    alignas(64) static const uint16_t order[2][32] = {
        {FOUR(16), FOUR(17), FOUR(18), FOUR(19), FOUR(20), FOUR(21), FOUR(22), FOUR(23)},
        {FOUR(24), FOUR(25), FOUR(26), FOUR(27), FOUR(28), FOUR(29), FOUR(30), FOUR(31)}};
#undef FOUR
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

// Sum: __m512 of bf16 products or __m512i of 16-bit integers, by what x and the table hold.
template <int BITS, int Q, int R, int CHAINS, class Sum>
ALWAYS void direct_quad(const uint8_t* codes, __m512i c, __m512i meta, __m512i table, __m512i by_eight,
                        const uint8_t* x, int64_t x_stride, Sum (&sum)[R][CHAINS]) {
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

ALWAYS void prefetch(const uint8_t* p, int bytes) {
#pragma GCC unroll 18
    for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + line), _MM_HINT_T0);
}

constexpr int kAhead = 8192;  // bytes between what is read and what is prefetched

// One step of a 2:4 pair, both panels. x: expanded rows, x_stride bytes apart.
template <int BITS, int R, int CHAINS, class Sum>
ALWAYS void direct_step(const uint8_t* p, __m512i table, const uint8_t* x, int64_t x_stride, Sum (&sum)[2][R][CHAINS]) {
    constexpr int bytes = kMetaBytes + 32 * BITS;
    alignas(64) static const uint8_t shifted[64] = {8, 16, 24, 32, 40, 48, 56, 0, 8, 16, 24, 32, 40, 48, 56, 0,
                                                    8, 16, 24, 32, 40, 48, 56, 0, 8, 16, 24, 32, 40, 48, 56, 0,
                                                    8, 16, 24, 32, 40, 48, 56, 0, 8, 16, 24, 32, 40, 48, 56, 0,
                                                    8, 16, 24, 32, 40, 48, 56, 0, 8, 16, 24, 32, 40, 48, 56, 0};
    const __m512i by_eight = _mm512_load_si512(shifted);
    prefetch(p + kAhead, 2 * bytes);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, p += bytes) {
        const __m512i meta = _mm512_loadu_si512(p);
        const uint8_t* codes = p + kMetaBytes;
        const __m512i c0 = BITS == 4 ? _mm512_loadu_si512(codes) : meta;
        const __m512i c1 = BITS == 4 ? _mm512_loadu_si512(codes + 64) : meta;
        direct_quad<BITS, 0>(codes, c0, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 4>(codes, c1, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 1>(codes, c0, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 5>(codes, c1, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 2>(codes, c0, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 6>(codes, c1, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 3>(codes, c0, meta, table, by_eight, x, x_stride, sum[half]);
        direct_quad<BITS, 7>(codes, c1, meta, table, by_eight, x, x_stride, sum[half]);
    }
}

// out[r][32] += scale * sum for both halves of a pair.
template <int R, int CHAINS>
ALWAYS void add_group(const __m512 (&sum)[2][R][CHAINS], const uint16_t* scales, int type, __m512 (&total)[2][R]) {
    for (int half = 0; half < 2; ++half) {
        const __m512 scale = scales ? load_scales(scales + half * kPanel, type) : _mm512_set1_ps(1.0f);
        for (int r = 0; r < R; ++r) {
            __m512 group = sum[half][r][0];
            for (int c = 1; c < CHAINS; ++c) group = _mm512_add_ps(group, sum[half][r][c]);
            total[half][r] = _mm512_fmadd_ps(group, scale, total[half][r]);
        }
    }
}

// out[r][32] = the outputs of a 2:4 pair for R rows. x: expanded rows, x_stride bytes apart.
template <int BITS, int R>
static void direct_sparse(const Layout& l, const uint8_t* p, const uint16_t* scales, const uint8_t* x, int64_t x_stride,
                          float* out) {
    constexpr int CHAINS = R == 1 ? 2 : 1;
    const __m512i table = code_table(false);
    __m512 total[2][R] = {};
    for (int64_t g = 0; g < l.groups; ++g) {
        __m512 sum[2][R][CHAINS] = {};
        for (int64_t s = 0; s < l.steps_per_group; ++s, x += kQuadBytes, p += 2 * l.step_bytes) {
            direct_step<BITS>(p, table, x, x_stride, sum);
        }
        add_group(sum, BITS == 16 ? nullptr : scales + g * kPair, l.stored_type, total);
    }
    for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + r * kPair + half * kPanel, total[half][r]);
    }
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
ALWAYS void direct_pairs(const uint8_t* codes, __m512i table, const uint8_t* x, int64_t x_stride,
                         __m512 (&sum)[R][CHAINS]) {
    if constexpr (P < 16) {
        if constexpr (BITS == 8) {  // fp32 multiply-adds: making bf16 pairs of bytes would cost more than they save
            const __m512 w0 = _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + P * 32))));
            const __m512 w1 = _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + P * 32 + 16))));
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

// As direct_sparse, for a dense pair. x: rows of bf16 (4 bits) or of fp32 (8 bits).
template <int BITS, int R>
static void direct_dense(const Layout& l, const uint8_t* p, const uint16_t* scales, const uint8_t* x, int64_t x_stride,
                         float* out) {
    constexpr int CHAINS = R <= 2 ? 2 : 1, bytes = kStep * kPanel * BITS / 8;
    const __m512i table = code_table(false);
    __m512 total[2][R] = {};
    for (int64_t g = 0; g < l.groups; ++g) {
        __m512 sum[2][R][CHAINS] = {};
        for (int64_t s = 0; s < l.steps_per_group; ++s, x += kStep * (BITS == 8 ? 4 : 2)) {
            prefetch(p + kAhead, 2 * bytes);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half, p += bytes) direct_pairs<BITS, 0>(p, table, x, x_stride, sum[half]);
        }
        add_group(sum, scales + g * kPair, l.stored_type, total);
    }
    for (int r = 0; r < R; ++r) {
        for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + r * kPair + half * kPanel, total[half][r]);
    }
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
    const __m512i x =
        _mm512_xor_si512(meta, _mm512_set1_epi32(0x55550000));  // 0 and 2: position = slot (+ 2);  3: crosses
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

// Steps of a pair -> for each panel 16 rows of 64 bytes per step: row r holds inputs 2 r and 2 r + 1 of the 16 outputs, as the
// right operand of tdpbf16ps does. The second panel goes `stride` bytes behind the first.
template <int BITS, bool SPARSE>
static void decode(const uint8_t* p, int steps, uint8_t* out, int64_t stride) {
    const __m512i table = code_table(SPARSE);
    constexpr int bytes = SPARSE ? kMetaBytes + 32 * BITS : 64 * BITS;
    for (int s = 0; s < steps; ++s, out += kStepBytes) {
        prefetch(p + kAhead, 2 * bytes);
        for (int half = 0; half < 2; ++half, p += bytes) {
            uint8_t* to = out + half * stride;
            if constexpr (SPARSE && BITS == 4) {
                decode_sparse4(p, table, to);
            } else if constexpr (SPARSE) {
                decode_quads<BITS, 0>(p + kMetaBytes, places(_mm512_loadu_si512(p)), to);
            } else {
                decode_pairs<BITS, 0>(p, table, to);
            }
        }
    }
}

ALWAYS __m512 scale_of(const Pieces& pieces, int piece, int half) {
    return pieces.scales ? load_scales(pieces.scales + piece * kPair + half * kPanel, pieces.scale_type)
                         : _mm512_set1_ps(1.0f);
}

// Pairs of bf16 times a scale per output, rounded to bf16 once.
ALWAYS __m512i scale_pairs(__m512i pairs, __m512 scale) {
    alignas(64) static const uint16_t weave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), scale);
    const __m512 odd =
        _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u)))), scale);
    return _mm512_permutexvar_epi16(_mm512_load_si512(weave), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Multiply decoded steps of one panel by their scales: the very weights of a dense bf16 checkpoint.
static void scale_decoded(uint8_t* rows, const Pieces& pieces, int half) {
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        const __m512 scale = scale_of(pieces, piece, half);
        for (int r = 0; r < 16 * pieces.steps_per_piece; ++r, rows += 64) {
            _mm512_store_si512(rows, scale_pairs(_mm512_load_si512(rows), scale));
        }
    }
}

using Decode = void (*)(const uint8_t* p, int steps, uint8_t* out, int64_t stride);
using Direct = void (*)(const Layout& l, const uint8_t* p, const uint16_t* scales, const uint8_t* x, int64_t x_stride,
                        float* out);

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

// c[i][16] += scale * sum[i] of both panels.
template <int ROWS>
ALWAYS void add_scaled(const __m512 (&sum)[2][ROWS], const Pieces& pieces, int piece, float* c, int64_t c_stride) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const __m512 scale = scale_of(pieces, piece, half);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            float* to = c + half * c_stride + i * kPanel;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum[half][i], scale, _mm512_loadu_ps(to)));
        }
    }
}

// Two decoded panels times a tile of ROWS rows: c[i][16] += sum over pieces of scale * (sum over their steps of a x b).
// a: [step][ROWS][32] bf16, b: [step][16 pairs of inputs][16 outputs][2], the second panel b_stride bytes behind; c_stride floats
// between panels of c.
template <int ROWS>
static void multiply_dot(const uint8_t* a, const uint8_t* b, int64_t b_stride, const Pieces& pieces, float* c,
                         int64_t c_stride) {
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        __m512 sum[2][ROWS] = {};
        for (int s = 0; s < pieces.steps_per_piece; ++s, a += ROWS * 64, b += kStepBytes) {
            for (int r = 0; r < 16; ++r) {
                const __m512i w0 = _mm512_load_si512(b + r * 64), w1 = _mm512_load_si512(b + b_stride + r * 64);
#pragma GCC unroll 12
                for (int i = 0; i < ROWS; ++i) {
                    int32_t two;
                    std::memcpy(&two, a + i * 64 + r * 4, 4);
                    const __m512i both = _mm512_set1_epi32(two);
                    sum[0][i] = dot(sum[0][i], w0, both);
                    sum[1][i] = dot(sum[1][i], w1, both);
                }
            }
        }
        add_scaled<ROWS>(sum, pieces, piece, c, c_stride);
    }
}

using MultiplyTile = void (*)(const uint8_t* a, const uint8_t* b, int64_t b_stride, const Pieces& pieces, float* c,
                              int64_t c_stride);

constexpr int kDotRows = 12;  // of a tile: 2 x 12 sums

static MultiplyTile multiplier_dot(int rows) {
    return rows <= 4 ? multiply_dot<4> : rows <= 8 ? multiply_dot<8> : multiply_dot<12>;
}

// ------------------------------------------------------------------------------- many rows without AMX: select
//
// A quad costs one product and one permute per row, where dense pairs cost two products. Products and permutes share one of
// three ports on Zen 5 (docs/kernel-log.md), so this is up to 1.5 times the rate of dense products.

constexpr int kSelectRows =
    8;  // of a tile of activations: 2 x 8 sums, the decoded pair and what is picked fill the registers
constexpr int kSelectSteps = 16;  // of weights between two tiles: 6 KB of 2:4 4-bit, which stay in L1

// 32 inputs of 8 rows of bf16, `offset` bytes into each -> [quad][row][4 inputs]: 8 x 8 quads change places.
static void transpose_quads(const uint8_t* const (&row)[kSelectRows], int64_t offset, uint8_t* out) {
    __m512i pairs[2][4];  // of even and odd quads, of rows 2 i and 2 i + 1
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_loadu_si512(row[2 * i] + offset), b = _mm512_loadu_si512(row[2 * i + 1] + offset);
        pairs[0][i] = _mm512_unpacklo_epi64(a, b);
        pairs[1][i] = _mm512_unpackhi_epi64(a, b);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
        const __m512i(&p)[4] = pairs[odd];
        const __m512i low0 = _mm512_shuffle_i64x2(p[0], p[1], 0x44), low1 = _mm512_shuffle_i64x2(p[2], p[3], 0x44);
        const __m512i high0 = _mm512_shuffle_i64x2(p[0], p[1], 0xee), high1 = _mm512_shuffle_i64x2(p[2], p[3], 0xee);
        uint8_t* to = out + odd * 64;
        _mm512_store_si512(to, _mm512_shuffle_i64x2(low0, low1, 0x88));
        _mm512_store_si512(to + 128, _mm512_shuffle_i64x2(low0, low1, 0xdd));
        _mm512_store_si512(to + 256, _mm512_shuffle_i64x2(high0, high1, 0x88));
        _mm512_store_si512(to + 384, _mm512_shuffle_i64x2(high0, high1, 0xdd));
    }
}

// As kept_pair, with plain shifts: where there is no AMX (Zen) a multishift takes a port that products need.
template <int BITS, int Q>
ALWAYS __m512i kept_shifted(const uint8_t* codes, __m512i table) {
    if constexpr (BITS == 4) {
        constexpr int t = Q & 3;
        const __m512i c = _mm512_loadu_si512(codes + Q / 4 * 64);
        return _mm512_permutexvar_epi16(t ? _mm512_srli_epi16(c, 4 * t) : c, table);
    } else {
        return kept_pair<BITS, Q>(codes, table, table, table);
    }
}

// One quad of both panels times R rows.
template <int BITS, int Q, int R>
ALWAYS void select_quad(const uint8_t* p, int64_t step_bytes, const __m512i (&meta)[2], __m512i table, const uint8_t* x,
                        __m512 (&sum)[2][R]) {
    if constexpr (Q < 8) {
        constexpr int t = Q & 3, high = Q >> 2;
        __m512i w[2], index[2];
        for (int half = 0; half < 2; ++half) {
            w[half] = kept_shifted<BITS, Q>(p + half * step_bytes + kMetaBytes, table);
            index[half] = Q ? _mm512_srli_epi16(meta[half], 4 * t + 2 * high) : meta[half];
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int64_t quad;
            std::memcpy(&quad, x + (Q * R + r) * 8, 8);
            const __m512i four = _mm512_set1_epi64(quad);
            sum[0][r] = dot(sum[0][r], w[0], _mm512_permutexvar_epi16(index[0], four));
            sum[1][r] = dot(sum[1][r], w[1], _mm512_permutexvar_epi16(index[1], four));
        }
        select_quad<BITS, Q + 1>(p, step_bytes, meta, table, x, sum);
    }
}

template <int BITS, int Q>
ALWAYS void fold_quads(const uint8_t* codes, __m512i table, __m512 scale, uint8_t* out) {
    if constexpr (Q < 8) {
        _mm512_store_si512(out + Q * 64, scale_pairs(kept_shifted<BITS, Q>(codes, table), scale));
        fold_quads<BITS, Q + 1>(codes, table, scale, out);
    }
}

constexpr int kFoldedBytes = kMetaBytes + 32 * 16;  // of a step

// Steps of a 2:4 pair of codes -> the same steps with 16 bits, multiplied by their scales: the kept values of a dense bf16 checkpoint.
template <int BITS>
static void fold(const uint8_t* p, const Pieces& pieces, uint8_t* out) {
    constexpr int bytes = kMetaBytes + 32 * BITS;
    const __m512i table = code_table(false);
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        const __m512 scale[2] = {scale_of(pieces, piece, 0), scale_of(pieces, piece, 1)};
        for (int s = 0; s < pieces.steps_per_piece; ++s) {
            prefetch(p + kAhead, 2 * bytes);
            for (int half = 0; half < 2; ++half, p += bytes, out += kFoldedBytes) {
                _mm512_store_si512(out, _mm512_loadu_si512(p));
                fold_quads<BITS, 0>(p + kMetaBytes, table, scale[half], out + kMetaBytes);
            }
        }
    }
}

using Fold = void (*)(const uint8_t* p, const Pieces& pieces, uint8_t* out);

static Fold folder(const Layout& l) { return l.bits == 4 ? fold<4> : fold<8>; }

// Steps of a 2:4 pair times a tile of R rows. x: [step][quad][R][4 inputs] bf16; c[R][16] +=, c_stride floats between panels.
// Nothing is decoded to dense: a permute picks the kept inputs, so a quad costs one product where a dense one costs two.
template <int BITS, int R>
static void select(const uint8_t* p, const Pieces& pieces, const uint8_t* x, float* c, int64_t c_stride) {
    constexpr int bytes = kMetaBytes + 32 * BITS;
    const __m512i table = code_table(false);
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        __m512 sum[2][R] = {};
        for (int s = 0; s < pieces.steps_per_piece; ++s, p += 2 * bytes, x += R * 64) {
            prefetch(p + kAhead, 2 * bytes);
            const __m512i meta[2] = {_mm512_loadu_si512(p), _mm512_loadu_si512(p + bytes)};
            select_quad<BITS, 0>(p, bytes, meta, table, x, sum);
        }
        add_scaled<R>(sum, pieces, piece, c, c_stride);
    }
}

using Select = void (*)(const uint8_t* p, const Pieces& pieces, const uint8_t* x, float* c, int64_t c_stride);

template <int BITS>
static Select selector_of(int rows) {
    constexpr Select of[kSelectRows] = {select<BITS, 1>, select<BITS, 2>, select<BITS, 3>, select<BITS, 4>,
                                        select<BITS, 5>, select<BITS, 6>, select<BITS, 7>, select<BITS, 8>};
    return of[rows - 1];
}

static Select selector(int bits, int rows) {
    return bits == 4 ? selector_of<4>(rows) : bits == 8 ? selector_of<8>(rows) : selector_of<16>(rows);
}

// ------------------------------------------------------------------------------------------------------ results

// 16 sums of one row, plus bias, as `columns` numbers of `type`.
ALWAYS void store_row(__m512 sum, int type, int columns, void* y) {
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    if (type == kF32) {
        _mm512_mask_storeu_ps(y, mask, sum);
    } else {
        const __m256i v =
            type == kBf16 ? (__m256i)_mm512_cvtneps_pbh(sum) : _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(y, mask, v);
    }
}

// Some rows of results of a pair, y_bytes apart. parts: rows of `sums` (16 floats, `stride` apart) that make one of them; the sums
// of the second panel lie `half_stride` floats behind; columns: how many of the pair's outputs exist.
static void finish_rows(const float* sums, int64_t stride, int64_t half_stride, int64_t rows, int parts,
                        const void* bias, int bias_type, int type, int columns, void* y, int64_t y_bytes) {
    __m512 added[2];
    for (int half = 0; half < 2; ++half) {
        const int64_t first = half * kPanel;
        added[half] = bias ? load_widened(static_cast<const uint8_t*>(bias) + first * (bias_type == kF32 ? 4 : 2),
                                          bias_type, 0, lanes_below(columns, first))
                           : _mm512_setzero_ps();
    }
    const int counts[2] = {columns < kPanel ? columns : kPanel, columns - kPanel};
    uint8_t* to = static_cast<uint8_t*>(y);
    for (int64_t m = 0; m < rows; ++m, to += y_bytes, sums += parts * stride) {
        for (int half = 0; half < 2 && counts[half] > 0; ++half) {
            const float* from = sums + half * half_stride;
            __m512 sum = _mm512_loadu_ps(from);
            for (int p = 1; p < parts; ++p) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + p * stride));
            store_row(_mm512_add_ps(sum, added[half]), type, counts[half], to + half * kPanel * (type == kF32 ? 4 : 2));
        }
    }
}

}  // namespace bf16
}  // namespace sparse24
TARGET_END

#if SPARSIFY_COMPILES_AMX
TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,bmi2,amx-tile,amx-bf16,amx-int8")
namespace sparse24 {
namespace bf16 {

// Tiles 0-1: sums, 4: activations, each of `rows` rows; 6-7: weights. Five of the eight on purpose: loads rename a tile, and with all
// eight in use they wait for what still reads the old one (docs/kernel-log.md).
static void enter_amx(int rows) { sparsify::configure_tiles(rows, 5); }

static void leave_amx() { _tile_release(); }

// sums[i][16] += scale * tile[i][16]
template <int ROWS>
ALWAYS void add_scaled(const float* tile, __m512 scale, float* sums) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
        _mm512_store_ps(sums + i * kPanel,
                        _mm512_fmadd_ps(_mm512_load_ps(tile + i * kPanel), scale, _mm512_load_ps(sums + i * kPanel)));
    }
}

// Tiles 0 and 1 += a tile of activations times two panels, b_stride bytes apart.
template <bool INT8>
ALWAYS void multiply_steps(const uint8_t* a, const uint8_t* b, int64_t b_stride, int steps, int rows) {
    const int step_bytes = rows * 64;
    for (int s = 0; s < steps; ++s, a += step_bytes, b += kStepBytes) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + b_stride, 64);
        if constexpr (INT8) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(a + step_bytes + i * 64), _MM_HINT_T0);
    }
}

// Two decoded panels times a tile of ROWS rows of activations.
//   a: [step][ROWS][32] bf16; b: [step][16 pairs][16 outputs][2], the second panel b_stride bytes behind; c[ROWS][16] +=,
//   c_stride floats between panels.
// What a tile of sums leaves in memory is added one piece later: reading it at once would wait for the store.
template <int ROWS>
static void multiply_amx(const uint8_t* a, const uint8_t* b, int64_t b_stride, const Pieces& pieces, float* c,
                         int64_t c_stride) {
    constexpr int kTile = 16 * kPanel;
    alignas(64) float buffer[2][2 * kTile];
    for (int piece = 0; piece <= pieces.pieces; ++piece) {
        float* leaving = buffer[piece % 2];
        if (piece < pieces.pieces) {
            _tile_zero(0);
            _tile_zero(1);
            multiply_steps<false>(a, b, b_stride, pieces.steps_per_piece, ROWS);
            a += pieces.steps_per_piece * ROWS * 64, b += pieces.steps_per_piece * kStepBytes;
            _tile_stored(0, leaving, 64);
            _tile_stored(1, leaving + kTile, 64);
        }
        if (piece == 0) continue;
        const float* arrived = buffer[(piece - 1) % 2];
        add_scaled<ROWS>(arrived, scale_of(pieces, piece - 1, 0), c);
        add_scaled<ROWS>(arrived + kTile, scale_of(pieces, piece - 1, 1), c + c_stride);
    }
}

// As multiply_amx, for weights that need no scale any more: the sums, fp32 or int32, stay in their tiles. INT8: every dword of
// a and b is four signed bytes of four inputs instead of a pair of bf16.
template <bool INT8>
static void multiply_scaled_amx(const uint8_t* a, const uint8_t* b, int64_t b_stride, int steps, int rows, void* sums,
                                int64_t c_stride) {
    uint32_t* c = static_cast<uint32_t*>(sums);
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + c_stride, 64);
    multiply_steps<INT8>(a, b, b_stride, steps, rows);
    _tile_stored(0, c, 64);
    _tile_stored(1, c + c_stride, 64);
}

static MultiplyTile multiplier_amx(int rows) {
    return rows <= 4 ? multiply_amx<4> : rows <= 8 ? multiply_amx<8> : rows <= 12 ? multiply_amx<12> : multiply_amx<16>;
}

}  // namespace bf16
}  // namespace sparse24
TARGET_END
#endif  // SPARSIFY_COMPILES_AMX
#endif  // SPARSIFY_COMPILES_AVX512BF16
