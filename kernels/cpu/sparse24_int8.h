// Opt-in int8 compute for many rows: twice the arithmetic of bf16, at the price of two more roundings.
//
//   activations  one scale per row: x = sx * u, u in -127 .. 127, rounded to nearest
//   weights      while a panel is decoded, the codes of all groups of an output are brought to one scale of that output:
//                w = sw * v, v in -127 .. 127. With 4-bit codes the step of sw is at most an eighth of a group's own when
//                the groups' scales are alike, so this adds little to the error that the codes have.
//   sums         int32 over all of K: |u v| < 2^14, so 2^17 inputs fit
#pragma once

#include "sparse24_bf16.h"

#if SPARSIFY_COMPILES_AVX512BF16

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,bmi2")
namespace sparse24 {
namespace int8 {

constexpr int kSteps = 2;          // of 32 inputs: a step of these kernels is 64 inputs, 16 quads
constexpr int kStepBytes = 1024;   // of a decoded step: 16 quads x 16 outputs x 4

// Row of K inputs -> `padded` signed bytes; returns the scale. A row that is not finite becomes zeros with scale NaN.
static float quantize_row(const void* x, int type, int64_t k, int64_t padded, int8_t* out) {
    __m512 most = _mm512_setzero_ps();
    bool finite = true;
    for (int64_t i = 0; i < k; i += 16) {
        const __m512 v = _mm512_abs_ps(bf16::load_widened(x, type, i, bf16::lanes_below(k, i)));
        finite &= _mm512_cmp_ps_mask(v, _mm512_set1_ps(3.4028235e38f), _CMP_LE_OQ) == 0xffff;
        most = _mm512_max_ps(most, v);
    }
    const float scale = _mm512_reduce_max_ps(most) / 127.0f;
    const float inverse = finite && scale >= 1e-37f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < padded; i += 16) {
        const __mmask16 mask = inverse != 0.0f ? bf16::lanes_below(k, i) : 0;
        const __m512i u = _mm512_cvtps_epi32(_mm512_mul_ps(bf16::load_widened(x, type, i, mask), _mm512_set1_ps(inverse)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtsepi32_epi8(u));
    }
    const uint32_t nan = 0x7fc00000;
    float result = scale;
    if (!finite) std::memcpy(&result, &nan, 4);
    return result;
}

// The scale of each of a pair's 32 outputs, and for every group and half the factor from its codes to v, in both words of an
// output's dword: times 2048 for 4-bit codes (which are decoded times 16), times 32768 for 8-bit ones; see `rescale`.
static void output_scales(const Layout& l, const uint16_t* scales, float* sw, __m512i* factors) {
    const float largest = l.bits == 4 ? 8.0f : 128.0f;
    for (int half = 0; half < 2; ++half) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t g = 0; g < l.groups; ++g) {
            most = _mm512_max_ps(most, _mm512_abs_ps(bf16::load_scales(scales + g * kPair + half * kPanel, l.stored_type)));
        }
        const __m512 unit = _mm512_mul_ps(most, _mm512_set1_ps(largest / 127.0f));
        _mm512_storeu_ps(sw + half * kPanel, unit);
        const __mmask16 some = _mm512_cmp_ps_mask(unit, _mm512_setzero_ps(), _CMP_GT_OQ);
        for (int64_t g = 0; g < l.groups; ++g) {
            const __m512 scale = bf16::load_scales(scales + g * kPair + half * kPanel, l.stored_type);
            const __m512 ratio = _mm512_maskz_div_ps(some, scale, unit);
            const __m512i f = _mm512_cvtps_epi32(_mm512_mul_ps(ratio, _mm512_set1_ps(l.bits == 4 ? 2048.0f : 32768.0f)));
            factors[2 * g + half] = _mm512_or_si512(_mm512_and_si512(f, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(f, 16));
        }
    }
}

// Code + 8 -> 16 * code, as words.
ALWAYS __m512i code_table() {
#define CODES -128, -112, -96, -80, -64, -48, -32, -16, 0, 16, 32, 48, 64, 80, 96, 112
    alignas(64) static const int16_t table[32] = {CODES, CODES};
#undef CODES
    return _mm512_load_si512(table);
}

// 16 signed bytes for the low and 16 for the high words.
ALWAYS __m512i words_of_bytes(const uint8_t* low, const uint8_t* high) {
    const __m512i l = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    const __m512i h = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, l, _mm512_slli_epi32(h, 16));
}

// (code x factor + half) >> 15: v in the low byte of every word.
ALWAYS __m512i rescale(__m512i codes, __m512i factor) { return _mm512_mulhrs_epi16(codes, factor); }

// Nibble T of every word -> words of 16 * code.
template <int T>
ALWAYS __m512i nibble(__m512i c, __m512i table) {
    return _mm512_permutexvar_epi16(T ? _mm512_srli_epi16(c, 4 * T) : c, table);
}

static constexpr Select kBytes(2);

template <int BITS, int Q>
ALWAYS void decode_quads(const uint8_t* codes, __m512i meta, __m512i factor, __m512i table, uint8_t* out) {
    if constexpr (Q < 8) {
        constexpr int t = Q % 4, bit = 4 * t + 2 * (Q / 4);
        __m512i words;
        if constexpr (BITS == 4) {
            words = nibble<t>(_mm512_loadu_si512(codes + Q / 4 * 64), table);
        } else {
            words = words_of_bytes(codes + Q * 32, codes + Q * 32 + 16);
        }
        const __m512i positions = _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), _mm512_srli_epi32(meta, bit),
                                                            _mm512_srli_epi32(meta, 14 + bit), 0xca);
        const __m512i select = _mm512_or_si512(_mm512_permutexvar_epi32(positions, _mm512_load_si512(kBytes.by_positions)), bf16::first_of_dwords(0));
        _mm512_store_si512(out + Q * 64, _mm512_shuffle_epi8(rescale(words, factor), select));
        decode_quads<BITS, Q + 1>(codes, meta, factor, table, out);
    }
}

template <int BITS, int Q>
ALWAYS void decode_dense(const uint8_t* codes, __m512i factor, __m512i table, uint8_t* out) {
    if constexpr (Q < 8) {
        __m512i first, second;
        if constexpr (BITS == 4) {
            const __m512i c = _mm512_loadu_si512(codes + Q / 2 * 64);
            first = nibble<2 * (Q % 2)>(c, table);
            second = nibble<2 * (Q % 2) + 1>(c, table);
        } else {
            first = words_of_bytes(codes + Q * 64, codes + Q * 64 + 16);
            second = words_of_bytes(codes + Q * 64 + 32, codes + Q * 64 + 48);
        }
        // the low bytes of four words, into one dword
        const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi32(int(0x80800200), int(0x80800604), int(0x80800a08), int(0x80800e0c)));
        const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi32(0x02008080, 0x06048080, 0x0a088080, 0x0e0c8080));
        _mm512_store_si512(out + Q * 64, _mm512_or_si512(_mm512_shuffle_epi8(rescale(first, factor), low),
                                                         _mm512_shuffle_epi8(rescale(second, factor), high)));
        decode_dense<BITS, Q + 1>(codes, factor, table, out);
    }
}

// Steps of a pair, beginning with number `first` -> rows of 64 bytes: 16 outputs x one quad, as the right operand of tdpbssd has
// them. `steps` is even unless they are the last; the second panel goes `stride` bytes behind the first.
template <int BITS, bool SPARSE>
static void decode(const Layout& l, const uint8_t* p, int64_t first, int steps, const __m512i* factors, uint8_t* out, int64_t stride) {
    const __m512i table = code_table();
    constexpr int bytes = SPARSE ? kMetaBytes + 32 * BITS : 64 * BITS;
    for (int s = 0; s < steps; ++s, out += kStepBytes / kSteps) {
        bf16::prefetch(p + bf16::kAhead, 2 * bytes);
        for (int half = 0; half < 2; ++half, p += bytes) {
            const __m512i factor = _mm512_loadu_si512(factors + 2 * ((first + s) / l.steps_per_group) + half);
            if constexpr (SPARSE) {
                decode_quads<BITS, 0>(p + kMetaBytes, _mm512_loadu_si512(p), factor, table, out + half * stride);
            } else {
                decode_dense<BITS, 0>(p, factor, table, out + half * stride);
            }
        }
    }
    if (steps % kSteps) {
        for (int half = 0; half < 2; ++half) std::memset(out + half * stride, 0, kStepBytes / kSteps);
    }
}

using Decode = void (*)(const Layout& l, const uint8_t* p, int64_t first, int steps, const __m512i* factors, uint8_t* out, int64_t stride);

static Decode decoder(const Layout& l) {
    if (l.sparse) return l.bits == 4 ? decode<4, true> : decode<8, true>;
    return l.bits == 4 ? decode<4, false> : decode<8, false>;
}

// c[i][16] += a x b for one panel and 16 rows. a: [step][rows][64] signed bytes. The instruction wants one operand unsigned,
// so 128 is added to the activations and 128 x the sums of the weights subtracted again.
static void multiply_dot(const uint8_t* a, int rows, const uint8_t* b, int steps, int32_t* c) {
    for (int start = 0; start < rows; start += 8) {
        const int some = rows - start < 8 ? rows - start : 8;
        __m512i sum[8], weights = _mm512_setzero_si512();
        for (int i = 0; i < 8; ++i) sum[i] = _mm512_setzero_si512();
        for (int s = 0; s < steps; ++s) {
            for (int r = 0; r < 16; ++r) {
                const __m512i w = _mm512_load_si512(b + s * kStepBytes + r * 64);
                weights = bf16::dot_bytes(weights, _mm512_set1_epi8(1), w);
                const uint8_t* from = a + (s * rows + start) * 64 + r * 4;
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    uint32_t four;
                    std::memcpy(&four, from + (i < some ? i : 0) * 64, 4);
                    sum[i] = bf16::dot_bytes(sum[i], _mm512_set1_epi32(int(four ^ 0x80808080u)), w);
                }
            }
        }
        const __m512i shift = _mm512_slli_epi32(weights, 7);
        for (int i = 0; i < some; ++i) {
            int32_t* to = c + (start + i) * kPanel;
            _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), _mm512_sub_epi32(sum[i], shift)));
        }
    }
}

// 16 sums of one row -> floats.
static void scale_row(const int32_t* sums, float sx, const float* sw, float* out) {
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(sx), _mm512_loadu_ps(sw));
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), scale));
}

// ----------------------------------------------------------------------------------- 2:4 without AMX: select
//
// Here a permute picks the kept inputs of two quads at once, and one product takes four of them. Codes stay as they are and
// activations have a scale per row and piece of K (a group, or 512 inputs of a longer one), as the blocks of other int8 kernels.

constexpr int kSelectRows = 8;                     // of a tile of activations
constexpr int kSelectSteps = 16;                   // of a run of weights
constexpr int kTwoQuads = 2 * 64;                  // bytes of two decoded quads of a panel: codes, then positions
constexpr int kSelectBytes = 2 * 4 * kTwoQuads;    // of a decoded step of both panels
constexpr int kPieceBytes = 2 * 2 * 64;            // before the steps of a piece: per panel what its sums begin with, and its scales

// The scale of a piece of a row, and 128 + the quotients, in the order of `select`: two quads of all rows after the other.
// from: the piece's inputs, of which `inputs` exist; steps: of the piece; out: [step][pair of quads][row of the tile][2 x 4 inputs].
static float quantize_piece(const void* from, int type, int64_t inputs, int steps, int tile_rows, uint8_t* out) {
    int8_t values[kSelectSteps * kStep];
    const float scale = quantize_row(from, type, inputs, steps * kStep, values);
    for (int s = 0; s < steps; ++s) {
        uint32_t quads[8];
        std::memcpy(quads, values + s * kStep, sizeof quads);
        for (int two = 0; two < 4; ++two) {
            const int first = two % 2 + two / 2 * 4;
            const uint32_t bytes[2] = {quads[first] ^ 0x80808080u, quads[first + 2] ^ 0x80808080u};
            std::memcpy(out + ((s * 4 + two) * tile_rows) * 8, bytes, 8);
        }
    }
    return scale;
}

// The codes of quads q and q + 2 as a dword of signed bytes per output: their first slots, then their second. 4-bit codes times 16.
template <int BITS, int TWO>
ALWAYS __m512i kept_bytes(const uint8_t* codes) {
    constexpr int q = TWO % 2 + TWO / 2 * 4;
    if constexpr (BITS == 4) {
        const __m512i c = _mm512_loadu_si512(codes + TWO / 2 * 64);
        // (c & 0xf0) ^ 0x80: from code + 8 to 16 x code
        return _mm512_ternarylogic_epi32(TWO % 2 ? c : _mm512_slli_epi16(c, 4), _mm512_set1_epi8(char(0xf0)), _mm512_set1_epi8(char(0x80)), 0x6a);
    } else {
        const auto bytes = [&](int quad, int slot) {
            return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + quad * 32 + slot * 16)));
        };
        const __m512i first = _mm512_or_si512(bytes(q, 0), _mm512_slli_epi32(bytes(q + 2, 0), 8));
        const __m512i second = _mm512_or_si512(bytes(q, 1), _mm512_slli_epi32(bytes(q + 2, 1), 8));
        return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    }
}

// Codes and positions of a step of a panel, and its part of what the offset of the activations adds to a sum.
template <int BITS, int TWO>
ALWAYS void decode_selection(const uint8_t* codes, __m512i meta, __m512i& offset, uint8_t* out) {
    if constexpr (TWO < 4) {
        const __m512i w = kept_bytes<BITS, TWO>(codes);
        offset = bf16::dot_bytes(offset, _mm512_set1_epi8(char(128)), w);
        _mm512_store_si512(out + TWO * kTwoQuads, w);
        constexpr int shift = TWO % 2 * 4 + TWO / 2 * 2;
        // (meta & 3) | 4 in the bytes of the second quad
        const __m512i positions = _mm512_ternarylogic_epi32(shift ? _mm512_srli_epi32(meta, shift) : meta, _mm512_set1_epi8(3), _mm512_set1_epi32(0x04000400), 0xea);
        _mm512_store_si512(out + TWO * kTwoQuads + 64, positions);
        decode_selection<BITS, TWO + 1>(codes, meta, offset, out);
    }
}

// A run of a 2:4 pair -> per piece: [panel][16] minus 128 times the sums of codes, [panel][16] scales, then its steps:
// [step][panel][pair of quads]{codes, positions}.
template <int BITS>
static void decode_selections(const uint8_t* p, const bf16::Pieces& pieces, uint8_t* out) {
    constexpr int bytes = kMetaBytes + 32 * BITS;
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        uint8_t* head = out;
        __m512i offset[2] = {};
        out += kPieceBytes;
        for (int s = 0; s < pieces.steps_per_piece; ++s) {
            bf16::prefetch(p + bf16::kAhead, 2 * bytes);
            for (int half = 0; half < 2; ++half, p += bytes, out += kSelectBytes / 2) {
                decode_selection<BITS, 0>(p + kMetaBytes, _mm512_loadu_si512(p), offset[half], out);
            }
        }
        for (int half = 0; half < 2; ++half) {
            const __m512 scale = bf16::scale_of(pieces, piece, half);
            _mm512_store_si512(head + half * 64, _mm512_sub_epi32(_mm512_setzero_si512(), offset[half]));
            _mm512_store_ps(head + 128 + half * 64, BITS == 4 ? _mm512_mul_ps(scale, _mm512_set1_ps(0.0625f)) : scale);
        }
    }
}

// Decoded pieces times a tile of R rows. x: as quantize_piece leaves it; unit: [piece][R] scales; c[R][16] +=, c_stride floats
// between panels.
template <int R>
static void select(const uint8_t* decoded, int pieces, int steps, const uint8_t* x, const float* unit, float* c, int64_t c_stride) {
    for (int piece = 0; piece < pieces; ++piece, unit += R) {
        const uint8_t* head = decoded;
        __m512i sum[2][R];
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[half][r] = _mm512_load_si512(head + half * 64);
        }
        decoded += kPieceBytes;
        for (int s = 0; s < steps; ++s, decoded += kSelectBytes) {
#pragma GCC unroll 4
            for (int two = 0; two < 4; ++two, x += R * 8) {
                const uint8_t* at = decoded + two * kTwoQuads;
                const __m512i w0 = _mm512_load_si512(at), positions0 = _mm512_load_si512(at + 64);
                const __m512i w1 = _mm512_load_si512(at + kSelectBytes / 2), positions1 = _mm512_load_si512(at + kSelectBytes / 2 + 64);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    int64_t inputs;
                    std::memcpy(&inputs, x + r * 8, 8);
                    const __m512i eight = _mm512_set1_epi64(inputs);
                    sum[0][r] = bf16::dot_bytes(sum[0][r], _mm512_permutexvar_epi8(positions0, eight), w0);
                    sum[1][r] = bf16::dot_bytes(sum[1][r], _mm512_permutexvar_epi8(positions1, eight), w1);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512 row = _mm512_set1_ps(unit[r]);
            for (int half = 0; half < 2; ++half) {
                float* to = c + half * c_stride + r * kPanel;
                const __m512 factor = _mm512_mul_ps(row, _mm512_load_ps(reinterpret_cast<const float*>(head + 128 + half * 64)));
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[half][r]), factor, _mm512_loadu_ps(to)));
            }
        }
    }
}

using DecodeSelections = void (*)(const uint8_t* p, const bf16::Pieces& pieces, uint8_t* out);
using Select = void (*)(const uint8_t* decoded, int pieces, int steps, const uint8_t* x, const float* unit, float* c, int64_t c_stride);

static Select selector(int rows) {
    constexpr Select of[kSelectRows] = {select<1>, select<2>, select<3>, select<4>, select<5>, select<6>, select<7>, select<8>};
    return of[rows - 1];
}

}  // namespace int8
}  // namespace sparse24
TARGET_END

#endif  // SPARSIFY_COMPILES_AVX512BF16
