// Products of bytes on 256-bit vectors: fixed point for every type of activation, and int8 on request. Included once per
// instruction set, inside a target region and a namespace that says whether vpdpbusd is there (`kVnni`).
//
//   activations  per row and piece of K (a group, at most 256 inputs) x = unit u with integers u of `PARTS` bytes; a byte is kept
//                plus 128. bf16: two bytes as in sparse24_fixed.h, unit = 2^e and |u| < 2^15, so exact for inputs of at least
//                1/64 of their piece's largest, others are off by at most 1.01 x 2^-15 of the largest. fp16 and fp32: three
//                bytes, off by at most 1.01 x 2^-23 of the largest; fp16 is exact from 2^-12 of the largest on. Where the
//                largest of a piece is below 2^-95, the bounds are those of a largest of 2^-95.
//                int8: one byte, unit = largest / 127, and pieces of up to 512 inputs, as in sparse24_int8.h
//   codes        8-bit ones without vpdpbusd are cut: code = 16 high + low, -8 <= high < 8, 0 <= low < 16
//   sums         int32 over a piece, minus what the 128s contribute (128 times the sum of codes); then in fp32 times the scale of
//                the output and the unit of the row. Integers are exact, so no result depends on the tile that it was computed in
//                or on the instruction set.
//
// Without vpdpbusd, vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits and saturates. Here it cannot: a
// product is at most 255 x 8 in magnitude (4-bit codes and upper halves), two of them at most 4080, and 8 such vectors are
// added before vpmaddwd widens them, at most 32640 < 2^15. Lower halves of 8-bit codes give at most 255 x 15 x 2 = 7650, and 4
// vectors of them 30600.
//
// A vector of codes: a dword per output, 8 outputs, a quarter of a pair. 2:4: the first slots of quads q and q + 2, then their
// second ones, which a byte shuffle picks out of these 8 inputs by the positions. Dense: 4 inputs.
// Activations of a tile: [step][vector][row][part] 8 bytes (2:4) or 4 (dense). No include guard on purpose.

constexpr int kFixedSteps = 8, kInt8Steps = 16;  // most steps of a piece, and of a run of weights
constexpr int kInt8Multiple = 4;                 // of rows of a tile of int8
constexpr int kQuarters = 4;
constexpr int kOffsetBytes = kQuarters * 32;  // before the vectors of a decoded piece: 128 times the sums of codes

template <int BITS, bool SPARSE>
struct Form {
    static constexpr bool kSplit = BITS == 8 && !kVnni;
    static constexpr int kVectors = SPARSE ? 4 : 8;  // of a step
    static constexpr int kFlush = kSplit ? 4 : 8;    // vectors whose sums 16 bits can hold, and of 4-bit codes a byte
    static constexpr int kBlockSteps = kFlush >= 2 * kVectors ? 2 : 1;
    static constexpr int kInputBytes = SPARSE ? 8 : 4;  // of a part of a row
    static constexpr int kStepBytes = (SPARSE ? kMetaBytes : 0) + (SPARSE ? 32 : 64) * BITS;
    static constexpr int kDecodedBytes = 32 * (1 + kSplit + SPARSE);  // of a decoded vector
};

ALWAYS_BYTES __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
ALWAYS_BYTES void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// What the compiler shall neither compute again nor add up in another order: with either it runs out of registers.
ALWAYS_BYTES void hold(__m256i& v) { __asm__("" : "+x"(v)); }

// sum += a b, a: unsigned bytes, b: signed; in words without vpdpbusd
ALWAYS_BYTES void dot(__m256i& sum, __m256i a, __m256i b) {
#if SPARSIFY_BYTES_VNNI
    __asm__("%{vex%} vpdpbusd %2, %1, %0"
            : "+x"(sum)
            : "x"(a), "x"(b));  // (GCC 12 copies the sums around the intrinsic)
#else
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    hold(sum);
#endif
}

// ------------------------------------------------------------------------------------------------------------- weights

struct Constants {
    __m256i nibble, eight, crumbs, second;

    ALWAYS_MEMBER void set() {
        nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), crumbs = _mm256_set1_epi8(0x33),
        second = _mm256_set1_epi16(0x4400);
        hold(nibble), hold(eight), hold(crumbs), hold(second);
    }
};

struct Vector {
    __m256i codes;  // with kSplit their upper halves
    __m256i low;    // their lower halves
    __m256i positions;
};

// Four times 8 bytes -> a dword of four for each of 8 outputs.
ALWAYS_BYTES __m256i by_output(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const auto eight = [](const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); };
    const __m128i ab = _mm_unpacklo_epi8(eight(a), eight(b)), cd = _mm_unpacklo_epi8(eight(c), eight(d));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(ab, cd)), _mm_unpackhi_epi16(ab, cd), 1);
}

// The V-th vector of a step of a panel, outputs LANE .. LANE + 7.
template <int BITS, bool SPARSE, int V>
ALWAYS_BYTES Vector vector_of(const uint8_t* p, int lane, const Constants& k) {
    using F = Form<BITS, SPARSE>;
    Vector v = {};
    const uint8_t* codes = p + (SPARSE ? kMetaBytes : 0);
    if constexpr (BITS == 4) {
        const __m256i c = load(codes + V / 2 * 64 + lane * 4);
        v.codes = _mm256_sub_epi8(_mm256_and_si256(V % 2 ? _mm256_srli_epi16(c, 4) : c, k.nibble), k.eight);
    } else {
        constexpr int q = SPARSE ? V % 2 + V / 2 * 4 : 0;
        const uint8_t* from = codes + lane + (SPARSE ? q * 32 : V * 64);
        const __m256i c = SPARSE ? by_output(from, from + 64, from + 16, from + 80)
                                 : by_output(from, from + 16, from + 32, from + 48);
        if constexpr (F::kSplit) {
            v.low = _mm256_and_si256(c, k.nibble);
            v.codes = _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(c, 4), k.nibble), k.eight),
                                      k.eight);
        } else {
            v.codes = c;
        }
    }
    if constexpr (SPARSE) {
        // two vectors' positions at once: those of the even one in bits 0-1, of the odd one in bits 4-5; second quads plus 4
        const __m256i meta = load(p + lane * 4);
        const __m256i both =
            _mm256_or_si256(_mm256_and_si256(V / 2 ? _mm256_srli_epi16(meta, 2) : meta, k.crumbs), k.second);
        v.positions = V % 2 ? _mm256_srli_epi16(both, 4) : both;  // a shuffle ignores bits 4-6
    }
    return v;
}

template <int BITS, bool SPARSE>
ALWAYS_BYTES Vector load_vector(const uint8_t* p) {
    using F = Form<BITS, SPARSE>;
    Vector v = {};
    v.codes = load(p);
    if constexpr (F::kSplit) v.low = load(p + 32);
    if constexpr (SPARSE) v.positions = load(p + 32 * (1 + F::kSplit));
    return v;
}

// 128 times the sum of the codes of a piece for each output, from sums of bytes where these hold it.
template <int BITS, bool SPARSE>
struct CodeSums {
    using F = Form<BITS, SPARSE>;
    __m256i sum, low, offset;

    ALWAYS_MEMBER void clear() { sum = low = offset = _mm256_setzero_si256(); }
    ALWAYS_MEMBER void add(const Vector& v) {
        if constexpr (kVnni && BITS == 8) {
            dot(offset, _mm256_set1_epi8(char(128)), v.codes);
            return;
        }
        sum = _mm256_add_epi8(sum, v.codes);
        hold(sum);
        if constexpr (F::kSplit) low = _mm256_add_epi8(low, v.low);
    }
    // After at most F::kFlush vectors: |sum| <= 64, low <= 60.
    ALWAYS_MEMBER void flush() {
        const __m256i most = _mm256_set1_epi8(char(128));
#if SPARSIFY_BYTES_VNNI
        if constexpr (BITS == 4) dot(offset, most, sum);
        sum = _mm256_setzero_si256();
#else
        offset = _mm256_add_epi32(
            offset, _mm256_madd_epi16(_mm256_maddubs_epi16(most, sum), _mm256_set1_epi16(F::kSplit ? 16 : 1)));
        if constexpr (F::kSplit)
            offset = _mm256_add_epi32(offset, _mm256_madd_epi16(_mm256_maddubs_epi16(most, low), _mm256_set1_epi16(1)));
        sum = low = _mm256_setzero_si256();
#endif
    }
};

// ------------------------------------------------------------------------------------------------------------ products

// Sums of a piece for R rows and 8 outputs. `whole` and, of three parts, `rest`: (256 part[2] + part[1]) and part[0], or
// 256 part[1] + part[0], or part[0].
template <int BITS, bool SPARSE, int PARTS, int R>
struct Sums {
    using F = Form<BITS, SPARSE>;
    __m256i sum[R][PARTS], low[F::kSplit ? R : 1][PARTS], whole[R], rest[R];

    ALWAYS_MEMBER void clear() {
        for (int r = 0; r < R; ++r) {
            for (int p = 0; p < PARTS; ++p) {
                sum[r][p] = _mm256_setzero_si256();
                if constexpr (F::kSplit) low[r][p] = _mm256_setzero_si256();
            }
        }
    }

    ALWAYS_MEMBER void clear_totals() {
        for (int r = 0; r < R; ++r) whole[r] = rest[r] = _mm256_setzero_si256();
    }

    // x: the inputs of a vector for all rows
    ALWAYS_MEMBER void add(const Vector& v, const uint8_t* x) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
            for (int p = 0; p < PARTS; ++p) {
                __m256i inputs;
                if constexpr (SPARSE) {
                    int64_t eight;
                    std::memcpy(&eight, x + (r * PARTS + p) * 8, 8);
                    inputs = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), v.positions);
                } else {
                    int32_t four;
                    std::memcpy(&four, x + (r * PARTS + p) * 4, 4);
                    inputs = _mm256_set1_epi32(four);
                }
                dot(sum[r][p], inputs, v.codes);
                if constexpr (F::kSplit) dot(low[r][p], inputs, v.low);
            }
        }
    }

    // Part p of row r, widened and times 256 where it is the upper one of two.
    ALWAYS_MEMBER __m256i part(int r, int p) const {
        const int factor = PARTS > 1 && p == PARTS - 1 ? 256 : 1;
#if SPARSIFY_BYTES_VNNI
        return factor > 1 ? _mm256_slli_epi32(sum[r][p], 8) : sum[r][p];
#else
        const __m256i high = _mm256_madd_epi16(sum[r][p], _mm256_set1_epi16(int16_t(F::kSplit ? 16 * factor : factor)));
        return F::kSplit ? _mm256_add_epi32(
                               high, _mm256_madd_epi16(low[F::kSplit ? r : 0][p], _mm256_set1_epi16(int16_t(factor))))
                         : high;
#endif
    }

    // Into `whole` and `rest`; FIRST: which hold nothing yet.
    template <bool FIRST>
    ALWAYS_MEMBER void flush() {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            __m256i w = part(r, PARTS - 1);
            if constexpr (PARTS > 1) w = _mm256_add_epi32(w, part(r, PARTS - 2));
            whole[r] = FIRST ? w : _mm256_add_epi32(whole[r], w);
            if constexpr (PARTS == 3) rest[r] = FIRST ? part(r, 0) : _mm256_add_epi32(rest[r], part(r, 0));
        }
    }
};

// Vectors V .. of STEPS steps. Direct: `p` is the panel's first step; decoded: the first vector.
template <int BITS, bool SPARSE, int PARTS, int R, bool DECODED, int STEPS, int V, bool FIRST>
ALWAYS_BYTES void add_vectors(const uint8_t* p, int lane, const uint8_t* x, const Constants& k,
                              Sums<BITS, SPARSE, PARTS, R>& sums, CodeSums<BITS, SPARSE>& codes) {
    using F = Form<BITS, SPARSE>;
    constexpr int total = STEPS * F::kVectors;
    if constexpr (V < total) {
        Vector v;
        if constexpr (DECODED) {
            v = load_vector<BITS, SPARSE>(p + V * F::kDecodedBytes);
        } else {
            v = vector_of<BITS, SPARSE, V % F::kVectors>(p + V / F::kVectors * 2 * F::kStepBytes, lane, k);
            codes.add(v);
        }
        sums.add(v, x + V * R * PARTS * F::kInputBytes);
        if constexpr ((V + 1) % F::kFlush == 0 || V + 1 == total) {
            if constexpr (!kVnni) {
                sums.template flush<FIRST && V / F::kFlush == 0>();
                if constexpr (V + 1 < total) sums.clear();
            }
            if constexpr (!DECODED) codes.flush();
        }
        add_vectors<BITS, SPARSE, PARTS, R, DECODED, STEPS, V + 1, FIRST>(p, lane, x, k, sums, codes);
    }
}

ALWAYS_BYTES __m256 load_scales(const uint16_t* s, int type) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s));
    return type == kF16 ? _mm256_cvtph_ps(raw) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// c[R][8 of 16] += what a piece comes to. One byte: (sum x scale) x unit, each rounded; more, where unit is a power of two: sum x
// (scale x unit).
template <int BITS, bool SPARSE, int PARTS, int R>
ALWAYS_BYTES void add_scaled(const Sums<BITS, SPARSE, PARTS, R>& sums, __m256i offset, __m256 scale, const float* unit,
                             float* c) {
    const __m256i both = PARTS > 1 ? _mm256_add_epi32(_mm256_slli_epi32(offset, 8), offset) : offset;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, c += kPanel) {
        __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums.whole[r], both));
        if constexpr (PARTS == 3) {
            value = _mm256_fmadd_ps(value, _mm256_set1_ps(256.0f),
                                    _mm256_cvtepi32_ps(_mm256_sub_epi32(sums.rest[r], offset)));
        }
        const __m256 one = _mm256_set1_ps(unit[r]);
        if constexpr (PARTS == 1) {
            _mm256_storeu_ps(c, _mm256_fmadd_ps(_mm256_mul_ps(value, scale), one, _mm256_loadu_ps(c)));
        } else {
            _mm256_storeu_ps(c, _mm256_fmadd_ps(value, _mm256_mul_ps(scale, one), _mm256_loadu_ps(c)));
        }
    }
}

constexpr int kAhead = 8192;  // bytes between what is read and what is prefetched

// A run of a pair times a tile of R rows: c[R][16] +=, c_stride floats between panels. x: as `quantize` leaves it; unit: [piece][R]
template <int BITS, bool SPARSE, int PARTS, int R, bool DECODED>
static void multiply(const uint8_t* p, const Pieces& pieces, const uint8_t* x, const float* unit, float* c,
                     int64_t c_stride) {
    using F = Form<BITS, SPARSE>;
    const int steps = pieces.steps_per_piece;
    constexpr int block_inputs = F::kVectors * R * PARTS * F::kInputBytes;  // of a step
    constexpr int step_stride = DECODED ? F::kVectors * F::kDecodedBytes : 2 * F::kStepBytes;
    Constants k;
    k.set();
    const int64_t quarter_stride = DECODED ? int64_t(steps) * step_stride : 0;
    for (int piece = 0; piece < pieces.pieces; ++piece, unit += R, x += steps * block_inputs) {
        const uint8_t* offsets = p;
        if (DECODED) p += kOffsetBytes;
        for (int quarter = 0; quarter < kQuarters; ++quarter) {
            const int half = quarter / 2, lane = quarter % 2 * 8;
            const uint8_t* w = DECODED ? p + quarter * quarter_stride : p + half * F::kStepBytes;
            const uint8_t* ahead = p + kAhead + quarter * F::kStepBytes / 2;
            Sums<BITS, SPARSE, PARTS, R> sums;
            CodeSums<BITS, SPARSE> codes;
            sums.clear();
            codes.clear();
            const auto fetch = [&](int count) {
                if constexpr (!DECODED) {
                    for (int i = 0; i < count; ++i, ahead += 2 * F::kStepBytes) {
#pragma GCC unroll 5
                        for (int line = 0; line <= F::kStepBytes / 2; line += 64)
                            _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
                    }
                }
            };
            if (steps == F::kBlockSteps) {
                fetch(F::kBlockSteps);
                add_vectors<BITS, SPARSE, PARTS, R, DECODED, F::kBlockSteps, 0, true>(w, lane, x, k, sums, codes);
            } else {
                sums.clear_totals();
                int s = 0;
                if constexpr (F::kBlockSteps == 2) {
                    for (; s + 2 <= steps; s += 2) {
                        fetch(2);
                        add_vectors<BITS, SPARSE, PARTS, R, DECODED, 2, 0, false>(w + s * step_stride, lane,
                                                                                  x + s * block_inputs, k, sums, codes);
                        if (!kVnni) sums.clear();
                    }
                }
                for (; s < steps; ++s) {
                    fetch(1);
                    add_vectors<BITS, SPARSE, PARTS, R, DECODED, 1, 0, false>(w + s * step_stride, lane,
                                                                              x + s * block_inputs, k, sums, codes);
                    if (!kVnni) sums.clear();
                }
            }
            if constexpr (kVnni) sums.template flush<true>();
            const __m256i offset = DECODED ? load(offsets + quarter * 32) : codes.offset;
            const __m256 scale = load_scales(pieces.scales + piece * kPair + half * kPanel + lane, pieces.scale_type);
            add_scaled(sums, offset, scale, unit, c + half * c_stride + lane);
        }
        p += steps * (DECODED ? kQuarters * step_stride : step_stride);
    }
}

template <int BITS, bool SPARSE, int V>
ALWAYS_BYTES void decode_vectors(const uint8_t* p, int lane, const Constants& k, CodeSums<BITS, SPARSE>& codes,
                                 uint8_t* out) {
    using F = Form<BITS, SPARSE>;
    if constexpr (V < F::kVectors) {
        const Vector v = vector_of<BITS, SPARSE, V>(p, lane, k);
        codes.add(v);
        if constexpr ((V + 1) % F::kFlush == 0 || V + 1 == F::kVectors) codes.flush();
        store(out, v.codes);
        if constexpr (F::kSplit) store(out + 32, v.low);
        if constexpr (SPARSE) store(out + 32 * (1 + F::kSplit), v.positions);
        decode_vectors<BITS, SPARSE, V + 1>(p, lane, k, codes, out + F::kDecodedBytes);
    }
}

// A run of a pair -> per piece: [quarter] sums of codes, then [quarter][step] vectors: with many tiles of rows that costs less than
// taking codes apart for each.
template <int BITS, bool SPARSE>
static void decode(const uint8_t* p, const Pieces& pieces, uint8_t* out) {
    using F = Form<BITS, SPARSE>;
    const int steps = pieces.steps_per_piece;
    Constants k;
    k.set();
    for (int piece = 0; piece < pieces.pieces; ++piece, p += steps * 2 * F::kStepBytes) {
        uint8_t* offsets = out;
        out += kOffsetBytes;
        for (int quarter = 0; quarter < kQuarters; ++quarter) {
            CodeSums<BITS, SPARSE> codes;
            codes.clear();
            for (int s = 0; s < steps; ++s, out += F::kVectors * F::kDecodedBytes) {
                const uint8_t* step = p + (2 * s + quarter / 2) * F::kStepBytes;
#pragma GCC unroll 5
                for (int line = 0; line <= F::kStepBytes / 2; line += 64) {
                    _mm_prefetch(reinterpret_cast<const char*>(p + 2 * s * F::kStepBytes + quarter * F::kStepBytes / 2 +
                                                               kAhead + line),
                                 _MM_HINT_T0);
                }
                decode_vectors<BITS, SPARSE, 0>(step, quarter % 2 * 8, k, codes, out);
            }
            store(offsets + quarter * 32, codes.offset);
        }
    }
}

// --------------------------------------------------------------------------------------------------------- activations

// 8 numbers of `type` from x[i] on, as fp32; zero from `end` on, which is not read.
ALWAYS_BYTES __m256 load_widened(const void* x, int type, int64_t i, int64_t end) {
    const int size = type == kF32 ? 4 : 2;
    const uint8_t* from = static_cast<const uint8_t*>(x) + i * size;
    alignas(32) uint8_t padded[32] = {};
    if (i + 8 > end) {
        if (i < end) std::memcpy(padded, from, size_t(end - i) * size);
        from = padded;
    }
    if (type == kF32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    return load_scales(reinterpret_cast<const uint16_t*>(from), type);
}

struct Unit {
    float factor;  // of activations, before they are rounded to integers
    float unit;    // what 1 is worth; NaN where something is not finite
};

// By the bits of the largest magnitude.
template <int PARTS>
ALWAYS_BYTES Unit unit_of(uint32_t most) {
    const bool finite = most < 0x7f800000;
    float largest;
    std::memcpy(&largest, &most, 4);
    if constexpr (PARTS == 1) {
        const float scale = largest / 127.0f;
        return {finite && scale >= 1e-37f ? 1.0f / scale : 0.0f, finite ? scale : __builtin_nanf("")};
    } else {
        constexpr uint32_t places = 8 * PARTS - 2;
        largest *= 1.01f;  // so that u stays below 127.5 x 256^(PARTS - 1)
        uint32_t exponent;
        std::memcpy(&exponent, &largest, 4);
        exponent = exponent >> 23 > 32 ? exponent >> 23 : 32;  // the factors below stay normal
        const uint32_t factor = finite ? (127 + places + 127 - exponent) << 23 : 0,
                       unit = finite ? (exponent - places) << 23 : 0x7fc00000;
        Unit u;
        std::memcpy(&u.factor, &factor, 4);
        std::memcpy(&u.unit, &unit, 4);
        return u;
    }
}

// Returns the unit of a piece of a row. from: its inputs, of which `inputs` exist; out: u + 128 by bytes, a row of a tile of
// `tile_rows`.
template <bool SPARSE, int PARTS, bool IN_NIBBLES>
static float quantize(const void* from, int type, int64_t inputs, int steps, int tile_rows, uint8_t* out) {
    float values[kInt8Steps * kStep];
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < steps * kStep; i += 8) {
        const __m256 v = load_widened(from, type, i, inputs);
        _mm256_storeu_ps(values + i, v);
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) uint32_t lanes[8];
    store(lanes, most);
    const Unit u = unit_of<PARTS>(*std::max_element(lanes, lanes + 8));
    const __m256 factor = _mm256_set1_ps(u.factor);
    const __m256i by_part =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    constexpr int width = SPARSE ? 8 : 4;
    const int64_t vector = int64_t(tile_rows) * PARTS * width;
    for (int s = 0; s < steps; ++s, out += (SPARSE ? 4 : 8) * vector) {
        for (int e = 0; e < 4; ++e) {  // quads 2 e and 2 e + 1
            __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + s * kStep + e * 8), factor));
            v = _mm256_shuffle_epi8(_mm256_add_epi32(v, _mm256_set1_epi32(0x808080 >> (24 - 8 * PARTS))), by_part);
            alignas(32) uint8_t bytes[2][16];  // [quad][part][4]
            if constexpr (IN_NIBBLES) {        // 0 4 1 5, then 2 6 3 7 of eight, as the nibbles of dense codes lie
                const __m128i first = _mm256_castsi256_si128(v), second = _mm256_extracti128_si256(v, 1);
                alignas(32) uint8_t mixed[4][2][4];  // [part][quad][4]
                _mm_store_si128(reinterpret_cast<__m128i*>(mixed[0]), _mm_unpacklo_epi8(first, second));
                _mm_store_si128(reinterpret_cast<__m128i*>(mixed[2]), _mm_unpackhi_epi8(first, second));
                for (int p = 0; p < PARTS; ++p) {
                    for (int q = 0; q < 2; ++q) std::memcpy(out + (2 * e + q) * vector + p * 4, mixed[p][q], 4);
                }
            } else {
                store(bytes, v);
                for (int q = 0; q < 2; ++q) {
                    uint8_t* to = SPARSE ? out + (q + e / 2 * 2) * vector + e % 2 * 4 : out + (2 * e + q) * vector;
                    for (int p = 0; p < PARTS; ++p) std::memcpy(to + p * width, bytes[q] + p * 4, 4);
                }
            }
        }
    }
    return u.unit;
}

// ------------------------------------------------------------------------------------------------------------- outputs

ALWAYS_BYTES __m128i to_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    const __m256i words = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Rows of 32 sums, [panel][row][16] -> outputs of `type`, y_bytes from row to row; of the 32 only `columns`.
static void finish(const float* sums, int64_t c_stride, int64_t rows, const void* bias, int bias_type, int type,
                   int columns, void* y, int64_t y_bytes) {
    const int size = type == kF32 ? 4 : 2;
    for (int first = 0; first < columns; first += 8) {
        const int count = columns - first < 8 ? columns - first : 8;
        const __m256 added = bias ? load_widened(bias, bias_type, first, columns) : _mm256_setzero_ps();
        const float* from = sums + first / kPanel * c_stride + first % kPanel;
        uint8_t* to = static_cast<uint8_t*>(y) + first * size;
        for (int64_t m = 0; m < rows; ++m, from += kPanel, to += y_bytes) {
            const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(from), added);
            alignas(32) uint8_t bytes[32];
            if (type == kF32) {
                _mm256_store_ps(reinterpret_cast<float*>(bytes), sum);
            } else {
                const __m128i words = type == kBf16 ? to_bf16(sum) : _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT);
                _mm_store_si128(reinterpret_cast<__m128i*>(bytes), words);
            }
            std::memcpy(to, bytes, size_t(count) * size);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- choice

// Rows of a tile are a multiple of `multiple`; where there is more than one tile, it has more than half of the most rows.
template <int BITS, bool SPARSE, int PARTS, int ROWS, int R>
static void add_tiles(ByteKernels& k) {
    if constexpr (R > 0) {
        k.multiply[R - 1] = multiply<BITS, SPARSE, PARTS, R, false>;
        if constexpr (2 * R > ROWS) k.multiply_decoded[R - 1] = multiply<BITS, SPARSE, PARTS, R, true>;
        add_tiles<BITS, SPARSE, PARTS, ROWS, R - (PARTS == 1 ? kInt8Multiple : 1)>(k);
    }
}

template <int BITS, bool SPARSE, int PARTS>
static ByteKernels kernels_for() {
    // As many rows of a tile as leave their sums in registers.
    constexpr int whole[3] = {8, 4, 3}, split[3] = {4, 2, 1},
                  rows = (Form<BITS, SPARSE>::kSplit ? split : whole)[PARTS - 1];
    ByteKernels k = {};
    k.tile_rows = rows;
    k.multiple = PARTS == 1 ? kInt8Multiple : 1;
    k.decode = decode<BITS, SPARSE>;
    k.quantize = quantize < SPARSE, PARTS, !SPARSE && BITS == 4 > ;
    k.finish = finish;
    add_tiles<BITS, SPARSE, PARTS, rows, rows>(k);
    return k;
}

template <int PARTS>
static ByteKernels kernels_of_parts(const Layout& l) {
    if (l.sparse) return l.bits == 4 ? kernels_for<4, true, PARTS>() : kernels_for<8, true, PARTS>();
    return l.bits == 4 ? kernels_for<4, false, PARTS>() : kernels_for<8, false, PARTS>();
}

// parts: 1 (int8), 2 or 3
static ByteKernels byte_kernels(const Layout& l, int parts) {
    return parts == 1 ? kernels_of_parts<1>(l) : parts == 2 ? kernels_of_parts<2>(l) : kernels_of_parts<3>(l);
}
