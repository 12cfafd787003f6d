// Opt-in int8 compute: twice the arithmetic of bf16.
//
// With AMX, where sums stay in tiles for all of K, at the price of two more roundings:
//
//   activations  one scale per row: x = sx * u, u in -127 .. 127, rounded to nearest
//   weights      while a panel is decoded, the codes of all groups of an output are brought to one scale of that output:
//                w = sw * v, v in -127 .. 127. With 4-bit codes the step of sw is at most an eighth of a group's own when
//                the groups' scales are alike, so this adds little to the error that the codes have.
//   sums         int32 over all of K: |u v| < 2^14, so 2^17 inputs fit
//
// Without AMX at the price of one:
//
//   activations  a scale per row and piece of K (a group, or 512 inputs of a longer one), as the blocks of llama.cpp's kernels
//   weights      their codes; 4-bit ones times 16. In 2:4 linears a permute picks the kept inputs of two quads for one product
//   sums         int32 over a piece, scaled in fp32
#pragma once

#include <limits>

#include "sparse24_bf16.h"

#if SPARSIFY_COMPILES_AVX512BF16

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,bmi2")
namespace sparse24 {
namespace int8 {

constexpr int kSteps = 2;         // of 32 inputs: a step of these kernels is 64 inputs, 16 quads
constexpr int kStepBytes = 1024;  // of a decoded step: 16 quads x 16 outputs x 4

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
        const __m512i u =
            _mm512_cvtps_epi32(_mm512_mul_ps(bf16::load_widened(x, type, i, mask), _mm512_set1_ps(inverse)));
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
            most = _mm512_max_ps(most,
                                 _mm512_abs_ps(bf16::load_scales(scales + g * kPair + half * kPanel, l.stored_type)));
        }
        const __m512 unit = _mm512_mul_ps(most, _mm512_set1_ps(largest / 127.0f));
        _mm512_storeu_ps(sw + half * kPanel, unit);
        const __mmask16 some = _mm512_cmp_ps_mask(unit, _mm512_setzero_ps(), _CMP_GT_OQ);
        for (int64_t g = 0; g < l.groups; ++g) {
            const __m512 scale = bf16::load_scales(scales + g * kPair + half * kPanel, l.stored_type);
            const __m512 ratio = _mm512_maskz_div_ps(some, scale, unit);
            const __m512i f =
                _mm512_cvtps_epi32(_mm512_mul_ps(ratio, _mm512_set1_ps(l.bits == 4 ? 2048.0f : 32768.0f)));
            factors[2 * g + half] =
                _mm512_or_si512(_mm512_and_si512(f, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(f, 16));
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
        const __m512i select = _mm512_or_si512(
            _mm512_permutexvar_epi32(positions, _mm512_load_si512(kBytes.by_positions)), bf16::first_of_dwords(0));
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
        const __m512i low =
            _mm512_broadcast_i32x4(_mm_setr_epi32(int(0x80800200), int(0x80800604), int(0x80800a08), int(0x80800e0c)));
        const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi32(0x02008080, 0x06048080, 0x0a088080, 0x0e0c8080));
        _mm512_store_si512(out + Q * 64, _mm512_or_si512(_mm512_shuffle_epi8(rescale(first, factor), low),
                                                         _mm512_shuffle_epi8(rescale(second, factor), high)));
        decode_dense<BITS, Q + 1>(codes, factor, table, out);
    }
}

// Steps of a pair, beginning with number `first` -> rows of 64 bytes: 16 outputs x one quad, as the right operand of tdpbssd has
// them. `steps` is even unless they are the last; the second panel goes `stride` bytes behind the first.
template <int BITS, bool SPARSE>
static void decode(const Layout& l, const uint8_t* p, int64_t first, int steps, const __m512i* factors, uint8_t* out,
                   int64_t stride) {
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

using Decode = void (*)(const Layout& l, const uint8_t* p, int64_t first, int steps, const __m512i* factors,
                        uint8_t* out, int64_t stride);

static Decode decoder(const Layout& l) {
    if (l.sparse) return l.bits == 4 ? decode<4, true> : decode<8, true>;
    return l.bits == 4 ? decode<4, false> : decode<8, false>;
}

// 16 sums of one row -> floats.
static void scale_row(const int32_t* sums, float sx, const float* sw, float* out) {
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(sx), _mm512_loadu_ps(sw));
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), scale));
}

// ------------------------------------------------------------------------------------------------- without AMX

constexpr int kDotRows = 8;    // of a tile of activations
constexpr int kRunSteps = 16;  // of a run of weights
constexpr int kPieceBytes =
    2 * 2 * 64;  // of a decoded piece, before its steps: per panel 128 times the sums of codes, and scales
constexpr int kDecodedBytes =
    4 * (64 + 64);  // of a decoded step of a 2:4 panel: four vectors of codes, each before its positions

constexpr int vectors(bool sparse) { return sparse ? 4 : 8; }  // of a step of a panel, each four values of 16 outputs
constexpr int step_bytes(int bits, bool sparse) { return sparse ? kMetaBytes + 32 * bits : 64 * bits; }

// The order of the inputs of a step: what a vector of codes is multiplied with, vector after vector. 2:4: quads q and q + 2.
// Dense 4-bit codes are taken as the nibbles of their bytes lie.
ALWAYS __m256i order_of_inputs(const Layout& l) {
    alignas(32) static const uint8_t orders[3][32] = {{0,  1,  2,  3,  8,  9,  10, 11, 4,  5,  6,  7,  12, 13, 14, 15,
                                                       16, 17, 18, 19, 24, 25, 26, 27, 20, 21, 22, 23, 28, 29, 30, 31},
                                                      {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                                       16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31},
                                                      {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31}};
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(orders[l.sparse ? 0 : l.bits == 4 ? 1 : 2]));
}

// As quantize_row, for `steps` full steps of bf16.
static float quantize_steps(const uint16_t* x, int steps, int8_t* out) {
    // Magnitudes of bf16 are in the order of their bits, those of Inf and NaN at the end.
    __m512i most = _mm512_setzero_si512();
    for (int s = 0; s < steps; ++s) {
        most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(x + s * kStep), _mm512_set1_epi16(0x7fff)));
    }
    const __m512i high = _mm512_and_si512(most, _mm512_set1_epi32(int(0xffff0000u)));
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_slli_epi32(most, 16), high));
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float scale = largest / 127.0f, inverse = finite && scale >= 1e-37f ? 1.0f / scale : 0.0f;
    const __m512 factor = _mm512_set1_ps(inverse);
    for (int s = 0; s < steps; ++s) {
        __m512i v = _mm512_loadu_si512(x + s * kStep);
        if (inverse == 0.0f) v = _mm512_setzero_si512();
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))));
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(even, factor)),
                      next = _mm512_cvtps_epi32(_mm512_mul_ps(odd, factor));
        // (low & 255) | next << 8
        const __m512i pairs = _mm512_ternarylogic_epi32(low, _mm512_set1_epi32(255), _mm512_slli_epi32(next, 8), 0xea);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + s * kStep), _mm512_cvtepi32_epi16(pairs));
    }
    return finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

// Returns the scale of a piece of a row. from: its inputs, of which `inputs` exist; out: 128 + their quotients, 32 per step in
// the order above, [step][vector][row of the tile][8 bytes (2:4) or 4].
static float quantize_piece(const Layout& l, const void* from, int type, int64_t inputs, int steps, int tile_rows,
                            uint8_t* out) {
    int8_t values[kRunSteps * kStep];
    const bool full = type == kBf16 && inputs == steps * kStep;
    const float scale = full ? quantize_steps(static_cast<const uint16_t*>(from), steps, values)
                             : quantize_row(from, type, inputs, steps * kStep, values);
    const __m256i order = order_of_inputs(l), offset = _mm256_set1_epi8(char(128));
    for (int s = 0; s < steps; ++s, out += tile_rows * kStep) {
        const __m256i v =
            _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + s * kStep)), offset);
        const __m256i ordered = _mm256_permutexvar_epi8(order, v);
        const __m128i halves[2] = {_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)};
        uint8_t* to = out;
        for (const __m128i half : halves) {
            if (l.sparse) {
                _mm_storel_epi64(reinterpret_cast<__m128i*>(to), half);
                _mm_storeh_pd(reinterpret_cast<double*>(to + tile_rows * 8), _mm_castsi128_pd(half));
                to += 2 * tile_rows * 8;
            } else {
                const int32_t fours[4] = {_mm_cvtsi128_si32(half), _mm_extract_epi32(half, 1),
                                          _mm_extract_epi32(half, 2), _mm_extract_epi32(half, 3)};
                for (const int32_t four : fours) {
                    std::memcpy(to, &four, 4);
                    to += tile_rows * 4;
                }
            }
        }
    }
    return scale;
}

// Four times the bytes of 16 outputs -> the four bytes of each output.
ALWAYS __m512i by_output(__m512i bytes) {
    alignas(64) static const uint8_t order[64] = {0,  16, 32, 48, 1,  17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51,
                                                  4,  20, 36, 52, 5,  21, 37, 53, 6,  22, 38, 54, 7,  23, 39, 55,
                                                  8,  24, 40, 56, 9,  25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59,
                                                  12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
    return _mm512_permutexvar_epi8(_mm512_load_si512(order), bytes);
}

// The V-th vector of codes of a step of a panel, a dword of signed bytes per output; 4-bit codes times 16. 2:4: the first slots
// of quads q and q + 2, then their second ones.
template <int BITS, bool SPARSE, int V>
ALWAYS __m512i codes_of(const uint8_t* codes) {
    if constexpr (BITS == 4) {
        const __m512i c = _mm512_loadu_si512(codes + V / 2 * 64);
        // (c & 0xf0) ^ 0x80: from code + 8 to 16 x code
        return _mm512_ternarylogic_epi32(V % 2 ? c : _mm512_slli_epi16(c, 4), _mm512_set1_epi8(char(0xf0)),
                                         _mm512_set1_epi8(char(128)), 0x6a);
    } else if constexpr (SPARSE) {
        constexpr int q = V % 2 + V / 2 * 4;
        const auto quad = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * 32)); };
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(quad(q)), quad(q + 2), 1);
        return by_output(_mm512_shuffle_i32x4(both, both, 0xd8));  // first slots of both quads, then second ones
    } else {
        return by_output(_mm512_loadu_si512(codes + V * 64));
    }
}

// Where the inputs of the V-th vector of codes are among the eight of its quads: position, plus 4 in the bytes of the second quad.
template <int V>
ALWAYS __m512i positions_of(__m512i meta) {
    constexpr int shift = V % 2 * 4 + V / 2 * 2;
    const __m512i at = shift ? _mm512_srli_epi32(meta, shift) : meta;
    return _mm512_ternarylogic_epi32(at, _mm512_set1_epi8(3), _mm512_set1_epi32(0x04000400), 0xea);  // (at & 3) | 4
}

// The inputs of the V-th vector of codes, in a row of a tile: 2:4 by their positions among the eight of two quads.
template <bool SPARSE>
ALWAYS __m512i inputs_at(const uint8_t* x, __m512i positions) {
    if constexpr (SPARSE) {
        int64_t eight;
        std::memcpy(&eight, x, 8);
        return _mm512_permutexvar_epi8(positions, _mm512_set1_epi64(eight));
    } else {
        int32_t four;
        std::memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
}

// c[R][16] of both panels += (sums - offsets) x scale of the output x unit of the row.
template <int R>
ALWAYS void add_scaled(const __m512i (&sum)[2][R], const __m512i (&offset)[2], const __m512 (&scale)[2],
                       const float* unit, float* c, int64_t c_stride) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            float* to = c + half * c_stride + r * kPanel;
            const __m512 product =
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[half][r], offset[half])), scale[half]);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(product, _mm512_set1_ps(unit[r]), _mm512_loadu_ps(to)));
        }
    }
}

// The scale of what `codes_of` leaves of a piece's codes.
template <int BITS>
ALWAYS __m512 scale_of(const Pieces& pieces, int piece, int half) {
    const __m512 scale = bf16::scale_of(pieces, piece, half);
    return BITS == 4 ? _mm512_mul_ps(scale, _mm512_set1_ps(0.0625f)) : scale;
}

template <int BITS, bool SPARSE, int V, int R>
ALWAYS void multiply_vectors(const uint8_t* p, const uint8_t* x, __m512i (&sum)[2][R], __m512i (&offset)[2]) {
    if constexpr (V < vectors(SPARSE)) {
        __m512i codes[2], positions[2] = {};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const uint8_t* panel = p + half * step_bytes(BITS, SPARSE);
            codes[half] = codes_of<BITS, SPARSE, V>(panel + (SPARSE ? kMetaBytes : 0));
            if constexpr (SPARSE) positions[half] = positions_of<V>(_mm512_loadu_si512(panel));
            offset[half] = bf16::dot_bytes(offset[half], _mm512_set1_epi8(char(128)), codes[half]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const uint8_t* inputs = x + (V * R + r) * (SPARSE ? 8 : 4);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                sum[half][r] = bf16::dot_bytes(sum[half][r], inputs_at<SPARSE>(inputs, positions[half]), codes[half]);
            }
        }
        multiply_vectors<BITS, SPARSE, V + 1>(p, x, sum, offset);
    }
}

// A run of a pair times a tile of R rows. x: as quantize_piece leaves it; unit: [piece][R] scales; c[R][16] +=, c_stride floats
// between panels. Each vector of codes is multiplied with all rows while it is in a register.
template <int BITS, bool SPARSE, int R>
static void multiply(const uint8_t* p, const Pieces& pieces, const uint8_t* x, const float* unit, float* c,
                     int64_t c_stride) {
    constexpr int bytes = 2 * step_bytes(BITS, SPARSE);
    for (int piece = 0; piece < pieces.pieces; ++piece, unit += R) {
        __m512i sum[2][R] = {}, offset[2] = {};
        for (int s = 0; s < pieces.steps_per_piece; ++s, p += bytes, x += R * kStep) {
            bf16::prefetch(p + bf16::kAhead, bytes);
            multiply_vectors<BITS, SPARSE, 0>(p, x, sum, offset);
        }
        add_scaled(sum, offset, {scale_of<BITS>(pieces, piece, 0), scale_of<BITS>(pieces, piece, 1)}, unit, c,
                   c_stride);
    }
}

template <int BITS, int V>
ALWAYS void decode_vectors(const uint8_t* p, __m512i& offset, uint8_t* out) {
    if constexpr (V < vectors(true)) {
        const __m512i codes = codes_of<BITS, true, V>(p + kMetaBytes);
        offset = bf16::dot_bytes(offset, _mm512_set1_epi8(char(128)), codes);
        _mm512_store_si512(out + 128 * V, codes);
        _mm512_store_si512(out + 128 * V + 64, positions_of<V>(_mm512_loadu_si512(p)));
        decode_vectors<BITS, V + 1>(p, offset, out);
    }
}

// A run of a 2:4 pair -> per piece: [panel][16] 128 times the sums of codes, [panel][16] scales, then [step][panel] vectors.
template <int BITS>
static void decode_run(const uint8_t* p, const Pieces& pieces, uint8_t* out) {
    constexpr int bytes = step_bytes(BITS, true);
    for (int piece = 0; piece < pieces.pieces; ++piece) {
        uint8_t* head = out;
        __m512i offset[2] = {};
        out += kPieceBytes;
        for (int s = 0; s < pieces.steps_per_piece; ++s) {
            bf16::prefetch(p + bf16::kAhead, 2 * bytes);
            for (int half = 0; half < 2; ++half, p += bytes, out += kDecodedBytes)
                decode_vectors<BITS, 0>(p, offset[half], out);
        }
        for (int half = 0; half < 2; ++half) {
            _mm512_store_si512(head + half * 64, offset[half]);
            _mm512_store_ps(head + 128 + half * 64, scale_of<BITS>(pieces, piece, half));
        }
    }
}

// As `multiply`, for a run that was decoded: with many tiles of rows that costs less than taking codes apart for each.
template <int R>
static void multiply_decoded(const uint8_t* decoded, const Pieces& pieces, const uint8_t* x, const float* unit,
                             float* c, int64_t c_stride) {
    for (int piece = 0; piece < pieces.pieces; ++piece, unit += R) {
        const uint8_t* head = decoded;
        __m512i sum[2][R] = {};
        decoded += kPieceBytes;
        for (int s = 0; s < pieces.steps_per_piece; ++s, decoded += kDecodedBytes) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors(true); ++v, decoded += 128, x += R * 8) {
                const uint8_t* second = decoded + kDecodedBytes;
                const __m512i codes[2] = {_mm512_load_si512(decoded), _mm512_load_si512(second)};
                const __m512i positions[2] = {_mm512_load_si512(decoded + 64), _mm512_load_si512(second + 64)};
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        sum[half][r] =
                            bf16::dot_bytes(sum[half][r], inputs_at<true>(x + r * 8, positions[half]), codes[half]);
                    }
                }
            }
        }
        add_scaled(sum, {_mm512_load_si512(head), _mm512_load_si512(head + 64)},
                   {_mm512_load_ps(head + 128), _mm512_load_ps(head + 192)}, unit, c, c_stride);
    }
}

using DecodeRun = void (*)(const uint8_t* p, const Pieces& pieces, uint8_t* out);
using MultiplyRun = void (*)(const uint8_t* weights, const Pieces& pieces, const uint8_t* x, const float* unit,
                             float* c, int64_t c_stride);

// For so many tiles of rows, or null where `multiplier` is faster.
static DecodeRun run_decoder(const Layout& l, int64_t tiles) {
    if (!l.sparse || tiles <= (l.bits == 4 ? 2 : 1)) return nullptr;
    return l.bits == 4 ? decode_run<4> : decode_run<8>;
}

template <int BITS, bool SPARSE>
static MultiplyRun multiplier_of(int rows) {
    constexpr MultiplyRun of[kDotRows] = {
        multiply<BITS, SPARSE, 1>, multiply<BITS, SPARSE, 2>, multiply<BITS, SPARSE, 3>, multiply<BITS, SPARSE, 4>,
        multiply<BITS, SPARSE, 5>, multiply<BITS, SPARSE, 6>, multiply<BITS, SPARSE, 7>, multiply<BITS, SPARSE, 8>};
    return of[rows - 1];
}

static MultiplyRun multiplier(const Layout& l, int rows) {
    if (l.sparse) return l.bits == 4 ? multiplier_of<4, true>(rows) : multiplier_of<8, true>(rows);
    return l.bits == 4 ? multiplier_of<4, false>(rows) : multiplier_of<8, false>(rows);
}

static MultiplyRun decoded_multiplier(int rows) {
    constexpr MultiplyRun of[kDotRows] = {multiply_decoded<1>, multiply_decoded<2>, multiply_decoded<3>,
                                          multiply_decoded<4>, multiply_decoded<5>, multiply_decoded<6>,
                                          multiply_decoded<7>, multiply_decoded<8>};
    return of[rows - 1];
}

}  // namespace int8
}  // namespace sparse24
TARGET_END

#endif  // SPARSIFY_COMPILES_AVX512BF16
