// Hessian accumulation on CPUs:  H += X'X  and  C += A'B  for bf16 activations and fp32 sums.
//
// The product of two bf16 numbers is exact in fp32, so the only rounding is that of the additions, and those are
// blocked: registers sum T_BLOCK rows from zero, a tile buffer sums those blocks over a chunk of rows, and H sums the
// chunks. X'X is symmetric: only tiles on and below the diagonal are computed.
//
// The work is split over output tiles and never over T, and each output element is summed in one fixed order, so the
// result is the same to the last bit for any number of threads and for any cutting of the rows into micro-batches.
//
// One driver, five instruction sets. Each brings two functions: `pack` copies one block of rows of one panel of columns
// into the order in which `multiply` reads it, and `multiply` adds a panel x panel product to a tile buffer.
//
//   amx           tdpbf16ps, 2x2 tiles of 16 x 16
//   avx512bf16    vdpbf16ps on pairs of rows, 8 x 48 in registers
//   avx512, avx2  fp32 FMA on rows widened while packing, 8 x 48 and 6 x 16
//   portable      the same in plain C++, 4 x 8
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "amx.h"
#include "cpu_features.h"

#if SPARSIFY_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from within GCC 12's own intrinsics
#endif
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int kMaxBlock = 1024;  // rows of T that any kernel sums in registers; chunks are multiples of it
constexpr int kMaxPanel = 48;    // columns that any kernel packs together

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kLevels = 5 };
enum Status { kOk = 0, kBadArgument = 1, kUnsupported = 2, kOutOfMemory = 3 };

struct Isa {
    int panel;              // columns packed together; a product is panel x panel
    int block;              // rows of T summed in registers
    int round;              // a shorter last block is padded with zero rows to a multiple of this
    int64_t packed_bytes;   // per row and column
    bool left_differs;      // the left operand has a packed order of its own
    // rows[t] points at the panel's first column in row t; `columns` (<= panel) of it exist. Left is null if it is not
    // wanted or does not differ, right is null if it is not wanted.
    void (*pack)(const uint16_t* const* rows, int n_rows, int columns, void* left, void* right);
    // c[i * ldc + j] += sum_t left[t, i] * right[t, j];  what lies above the diagonal may be left out if `lower`.
    void (*multiply)(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower);
    void (*enter)();   // called by each thread before its first multiply, and after its last
    void (*leave)();
};

void nothing() {}

inline float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A panel at the right edge of X has fewer columns than the packed order has room for. Rows of a whole panel are used
// where they lie, rows of a narrow one are first copied to where zeros follow them.
struct Widened {
    alignas(64) uint16_t row[2][kMaxPanel] = {};
    int columns, panel;
    Widened(int columns, int panel) : columns(columns), panel(panel) {}
    const uint16_t* get(const uint16_t* source, int slot) {
        if (columns == panel) return source;
        std::memcpy(row[slot], source, size_t(columns) * sizeof(uint16_t));
        return row[slot];
    }
};

// ---------------------------------------------------------------------------------------------- portable

constexpr int kPlainPanel = 48;

void pack_plain(const uint16_t* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened widened(columns, kPlainPanel);
    for (int t = 0; t < n_rows; ++t, out += kPlainPanel) {
        const uint16_t* row = widened.get(rows[t], 0);
        for (int j = 0; j < kPlainPanel; ++j) out[j] = widen(row[j]);
    }
}

// Four floats as one value: SSE, NEON, or whatever the baseline of the architecture has.
typedef float Float4 __attribute__((vector_size(16)));

inline Float4 load4(const float* p) {
    Float4 value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline void add4(float* p, Float4 value) {
    value += load4(p);
    std::memcpy(p, &value, sizeof value);
}

void multiply_plain(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower) {
    constexpr int M = 4, N = 8;  // 8 sums and 3 operands: 11 of at least 16 registers
    for (int j = 0; j < kPlainPanel; j += N) {
        for (int i = 0; i < kPlainPanel; i += M) {
            if (lower && j > i + M - 1) continue;
            const float* a = static_cast<const float*>(left) + i;
            const float* b = static_cast<const float*>(right) + j;
            Float4 s00 = {}, s01 = {}, s10 = {}, s11 = {}, s20 = {}, s21 = {}, s30 = {}, s31 = {};
            for (int t = 0; t < n_rows; ++t, a += kPlainPanel, b += kPlainPanel) {
                const Float4 b0 = load4(b), b1 = load4(b + 4);
                s00 += a[0] * b0, s01 += a[0] * b1;
                s10 += a[1] * b0, s11 += a[1] * b1;
                s20 += a[2] * b0, s21 += a[2] * b1;
                s30 += a[3] * b0, s31 += a[3] * b1;
            }
            float* out = c + i * ldc + j;
            add4(out, s00), add4(out + 4, s01), out += ldc;
            add4(out, s10), add4(out + 4, s11), out += ldc;
            add4(out, s20), add4(out + 4, s21), out += ldc;
            add4(out, s30), add4(out + 4, s31);
        }
    }
}

#if SPARSIFY_X86

// -------------------------------------------------------------------------------------------------- AVX2

TARGET("avx2,fma") void pack_avx2(const uint16_t* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened widened(columns, kPlainPanel);
    for (int t = 0; t < n_rows; ++t, out += kPlainPanel) {
        const uint16_t* row = widened.get(rows[t], 0);
        for (int j = 0; j < kPlainPanel; j += 8) {
            const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j)));
            _mm256_storeu_ps(out + j, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
        }
    }
}

TARGET("avx2,fma")
void multiply_avx2(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower) {
    constexpr int M = 6, N = 2;  // 12 sums, 2 of the right and 1 of the left operand: 15 of 16 registers
    for (int j = 0; j < kPlainPanel; j += 8 * N) {
        for (int i = 0; i < kPlainPanel; i += M) {
            if (lower && j > i + M - 1) continue;
            const float* a = static_cast<const float*>(left) + i;
            const float* b = static_cast<const float*>(right) + j;
            __m256 sum[M][N];
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_ps();
            for (int t = 0; t < n_rows; ++t, a += kPlainPanel, b += kPlainPanel) {
                const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
                for (int m = 0; m < M; ++m) {
                    const __m256 x = _mm256_broadcast_ss(a + m);
                    sum[m][0] = _mm256_fmadd_ps(x, b0, sum[m][0]);
                    sum[m][1] = _mm256_fmadd_ps(x, b1, sum[m][1]);
                }
            }
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                float* out = c + (i + m) * ldc + j;
                _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum[m][0]));
                _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_loadu_ps(out + 8), sum[m][1]));
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- AVX-512

constexpr int kRows512 = 8;  // of the register tile: 8 x 3 sums and 3 of the right operand: 27 of 32 registers

TARGET("avx512f,avx512bw,avx512dq,avx512vl")
void pack_avx512(const uint16_t* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened widened(columns, kPlainPanel);
    for (int t = 0; t < n_rows; ++t, out += kPlainPanel) {
        const uint16_t* row = widened.get(rows[t], 0);
        for (int j = 0; j < kPlainPanel; j += 16) {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + j)));
            _mm512_storeu_ps(out + j, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
    }
}

// Rows i .. i+7, columns 0 .. 16 N - 1 of the panel's product.
template <int N>
TARGET("avx512f,avx512bw,avx512dq,avx512vl")
void strip_avx512(const float* a, const float* b, int n_rows, float* c, int64_t ldc) {
    __m512 sum[kRows512][N];
#pragma GCC unroll 8
    for (int m = 0; m < kRows512; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    for (int t = 0; t < n_rows; ++t, a += kPlainPanel, b += kPlainPanel) {
        __m512 right[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) right[n] = _mm512_loadu_ps(b + 16 * n);
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m) {
            const __m512 x = _mm512_set1_ps(a[m]);
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sum[m][n] = _mm512_fmadd_ps(x, right[n], sum[m][n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows512; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) {
            float* out = c + m * ldc + 16 * n;
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum[m][n]));
        }
}

void multiply_avx512(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower) {
    const float* a = static_cast<const float*>(left);
    const float* b = static_cast<const float*>(right);
    for (int i = 0; i < kPlainPanel; i += kRows512) {
        const int columns = lower ? i + kRows512 : kPlainPanel;
        if (columns <= 16) strip_avx512<1>(a + i, b, n_rows, c + i * ldc, ldc);
        else if (columns <= 32) strip_avx512<2>(a + i, b, n_rows, c + i * ldc, ldc);
        else strip_avx512<3>(a + i, b, n_rows, c + i * ldc, ldc);
    }
}

#endif  // SPARSIFY_X86

#if SPARSIFY_COMPILES_AVX512BF16

// -------------------------------------------------------------------------------------------- AVX512-BF16

#define TARGET_BF16 TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

// 16 columns of two rows, interleaved: dword j = (row0[j], row1[j]), the pair that vdpbf16ps and tdpbf16ps sum.
TARGET("avx512f,avx512bw,avx512dq,avx512vl")
inline __m512i interleave(const uint16_t* row0, const uint16_t* row1) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

TARGET("avx512f,avx512bw,avx512dq,avx512vl")
void pack_pairs(const uint16_t* const* rows, int n_rows, int columns, void*, void* packed) {
    uint32_t* out = static_cast<uint32_t*>(packed);
    Widened widened(columns, kPlainPanel);
    for (int t = 0; t < n_rows; t += 2, out += kPlainPanel) {
        const uint16_t* row0 = widened.get(rows[t], 0);
        const uint16_t* row1 = widened.get(rows[t + 1], 1);
        for (int j = 0; j < kPlainPanel; j += 16) _mm512_storeu_si512(out + j, interleave(row0 + j, row1 + j));
    }
}

template <int N>
TARGET_BF16 void strip_bf16(const uint32_t* a, const uint32_t* b, int n_rows, float* c, int64_t ldc) {
    __m512 sum[kRows512][N];
#pragma GCC unroll 8
    for (int m = 0; m < kRows512; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    for (int t = 0; t < n_rows; t += 2, a += kPlainPanel, b += kPlainPanel) {
        __m512bh right[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + 16 * n);
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[m]));
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], x, right[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows512; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) {
            float* out = c + m * ldc + 16 * n;
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum[m][n]));
        }
}

void multiply_bf16(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower) {
    const uint32_t* a = static_cast<const uint32_t*>(left);
    const uint32_t* b = static_cast<const uint32_t*>(right);
    for (int i = 0; i < kPlainPanel; i += kRows512) {
        const int columns = lower ? i + kRows512 : kPlainPanel;
        if (columns <= 16) strip_bf16<1>(a + i, b, n_rows, c + i * ldc, ldc);
        else if (columns <= 32) strip_bf16<2>(a + i, b, n_rows, c + i * ldc, ldc);
        else strip_bf16<3>(a + i, b, n_rows, c + i * ldc, ldc);
    }
}

#endif  // SPARSIFY_COMPILES_AVX512BF16

#if SPARSIFY_COMPILES_AMX

// ---------------------------------------------------------------------------------------------------- AMX
// A panel is 32 columns, a step is 32 rows. Packed: [step][16-column half][16][16] dwords of row pairs, which is one
// 1 KB tile each; the right operand has pair x column as tdpbf16ps wants it, the left one the transpose.

constexpr int kAmxPanel = 32;
constexpr int kAmxStep = 32;
constexpr int kTileDwords = 256;
#define TARGET_AMX TARGET("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")

TARGET_AMX void enter_amx() { sparsify::configure_tiles(16, 7); }

TARGET_AMX void leave_amx() { _tile_release(); }

// out[i][j] = r[j][i], 16 x 16 dwords.
TARGET("avx512f,avx512bw,avx512dq,avx512vl") inline void store_transposed(const __m512i* r, uint32_t* out) {
    __m512i s[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 dwords within each 128-bit lane
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        s[i] = _mm512_unpacklo_epi64(a, c);
        s[i + 1] = _mm512_unpackhi_epi64(a, c);
        s[i + 2] = _mm512_unpacklo_epi64(b, d);
        s[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // then 4 x 4 lanes: s[4 q + i] lane l holds column 4 l + i of rows 4 q .. 4 q + 3
        const __m512i a = _mm512_shuffle_i32x4(s[i], s[4 + i], 0x88), b = _mm512_shuffle_i32x4(s[i], s[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(s[8 + i], s[12 + i], 0xdd);
        _mm512_store_si512(out + 16 * i, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_store_si512(out + 16 * (4 + i), _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_store_si512(out + 16 * (8 + i), _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_store_si512(out + 16 * (12 + i), _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}

TARGET("avx512f,avx512bw,avx512dq,avx512vl")
void pack_amx(const uint16_t* const* rows, int n_rows, int columns, void* left, void* right) {
    uint32_t* left_out = static_cast<uint32_t*>(left);
    uint32_t* right_out = static_cast<uint32_t*>(right);
    Widened widened(columns, kAmxPanel);
    for (int t = 0; t < n_rows; t += kAmxStep) {
        __m512i first[16], second[16];  // the two halves of the panel
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; ++pair) {
            const uint16_t* source0 = rows[t + 2 * pair];
            const uint16_t* source1 = rows[t + 2 * pair + 1];
            _mm_prefetch(reinterpret_cast<const char*>(source0 + kAmxPanel), _MM_HINT_T1);  // the next panel
            _mm_prefetch(reinterpret_cast<const char*>(source1 + kAmxPanel), _MM_HINT_T1);
            const uint16_t* row0 = widened.get(source0, 0);
            const uint16_t* row1 = widened.get(source1, 1);
            first[pair] = interleave(row0, row1);
            second[pair] = interleave(row0 + 16, row1 + 16);
        }
        if (right_out) {
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; ++pair) {
                _mm512_store_si512(right_out + 16 * pair, first[pair]);
                _mm512_store_si512(right_out + kTileDwords + 16 * pair, second[pair]);
            }
            right_out += 2 * kTileDwords;
        }
        if (left_out) {
            store_transposed(first, left_out);
            store_transposed(second, left_out + kTileDwords);
            left_out += 2 * kTileDwords;
        }
    }
}

TARGET_AMX void multiply_amx(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool) {
    const uint32_t* a = static_cast<const uint32_t*>(left);
    const uint32_t* b = static_cast<const uint32_t*>(right);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int t = 0; t < n_rows; t += kAmxStep, a += 2 * kTileDwords, b += 2 * kTileDwords) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(5, a + kTileDwords, 64);
        _tile_loadd(7, b + kTileDwords, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float sum[kAmxPanel][kAmxPanel];
    const int row_bytes = kAmxPanel * sizeof(float);
    _tile_stored(0, &sum[0][0], row_bytes);
    _tile_stored(1, &sum[0][16], row_bytes);
    _tile_stored(2, &sum[16][0], row_bytes);
    _tile_stored(3, &sum[16][16], row_bytes);
    for (int i = 0; i < kAmxPanel; ++i) {
        float* out = c + i * ldc;
        _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_load_ps(sum[i])));
        _mm512_storeu_ps(out + 16, _mm512_add_ps(_mm512_loadu_ps(out + 16), _mm512_load_ps(sum[i] + 16)));
    }
}

#endif  // SPARSIFY_COMPILES_AMX

// ----------------------------------------------------------------------------------------------- dispatch

const Isa* isa_of(int level) {
    static const Isa portable{kPlainPanel, 256, 1, 4, false, pack_plain, multiply_plain, nothing, nothing};
#if SPARSIFY_X86
    static const Isa avx2{kPlainPanel, 256, 1, 4, false, pack_avx2, multiply_avx2, nothing, nothing};
    static const Isa avx512{kPlainPanel, 256, 1, 4, false, pack_avx512, multiply_avx512, nothing, nothing};
#endif
#if SPARSIFY_COMPILES_AVX512BF16
    static const Isa bf16{kPlainPanel, 256, 2, 2, false, pack_pairs, multiply_bf16, nothing, nothing};
#endif
#if SPARSIFY_COMPILES_AMX
    static const Isa amx{kAmxPanel, 1024, kAmxStep, 2, true, pack_amx, multiply_amx, enter_amx, leave_amx};
#endif
    static const sparsify::CpuFeatures cpu = sparsify::detect_cpu();
    switch (level) {
        case kPortable: return &portable;
#if SPARSIFY_X86
        case kAvx2: return cpu.avx2 ? &avx2 : nullptr;
        case kAvx512: return cpu.avx512 ? &avx512 : nullptr;
#endif
#if SPARSIFY_COMPILES_AVX512BF16
        case kAvx512Bf16: return cpu.avx512_bf16 ? &bf16 : nullptr;
#endif
#if SPARSIFY_COMPILES_AMX
        case kAmx: {
            static const bool granted = cpu.amx_bf16 && sparsify::request_amx();
            return granted ? &amx : nullptr;
        }
#endif
        default: return nullptr;
    }
}

int best_level() {
    static const int best = [] {
        if (isa_of(kAmx)) return int(kAmx);
        // Intel's cores do half as many multiply-adds per cycle with vdpbf16ps as with fp32 FMA, AMD's twice as many.
        const bool pairs_are_fast = !sparsify::detect_cpu().intel;
        if (pairs_are_fast && isa_of(kAvx512Bf16)) return int(kAvx512Bf16);
        if (isa_of(kAvx512)) return int(kAvx512);
        return isa_of(kAvx2) ? int(kAvx2) : int(kPortable);
    }();
    return best;
}

// ------------------------------------------------------------------------------------------------- driver

// Memory that is written once and read many times; large pages spare it most of its page faults.
struct Buffer {
    void* data = nullptr;
    explicit Buffer(size_t bytes) {
        bytes = std::max<size_t>(bytes, 1);
        const size_t alignment = bytes >= (size_t(2) << 20) ? size_t(2) << 20 : 64;
        bytes = (bytes + alignment - 1) / alignment * alignment;
        data = std::aligned_alloc(alignment, bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (data && alignment > 64) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    char* at(size_t offset) const { return static_cast<char*>(data) + offset; }
};

// The rows of several [rows_i, columns] matrices as if they were one below the other.
struct Rows {
    const uint16_t* const* blocks;
    const int64_t* strides;
    const int64_t* lengths;
    int64_t n_blocks;
    int64_t columns;

    // Addresses of element `column` of rows first .. first + n - 1; those past the end are rows of zeros.
    void locate(int64_t first, int n, int64_t column, const uint16_t** out) const {
        alignas(64) static const uint16_t zeros[kMaxPanel] = {};
        int filled = 0;
        for (int64_t block = 0; block < n_blocks && filled < n; ++block) {
            if (first >= lengths[block]) {
                first -= lengths[block];
                continue;
            }
            for (; first < lengths[block] && filled < n; ++first)
                out[filled++] = blocks[block] + first * strides[block] + column;
            first = 0;
        }
        while (filled < n) out[filled++] = zeros;
    }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed rows of all columns of an operand: panel after panel, and in each panel block after block.
struct Packed {
    const Isa& isa;
    int64_t panels, chunk;
    Buffer buffer;

    Packed(const Isa& isa, int64_t columns, int64_t chunk)
        : isa(isa), panels(divide_up(columns, isa.panel)), chunk(chunk),
          buffer(size_t(panels) * size_t(chunk) * size_t(isa.panel) * size_t(isa.packed_bytes)) {}

    void* at(int64_t panel, int64_t block) const {
        return buffer.at(size_t((panel * chunk + block * isa.block) * isa.panel * isa.packed_bytes));
    }
};

void pack(const Isa& isa, const Rows& source, int64_t first, int n_rows, int64_t panel, void* left, void* right) {
    const uint16_t* rows[kMaxBlock];
    source.locate(first, n_rows, panel * isa.panel, rows);
    const int columns = int(std::min<int64_t>(isa.panel, source.columns - panel * isa.panel));
    isa.pack(rows, n_rows, columns, left, right);
}

struct Tile {
    int64_t row, column;  // first panel of each operand
};

// C[lda] += left' right, only i >= j if `lower` (left and right are then the same).
int accumulate(const Isa& isa, const Rows& left, const Rows& right, int64_t total, float* c, int64_t ldc, bool lower,
               int threads) {
    if (total == 0 || left.columns == 0 || right.columns == 0) return kOk;
    // A chunk of rows is packed at once. Short ones keep the packed operands in cache; adding them to C costs a pass over
    // C each, which matters once C is too large for the cache.
    int64_t chunk = std::min(left.columns, right.columns) >= 1024 ? 2048 : 1024;
    chunk = std::min(chunk, divide_up(total, isa.block) * isa.block);

    const Packed rhs(isa, right.columns, chunk);
    const Packed own_lhs(isa, lower && !isa.left_differs ? 0 : left.columns, chunk);
    const Packed& lhs = lower && !isa.left_differs ? rhs : own_lhs;  // one packed copy serves as both operands

    // Tiles of C: big ones reread the packed operands less often, small ones share out better among the threads.
    const int64_t panels_wide = 384 / isa.panel, panels_narrow = 96 / isa.panel;
    const bool wide = std::min(lhs.panels, rhs.panels) >= 4 * panels_wide;
    const int64_t edge = wide ? panels_wide : panels_narrow;
    const int64_t tile_rows = divide_up(lhs.panels, edge), tile_columns = divide_up(rhs.panels, edge);
    const int64_t n_tiles = lower ? tile_rows * (tile_rows + 1) / 2 : tile_rows * tile_columns;
    Buffer tiles(size_t(n_tiles) * sizeof(Tile));
    if (!rhs.buffer.data || !own_lhs.buffer.data || !tiles.data) return kOutOfMemory;
    Tile* tile = reinterpret_cast<Tile*>(tiles.data);
    int64_t n = 0;
    for (int64_t i = 0; i < tile_rows; ++i)
        for (int64_t j = 0; j < tile_columns; ++j)
            if (!lower || j < i) tile[n++] = {i * edge, j * edge};
    if (lower)  // those on the diagonal are half the work and come last, to even out the threads
        for (int64_t i = 0; i < tile_rows; ++i) tile[n++] = {i * edge, i * edge};

    const int64_t size = edge * isa.panel;  // of a tile, in elements
    bool no_memory = false;
#pragma omp parallel num_threads(threads)
    {
        Buffer tile_sums(size_t(size * size) * sizeof(float));
        float* sums = static_cast<float*>(tile_sums.data);
        if (!sums) {
#pragma omp atomic write
            no_memory = true;
        }
#pragma omp barrier
        bool give_up;
#pragma omp atomic read
        give_up = no_memory;
        for (int64_t first = 0; first < total && !give_up; first += chunk) {
            const int64_t rows = std::min(chunk, total - first);
            const int64_t blocks = divide_up(rows, isa.block);
            const auto rows_of = [&](int64_t block) {
                const int64_t there = std::min<int64_t>(isa.block, rows - block * isa.block);
                return int(divide_up(there, isa.round) * isa.round);
            };
#pragma omp for schedule(dynamic, 4) nowait
            for (int64_t k = 0; k < rhs.panels * blocks; ++k) {
                const int64_t block = k / rhs.panels, panel = k % rhs.panels;
                void* also_left = lower && isa.left_differs ? lhs.at(panel, block) : nullptr;
                pack(isa, right, first + block * isa.block, rows_of(block), panel, also_left, rhs.at(panel, block));
            }
            if (!lower) {
#pragma omp for schedule(dynamic, 4) nowait
                for (int64_t k = 0; k < lhs.panels * blocks; ++k) {
                    const int64_t block = k / lhs.panels, panel = k % lhs.panels;
                    void* packed = lhs.at(panel, block);
                    pack(isa, left, first + block * isa.block, rows_of(block), panel,
                         isa.left_differs ? packed : nullptr, isa.left_differs ? nullptr : packed);
                }
            }
#pragma omp barrier
            isa.enter();
#pragma omp for schedule(dynamic, 1)
            for (int64_t k = 0; k < n_tiles; ++k) {
                const int64_t row = tile[k].row, column = tile[k].column;
                const int64_t row_end = std::min(row + edge, lhs.panels);
                const int64_t column_end = std::min(column + edge, rhs.panels);
                std::memset(sums, 0, size_t(size * size) * sizeof(float));
                for (int64_t block = 0; block < blocks; ++block)
                    for (int64_t q = column; q < column_end; ++q)
                        for (int64_t p = lower ? std::max(row, q) : row; p < row_end; ++p)
                            isa.multiply(lhs.at(p, block), rhs.at(q, block), rows_of(block),
                                         sums + (p - row) * isa.panel * size + (q - column) * isa.panel, size,
                                         lower && p == q);
                const int64_t i0 = row * isa.panel, j0 = column * isa.panel;
                const int64_t i1 = std::min(row_end * isa.panel, left.columns);
                for (int64_t i = i0; i < i1; ++i) {
                    const int64_t j1 = std::min(column_end * isa.panel, lower ? i + 1 : right.columns);
                    const float* from = sums + (i - i0) * size - j0;
                    for (int64_t j = j0; j < j1; ++j) c[i * ldc + j] += from[j];
                }
            }
            isa.leave();
        }
    }
    return no_memory ? kOutOfMemory : kOk;
}

bool valid(int64_t n_blocks, const void* const* blocks, const int64_t* rows, const int64_t* strides, int64_t columns) {
    if (n_blocks < 0 || columns < 0 || (n_blocks && (!blocks || !rows || !strides))) return false;
    for (int64_t i = 0; i < n_blocks; ++i)
        if (rows[i] < 0 || (rows[i] > 0 && columns > 0 && !blocks[i])) return false;
    return true;
}

int64_t sum_of(const int64_t* rows, int64_t n_blocks) {
    int64_t total = 0;
    for (int64_t i = 0; i < n_blocks; ++i) total += rows[i];
    return total;
}

}  // namespace

extern "C" {

// The level that `requested` (0 portable .. 4 amx; -1 the fastest) comes to here, -1 if this machine cannot run it.
int sparsify_gram_level(int requested) {
    if (requested == -1) return best_level();
    return isa_of(requested) ? requested : -1;
}

// Lower triangle of H[k, k] (row stride ldh) += sum_b X_b' X_b, X_b = blocks[b]: bf16 [rows[b], k], row stride
// strides[b] elements, inner stride 1. What is above the diagonal is neither read nor written.
int sparsify_gram(const void* const* blocks, const int64_t* rows, const int64_t* strides, int64_t n_blocks, int64_t k,
                  float* h, int64_t ldh, int threads, int level) {
    if (!valid(n_blocks, blocks, rows, strides, k) || !h || ldh < k || threads < 1) return kBadArgument;
    const Isa* isa = isa_of(level == -1 ? best_level() : level);
    if (!isa) return kUnsupported;
    const Rows x{reinterpret_cast<const uint16_t* const*>(blocks), strides, rows, n_blocks, k};
    return accumulate(*isa, x, x, sum_of(rows, n_blocks), h, ldh, true, threads);
}

// C[ka, kb] += sum_b A_b' B_b; A_b: [rows[b], ka], B_b: [rows[b], kb].
int sparsify_gram_cross(const void* const* a_blocks, const int64_t* a_strides, int64_t ka, const void* const* b_blocks,
                        const int64_t* b_strides, int64_t kb, const int64_t* rows, int64_t n_blocks, float* c,
                        int64_t ldc, int threads, int level) {
    if (!valid(n_blocks, a_blocks, rows, a_strides, ka) || !valid(n_blocks, b_blocks, rows, b_strides, kb) || !c ||
        ldc < kb || threads < 1)
        return kBadArgument;
    const Isa* isa = isa_of(level == -1 ? best_level() : level);
    if (!isa) return kUnsupported;
    const Rows a{reinterpret_cast<const uint16_t* const*>(a_blocks), a_strides, rows, n_blocks, ka};
    const Rows b{reinterpret_cast<const uint16_t* const*>(b_blocks), b_strides, rows, n_blocks, kb};
    return accumulate(*isa, a, b, sum_of(rows, n_blocks), c, ldc, false, threads);
}

// H[i, j] = H[j, i] for i < j: the upper triangle from the lower one.
int sparsify_gram_mirror(float* h, int64_t k, int64_t ldh, int threads) {
    if (!h || k < 0 || ldh < k || threads < 1) return kBadArgument;
    constexpr int64_t kEdge = 64;  // two such squares stay in L1, so that both sides go by whole cache lines
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i0 = 0; i0 < k; i0 += kEdge)
        for (int64_t j0 = 0; j0 <= i0; j0 += kEdge)
            for (int64_t i = i0; i < std::min(i0 + kEdge, k); ++i)
                for (int64_t j = j0; j < std::min(j0 + kEdge, i); ++j) h[j * ldh + i] = h[i * ldh + j];
    return kOk;
}

}  // extern "C"
