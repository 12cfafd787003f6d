// Few rows of bf16 in 16-bit fixed point: integer products are cheaper than those of bf16 pairs.
//
//   activations  per row and piece (a group, at most 256 inputs) one power of two: x = 2^e u, |u| < 2^15. Exact for inputs of at
//                least 1/64 of their piece's largest; others are off by at most 1.01 x 2^-15 of the largest. bf16 itself rounds
//                the largest by up to 2^-9 of it.
//   sums         int32 over a piece, scaled in fp32: |code| <= 2^7 and 256 inputs need 30 bits
//
// One row (`direct_fixed`): as the few-rows kernels of sparse24_bf16.h, with vpdpwssd. Some rows on AMX (`multiply_pair`):
// u = 256 high + low in two signed bytes, so that the codes of the weights can stay bytes. Beside bf16 pairs that is half to
// write, half to load, and half of the permutes of decoding a 2:4 panel.
#pragma once

#include "sparse24_bf16.h"
#include "sparse24_int8.h"

#if SPARSIFY_COMPILES_AVX512BF16

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,bmi2")
namespace sparse24 {
namespace fixed {

constexpr int kPieceSteps = 8;

// How K is cut.
struct Cut {
    int64_t pieces;
    int steps;  // of a piece; the last one may have fewer

    int steps_of(const Layout& l, int64_t piece) const {
        return int(l.steps - piece * steps < steps ? l.steps - piece * steps : steps);
    }
};

inline Cut cut(const Layout& l) {
    const int steps = int(l.steps_per_group < kPieceSteps ? l.steps_per_group : kPieceSteps);
    return {(l.steps + steps - 1) / steps, steps};
}

// One row x of K bf16 -> `padded` words u, zero from K on, and per piece, `unit_stride` apart, what 2^shift of a code times 1 of u
// is worth; NaN where something in the piece is not finite.
static void to_words(const Layout& l, const Cut& c, const uint16_t* x, int64_t padded, int shift, int16_t* words,
                     float* unit, int64_t unit_stride) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    for (int64_t piece = 0; piece < c.pieces; ++piece, unit += unit_stride) {
        const int64_t begin = piece * c.steps * kStep,
                      end = begin + c.steps * kStep < l.k ? begin + c.steps * kStep : l.k;
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = begin; i < end; i += 32) {
            const __mmask32 mask = i + 32 <= end ? ~0u : (1u << (end - i)) - 1;
            most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i), magnitude));
        }
        // bf16 magnitudes are ordered as their bits are
        most = _mm512_max_epu32(_mm512_slli_epi32(most, 16), _mm512_andnot_si512(_mm512_set1_epi32(0xffff), most));
        const uint32_t bits = uint32_t(_mm512_reduce_max_epu32(most));
        const bool finite = bits < 0x7f800000;
        float largest;
        std::memcpy(&largest, &bits, 4);
        largest *= 1.01f;  // so that u stays below 127.5 x 256
        uint32_t exponent;
        std::memcpy(&exponent, &largest, 4);
        exponent = exponent >> 23 > 32 ? exponent >> 23 : 32;  // the factors below stay normal
        // u = x 2^(14 - (exponent - 127)), or 0
        const uint32_t factor_bits = finite ? (127 + 14 + 127 - exponent) << 23 : 0;
        const uint32_t unit_bits = finite ? (exponent - 14 - shift) << 23 : 0x7fc00000;
        float factor;
        std::memcpy(&factor, &factor_bits, 4);
        std::memcpy(unit, &unit_bits, 4);
        const __m512 scale = _mm512_set1_ps(factor);
        for (int64_t i = begin; i < end; i += 16) {
            // (infinity times zero converts to a number whose lower word is zero)
            const __m512 scaled = _mm512_mul_ps(bf16::load_widened(x, kBf16, i, bf16::lanes_below(end, i)), scale);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i),
                                _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled)));
        }
    }
    if (padded > l.k) std::memset(words + l.k, 0, (padded - l.k) * 2);
}

// code + 8 -> code
ALWAYS __m512i code_words() {
#define CODES -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7
    alignas(64) static const int16_t table[32] = {CODES, CODES};
#undef CODES
    return _mm512_load_si512(table);
}

// out[32] = the outputs of a 2:4 pair of 4-bit codes for one row. x: expanded words, unit: per piece.
static void direct_fixed(const Layout& l, const Cut& c, const uint8_t* p, const uint16_t* scales, const uint8_t* x,
                         const float* unit, float* out) {
    const __m512i table = code_words();
    __m512 total[2] = {};
    for (int64_t piece = 0; piece < c.pieces; ++piece) {
        __m512i sum[2][1][2] = {};
        const int steps = c.steps_of(l, piece);
        for (int s = 0; s < steps; ++s, x += bf16::kQuadBytes, p += 2 * l.step_bytes)
            bf16::direct_step<4>(p, table, x, 0, sum);
        const uint16_t* scale = scales + piece * c.steps / l.steps_per_group * kPair;
        for (int half = 0; half < 2; ++half) {
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[half][0][0], sum[half][0][1]));
            const __m512 factor =
                _mm512_mul_ps(bf16::load_scales(scale + half * kPanel, l.stored_type), _mm512_set1_ps(unit[piece]));
            total[half] = _mm512_fmadd_ps(whole, factor, total[half]);
        }
    }
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + half * kPanel, total[half]);
}

}  // namespace fixed
}  // namespace sparse24
TARGET_END

#if SPARSIFY_COMPILES_AMX

TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,bmi2,amx-tile,amx-bf16,amx-int8")
namespace sparse24 {
namespace fixed {

constexpr int kTileInputs = 64, kTileSteps = kTileInputs / kStep;  // of one tile of weights: 16 quads x 16 outputs
constexpr int kQuadBytes = 64;                                     // of a decoded quad
constexpr int kStepBytes = 8 * kQuadBytes;                         // of a decoded step of a panel
constexpr int kPanelBytes = kPieceSteps * kStepBytes;

inline int tiles_of(int steps) { return (steps + kTileSteps - 1) / kTileSteps; }

// Whether every piece begins with a tile of its own.
inline bool fits_tiles(const Layout& l) { return l.scaled() && (l.groups == 1 || l.steps_per_group % kTileSteps == 0); }

// ------------------------------------------------------------------------------------------------------ activations

// The order of 64 inputs in a row of a tile. Dense 4-bit codes are not moved within 8 inputs: `decode_step` gives them as the
// nibbles of a code's bytes lie.
ALWAYS __m512i order_of_inputs(const Layout& l) {
    alignas(64) static const uint8_t within[64] = {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                                   16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31,
                                                   32, 36, 33, 37, 34, 38, 35, 39, 40, 44, 41, 45, 42, 46, 43, 47,
                                                   48, 52, 49, 53, 50, 54, 51, 55, 56, 60, 57, 61, 58, 62, 59, 63};
    alignas(64) static const uint8_t same[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    return _mm512_load_si512(!l.sparse && l.bits == 4 ? within : same);
}

// Words of a row, a multiple of 64 -> rows of tiles, of their high bytes and of their low ones, `tile_bytes` from tile to tile.
static void to_tiles(const Layout& l, const int16_t* words, int64_t tiles, uint8_t* high, uint8_t* low,
                     int64_t tile_bytes) {
    const __m512i order = order_of_inputs(l), half = _mm512_set1_epi16(128);
    for (int64_t tile = 0; tile < tiles; ++tile, words += kTileInputs, high += tile_bytes, low += tile_bytes) {
        const __m512i u0 = _mm512_loadu_si512(words), u1 = _mm512_loadu_si512(words + 32);
        const __m256i h0 = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(u0, half), 8));
        const __m256i h1 = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(u1, half), 8));
        const __m512i bytes =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(u0)), _mm512_cvtepi16_epi8(u1), 1);
        _mm512_store_si512(high, _mm512_permutexvar_epi8(order, _mm512_inserti64x4(_mm512_castsi256_si512(h0), h1, 1)));
        _mm512_store_si512(low, _mm512_permutexvar_epi8(order, bytes));
    }
}

// ---------------------------------------------------------------------------------------------------------- weights

static constexpr Select kTwoApart(2), kNext(1);

// code + 8 in the upper nibbles -> 16 code
ALWAYS __m512i upper_nibbles(__m512i c) {
    return _mm512_ternarylogic_epi32(c, _mm512_set1_epi8(char(0x80)), _mm512_set1_epi8(char(0xf0)),
                                     0x28);  // (c ^ 0x80) & 0xf0
}

// Positions of both slots of quads 0-3, nibble t of an output's low word for quad t, and of quads 4-7.
ALWAYS void join_positions(__m512i meta, __m512i (&joined)[2]) {
    const __m512i low = _mm512_set1_epi32(0x3333);
    joined[0] = _mm512_ternarylogic_epi32(low, meta, _mm512_srli_epi32(meta, 14), 0xca);  // low ? meta : meta >> 14
    joined[1] = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(meta, 2), _mm512_srli_epi32(meta, 16), 0xca);
}

// One step of a panel -> 8 rows of 64 bytes: a quad of each of the 16 outputs, as the right operand of tdpbssd has them; 4-bit codes
// times 16.
template <int BITS, bool SPARSE>
ALWAYS void decode_step(const uint8_t* p, uint8_t* out) {
    if constexpr (SPARSE) {
        __m512i positions[2];
        join_positions(_mm512_loadu_si512(p), positions);
        const __m512i table = _mm512_load_si512((BITS == 4 ? kTwoApart : kNext).by_positions);
        const __m512i front = bf16::first_of_dwords(0), back = bf16::first_of_dwords(BITS == 4 ? 1 : 2);
#pragma GCC unroll 2
        for (int high = 0; high < 2; ++high) {
            const uint8_t* codes = p + kMetaBytes + high * 16 * BITS;
            __m512i pairs[2];  // 4 bits: of quads 0 and 2, of quads 1 and 3; 8 bits: of quads 0 and 1, of quads 2 and 3
            if constexpr (BITS == 4) {
                const __m512i c = _mm512_loadu_si512(codes);
                pairs[0] = upper_nibbles(_mm512_slli_epi16(c, 4));
                pairs[1] = upper_nibbles(c);
            } else {
                pairs[0] = int8::by_output(_mm512_loadu_si512(codes));
                pairs[1] = int8::by_output(_mm512_loadu_si512(codes + 64));
            }
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) {
                const __m512i index = t ? _mm512_srli_epi32(positions[high], 4 * t) : positions[high];
                const int which = BITS == 4 ? t % 2 : t / 2, behind = BITS == 4 ? t / 2 : t % 2;
                const __m512i select = _mm512_or_si512(_mm512_permutexvar_epi32(index, table), behind ? back : front);
                _mm512_store_si512(out + (4 * high + t) * kQuadBytes, _mm512_shuffle_epi8(pairs[which], select));
            }
        }
    } else if constexpr (BITS == 4) {
#pragma GCC unroll 4
        for (int eight = 0; eight < 4; ++eight) {  // inputs 0 4 1 5, then 2 6 3 7 of eight: `order_of_inputs`
            const __m512i c = _mm512_loadu_si512(p + eight * 64);
            _mm512_store_si512(out + 2 * eight * kQuadBytes, upper_nibbles(_mm512_slli_epi16(c, 4)));
            _mm512_store_si512(out + (2 * eight + 1) * kQuadBytes, upper_nibbles(c));
        }
    } else {
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q)
            _mm512_store_si512(out + q * kQuadBytes, int8::by_output(_mm512_loadu_si512(p + q * 64)));
    }
}

// Up to 8 steps of a pair; the second panel goes kPanelBytes behind the first. What fills the last tile up is zero.
template <int BITS, bool SPARSE>
ALWAYS void decode_piece(const uint8_t* p, int steps, uint8_t* out) {
    constexpr int bytes = SPARSE ? kMetaBytes + 32 * BITS : 64 * BITS;
    for (int s = 0; s < steps; ++s, p += 2 * bytes, out += kStepBytes) {
        bf16::prefetch(p + bf16::kAhead, 2 * bytes);
        decode_step<BITS, SPARSE>(p, out);
        decode_step<BITS, SPARSE>(p + bytes, out + kPanelBytes);
    }
    if (steps % kTileSteps) {
        std::memset(out, 0, kStepBytes);
        std::memset(out + kPanelBytes, 0, kStepBytes);
    }
}

// --------------------------------------------------------------------------------------------------------- products

// sums[i][16] += (256 high[i] + low[i]) x unit[i] x scale
template <int ROWS>
ALWAYS void add_scaled(const int32_t* high, const int32_t* low, const float* unit, __m512 scale, float* sums) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high + i * kPanel), 8),
                                               _mm512_load_si512(low + i * kPanel));
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(unit[i]));
        _mm512_store_ps(sums + i * kPanel,
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, _mm512_load_ps(sums + i * kPanel)));
    }
}

struct Waiting {  // sums of a piece that left their tiles and are not scaled yet: [panel][high, low][row][16]
    const int32_t* left;
    const uint16_t* scales;
    const float* unit;
    float* sums;
};

template <int ROWS>
ALWAYS void add_waiting(const Waiting& w, int scale_type, int64_t c_stride) {
#pragma GCC unroll 2
    for (int panel = 0; panel < 2; ++panel) {
        const int32_t* high = w.left + panel * 2 * ROWS * kPanel;
        add_scaled<ROWS>(high, high + ROWS * kPanel, w.unit, bf16::load_scales(w.scales + panel * kPanel, scale_type),
                         w.sums + panel * c_stride);
    }
}

// A pair times `blocks` blocks of ROWS rows of activations.
//   x: [tile][block][high, low][ROWS][64] bytes; unit: [piece][block][ROWS]; sums: [panel][block][ROWS][16] +=, c_stride floats
//   between panels. APART: high and low bytes are tiles of their own (more than 8 rows), else halves of one.
// A piece is decoded while the one before it is multiplied and the sums of the one before that, which have to leave their tiles
// through memory, are scaled: nothing waits for a store.
template <int BITS, bool SPARSE, int ROWS, bool APART>
static void multiply_pair(const Layout& l, const Cut& c, const uint8_t* p, const uint16_t* scales, const uint8_t* x,
                          const float* unit, int blocks, float* sums, int64_t c_stride) {
    constexpr int kSums = ROWS * kPanel, kBlockBytes = 2 * ROWS * 64, kPanels = 2;
    alignas(64) uint8_t decoded[2][kPanels * kPanelBytes];
    alignas(64) int32_t left[2][kPanels * 2 * kSums];
    const int64_t piece_bytes = c.steps * 2 * l.step_bytes;
    Waiting before = {};
    int turn = 0;
    decode_piece<BITS, SPARSE>(p, c.steps_of(l, 0), decoded[0]);
    for (int64_t piece = 0; piece < c.pieces; ++piece) {
        const int tiles = tiles_of(c.steps_of(l, piece));
        if (piece + 1 < c.pieces) {
            decode_piece<BITS, SPARSE>(p + (piece + 1) * piece_bytes, c.steps_of(l, piece + 1),
                                       decoded[(piece + 1) % 2]);
        }
        for (int block = 0; block < blocks; ++block, turn ^= 1) {
            int32_t* leaving = left[turn];
            const uint8_t* a = x + (piece * tiles_of(c.steps) * blocks + block) * kBlockBytes;
            for (int part = 0; part < (APART ? 2 : 1); ++part) {
                _tile_zero(0);
                _tile_zero(1);
                for (int tile = 0; tile < tiles; ++tile) {
                    const uint8_t* b = decoded[piece % 2] + tile * kTileSteps * kStepBytes;
                    _tile_loadd(4, a + tile * blocks * kBlockBytes + part * kBlockBytes / 2, 64);
                    _tile_loadd(6, b, 64);
                    _tile_loadd(7, b + kPanelBytes, 64);
                    _tile_dpbssd(0, 4, 6);
                    _tile_dpbssd(1, 4, 7);
                }
                _tile_stored(0, leaving + part * kSums, 64);
                _tile_stored(1, leaving + (2 + part) * kSums, 64);
            }
            if (before.left) add_waiting<ROWS>(before, l.stored_type, c_stride);
            before = {leaving, scales + piece * c.steps / l.steps_per_group * kPair,
                      unit + (piece * blocks + block) * ROWS, sums + block * kSums};
        }
    }
    add_waiting<ROWS>(before, l.stored_type, c_stride);
}

using Multiply = void (*)(const Layout& l, const Cut& c, const uint8_t* p, const uint16_t* scales, const uint8_t* x,
                          const float* unit, int blocks, float* sums, int64_t c_stride);

template <int BITS, bool SPARSE>
static Multiply multiplier_of(int rows) {
    switch (rows) {
        case 2:
            return multiply_pair<BITS, SPARSE, 2, false>;
        case 4:
            return multiply_pair<BITS, SPARSE, 4, false>;
        case 6:
            return multiply_pair<BITS, SPARSE, 6, false>;
        case 8:
            return multiply_pair<BITS, SPARSE, 8, false>;
        case 12:
            return multiply_pair<BITS, SPARSE, 12, true>;
        default:
            return multiply_pair<BITS, SPARSE, 16, true>;
    }
}

// `rows` of a block: 2, 4, 6, 8, 12 or 16.
static Multiply multiplier(const Layout& l, int rows) {
    if (l.sparse) return l.bits == 4 ? multiplier_of<4, true>(rows) : multiplier_of<8, true>(rows);
    return l.bits == 4 ? multiplier_of<4, false>(rows) : multiplier_of<8, false>(rows);
}

}  // namespace fixed
}  // namespace sparse24
TARGET_END

#endif  // SPARSIFY_COMPILES_AMX
#endif  // SPARSIFY_COMPILES_AVX512BF16
