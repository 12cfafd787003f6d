// How a compressed linear lies in memory when it is multiplied: panels of 16 outputs, so that every vector lane belongs to
// one output, cut into steps of 32 inputs. Two panels make a pair, whose steps alternate: a kernel works on both and reads
// one address after the other.
//
// One step of a 2:4 panel, `j` the output within the panel, quads 0 .. 7 the 4-groups of the step:
//
//   meta       64 bytes: a dword per output. Its low word belongs to slot 0 of every quad, its high word to slot 1.
//              Nibble t of a word: the position (0 .. 3) of quad t in bits 0-1, of quad t + 4 in bits 2-3.
//   codes      4 bits: 2 x 64 bytes, for quads 0-3 and 4-7; a dword per output, nibble t of its low word the code of slot
//              0 of the t-th of these quads, of its high word that of slot 1; code + 8 is stored.
//              8 bits: per quad 16 signed bytes of slot 0, then 16 of slot 1.
//              16 bits: per quad a dword per output, slot 0 in its low word.
//
// Which of the two kept values of a quad comes first is free, because the positions are stored. They are ordered so that
// what is kept at position 0 or 1 lies in the slot of that number (see `slot_order`), which lets `decode` place most values
// without moving them.
//
// One step of a dense panel: 4 bits: 4 x 64 bytes, a dword per output, nibble t of the c-th word pair holds inputs
// 2 (4 c + t) and 2 (4 c + t) + 1. 8 bits: per input 16 signed bytes.
//
// Behind all pairs: per pair and group 2 x 16 scales as they are on disk (2 bytes each).
#pragma once

#include <cstdint>
#include <cstring>

namespace sparse24 {

constexpr int kPanel = 16;  // outputs
constexpr int kPair = 2 * kPanel;
constexpr int kStep = 32;                        // inputs
constexpr int kHeader = 64;                      // bytes before the first panel
constexpr int kMetaBytes = 64;                   // of one step
constexpr uint64_t kMagic = 0x3130345345535053;  // "SPSES401"

enum Type { kBf16 = 0, kF16 = 1, kF32 = 2 };

struct Header {
    uint64_t magic;
    int64_t n, k, group;
    int32_t bits, sparse;
    int32_t stored_type;  // of the scales, or of the values when bits is 16: kBf16 or kF16
    int32_t options;      // see sparse24_linear; what a call with options 0 uses
};
static_assert(sizeof(Header) <= kHeader);

struct Layout {
    int64_t n, k, group;
    int bits;
    bool sparse;
    int stored_type;
    int64_t pairs, steps, groups, steps_per_group;
    int64_t step_bytes, pair_bytes, scales_offset, total_bytes;

    bool scaled() const { return bits < 16; }
    const uint8_t* pair(const uint8_t* blob, int64_t p) const { return blob + kHeader + p * pair_bytes; }
    const uint16_t* scales(const uint8_t* blob, int64_t p) const {
        return reinterpret_cast<const uint16_t*>(blob + scales_offset) + p * groups * kPair;
    }
};

// False when no kernel can run such a linear.
inline bool make_layout(int64_t n, int64_t k, int bits, int64_t group, bool sparse, int stored_type, Layout* out) {
    if (n <= 0 || k <= 0 || k % 16 || n > (int64_t(1) << 40) / k) return false;
    if (bits != 4 && bits != 8 && !(bits == 16 && sparse)) return false;
    if (bits == 16) group = k;
    if (group <= 0 || k % group || (group % kStep && group != k)) return false;
    // Kernels decode 8 steps at once and scale whole groups of them: 3 steps (96 inputs) would straddle two runs.
    if (group != k && group & (group - 1)) return false;
    if (stored_type != kBf16 && stored_type != kF16) return false;
    Layout l;
    l.n = n, l.k = k, l.group = group, l.bits = bits, l.sparse = sparse, l.stored_type = stored_type;
    l.pairs = (n + kPair - 1) / kPair;
    l.steps = (k + kStep - 1) / kStep;
    l.groups = k / group;
    l.steps_per_group = (group + kStep - 1) / kStep;
    const int64_t stored = sparse ? kStep / 2 : kStep;
    l.step_bytes = (sparse ? kMetaBytes : 0) + stored * kPanel * bits / 8;
    l.pair_bytes = l.steps * 2 * l.step_bytes;
    l.scales_offset = kHeader + l.pairs * l.pair_bytes;
    l.total_bytes = l.scales_offset + (l.scaled() ? l.pairs * l.groups * kPair * 2 : 0);
    *out = l;
    return true;
}

// The layout of a packed linear, checked against its own size.
inline bool read_layout(const uint8_t* blob, int64_t bytes, Layout* out) {
    Header h;
    if (blob == nullptr || bytes < kHeader) return false;
    std::memcpy(&h, blob, sizeof h);
    return h.magic == kMagic && make_layout(h.n, h.k, h.bits, h.group, h.sparse != 0, h.stored_type, out) &&
           out->total_bytes == bytes;
}

// The groups of a run of steps: a whole group, or the part of one that is longer than the run.
struct Pieces {
    int steps_per_piece, pieces;
    const uint16_t* scales;  // of the first piece, a pair's 32 per piece; null: no scales
    int scale_type;
};

struct Source {              // the tensors of a checkpoint, rows of one linear
    const uint8_t* packed;   // weight_packed as bytes
    const uint8_t* meta;     // weight_meta
    const uint16_t* scale;   // weight_scale
    const uint16_t* values;  // weight_values
};

// Whether position `first` of a quad (the smaller of two kept) belongs into slot 0. The rule: a value kept at position 0
// or 1 lies in the slot of that number; when only one of the two slots is claimed, the other value takes what is left.
//   (0,1) (0,2) (0,3) (2,3): as on disk;  (1,2) (1,3): swapped.
inline bool slot_order(int first) { return first != 1; }

// By the positions of slot 0 (bits 0-1) and slot 1 (bits 2-3) of a quad: for each of its four bytes, which byte of an output's
// dword goes there, 0x80 for none: slot 0 is in byte 0, slot 1 in byte `second_slot`.
struct Select {
    alignas(64) uint32_t by_positions[16];
    constexpr explicit Select(int second_slot) : by_positions() {
        for (int index = 0; index < 16; ++index) {
            const int first = index & 3, second = index >> 2;
            uint32_t bytes = 0x80808080 & ~(0xffu << (8 * first));
            if (second != first) bytes = (bytes & ~(0xffu << (8 * second))) | uint32_t(second_slot) << (8 * second);
            by_positions[index] = bytes;
        }
    }
};

inline void pack_step(const Layout& l, const Source& src, int64_t panel, int64_t step, uint8_t* out) {
    std::memset(out, 0, l.step_bytes);
    uint8_t* codes = out + (l.sparse ? kMetaBytes : 0);
    if (l.bits == 4) std::memset(codes, 0x88, l.step_bytes - (l.sparse ? kMetaBytes : 0));  // zero is stored as 8
    for (int j = 0; j < kPanel; ++j) {
        const int64_t row = panel * kPanel + j;
        uint32_t meta = 0;
        if (l.sparse) {
            const uint8_t* positions = src.meta + row * (l.k / 8);
            for (int q = 0; q < 8; ++q) {
                const int t = q & 3, high = q >> 2;
                const int64_t quad = step * 8 + q;
                int place[2] = {0, 1};
                if (row < l.n && quad < l.k / 4) {
                    const int nibble = positions[quad / 2] >> (quad % 2 * 4) & 15;
                    const bool kept = slot_order(nibble & 3);
                    place[kept ? 0 : 1] = nibble & 3;
                    place[kept ? 1 : 0] = nibble >> 2;
                    const int64_t first = row * (l.k / 2) + quad * 2;  // of the two kept values, in disk order
                    for (int i = 0; i < 2; ++i) {
                        const int slot = kept ? i : 1 - i;
                        if (l.bits == 4) {
                            const uint32_t code = src.packed[(first + i) / 2] >> ((first + i) % 2 * 4) & 15;
                            uint8_t& byte = codes[high * 64 + j * 4 + slot * 2 + t / 2];
                            byte = t % 2 ? (byte & 0x0f) | code << 4 : (byte & 0xf0) | code;
                        } else if (l.bits == 8) {
                            codes[q * 32 + slot * 16 + j] = src.packed[first + i] ^ 0x80;
                        } else {
                            std::memcpy(codes + q * 64 + j * 4 + slot * 2, src.values + first + i, 2);
                        }
                    }
                }
                for (int slot = 0; slot < 2; ++slot) meta |= uint32_t(place[slot]) << (16 * slot + 4 * t + 2 * high);
            }
            std::memcpy(out + j * 4, &meta, 4);
        } else if (row < l.n) {
            for (int i = 0; i < kStep && step * kStep + i < l.k; ++i) {
                const int64_t at = row * l.k + step * kStep + i;
                if (l.bits == 4) {
                    const uint32_t code = src.packed[at / 2] >> (at % 2 * 4) & 15;
                    const int pair = i / 2, t = pair % 4;
                    uint8_t& byte = codes[pair / 4 * 64 + j * 4 + i % 2 * 2 + t / 2];
                    byte = t % 2 ? (byte & 0x0f) | code << 4 : (byte & 0xf0) | code;
                } else {
                    codes[i * 16 + j] = src.packed[at] ^ 0x80;
                }
            }
        }
    }
}

inline void pack_pair(const Layout& l, const Source& src, int64_t pair, uint8_t* blob) {
    uint8_t* out = blob + kHeader + pair * l.pair_bytes;
    for (int64_t i = 0; i < 2 * l.steps; ++i) pack_step(l, src, 2 * pair + i % 2, i / 2, out + i * l.step_bytes);
    if (!l.scaled()) return;
    uint16_t* scales = reinterpret_cast<uint16_t*>(blob + l.scales_offset) + pair * l.groups * kPair;
    for (int64_t g = 0; g < l.groups; ++g) {
        for (int j = 0; j < kPair; ++j) {
            const int64_t row = pair * kPair + j;
            scales[g * kPair + j] = row < l.n ? src.scale[row * l.groups + g] : 0;
        }
    }
}

}  // namespace sparse24
