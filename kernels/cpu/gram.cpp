// Hessian accumulation on CPUs:  H += X'X  and  C += A'B  for bf16 or fp32 activations and fp32 sums.
//
// Sums are blocked: registers sum a block of rows from zero, a tile buffer sums those blocks over a chunk of rows, and H
// sums the chunks. X'X is symmetric: only tiles on and below the diagonal are computed.
//
// The work is split over output tiles and never over T, and each output element is summed in one fixed order, so the
// result is the same to the last bit for any number of threads and for any cutting of the rows into micro-batches.
//
// The order is one of three, each with its own block of rows, and every instruction set sums in every order, to the same
// bits. Two of them are those of the bf16 instructions, as Intel's manual (volume 2) states them and processors do it:
//
//   float32     one fused multiply-add per row, row after row; the only order of fp32 inputs
//   avx512bf16  vdpbf16ps: of each pair of rows the second, then the first; denormals are zero, before and after
//   amx         tdpbf16ps: 32 rows at a time, the even and the odd ones from zero each, both sums added to each other and
//               then to what there was; denormals are zero, before and after
//
// Manuals of AMD do not state how theirs rounds. So bf16 instructions are used only where they have been found, on the
// processor itself, to give the bits of the order (`keeps_order`).
//
// One driver, five instruction sets. Each brings `pack`, which copies one block of rows of one panel of columns into the
// order in which `multiply` reads it, and `multiply`, which adds a panel x panel product to a tile buffer.
//
//   amx           tdpbf16ps, 2x2 tiles of 16 x 16
//   avx512bf16    vdpbf16ps on pairs of rows, 8 x 48 in registers
//   avx512, avx2  fp32 FMA, bf16 rows widened while packing, 8 x 32 and 6 x 16
//   portable      plain C++, 4 x 8; without an FMA instruction, products that fp32 does not hold go through fp64
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "amx.h"
#include "levels.h"

#define INLINE inline __attribute__((always_inline))
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

using namespace sparsify;

constexpr int kMaxBlock = 1024;  // rows of T that any kernel sums in registers; chunks are multiples of it
constexpr int kMaxPanel = 48;    // columns that any kernel packs together

constexpr int kStep = 32;  // rows of one tdpbf16ps

enum Status { kOk = 0, kBadArgument = 1, kUnsupported = 2, kOutOfMemory = 3 };
// As sparsify/solver/gram.py counts them.
enum OrderName { kFloat32 = 0, kPairs = 1, kTiles = 2 };

struct Order {
    OrderName name;
    int block;     // rows of T summed in registers
    int round;     // a shorter last block is padded with zero rows to a multiple of this
    bool flushes;  // denormals are zero
};

constexpr Order kOrders[] = {{kFloat32, 256, 1, false}, {kPairs, 256, 2, true}, {kTiles, 1024, kStep, true}};

// rows[t] points at the panel's first column in row t; `columns` (<= panel) of it exist. Left is null if it is not
// wanted or has no packed order of its own, right is null if it is not wanted.
using Pack = void (*)(const void* const* rows, int n_rows, int columns, void* left, void* right);
// c[i * ldc + j] += sum_t left[t, i] * right[t, j];  what lies above the diagonal may be left out if `lower`. `ahead` is the
// packed panel that will be wanted next and may not be in cache.
using Multiply = void (*)(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower,
                          const void* ahead);

struct Kernel {
    Order order;
    int panel;             // columns packed together; a product is panel x panel
    int wide;              // edge of the tiles of a large C, in columns
    int64_t packed_bytes;  // per row and column
    bool left_differs;     // the left operand has a packed order of its own
    bool arranges;         // rows are packed in the order in which `multiply` sums them
    Pack pack[2];          // of bf16 rows, of fp32 rows
    Multiply multiply;
    void (*enter)();  // called by each thread before its first multiply, and after its last
    void (*leave)();
};

void nothing() {}

// How a thread rounds while it lives, whatever the caller had set: to nearest, with or without denormals.
class Rounding {
  public:
#if SPARSIFY_X86
    explicit Rounding(bool flushes) : before(_mm_getcsr()) { _mm_setcsr(0x1f80u | (flushes ? 0x8040u : 0u)); }
    ~Rounding() { _mm_setcsr(before); }

  private:
    unsigned before;
#else
    explicit Rounding(bool) {}
#endif
};

inline float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A panel at the right edge of X has fewer columns than the packed order has room for. Rows of a whole panel are used
// where they lie, rows of a narrow one are first copied to where zeros follow them.
template <typename T>
struct Widened {
    alignas(64) T row[2][kMaxPanel] = {};
    int columns, panel;
    Widened(int columns, int panel) : columns(columns), panel(panel) {}
    const T* get(const void* source, int slot) {
        if (columns == panel) return static_cast<const T*>(source);
        std::memcpy(row[slot], source, size_t(columns) * sizeof(T));
        return row[slot];
    }
};

// ---------------------------------------------------------------------------------------------- portable

// `multiply` of fp32 goes through a block in parts of so many rows that two panels stay in an L1 of 32 KB while every
// register tile of their product is computed.
constexpr int kPlainPanel = 24;

void pack_plain(const void* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened<uint16_t> widened(columns, kPlainPanel);
    for (int t = 0; t < n_rows; ++t, out += kPlainPanel) {
        const uint16_t* row = widened.get(rows[t], 0);
        for (int j = 0; j < kPlainPanel; ++j) out[j] = widen(row[j]);
    }
}

template <int panel>
void pack_float32(const void* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened<float> widened(columns, panel);
    for (int t = 0; t < n_rows; ++t, out += panel) std::memcpy(out, widened.get(rows[t], 0), panel * sizeof(float));
}

// The product of two panels from register tiles of M x N. add(a, b, n_rows, sums, ahead) goes on adding up one tile in `sums`
// over part rows at most, and may prefetch as much of `ahead`; `sums` has rows of `panel`.
template <int panel, int M, int N, int part, typename Add>
INLINE void multiply_in_parts(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower,
                              const void* ahead, Add add) {
    const float *a = static_cast<const float*>(left), *b = static_cast<const float*>(right);
    const char* next = static_cast<const char*>(ahead);
    constexpr int kTiles = (panel / M) * (panel / N);
    alignas(64) float sums[panel * panel] = {};
    for (int t = 0; t < n_rows; t += part)
        for (int j = 0; j < panel; j += N)
            for (int i = 0; i < panel; i += M) {
                if (lower && j >= i + M) continue;
                add(a + t * panel + i, b + t * panel + j, std::min(part, n_rows - t), sums + i * panel + j, next);
                next += part * panel * int(sizeof(float)) / kTiles;
            }
    for (int i = 0; i < panel; ++i)
        for (int j = 0; j < panel; ++j) c[i * ldc + j] += sums[i * panel + j];
}

constexpr int kPlainRows = 4, kPlainColumns = 8;
typedef float PlainBlock[kPlainRows][kPlainColumns];

#ifndef __FP_FAST_FMAF

// Four floats as one value: SSE, or whatever the baseline of the architecture has.
typedef float Float4 __attribute__((vector_size(16)));

INLINE Float4 load4(const float* p) {
    Float4 value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// sum += sum_t a[t, m] * b[t, n], where products are exact: multiplying and adding then rounds as a fused multiply-add.
void dot_exact(const float* a, const float* b, int n_rows, PlainBlock& sum) {
    Float4 s00 = load4(sum[0]), s01 = load4(sum[0] + 4), s10 = load4(sum[1]), s11 = load4(sum[1] + 4);
    Float4 s20 = load4(sum[2]), s21 = load4(sum[2] + 4), s30 = load4(sum[3]), s31 = load4(sum[3] + 4);
    for (int t = 0; t < n_rows; ++t, a += kPlainPanel, b += kPlainPanel) {
        const Float4 b0 = load4(b), b1 = load4(b + 4);
        s00 += a[0] * b0, s01 += a[0] * b1;
        s10 += a[1] * b0, s11 += a[1] * b1;
        s20 += a[2] * b0, s21 += a[2] * b1;
        s30 += a[3] * b0, s31 += a[3] * b1;
    }
    const Float4 all[] = {s00, s01, s10, s11, s20, s21, s30, s31};
    std::memcpy(sum, all, sizeof all);
}

// a * b + c, rounded once. To double and then to float would round twice; to odd and then to float does not.
INLINE float fused(float a, float b, float c) {
    const double product = double(a) * double(b);  // 48 bits at most
    const double total = product + double(c);
    const double back = total - product;
    const double error = (product - (total - back)) + (double(c) - back);
    uint64_t bits, error_bits;
    std::memcpy(&bits, &total, sizeof bits);
    std::memcpy(&error_bits, &error, sizeof bits);
    const uint64_t towards = 1 - 2 * ((bits ^ error_bits) >> 63);
    const uint64_t inexact = -uint64_t((error > 0) | (error < 0)), even = (bits & 1) - 1;
    bits += towards & inexact & even;
    double odd;
    std::memcpy(&odd, &bits, sizeof odd);
    return float(odd);
}

// Whether products of such numbers are exact in float: bf16 ones, neither so small nor so large that they leave its range.
bool multiplies_exactly(const float* packed, int n_rows) {
    uint32_t odd_ones = 0;
    for (int i = 0; i < n_rows * kPlainPanel; ++i) {
        uint32_t bits;
        std::memcpy(&bits, packed + i, sizeof bits);
        const uint32_t exponent = bits >> 23 & 255;
        odd_ones |= bits & 0xffff;
        odd_ones |= (bits << 1 != 0) & ((exponent < 64) | (exponent > 189));
    }
    return odd_ones == 0;
}

#else

INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
bool multiplies_exactly(const float*, int) { return false; }  // nothing is faster than the instruction
void dot_exact(const float*, const float*, int, PlainBlock&) {}

#endif

void dot_fused(const float* a, const float* b, int n_rows, PlainBlock& sum) {
    for (int t = 0; t < n_rows; ++t, a += kPlainPanel, b += kPlainPanel)
        for (int m = 0; m < kPlainRows; ++m)
            for (int n = 0; n < kPlainColumns; ++n) sum[m][n] = fused(a[m], b[n], sum[m][n]);
}

// In steps of 32 rows, each packed as 16 even and 16 odd ones, if `steps`.
template <bool steps>
void multiply_plain(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower,
                    const void* ahead) {
    const bool exact = multiplies_exactly(static_cast<const float*>(left), n_rows) &&
                       multiplies_exactly(static_cast<const float*>(right), n_rows);
    const auto dot = exact ? dot_exact : dot_fused;
    const auto add = [=](const float* a, const float* b, int n, float* sums, const char*) {
        constexpr int kHalf = kStep / 2;
        for (int t = 0; t < n; t += steps ? kStep : n) {
            PlainBlock even = {}, odd = {};
            if (!steps)
                for (int m = 0; m < kPlainRows; ++m) std::memcpy(even[m], sums + m * kPlainPanel, sizeof even[m]);
            dot(a + t * kPlainPanel, b + t * kPlainPanel, steps ? kHalf : n, even);
            if (steps) dot(a + (t + kHalf) * kPlainPanel, b + (t + kHalf) * kPlainPanel, kHalf, odd);
            for (int m = 0; m < kPlainRows; ++m)
                for (int j = 0; j < kPlainColumns; ++j) {
                    float& out = sums[m * kPlainPanel + j];
                    out = steps ? out + (even[m][j] + odd[m][j]) : even[m][j];
                }
        }
    };
    multiply_in_parts<kPlainPanel, kPlainRows, kPlainColumns, 128>(left, right, n_rows, c, ldc, lower, ahead, add);
}

#if SPARSIFY_X86

// -------------------------------------------------------------------------------------------------- AVX2

#define TARGET_AVX2 TARGET("avx2,fma")
constexpr int kPanel256 = 48;
constexpr int kRows256 = 6;  // of the register tile: 6 x 2 sums, 2 of the right and 1 of the left operand: 15 registers
constexpr int kColumns256 = 16;  // of the register tile

TARGET_AVX2 void pack_avx2(const void* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened<uint16_t> widened(columns, kPanel256);
    for (int t = 0; t < n_rows; ++t, out += kPanel256) {
        _mm_prefetch(static_cast<const uint16_t*>(rows[t]) + 64, _MM_HINT_T0);  // of the panels that follow
        const uint16_t* row = widened.get(rows[t], 0);
        for (int j = 0; j < kPanel256; j += 8) {
            const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j)));
            _mm256_storeu_ps(out + j, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
        }
    }
}

struct Sums256 {
    __m256 at[kRows256][2];

    TARGET_AVX2 INLINE void clear() {
#pragma GCC unroll 6
        for (int m = 0; m < kRows256; ++m) at[m][0] = at[m][1] = _mm256_setzero_ps();
    }
    TARGET_AVX2 INLINE void load(const float* from, int stride) {
#pragma GCC unroll 6
        for (int m = 0; m < kRows256; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) at[m][n] = _mm256_loadu_ps(from + m * stride + 8 * n);
    }
    TARGET_AVX2 INLINE void store(float* to, int stride) const {
#pragma GCC unroll 6
        for (int m = 0; m < kRows256; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) _mm256_storeu_ps(to + m * stride + 8 * n, at[m][n]);
    }
    // at += from: what is there is the second summand
    TARGET_AVX2 INLINE void add(const float* from, int stride) {
#pragma GCC unroll 6
        for (int m = 0; m < kRows256; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) at[m][n] = _mm256_add_ps(_mm256_loadu_ps(from + m * stride + 8 * n), at[m][n]);
    }
    TARGET_AVX2 INLINE void step(const float* a, const float* b) {
        const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
        for (int m = 0; m < kRows256; ++m) {
            const __m256 x = _mm256_broadcast_ss(a + m);
            at[m][0] = _mm256_fmadd_ps(x, b0, at[m][0]);
            at[m][1] = _mm256_fmadd_ps(x, b1, at[m][1]);
        }
    }
    // One fused multiply-add per row; prefetches 8 bytes per row.
    TARGET_AVX2 INLINE void dot(const float* a, const float* b, int n_rows, const char* ahead) {
        int t = 0;
        for (; t + 2 <= n_rows; t += 2, a += 2 * kPanel256, b += 2 * kPanel256) {
            _mm_prefetch(ahead + 8 * t, _MM_HINT_T1);
            step(a, b);
            step(a + kPanel256, b + kPanel256);
        }
        for (; t < n_rows; ++t, a += kPanel256, b += kPanel256) step(a, b);
    }
};

template <bool steps>
TARGET_AVX2 void multiply_avx2(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower,
                               const void* ahead) {
    const auto add = [](const float* a, const float* b, int n, float* sums, const char* next) TARGET_AVX2 {
        Sums256 sum;
        if (!steps) {
            sum.load(sums, kPanel256);
            sum.dot(a, b, n, next);
            sum.store(sums, kPanel256);
            return;
        }
        constexpr int kHalf = kStep / 2;
        alignas(32) float even[kRows256 * kPanel256];
        for (int t = 0; t < n; t += kStep) {
            sum.clear();
            sum.dot(a + t * kPanel256, b + t * kPanel256, kHalf, next + t * 8);
            sum.store(even, kPanel256);
            sum.clear();
            sum.dot(a + (t + kHalf) * kPanel256, b + (t + kHalf) * kPanel256, kHalf, next + (t + kHalf) * 8);
            sum.add(even, kPanel256);
            sum.add(sums, kPanel256);
            sum.store(sums, kPanel256);
        }
    };
    multiply_in_parts<kPanel256, kRows256, kColumns256, 64>(left, right, n_rows, c, ldc, lower, ahead, add);
}

// ----------------------------------------------------------------------------------------------- AVX-512

#define TARGET_AVX512 TARGET("avx512f,avx512bw,avx512dq,avx512vl")
constexpr int kPanel512 = 32;
constexpr int kRows512 = 8;  // of the register tile: 8 x 2 sums, 2 of the right and 1 of the left operand: 19 registers

TARGET_AVX512 void pack_avx512(const void* const* rows, int n_rows, int columns, void*, void* packed) {
    float* out = static_cast<float*>(packed);
    Widened<uint16_t> widened(columns, kPanel512);
    for (int t = 0; t < n_rows; ++t, out += kPanel512) {
        _mm_prefetch(static_cast<const uint16_t*>(rows[t]) + 64, _MM_HINT_T0);  // of the panels that follow
        const uint16_t* row = widened.get(rows[t], 0);
        for (int j = 0; j < kPanel512; j += 16) {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + j)));
            _mm512_storeu_ps(out + j, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
        }
    }
}

struct Sums512 {
    __m512 at[kRows512][2];

    TARGET_AVX512 INLINE void clear() {
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m) at[m][0] = at[m][1] = _mm512_setzero_ps();
    }
    TARGET_AVX512 INLINE void load(const float* from, int stride) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m)
            at[m][0] = _mm512_loadu_ps(from + m * stride), at[m][1] = _mm512_loadu_ps(from + m * stride + 16);
    }
    TARGET_AVX512 INLINE void store(float* to, int stride) const {
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m)
            _mm512_storeu_ps(to + m * stride, at[m][0]), _mm512_storeu_ps(to + m * stride + 16, at[m][1]);
    }
    // at += from: what is there is the second summand
    TARGET_AVX512 INLINE void add(const float* from, int stride) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m) {
            at[m][0] = _mm512_add_ps(_mm512_loadu_ps(from + m * stride), at[m][0]);
            at[m][1] = _mm512_add_ps(_mm512_loadu_ps(from + m * stride + 16), at[m][1]);
        }
    }
    TARGET_AVX512 INLINE void step(const float* a, const float* b) {
        const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 8
        for (int m = 0; m < kRows512; ++m) {
            const __m512 x = _mm512_set1_ps(a[m]);
            at[m][0] = _mm512_fmadd_ps(x, b0, at[m][0]);
            at[m][1] = _mm512_fmadd_ps(x, b1, at[m][1]);
        }
    }
    // One fused multiply-add per row; prefetches 32 bytes per row.
    TARGET_AVX512 INLINE void dot(const float* a, const float* b, int n_rows, const char* ahead) {
        int t = 0;
        for (; t + 4 <= n_rows; t += 4, a += 4 * kPanel512, b += 4 * kPanel512) {
            _mm_prefetch(ahead + 32 * t, _MM_HINT_T1);
            _mm_prefetch(ahead + 32 * t + 64, _MM_HINT_T1);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) step(a + i * kPanel512, b + i * kPanel512);
        }
        for (; t < n_rows; ++t, a += kPanel512, b += kPanel512) step(a, b);
    }
};

template <bool steps>
TARGET_AVX512 void multiply_avx512(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower,
                                   const void* ahead) {
    const auto add = [](const float* a, const float* b, int n, float* sums, const char* next) TARGET_AVX512 {
        Sums512 sum;
        if (!steps) {
            sum.load(sums, kPanel512);
            sum.dot(a, b, n, next);
            sum.store(sums, kPanel512);
            return;
        }
        constexpr int kHalf = kStep / 2;
        alignas(64) float even[kRows512 * kPanel512];
        for (int t = 0; t < n; t += kStep) {
            sum.clear();
            sum.dot(a + t * kPanel512, b + t * kPanel512, kHalf, next + t * 32);
            sum.store(even, kPanel512);
            sum.clear();
            sum.dot(a + (t + kHalf) * kPanel512, b + (t + kHalf) * kPanel512, kHalf, next + (t + kHalf) * 32);
            sum.add(even, kPanel512);
            sum.add(sums, kPanel512);
            sum.store(sums, kPanel512);
        }
    };
    multiply_in_parts<kPanel512, kRows512, kPanel512, 128>(left, right, n_rows, c, ldc, lower, ahead, add);
}

#endif  // SPARSIFY_X86

#if SPARSIFY_COMPILES_AVX512BF16

// -------------------------------------------------------------------------------------------- AVX512-BF16

#define TARGET_BF16 TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

constexpr int kPairPanel = 48;
constexpr int kPairRows = 8;  // of the register tile: 8 x 3 sums and 3 of the right operand: 27 of 32 registers

// 16 columns of two rows, interleaved: dword j = (row0[j], row1[j]), the pair that vdpbf16ps and tdpbf16ps sum.
TARGET("avx512f,avx512bw,avx512dq,avx512vl")
inline __m512i interleave(const uint16_t* row0, const uint16_t* row1) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

TARGET("avx512f,avx512bw,avx512dq,avx512vl")
void pack_pairs(const void* const* rows, int n_rows, int columns, void*, void* packed) {
    uint32_t* out = static_cast<uint32_t*>(packed);
    Widened<uint16_t> widened(columns, kPairPanel);
    for (int t = 0; t < n_rows; t += 2, out += kPairPanel) {
        const uint16_t* row0 = widened.get(rows[t], 0);
        const uint16_t* row1 = widened.get(rows[t + 1], 1);
        for (int j = 0; j < kPairPanel; j += 16) _mm512_storeu_si512(out + j, interleave(row0 + j, row1 + j));
    }
}

template <int N>
TARGET_BF16 void strip_bf16(const uint32_t* a, const uint32_t* b, int n_rows, float* c, int64_t ldc) {
    __m512 sum[kPairRows][N];
#pragma GCC unroll 8
    for (int m = 0; m < kPairRows; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    for (int t = 0; t < n_rows; t += 2, a += kPairPanel, b += kPairPanel) {
        __m512bh right[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) right[n] = (__m512bh)_mm512_loadu_si512(b + 16 * n);
#pragma GCC unroll 8
        for (int m = 0; m < kPairRows; ++m) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[m]));
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], x, right[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kPairRows; ++m)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) {
            float* out = c + m * ldc + 16 * n;
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum[m][n]));
        }
}

void multiply_bf16(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool lower, const void*) {
    const uint32_t* a = static_cast<const uint32_t*>(left);
    const uint32_t* b = static_cast<const uint32_t*>(right);
    for (int i = 0; i < kPairPanel; i += kPairRows) {
        const int columns = lower ? i + kPairRows : kPairPanel;
        if (columns <= 16)
            strip_bf16<1>(a + i, b, n_rows, c + i * ldc, ldc);
        else if (columns <= 32)
            strip_bf16<2>(a + i, b, n_rows, c + i * ldc, ldc);
        else
            strip_bf16<3>(a + i, b, n_rows, c + i * ldc, ldc);
    }
}

#endif  // SPARSIFY_COMPILES_AVX512BF16

#if SPARSIFY_COMPILES_AMX

// ---------------------------------------------------------------------------------------------------- AMX
// A panel is 32 columns. Packed: [step][16-column half][16][16] dwords of row pairs, which is one
// 1 KB tile each; the right operand has pair x column as tdpbf16ps wants it, the left one the transpose.

constexpr int kAmxPanel = 32;
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
void pack_amx(const void* const* rows, int n_rows, int columns, void* left, void* right) {
    uint32_t* left_out = static_cast<uint32_t*>(left);
    uint32_t* right_out = static_cast<uint32_t*>(right);
    Widened<uint16_t> widened(columns, kAmxPanel);
    for (int t = 0; t < n_rows; t += kStep) {
        __m512i first[16], second[16];  // the two halves of the panel
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; ++pair) {
            const void* source0 = rows[t + 2 * pair];
            const void* source1 = rows[t + 2 * pair + 1];
            _mm_prefetch(static_cast<const uint16_t*>(source0) + kAmxPanel, _MM_HINT_T1);  // the next panel
            _mm_prefetch(static_cast<const uint16_t*>(source1) + kAmxPanel, _MM_HINT_T1);
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

TARGET_AMX void multiply_amx(const void* left, const void* right, int n_rows, float* c, int64_t ldc, bool,
                             const void*) {
    const uint32_t* a = static_cast<const uint32_t*>(left);
    const uint32_t* b = static_cast<const uint32_t*>(right);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int t = 0; t < n_rows; t += kStep, a += 2 * kTileDwords, b += 2 * kTileDwords) {
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
    const void* const* blocks;
    const int64_t* strides;
    const int64_t* lengths;
    int64_t n_blocks;
    int64_t columns;
    bool wide;  // fp32, else bf16

    // Addresses of element `column` of rows first .. first + n - 1; those past the end are rows of zeros.
    void locate(int64_t first, int n, int64_t column, const void** out) const {
        alignas(64) static const float zeros[kMaxPanel] = {};
        const int64_t size = wide ? sizeof(float) : sizeof(uint16_t);
        int filled = 0;
        for (int64_t block = 0; block < n_blocks && filled < n; ++block) {
            if (first >= lengths[block]) {
                first -= lengths[block];
                continue;
            }
            for (; first < lengths[block] && filled < n; ++first)
                out[filled++] = static_cast<const char*>(blocks[block]) + (first * strides[block] + column) * size;
            first = 0;
        }
        while (filled < n) out[filled++] = zeros;
    }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed rows of all columns of an operand: panel after panel, and in each panel block after block.
struct Packed {
    const Kernel& kernel;
    int64_t panels, chunk;
    Buffer buffer;

    Packed(const Kernel& kernel, int64_t columns, int64_t chunk)
        : kernel(kernel),
          panels(divide_up(columns, kernel.panel)),
          chunk(chunk),
          buffer(size_t(panels) * size_t(chunk) * size_t(kernel.panel) * size_t(kernel.packed_bytes)) {}

    void* at(int64_t panel, int64_t block) const {
        return buffer.at(size_t((panel * chunk + block * kernel.order.block) * kernel.panel * kernel.packed_bytes));
    }
};

// Rows in the order in which fused multiply-adds have to take them.
void arrange(OrderName order, const void** rows, int n_rows) {
    if (order == kPairs)
        for (int t = 0; t < n_rows; t += 2) std::swap(rows[t], rows[t + 1]);
    if (order != kTiles) return;
    for (int t = 0; t < n_rows; t += kStep) {
        const void* step[kStep];
        std::copy(rows + t, rows + t + kStep, step);
        for (int i = 0; i < kStep; ++i) rows[t + i] = step[i < kStep / 2 ? 2 * i : 2 * i - kStep + 1];
    }
}

void pack(const Kernel& kernel, const Rows& source, int64_t first, int n_rows, int64_t panel, void* left, void* right) {
    const void* rows[kMaxBlock];
    source.locate(first, n_rows, panel * kernel.panel, rows);
    if (kernel.arranges) arrange(kernel.order.name, rows, n_rows);
    const int columns = int(std::min<int64_t>(kernel.panel, source.columns - panel * kernel.panel));
    kernel.pack[source.wide](rows, n_rows, columns, left, right);
}

struct Tile {
    int64_t row, column;  // first panel of each operand
};

// C[lda] += left' right, only i >= j if `lower` (left and right are then the same).
int accumulate(const Kernel& kernel, const Rows& left, const Rows& right, int64_t total, float* c, int64_t ldc,
               bool lower, int threads) {
    if (total == 0 || left.columns == 0 || right.columns == 0) return kOk;
    // A chunk of rows is packed at once. Short ones keep the packed operands in cache; adding them to C costs a pass over
    // C each, which matters once C is too large for the cache.
    int64_t chunk = std::min(left.columns, right.columns) >= 1024 ? 2048 : 1024;
    chunk = std::min(chunk, divide_up(total, kernel.order.block) * kernel.order.block);

    const Packed rhs(kernel, right.columns, chunk);
    const Packed own_lhs(kernel, lower && !kernel.left_differs ? 0 : left.columns, chunk);
    const Packed& lhs = lower && !kernel.left_differs ? rhs : own_lhs;  // one packed copy serves as both operands

    // Tiles of C: big ones reread the packed operands less often, small ones share out better among the threads.
    const int64_t panels_wide = kernel.wide / kernel.panel, panels_narrow = 96 / kernel.panel;
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

    const int64_t size = edge * kernel.panel;  // of a tile, in elements
    bool no_memory = false;
#pragma omp parallel num_threads(threads)
    {
        Buffer tile_sums(size_t(size * size) * sizeof(float));
        float* sums = static_cast<float*>(tile_sums.data);
        const Rounding rounding(kernel.order.flushes);
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
            const int64_t blocks = divide_up(rows, kernel.order.block);
            const auto rows_of = [&](int64_t block) {
                const int64_t there = std::min<int64_t>(kernel.order.block, rows - block * kernel.order.block);
                return int(divide_up(there, kernel.order.round) * kernel.order.round);
            };
#pragma omp for schedule(dynamic, 4) nowait
            for (int64_t k = 0; k < rhs.panels * blocks; ++k) {
                const int64_t block = k / rhs.panels, panel = k % rhs.panels;
                void* also_left = lower && kernel.left_differs ? lhs.at(panel, block) : nullptr;
                pack(kernel, right, first + block * kernel.order.block, rows_of(block), panel, also_left,
                     rhs.at(panel, block));
            }
            if (!lower) {
#pragma omp for schedule(dynamic, 4) nowait
                for (int64_t k = 0; k < lhs.panels * blocks; ++k) {
                    const int64_t block = k / lhs.panels, panel = k % lhs.panels;
                    void* packed = lhs.at(panel, block);
                    pack(kernel, left, first + block * kernel.order.block, rows_of(block), panel,
                         kernel.left_differs ? packed : nullptr, kernel.left_differs ? nullptr : packed);
                }
            }
#pragma omp barrier
            kernel.enter();
#pragma omp for schedule(dynamic, 1)
            for (int64_t k = 0; k < n_tiles; ++k) {
                const int64_t row = tile[k].row, column = tile[k].column;
                const int64_t row_end = std::min(row + edge, lhs.panels);
                const int64_t column_end = std::min(column + edge, rhs.panels);
                std::memset(sums, 0, size_t(size * size) * sizeof(float));
                for (int64_t block = 0; block < blocks; ++block)
                    for (int64_t q = column; q < column_end; ++q)
                        for (int64_t p = lower ? std::max(row, q) : row; p < row_end; ++p) {
                            const void* ahead = p + 1 < row_end      ? lhs.at(p + 1, block)
                                                : q + 1 < column_end ? rhs.at(q + 1, block)
                                                                     : rhs.at(column, block + 1);
                            kernel.multiply(lhs.at(p, block), rhs.at(q, block), rows_of(block),
                                            sums + (p - row) * kernel.panel * size + (q - column) * kernel.panel, size,
                                            lower && p == q, ahead);
                        }
                const int64_t i0 = row * kernel.panel, j0 = column * kernel.panel;
                const int64_t i1 = std::min(row_end * kernel.panel, left.columns);
                for (int64_t i = i0; i < i1; ++i) {
                    const int64_t j1 = std::min(column_end * kernel.panel, lower ? i + 1 : right.columns);
                    const float* from = sums + (i - i0) * size - j0;
                    for (int64_t j = j0; j < j1; ++j) c[i * ldc + j] += from[j];
                }
            }
            kernel.leave();
        }
    }
    return no_memory ? kOutOfMemory : kOk;
}

// ----------------------------------------------------------------------------------------------- dispatch

// Fused multiply-adds, whatever the order: of the fastest level up to `level` that has nothing else.
Kernel fused_kernel(int level, const Order& order) {
    const bool steps = order.name == kTiles, arranges = order.name != kFloat32;
#if SPARSIFY_X86
    if (level >= kAvx512)
        return {order,
                kPanel512,
                192,
                4,
                false,
                arranges,
                {pack_avx512, pack_float32<kPanel512>},
                steps ? multiply_avx512<true> : multiply_avx512<false>,
                nothing,
                nothing};
    if (level >= kAvx2)
        return {order,
                kPanel256,
                192,
                4,
                false,
                arranges,
                {pack_avx2, pack_float32<kPanel256>},
                steps ? multiply_avx2<true> : multiply_avx2<false>,
                nothing,
                nothing};
#endif
    return {order,
            kPlainPanel,
            192,
            4,
            false,
            arranges,
            {pack_plain, pack_float32<kPlainPanel>},
            steps ? multiply_plain<true> : multiply_plain<false>,
            nothing,
            nothing};
}

// The instructions that an order is named after, which take bf16 only. `multiply` is null where this build lacks them.
Kernel native_kernel(const Order& order) {
#if SPARSIFY_COMPILES_AMX
    if (order.name == kTiles)
        return {order, kAmxPanel, 384, 2, true, false, {pack_amx, nullptr}, multiply_amx, enter_amx, leave_amx};
#endif
#if SPARSIFY_COMPILES_AVX512BF16
    if (order.name == kPairs)
        return {order, kPairPanel, 384, 2, false, false, {pack_pairs, nullptr}, multiply_bf16, nothing, nothing};
#endif
    return {order, 0, 0, 0, false, false, {nullptr, nullptr}, nullptr, nothing, nothing};
}

// Whether the instructions of this processor sum as the order says: 32 x 32 sums of 64 products of any size, many of
// which cancel or are denormal. `level` has them.
bool keeps_order(int level, const Order& order) {
    constexpr int64_t kTokens = 64, kColumns = 32;
    static uint16_t values[kTokens * kColumns];
    uint32_t state = 1;
    for (uint16_t& value : values) {
        state = state * 1664525u + 1013904223u;
        const uint32_t exponent = state >> 31 ? 125 + (state >> 8) % 6 : 50 + (state >> 8) % 20;
        value = uint16_t((state >> 24 & 1) << 15 | exponent << 7 | (state >> 16 & 127));
    }
    const void* block = values;
    const int64_t stride = kColumns, tokens = kTokens;
    const Rows x{&block, &stride, &tokens, 1, kColumns, false};
    static float found[kColumns * kColumns], expected[kColumns * kColumns];
    return accumulate(native_kernel(order), x, x, tokens, found, kColumns, false, 1) == kOk &&
           accumulate(fused_kernel(level, order), x, x, tokens, expected, kColumns, false, 1) == kOk &&
           std::memcmp(found, expected, sizeof found) == 0;
}

// Whether `level` (which is here) computes the order that is named after it with its own instructions.
bool has_own_order(int level) {
    static const bool pairs = has_level(kAvx512Bf16) && keeps_order(kAvx512Bf16, kOrders[kPairs]);
    static const bool tiles = has_level(kAmx) && keeps_order(kAmx, kOrders[kTiles]);
    return (level == kAvx512Bf16 && pairs) || (level == kAmx && tiles);
}

// The order in which a level sums bf16 inputs.
OrderName order_of(int level) { return !has_own_order(level) ? kFloat32 : level == kAmx ? kTiles : kPairs; }

Kernel kernel_of(int level, int order) {
    const bool own = order != kFloat32 && order == order_of(level);
    return own ? native_kernel(kOrders[order]) : fused_kernel(level, kOrders[order]);
}

// The fastest level up to `cap`.
int best_level(int cap) {
    if (cap >= kAmx && has_own_order(kAmx)) return kAmx;
    // Intel's cores do half as many multiply-adds per cycle with vdpbf16ps as with fp32 FMA, AMD's twice as many.
    if (cap >= kAvx512Bf16 && !cpu().intel && has_own_order(kAvx512Bf16)) return kAvx512Bf16;
    if (cap >= kAvx512 && has_level(kAvx512)) return kAvx512;
    return cap >= kAvx2 && has_level(kAvx2) ? kAvx2 : kPortable;
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

// `requested` (0 portable .. 5 amx) if this machine can run it, else -1.
int sparsify_gram_level(int requested) { return has_level(requested) ? requested : -1; }

// The level that computes fastest of those up to `cap`, on which it does not depend what else the machine has.
int sparsify_gram_fastest(int cap) { return best_level(cap); }

// The order (0 float32, 1 avx512bf16, 2 amx) in which a level sums bf16 inputs unless told otherwise.
int sparsify_gram_order(int level) { return has_level(level) ? order_of(level) : -1; }

// Lower triangle of H[k, k] (row stride ldh) += sum_b X_b' X_b, X_b = blocks[b]: bf16, or fp32 if `wide`, [rows[b], k],
// row stride strides[b] elements, inner stride 1. What is above the diagonal is neither read nor written. fp32 inputs
// are summed in order 0 only.
int sparsify_gram(const void* const* blocks, const int64_t* rows, const int64_t* strides, int64_t n_blocks, int64_t k,
                  int wide, float* h, int64_t ldh, int threads, int level, int order) {
    if (!valid(n_blocks, blocks, rows, strides, k) || !h || ldh < k || threads < 1) return kBadArgument;
    if (order < kFloat32 || order > kTiles || (wide && order != kFloat32)) return kBadArgument;
    if (!has_level(level)) return kUnsupported;
    const Rows x{blocks, strides, rows, n_blocks, k, wide != 0};
    return accumulate(kernel_of(level, order), x, x, sum_of(rows, n_blocks), h, ldh, true, threads);
}

// C[ka, kb] += sum_b A_b' B_b; A_b: [rows[b], ka], B_b: [rows[b], kb], each bf16 or fp32.
int sparsify_gram_cross(const void* const* a_blocks, const int64_t* a_strides, int64_t ka, int a_wide,
                        const void* const* b_blocks, const int64_t* b_strides, int64_t kb, int b_wide,
                        const int64_t* rows, int64_t n_blocks, float* c, int64_t ldc, int threads, int level,
                        int order) {
    if (!valid(n_blocks, a_blocks, rows, a_strides, ka) || !valid(n_blocks, b_blocks, rows, b_strides, kb) || !c ||
        ldc < kb || threads < 1)
        return kBadArgument;
    if (order < kFloat32 || order > kTiles || ((a_wide || b_wide) && order != kFloat32)) return kBadArgument;
    if (!has_level(level)) return kUnsupported;
    const Rows a{a_blocks, a_strides, rows, n_blocks, ka, a_wide != 0};
    const Rows b{b_blocks, b_strides, rows, n_blocks, kb, b_wide != 0};
    return accumulate(kernel_of(level, order), a, b, sum_of(rows, n_blocks), c, ldc, false, threads);
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
