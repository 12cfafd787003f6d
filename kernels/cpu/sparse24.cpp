// y = x W' + b for a compressed linear W [N, K]: 2:4 sparse with 4, 8 or 16 bits, or dense with 4 or 8 bits.
//
// The work is split over pairs of panels, 32 outputs (sparse24_layout.h). A thread begins with the same ones in every call, whose
// memory it filled; which thread computes an output does not change it. Three families of kernels:
//
//   sparse24_bf16.h   amx, avx512bf16: bf16 products of every type of activation, summed in fp32; on request int8 (_int8.h)
//   sparse24_bytes.h  avx2, avxvnni, avx512: products of bytes in fixed point for every type of activation; on request int8
//   sparse24_f32.h    portable; 16-bit weights below avx512bf16, and many rows where `bytes_of` says so: fp32 products
//
// and in the first and the last family two ways: `direct` for few rows, where the weights are read once, and for many rows
// decoding a piece of a panel into the first-level cache, which then serves all of them. On avx512bf16 many rows of a 2:4 linear are not multiplied
// with dense weights either (`select`). Few rows of bf16 may become fixed point: sparse24_fixed.h.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_features.h"
#include "sparse24_crossovers.h"
#include "sparse24_layout.h"
#include "targets.h"

#if SPARSIFY_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from within GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#include "sparse24_bf16.h"
#include "sparse24_fixed.h"
#include "sparse24_int8.h"

namespace sparse24 {

// As LEVELS of sparsify/processor.py counts them; the two change together.
enum Level { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAvx512Bf16 = 4, kAmx = 5, kLevels = 6 };
// Options, added to a level: all but the fewest rows may be multiplied in int8; few rows, many rows or fixed point kernels
// whatever the number of rows (below avx512bf16, either of the first two: the fp32 kernels).
constexpr int kInt8 = 256, kForceDirect = 512, kForceTiles = 1024, kForceFixed = 2048, kFirstOption = kInt8;
enum Status { kOk = 0, kBadArgument = 1, kUnsupported = 2, kOutOfMemory = 3 };

static inline float bf16_to_float(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline float half_to_float(uint16_t v) {
    const uint32_t sign = uint32_t(v & 0x8000) << 16, rest = v & 0x7fff;
    uint32_t bits = (rest << 13) + (112u << 23);  // the exponent's bias is 15 there and 127 here
    float f;
    if (rest >= 0x7c00) {
        bits = rest << 13 | 0x7f800000;  // Inf and NaN
    } else if (rest < 0x0400) {          // zero and denormals: a multiple of 2^-24
        f = float(rest) * 0x1p-24f;
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // a NaN stays one
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x47800000) return sign | 0x7c00;  // 65536 and more; what rounds up to it carries into Inf below
    if (bits < 0x38800000) {                       // a denormal: count of 2^-24, rounded by the addition of 1.5 * 2^23
        float magnitude, magic = 0x1.8p23f;
        std::memcpy(&magnitude, &bits, 4);
        volatile float sum = magnitude * 0x1p24f + magic;
        const float rounded = sum;
        uint32_t count;
        std::memcpy(&count, &rounded, 4);
        return uint16_t(sign | (count & 0x7ff));
    }
    return uint16_t(sign | (bits - (112u << 23) + 0x0fff + (bits >> 13 & 1)) >> 13);
}

static inline float to_float(const void* x, int type, int64_t i) {
    if (type == kF32) return static_cast<const float*>(x)[i];
    const uint16_t v = static_cast<const uint16_t*>(x)[i];
    return type == kBf16 ? bf16_to_float(v) : half_to_float(v);
}

}  // namespace sparse24

#include "sparse24_twin.h"

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
    ALWAYS_F32 F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
    ALWAYS_F32 I loadi(const void* p) { I v; std::memcpy(&v, p, sizeof v); return v; }
    ALWAYS_F32 void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
    ALWAYS_F32 F set1(float f) { return F{f, f, f, f}; }
    ALWAYS_F32 F add(F a, F b) { return a + b; }
    ALWAYS_F32 F sub(F a, F b) { return a - b; }
    ALWAYS_F32 F mul(F a, F b) { return a * b; }
    ALWAYS_F32 F fma(F a, F b, F c) { return a * b + c; }
    ALWAYS_F32 F from_int(I v) { return __builtin_convertvector(v, F); }
    template <int S> ALWAYS_F32 I shr(I v) { return (I)((U)v >> S); }
    template <int M> ALWAYS_F32 I low(I v) { return v & M; }
    ALWAYS_F32 I shl16(I v) { return (I)((U)v << 16); }
    ALWAYS_F32 I high16(I v) { return (I)((U)v & 0xffff0000u); }
    ALWAYS_F32 F bits(I v) { return (F)v; }
    ALWAYS_F32 I bytes(const uint8_t* p) { return I{int8_t(p[0]), int8_t(p[1]), int8_t(p[2]), int8_t(p[3])}; }
    ALWAYS_F32 F half(I v) { return F{half_to_float(uint16_t(v[0])), half_to_float(uint16_t(v[1])), half_to_float(uint16_t(v[2])), half_to_float(uint16_t(v[3]))}; }
    ALWAYS_F32 F pick(const float* four, I index) {
        I v = {};
        for (int i = 0; i < 4; ++i) v |= (index == i) & (I)set1(four[i]);
        return (F)v;
    }
    ALWAYS_F32 F where(I ia, F a, I ib, F b, int i) { return (F)(((ia == i) & (I)a) | ((ib == i) & (I)b)); }
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
    template <int S> ALWAYS_F32 I shr(I v) { return S ? _mm256_srli_epi32(v, S) : v; }
    template <int M> ALWAYS_F32 I low(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(M)); }
    ALWAYS_F32 I shl16(I v) { return _mm256_slli_epi32(v, 16); }
    ALWAYS_F32 I high16(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000u))); }
    ALWAYS_F32 F bits(I v) { return _mm256_castsi256_ps(v); }
    ALWAYS_F32 I bytes(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
    ALWAYS_F32 F half(I v) {
        const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
        return _mm256_cvtph_ps(_mm_packus_epi32(low, high));
    }
    ALWAYS_F32 F pick(const float* four, I index) {
        return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four)), index);
    }
    ALWAYS_F32 F where(I ia, F a, I ib, F b, int i) {
        const I at = _mm256_set1_epi32(i);
        return _mm256_or_ps(_mm256_and_ps(bits(_mm256_cmpeq_epi32(ia, at)), a), _mm256_and_ps(bits(_mm256_cmpeq_epi32(ib, at)), b));
    }
};
#include "sparse24_f32.h"
}  // namespace avx2
}  // namespace sparse24
TARGET_END

namespace sparse24 {

using MultiplyRun = void (*)(const uint8_t* weights, const Pieces& pieces, const uint8_t* x, const float* unit, float* c, int64_t c_stride);

struct ByteKernels {  // sparse24_bytes.h, for a linear and a number of bytes of an activation
    int tile_rows, multiple;  // most rows of a tile, whose number is a multiple
    MultiplyRun multiply[8], multiply_decoded[8];  // by the rows, from 1 on; the second for more than one tile
    void (*decode)(const uint8_t* p, const Pieces& pieces, uint8_t* out);
    float (*quantize)(const void* from, int type, int64_t inputs, int steps, int tile_rows, uint8_t* out);
    void (*finish)(const float* sums, int64_t c_stride, int64_t rows, const void* bias, int bias_type, int type, int columns, void* y, int64_t y_bytes);
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
    template <int S> ALWAYS_F32 I shr(I v) { return S ? _mm512_srli_epi32(v, S) : v; }
    template <int M> ALWAYS_F32 I low(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(M)); }
    ALWAYS_F32 I shl16(I v) { return _mm512_slli_epi32(v, 16); }
    ALWAYS_F32 I high16(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))); }
    ALWAYS_F32 F bits(I v) { return _mm512_castsi512_ps(v); }
    ALWAYS_F32 I bytes(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    ALWAYS_F32 F half(I v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
    ALWAYS_F32 F pick(const float* four, I index) { return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), index); }
    ALWAYS_F32 F where(I ia, F a, I ib, F b, int i) {
        const I at = _mm512_set1_epi32(i);
        return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(ia, at), a), _mm512_cmpeq_epi32_mask(ib, at), b);
    }
};
#include "sparse24_f32.h"
}  // namespace avx512
}  // namespace sparse24
TARGET_END
#endif  // SPARSIFY_X86

namespace sparse24 {

// ------------------------------------------------------------------------------------------------------ threads

// Ask for huge pages: streaming through small ones costs a page walk every 4 KB, two-dimensional in a virtual machine.
static void want_huge_pages(uint8_t* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > begin && end - begin >= (uintptr_t(2) << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

struct Workspace {  // grows, and stays with its thread
    uint8_t* data = nullptr;
    size_t bytes = 0;
    ~Workspace() { std::free(data); }
    uint8_t* get(size_t wanted) {
        if (wanted > bytes) {
            std::free(data);
            bytes = (wanted + 4095) / 4096 * 4096;
            data = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
            if (data == nullptr) bytes = 0;
            want_huge_pages(data, bytes);
        }
        return data;
    }
};

static thread_local Workspace own, shared;

static inline int threads_here() {
#if defined(_OPENMP)
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

static inline void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

struct Range {
    int64_t begin, end;
};

static inline Range part(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Calls body(thread, threads) in every thread of the pool that torch uses; in this one alone when the work is not worth more.
template <class Body>
static void in_threads(int64_t work, const Body& body) {
    const int64_t worth = 1 << 16;  // weights times rows: some microseconds, which is what waking the pool costs
    const int threads = threads_here();
    if (threads == 1 || work < worth) {
        body(0, 1);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel
    body(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// The pairs of panels of a linear, shared out while they are multiplied: a thread takes from its own part, whose memory it filled
// (sparse24_pack), less and less at a time, then from the parts of threads that are behind, because their core is slower or others
// use it too.
class Shares {
public:
    // To be made by the thread that enters the parallel region.
    explicit Shares(int64_t pairs) : pairs_(pairs), taken_(reinterpret_cast<Taken*>(cursors.get(threads_here() * sizeof(Taken)))) {
        if (taken_ != nullptr) std::memset(static_cast<void*>(taken_), 0, threads_here() * sizeof(Taken));
    }

    bool failed() const { return taken_ == nullptr; }

    // Calls body(pair) for each pair that is this thread's to do, in round 0, 1, ...; a barrier has to lie between two rounds.
    template <class Body>
    void each(int thread, int threads, int64_t round, const Body& body) const {
        for (int i = 0; i < threads; ++i) {
            const int owner = (thread + i) % threads;
            const Range all = part(pairs_, owner, threads);
            const int64_t count = all.end - all.begin, limit = (round + 1) * count;
            std::atomic<int64_t>& taken = taken_[owner].pairs;
            for (int64_t from = taken.load(std::memory_order_relaxed); from < limit;) {
                const int64_t to = from + std::max<int64_t>(1, (limit - from) / 4);
                if (!taken.compare_exchange_weak(from, to, std::memory_order_relaxed)) continue;
                for (int64_t p = from; p < to; ++p) body(all.begin + p - round * count);
                from = taken.load(std::memory_order_relaxed);
            }
        }
    }

private:
    struct alignas(64) Taken {
        std::atomic<int64_t> pairs;  // of an owner's part, in all rounds
    };
    static thread_local Workspace cursors;

    const int64_t pairs_;
    Taken* const taken_;
};

thread_local Workspace Shares::cursors;

struct Call {
    Layout l;
    const uint8_t* blob;
    const void* x;
    int type;  // of x and y
    int64_t rows, ldx;
    const void* bias;  // or null
    int bias_type;
    void* y;

    const void* row(int64_t m) const { return static_cast<const uint8_t*>(x) + m * ldx * (type == kF32 ? 4 : 2); }
    // The bias of the outputs from `n` on, or null.
    const void* bias_at(int64_t n) const { return bias ? static_cast<const uint8_t*>(bias) + n * (bias_type == kF32 ? 4 : 2) : nullptr; }
    void* result(int64_t m, int64_t n) const { return static_cast<uint8_t*>(y) + (m * l.n + n) * (type == kF32 ? 4 : 2); }
};

// --------------------------------------------------------------------------------------- fp32 kernels: the driver

static void widen_row(const Call& call, int64_t m, int64_t padded, float* out) {
    for (int64_t i = 0; i < call.l.k; ++i) out[i] = to_float(call.row(m), call.type, i);
    std::fill(out + call.l.k, out + padded, 0.0f);
}

static void finish_f32(const Call& call, int64_t pair, int64_t m, const float* sums) {
    const int64_t first = pair * kPair;
    const int columns = int(std::min<int64_t>(kPair, call.l.n - first));
    for (int j = 0; j < columns; ++j) {
        const float sum = sums[j] + (call.bias ? to_float(call.bias, call.bias_type, first + j) : 0.0f);
        void* to = call.result(m, first + j);
        if (call.type == kF32) {
            std::memcpy(to, &sum, 4);
        } else {
            const uint16_t v = call.type == kBf16 ? float_to_bf16(sum) : float_to_half(sum);
            std::memcpy(to, &v, 2);
        }
    }
}

constexpr int kF32Sub = 8;         // steps decoded at once: 16 KB
constexpr int kF32Block = 64;      // rows that a decoded piece serves
constexpr int kF32DirectRows = 4;  // with more, decoding once pays

static int run_f32(const Call& call, const F32Kernels& kernels) {
    const Layout& l = call.l;
    const int64_t padded = l.steps * kStep, block = std::min<int64_t>(call.rows, kF32Block);
    float* x = reinterpret_cast<float*>(shared.get(size_t(block) * padded * 4));
    const Shares shares(l.pairs);
    if (x == nullptr || shares.failed()) return kOutOfMemory;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        float* mine = reinterpret_cast<float*>(own.get((kF32Sub * kStep * kPanel + kF32Block * kPair) * 4));
        if (mine == nullptr) failed = true;
        barrier();
        if (failed) return;
        float *decoded = mine, *sums = mine + kF32Sub * kStep * kPanel;
        for (int64_t start = 0; start < call.rows; start += block) {
            const int64_t rows = std::min(block, call.rows - start);
            const Range to_widen = part(rows, thread, threads);
            for (int64_t m = to_widen.begin; m < to_widen.end; ++m) widen_row(call, start + m, padded, x + m * padded);
            barrier();
            shares.each(thread, threads, start / block, [&](int64_t p) {
                std::fill(sums, sums + rows * kPair, 0.0f);
                for (int half = 0; half < 2; ++half) {
                    const uint8_t* data = l.pair(call.blob, p) + half * l.step_bytes;
                    const uint16_t* scales = l.scales(call.blob, p) + half * kPanel;
                    float* c = sums + half * kPanel;
                    if (kernels.direct[0] != nullptr && rows <= kF32DirectRows) {
                        kernels.direct[rows - 1](l, data, scales, x, padded, c);
                        continue;
                    }
                    for (int64_t s = 0; s < l.steps; s += kF32Sub) {
                        const int steps = int(std::min<int64_t>(kF32Sub, l.steps - s));
                        kernels.decode(l, data + s * 2 * l.step_bytes, scales, s, steps, decoded);
                        for (int64_t m = 0; m < rows; m += 4) {
                            const int some = int(std::min<int64_t>(4, rows - m));
                            kernels.multiply[some - 1](x + m * padded + s * kStep, padded, decoded, steps * kStep, c + m * kPair);
                        }
                    }
                }
                for (int64_t m = 0; m < rows; ++m) finish_f32(call, p, start + m, sums + m * kPair);
            });
            barrier();
        }
    });
    return failed ? kOutOfMemory : kOk;
}

// ---------------------------------------------------------------------------------------- rows in blocks: the driver

#if SPARSIFY_X86

constexpr int64_t kPickedBlockRows = 128;  // most rows of a block of tiles of up to 8 rows
constexpr int64_t kInt8Rows = 3;           // fewest rows of int8 without AMX: fewer are as fast without
constexpr size_t kPackedAlone = 1 << 16;   // most bytes of activations that every thread packs for itself

struct Blocking {
    int64_t rows;        // split rows of a block
    int64_t tile_rows;   // of a tile
    int64_t tiles;       // of a block
    int64_t run;         // steps of K that a piece of weights has, which serves all tiles
    int64_t chunk;       // steps of K between two passes over the pairs
    int64_t row_bytes;   // of a step of a row

    int64_t step_bytes() const { return tile_rows * row_bytes; }
    int64_t sums_rows() const { return tiles * tile_rows; }
};

// Runs of K of nearly one size, of at most `most` steps and of whole groups or parts of one.
static int64_t even_run(const Layout& l, int64_t most) {
    if (l.groups > 1 && l.steps_per_group >= most) return most;
    const int64_t runs = (l.steps + most - 1) / most, unit = l.groups > 1 ? l.steps_per_group : 1;
    return ((l.steps + runs - 1) / runs + unit - 1) / unit * unit;
}

// block_rows: most rows of a block; tile_rows, multiple: a tile has at most so many rows, and a multiple of these; cached: bytes of
// activations that are to stay in the second-level cache.
static Blocking blocking(const Layout& l, int64_t rows, int parts, int64_t block_rows, int64_t tile_rows, int64_t multiple, int64_t run,
                         int64_t row_bytes = 64, int64_t cached = 1 << 20) {
    const int64_t blocks = (rows + block_rows - 1) / block_rows, unit = parts == 1 ? 16 : 48;  // parts of a row stay together
    Blocking b;
    b.rows = blocks == 1 ? rows : ((rows + blocks - 1) / blocks + unit - 1) / unit * unit;
    b.tiles = (b.rows + tile_rows - 1) / tile_rows;
    b.tile_rows = ((b.rows + b.tiles - 1) / b.tiles + multiple - 1) / multiple * multiple;
    b.run = run;
    b.row_bytes = row_bytes;
    b.chunk = std::min(l.steps, std::max<int64_t>(run, cached / (b.tiles * b.step_bytes()) / run * run));
    return b;
}

// The groups within `steps` steps from `first` on; a group longer than that is cut.
static Pieces pieces_of(const Layout& l, const uint16_t* scales, int64_t first, int64_t steps) {
    if (!l.scaled()) return {int(steps), 1, nullptr, l.stored_type};
    const uint16_t* from = scales + first / l.steps_per_group * kPair;
    if (l.steps_per_group >= steps) return {int(steps), 1, from, l.stored_type};
    return {int(l.steps_per_group), int(steps / l.steps_per_group), from, l.stored_type};
}

// Rows in blocks, K in chunks: the activations of a block and chunk stay in the second-level cache while all pairs pass by. The
// threads share the packing of activations, unless there are so few (kPackedAlone bytes) that waiting for each other costs more.
template <class Way>
static int run_blocks(const Call& call, const Way& way) {
    const Layout& l = call.l;
    const Blocking& b = way.b;
    const int parts = way.parts;
    const int64_t rows = call.rows * parts, padded = l.steps * kStep, tile_bytes = l.steps * b.step_bytes(), c_stride = b.sums_rows() * kPanel;
    const size_t tiles_bytes = size_t(b.tiles) * tile_bytes;
    const bool alone = rows <= b.rows && tiles_bytes <= kPackedAlone;
    uint8_t* common = alone ? nullptr : shared.get(tiles_bytes);
    const Shares shares(l.pairs);
    if ((common == nullptr && !alone) || shares.failed()) return kOutOfMemory;
    const bool one_pass = b.chunk == l.steps;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        const Range pairs = part(l.pairs, thread, threads);
        const int64_t kept = one_pass ? 1 : pairs.end - pairs.begin;  // pairs whose sums wait for the next chunk
        const size_t sums_bytes = size_t(b.sums_rows()) * kPair * 4;
        const size_t split_bytes = (3 * padded * 2 + 63) / 64 * 64;
        uint8_t* mine = own.get(Way::kScratch + kept * sums_bytes + split_bytes + (alone ? tiles_bytes : 0));
        if (mine == nullptr) failed = true;
        uint8_t* split = mine + Way::kScratch + kept * sums_bytes;
        uint8_t* tiles = alone ? split + split_bytes : common;
        way.enter();
        for (int64_t start = 0; start < rows; start += b.rows) {
            const int64_t here = std::min(b.rows, rows - start), used_tiles = (here + b.tile_rows - 1) / b.tile_rows;
            if (mine != nullptr) way.pack(start, here, alone ? 0 : thread, alone ? 1 : threads, reinterpret_cast<uint16_t*>(split), tiles);
            if (!alone) barrier();
            if (failed) break;  // behind a barrier in all threads: each has said so before it
            float* sums = reinterpret_cast<float*>(mine + Way::kScratch);
            const auto multiply = [&](int64_t p, int64_t chunk, float* c) {  // c: [panel][row][16]
                const int64_t end = std::min(l.steps, chunk + b.chunk);
                if (chunk == 0) std::memset(c, 0, sums_bytes);
                for (int64_t s = chunk; s < end; s += b.run) {
                    const Pieces pieces = pieces_of(l, l.scales(call.blob, p), s, std::min(b.run, end - s));
                    const uint8_t* weights = l.pair(call.blob, p) + s * 2 * l.step_bytes;
                    way.run(weights, s, pieces, tiles, used_tiles, tile_bytes, mine, c, c_stride);
                }
                if (end == l.steps) way.finish(p, start, here, c, c_stride);
            };
            if (one_pass) shares.each(thread, threads, start / b.rows, [&](int64_t p) { multiply(p, 0, sums); });
            for (int64_t chunk = 0; chunk < l.steps && !one_pass; chunk += b.chunk) {
                for (int64_t p = pairs.begin; p < pairs.end; ++p) multiply(p, chunk, sums + (p - pairs.begin) * b.sums_rows() * kPair);
            }
            if (start + b.rows < rows) barrier();  // the tiles are written again
        }
        way.leave();
    });
    return failed ? kOutOfMemory : kOk;
}

// Rows as integers of `Bytes` bytes (sparse24_bytes.h). A tile: [step][vector][row][part] bytes, then [piece][row] units.
struct BytesWay {
    const Call& call;
    const ByteKernels kernels;
    const int bytes;  // of an activation
    const int parts = 1;
    const int64_t most_steps = bytes == 1 ? avx2::kInt8Steps : avx2::kFixedSteps;
    const int64_t piece_steps = std::min(call.l.steps_per_group, most_steps), pieces = (call.l.steps + piece_steps - 1) / piece_steps;
    const bool in_one_run = call.rows <= kernels.tile_rows && call.l.steps_per_group <= most_steps;  // no other tile reads it again
    const Blocking b = blocking(call.l, call.rows, 1, kPickedBlockRows, kernels.tile_rows, kernels.multiple, in_one_run ? call.l.steps : most_steps,
                                32 * bytes + 32, kCachedBytes);
    const MultiplyRun multiply = (b.tiles > 1 ? kernels.multiply_decoded : kernels.multiply)[b.tile_rows - 1];

    static constexpr int64_t kCachedBytes = 1 << 18, kScratch = avx2::kInt8Steps * (avx2::kOffsetBytes + 4 * 8 * 64);

    void enter() const {}
    void leave() const {}

    uint8_t* inputs_of(uint8_t* tile, int64_t step) const { return tile + step * b.tile_rows * kStep * bytes; }
    float* units_of(uint8_t* tile, int64_t step) const {
        return reinterpret_cast<float*>(inputs_of(tile, call.l.steps)) + step / piece_steps * b.tile_rows;
    }

    // A thread's share of the rows `start` .. start + rows; the threads share pieces.
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t*, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t size = call.type == kF32 ? 4 : 2, width = (l.sparse ? 8 : 4) * bytes;
        const Range mine = part(b.tiles * pieces, thread, threads);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const int64_t top = at / pieces * b.tile_rows, step = at % pieces * piece_steps, first = step * kStep;
            const int64_t steps = std::min(piece_steps, l.steps - step), inputs = std::min(steps * kStep, l.k - first);
            uint8_t* tile = tiles + at / pieces * l.steps * b.step_bytes();
            for (int64_t i = 0; i < b.tile_rows; ++i) {
                const bool real = top + i < rows;
                const uint8_t* from = real ? static_cast<const uint8_t*>(call.row(start + top + i)) + first * size : nullptr;
                uint8_t* to = inputs_of(tile, step) + i * width;
                units_of(tile, step)[i] = kernels.quantize(from, call.type, real ? inputs : 0, int(steps), int(b.tile_rows), to);
            }
        }
    }

    void run(const uint8_t* weights, int64_t step, const Pieces& some, uint8_t* tiles, int64_t count, int64_t tile_bytes, uint8_t* decoded,
             float* c, int64_t c_stride) const {
        if (b.tiles > 1) {
            kernels.decode(weights, some, decoded);
            weights = decoded;
        }
        for (int64_t t = 0; t < count; ++t, tiles += tile_bytes, c += b.tile_rows * kPanel) {
            multiply(weights, some, inputs_of(tiles, step), units_of(tiles, step), c, c_stride);
        }
    }

    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        const int64_t first = pair * kPair;
        kernels.finish(sums, c_stride, rows, call.bias_at(first), call.bias_type, call.type, int(std::min<int64_t>(kPair, call.l.n - first)),
                       call.result(start, first), call.l.n * (call.type == kF32 ? 4 : 2));
    }
};

#endif  // SPARSIFY_X86

// --------------------------------------------------------------------------------------- bf16 kernels: the driver

#if SPARSIFY_COMPILES_AVX512BF16

static inline int parts_of(int type) { return type == kBf16 ? 1 : type == kF16 ? 2 : 3; }

// The column of sparse24_crossovers.h, whose rows are counted after splitting.
static int scheme_index(const Layout& l) { return (l.bits == 4 ? 0 : l.bits == 8 ? 1 : 2) + (l.sparse ? 0 : 3); }

// Rows `start` .. of the result from the sums of a pair; `stride` floats between rows of sums, `parts` of which make one, and
// `half_stride` between its panels.
static void finish_rows(const Call& call, int64_t pair, int64_t start, int64_t rows, int parts, const float* sums, int64_t stride, int64_t half_stride) {
    const int64_t first = pair * kPair;
    const int columns = int(std::min<int64_t>(kPair, call.l.n - first));
    bf16::finish_rows(sums, stride, half_stride, rows / parts, parts, call.bias_at(first), call.bias_type, call.type, columns,
                      call.result(start / parts, first), call.l.n * (call.type == kF32 ? 4 : 2));
}

static int run_direct(const Call& call) {
    const Layout& l = call.l;
    const bool floats = !l.sparse && l.bits == 8;  // that kernel multiplies in fp32
    const int parts = floats ? 1 : parts_of(call.type);
    const int64_t rows = call.rows * parts, padded = l.steps * kStep;
    const int64_t stride = floats ? padded * 4 : l.sparse ? l.steps * bf16::kQuadBytes : padded * 2;
    const bool as_it_is = !floats && !l.sparse && call.type == kBf16 && padded == l.k;
    const Shares shares(l.pairs);
    if (shares.failed()) return kOutOfMemory;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        uint8_t* x = own.get(size_t(rows) * stride + 3 * padded * 2);
        if (x == nullptr) {
            failed = true;
            return;
        }
        if (thread >= l.pairs) return;
        uint16_t* split = reinterpret_cast<uint16_t*>(x + rows * stride);
        for (int64_t m = 0; m < call.rows && !as_it_is; ++m) {
            if (floats) {
                widen_row(call, m, padded, reinterpret_cast<float*>(x + m * stride));
            } else if (l.sparse) {
                bf16::split_row(call.row(m), call.type, l.k, padded, split, padded);
                for (int p = 0; p < parts; ++p) bf16::expand_row(split + p * padded, l.steps, x + (m * parts + p) * stride);
            } else {
                bf16::split_row(call.row(m), call.type, l.k, padded, reinterpret_cast<uint16_t*>(x + m * parts * stride), padded);
            }
        }
        const uint8_t* from = as_it_is ? static_cast<const uint8_t*>(call.x) : x;
        const int64_t step = as_it_is ? call.ldx * 2 : stride;
        float sums[bf16::kMaxDirectRows * kPair];
        shares.each(thread, threads, 0, [&](int64_t p) {
            for (int64_t r = 0; r < rows; r += 4) {
                const int some = int(std::min<int64_t>(4, rows - r));
                bf16::direct(l, some)(l, l.pair(call.blob, p), l.scales(call.blob, p), from + r * step, step, sums + r * kPair);
            }
            finish_rows(call, p, 0, rows, parts, sums, kPair, kPanel);
        });
    });
    return failed ? kOutOfMemory : kOk;
}

constexpr int64_t kBlockRows = 288;  // most rows of a block, which a decoded piece of dense weights serves

// With more rows of bf16 than this, multiplying the decoded weights by their scales costs less than scaling sums per group.
// It rounds each weight to bf16, as storing the model densely would.
constexpr int64_t kFoldRows = 64;

static bool folds(const Call& call) { return call.l.scaled() && call.type == kBf16 && call.rows > kFoldRows; }

// Whether runs are to be short. Dense 8-bit codes are so many bytes that memory should bring what is prefetched while a run is
// decoded while few rows are multiplied with that run, and not all at once.
static bool wants_short_runs(const Call& call) { return !call.l.sparse && call.l.bits == 8 && call.rows <= 32; }

// Many rows by decoded panels: tiles of rows that AMX (up to 16) or vdpbf16ps (up to 12) multiplies with dense pairs of bf16.
struct DecodedWay {
    const Call& call;
    const bool amx;
    const int parts = parts_of(call.type);
    const Blocking b = blocking(call.l, call.rows * parts, parts, kBlockRows, amx ? 16 : bf16::kDotRows, 4,
                                !amx && wants_short_runs(call) ? bf16::kSub / 2 : even_run(call.l, bf16::kSub));
    const bool folded = folds(call), unscaled = folded || !call.l.scaled();
    const bf16::Decode decode = bf16::decoder(call.l);
#if SPARSIFY_COMPILES_AMX
    const bf16::MultiplyTile multiply = amx ? bf16::multiplier_amx(int(b.tile_rows)) : bf16::multiplier_dot(int(b.tile_rows));
#else
    const bf16::MultiplyTile multiply = bf16::multiplier_dot(int(b.tile_rows));
#endif

    static constexpr int64_t kPanelBytes = bf16::kSub * bf16::kStepBytes, kScratch = 2 * kPanelBytes;

    void enter() const {
#if SPARSIFY_COMPILES_AMX
        if (amx) bf16::enter_amx(int(b.tile_rows));
#endif
    }

    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        finish_rows(call, pair, start, rows, parts, sums, kPanel, c_stride);
    }
    void leave() const {
#if SPARSIFY_COMPILES_AMX
        if (amx) bf16::leave_amx();
#endif
    }

    // A thread's share of the rows `start` .. start + rows -> [tile][step][row of the tile][32 inputs]
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t* split, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t padded = l.steps * kStep;
        const Range mine = part((b.sums_rows() + parts - 1) / parts, thread, threads);
        if (parts == 1) {
            for (int64_t m = mine.begin, last; m < mine.end; m = last) {
                last = std::min(mine.end, (m / b.tile_rows + 1) * b.tile_rows);
                const int real = int(std::max<int64_t>(0, std::min(last, rows) - m));
                uint8_t* to = tiles + m / b.tile_rows * l.steps * b.step_bytes() + m % b.tile_rows * 64;
                const void* from = real ? call.row(start + m) : nullptr;
                bf16::pack_rows(static_cast<const uint16_t*>(from), call.ldx, real, int(last - m) - real, l.k, to, b.step_bytes());
            }
            return;
        }
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const bool real = m * parts < rows;
            if (real) bf16::split_row(call.row(start / parts + m), call.type, l.k, padded, split, padded);
            for (int p = 0; p < parts; ++p) {
                const int64_t r = m * parts + p;
                if (r >= b.sums_rows()) continue;
                uint8_t* to = tiles + r / b.tile_rows * l.steps * b.step_bytes() + r % b.tile_rows * 64;
                for (int64_t s = 0; s < l.steps; ++s) {
                    if (real) {
                        std::memcpy(to + s * b.step_bytes(), split + p * padded + s * kStep, 64);
                    } else {
                        std::memset(to + s * b.step_bytes(), 0, 64);
                    }
                }
            }
        }
    }

    // Sums of `count` tiles of activations, tile_bytes apart, += their products with the run of weights that begins with `step`.
    // c: [panel][row][16]
    void run(const uint8_t* weights, int64_t step, const Pieces& pieces, uint8_t* tiles, int64_t count, int64_t tile_bytes,
             uint8_t* decoded, float* c, int64_t c_stride) const {
        const int steps = pieces.pieces * pieces.steps_per_piece;
        decode(weights, steps, decoded, kPanelBytes);
        for (int half = 0; half < 2 && folded; ++half) bf16::scale_decoded(decoded + half * kPanelBytes, pieces, half);
        const Pieces left = unscaled ? Pieces{steps, 1, nullptr, 0} : pieces;
        const uint8_t* a = tiles + step * b.step_bytes();
        for (int64_t t = 0; t < count; ++t, a += tile_bytes, c += b.tile_rows * kPanel) {
#if SPARSIFY_COMPILES_AMX
            if (amx && unscaled) {
                bf16::multiply_scaled_amx<false>(a, decoded, kPanelBytes, steps, int(b.tile_rows), c, c_stride);
                continue;
            }
#endif
            multiply(a, decoded, kPanelBytes, left, c, c_stride);
        }
    }
};

// Rows of a 2:4 linear without AMX: tiles of up to 8 rows, from which permutes pick what the weights kept.
struct SelectWay {
    const Call& call;
    const int parts = parts_of(call.type);
    const bool in_one_run = call.rows * parts <= bf16::kSelectRows;  // no other tile reads it again
    const Blocking b = blocking(call.l, call.rows * parts, parts, kPickedBlockRows, bf16::kSelectRows, 1,
                                in_one_run ? call.l.steps : even_run(call.l, bf16::kSelectSteps));
    const bool folded = folds(call);
    const bf16::Select select = bf16::selector(folded ? 16 : call.l.bits, int(b.tile_rows));

    static constexpr int64_t kScratch = bf16::kSelectSteps * 2 * bf16::kFoldedBytes;

    void enter() const {}
    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        finish_rows(call, pair, start, rows, parts, sums, kPanel, c_stride);
    }
    void leave() const {}

    // A thread's share of the rows `start` .. start + rows -> [tile][step][quad][row of the tile][4 inputs]. The threads share steps,
    // not rows, so that no two of them write to one cache line.
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t* split, uint8_t* tiles) const {
        const Layout& l = call.l;
        const int64_t size = call.type == kF32 ? 4 : 2;
        const Range mine = part(b.tiles * l.steps, thread, threads);
        for (int64_t at = mine.begin, end; at < mine.end; at = end) {  // what of them is in one tile
            const int64_t tile = at / l.steps, top = tile * b.tile_rows, given = std::min(b.tile_rows, rows - top);
            const uint8_t* row[bf16::kSelectRows];
            for (int64_t i = 0; i < given; ++i) row[i] = static_cast<const uint8_t*>(call.row((start + top + i) / parts));
            end = std::min(mine.end, (tile + 1) * l.steps);
            for (int64_t s = at; s < end; ++s) {
                const int64_t first = (s - tile * l.steps) * kStep, inputs = std::min<int64_t>(kStep, l.k - first);
                uint8_t* to = tiles + s * b.step_bytes();
                if (given == bf16::kSelectRows && parts == 1 && inputs == kStep) {
                    bf16::transpose_quads(row, first * size, to);
                    continue;
                }
                for (int64_t i = 0; i < given; ++i) {
                    const uint8_t* from = row[i] + first * size;
                    if (parts > 1 || inputs < kStep) {
                        if (i == 0 || (top + i) % parts == 0) bf16::split_row(from, call.type, inputs, kStep, split, kStep);
                        from = reinterpret_cast<const uint8_t*>(split + (top + i) % parts * kStep);
                    }
                    for (int q = 0; q < 8; ++q) std::memcpy(to + (q * b.tile_rows + i) * 8, from + q * 8, 8);
                }
                for (int64_t i = given; i < b.tile_rows; ++i) {
                    for (int q = 0; q < 8; ++q) std::memset(to + (q * b.tile_rows + i) * 8, 0, 8);
                }
            }
        }
    }

    void run(const uint8_t* weights, int64_t step, Pieces pieces, uint8_t* tiles, int64_t count, int64_t tile_bytes, uint8_t* scratch,
             float* c, int64_t c_stride) const {
        if (folded) {
            bf16::folder(call.l)(weights, pieces, scratch);
            weights = scratch;
            pieces = {pieces.steps_per_piece * pieces.pieces, 1, nullptr, 0};
        }
        const uint8_t* a = tiles + step * b.step_bytes();
        for (int64_t t = 0; t < count; ++t) select(weights, pieces, a + t * tile_bytes, c + t * b.tile_rows * kPanel, c_stride);
    }
};

// Rows in int8 without AMX (sparse24_int8.h). A tile: [step][vector][row] bytes, then [piece][row] scales.
struct Int8Way {
    const Call& call;
    const int parts = 1;
    const int64_t piece_steps = std::min<int64_t>(call.l.steps_per_group, int8::kRunSteps), pieces = (call.l.steps + piece_steps - 1) / piece_steps;
    const bool in_one_run = call.rows <= int8::kDotRows && call.l.steps_per_group <= int8::kRunSteps;  // no other tile reads it again
    const Blocking b = blocking(call.l, call.rows, 1, kPickedBlockRows, int8::kDotRows, 1, in_one_run ? call.l.steps : int8::kRunSteps);
    const int8::DecodeRun decode = int8::run_decoder(call.l, b.tiles);  // or null
    const int8::MultiplyRun multiply = decode ? int8::decoded_multiplier(int(b.tile_rows)) : int8::multiplier(call.l, int(b.tile_rows));

    static constexpr int64_t kScratch = int8::kRunSteps * (2 * int8::kDecodedBytes + int8::kPieceBytes);

    void enter() const {}
    void finish(int64_t pair, int64_t start, int64_t rows, const float* sums, int64_t c_stride) const {
        finish_rows(call, pair, start, rows, parts, sums, kPanel, c_stride);
    }
    void leave() const {}

    uint8_t* inputs_of(uint8_t* tile, int64_t step) const { return tile + step * b.tile_rows * kStep; }
    float* units_of(uint8_t* tile, int64_t step) const {
        return reinterpret_cast<float*>(inputs_of(tile, call.l.steps)) + step / piece_steps * b.tile_rows;
    }

    // A thread's share of the rows `start` .. start + rows; the threads share pieces.
    void pack(int64_t start, int64_t rows, int thread, int threads, uint16_t*, uint8_t* tiles) const {
        const Layout& l = call.l;
        const Range mine = part(b.tiles * pieces, thread, threads);
        for (int64_t at = mine.begin; at < mine.end; ++at) {
            const int64_t top = at / pieces * b.tile_rows, step = at % pieces * piece_steps, first = step * kStep;
            const int64_t steps = std::min(piece_steps, l.steps - step), inputs = std::min(steps * kStep, l.k - first);
            uint8_t* tile = tiles + at / pieces * l.steps * b.step_bytes();
            for (int64_t i = 0; i < b.tile_rows; ++i) {
                const bool real = top + i < rows;
                const uint8_t* from = real ? static_cast<const uint8_t*>(call.row(start + top + i)) + first * (call.type == kF32 ? 4 : 2) : nullptr;
                uint8_t* to = inputs_of(tile, step) + i * (l.sparse ? 8 : 4);
                units_of(tile, step)[i] = int8::quantize_piece(l, from, call.type, real ? inputs : 0, int(steps), int(b.tile_rows), to);
            }
        }
    }

    void run(const uint8_t* weights, int64_t step, const Pieces& some, uint8_t* tiles, int64_t count, int64_t tile_bytes,
             uint8_t* decoded, float* c, int64_t c_stride) const {
        if (decode != nullptr) {
            decode(weights, some, decoded);
            weights = decoded;
        }
        for (int64_t t = 0; t < count; ++t, tiles += tile_bytes, c += b.tile_rows * kPanel) {
            multiply(weights, some, inputs_of(tiles, step), units_of(tiles, step), c, c_stride);
        }
    }
};

static int run_tiles(const Call& call, bool amx) {
    if (amx || !call.l.sparse) return run_blocks(call, DecodedWay{call, amx});
    return run_blocks(call, SelectWay{call});
}

// One row of bf16 in fixed point (sparse24_fixed.h).
static int run_one_fixed(const Call& call) {
    const Layout& l = call.l;
    const fixed::Cut cut = fixed::cut(l);
    const int64_t padded = l.steps * kStep, expanded = l.steps * bf16::kQuadBytes;
    const Shares shares(l.pairs);
    if (shares.failed()) return kOutOfMemory;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k, [&](int thread, int threads) {
        uint8_t* x = own.get(size_t(expanded + padded * 2 + cut.pieces * 4));
        if (x == nullptr) {
            failed = true;
            return;
        }
        if (thread >= l.pairs) return;
        int16_t* words = reinterpret_cast<int16_t*>(x + expanded);
        float* units = reinterpret_cast<float*>(words + padded);
        fixed::to_words(l, cut, static_cast<const uint16_t*>(call.x), padded, 0, words, units, 1);
        bf16::expand_row(reinterpret_cast<const uint16_t*>(words), l.steps, x);
        shares.each(thread, threads, 0, [&](int64_t p) {
            float sums[kPair];
            fixed::direct_fixed(l, cut, l.pair(call.blob, p), l.scales(call.blob, p), x, units, sums);
            finish_rows(call, p, 0, 1, 1, sums, kPair, kPanel);
        });
    });
    return failed ? kOutOfMemory : kOk;
}

#if SPARSIFY_COMPILES_AMX

// Rows of bf16 in fixed point, all of them at once.
static int run_fixed(const Call& call) {
    const Layout& l = call.l;
    const fixed::Cut cut = fixed::cut(l);
    const int blocks = int((call.rows + 15) / 16), even = int((call.rows + blocks - 1) / blocks);  // rows of a block
    const int block_rows = even > 8 ? std::max((even + 3) / 4 * 4, 12) : (even + 1) / 2 * 2;
    const int64_t all_rows = int64_t(blocks) * block_rows, block_bytes = int64_t(block_rows) * 128;
    const int64_t tile_bytes = blocks * block_bytes, tiles = fixed::tiles_of(int(l.steps)), padded = tiles * fixed::kTileInputs;
    uint8_t* x = shared.get(size_t(tiles * tile_bytes + cut.pieces * all_rows * 4));
    const Shares shares(l.pairs);
    if (x == nullptr || shares.failed()) return kOutOfMemory;
    float* units = reinterpret_cast<float*>(x + tiles * tile_bytes);
    const fixed::Multiply multiply = fixed::multiplier(l, block_rows);
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        const size_t sums_bytes = size_t(all_rows) * kPair * 4;
        float* sums = reinterpret_cast<float*>(own.get(sums_bytes + padded * 2));  // [panel][row][16]
        if (sums == nullptr) failed = true;
        const Range mine = sums ? part(all_rows, thread, threads) : Range{0, 0};
        int16_t* words = reinterpret_cast<int16_t*>(reinterpret_cast<uint8_t*>(sums) + sums_bytes);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            uint8_t* high = x + m / block_rows * block_bytes + m % block_rows * 64;
            uint8_t* low = high + block_rows * 64;
            if (m < call.rows) {
                const int shift = l.bits == 4 ? 4 : 0;  // 4-bit codes are decoded times 16
                fixed::to_words(l, cut, static_cast<const uint16_t*>(call.row(m)), padded, shift, words, units + m, all_rows);
                fixed::to_tiles(l, words, tiles, high, low, tile_bytes);
                continue;
            }
            for (int64_t t = 0; t < tiles; ++t) {
                std::memset(high + t * tile_bytes, 0, 64);
                std::memset(low + t * tile_bytes, 0, 64);
            }
            for (int64_t piece = 0; piece < cut.pieces; ++piece) units[piece * all_rows + m] = 0;
        }
        barrier();
        if (failed) return;
        bf16::enter_amx(block_rows > 8 ? block_rows : 2 * block_rows);
        const int64_t c_stride = all_rows * kPanel;
        shares.each(thread, threads, 0, [&](int64_t p) {
            std::memset(sums, 0, sums_bytes);
            multiply(l, cut, l.pair(call.blob, p), l.scales(call.blob, p), x, units, blocks, sums, c_stride);
            finish_rows(call, p, 0, call.rows, 1, sums, kPanel, c_stride);
        });
        bf16::leave_amx();
    });
    return failed ? kOutOfMemory : kOk;
}

// Rows in int8 in AMX tiles (sparse24_int8.h).
static int run_int8_tiles(const Call& call) {
    const Layout& l = call.l;
    const int64_t steps = (l.steps + int8::kSteps - 1) / int8::kSteps, padded = steps * int8::kSteps * kStep;
    const Blocking b = blocking(l, call.rows, 1, kBlockRows, 16, 4, bf16::kSub);
    const int64_t tile_bytes = steps * b.step_bytes(), sums_rows = b.tiles * b.tile_rows;
    uint8_t* tiles = shared.get(size_t(b.tiles) * tile_bytes + sums_rows * 4);
    const Shares shares(l.pairs);
    if (tiles == nullptr || shares.failed()) return kOutOfMemory;
    float* row_scales = reinterpret_cast<float*>(tiles + b.tiles * tile_bytes);
    const int8::Decode decode = int8::decoder(l);
    constexpr int sub = 2 * bf16::kSub;
    std::atomic<bool> failed{false};
    in_threads(l.n * l.k * call.rows, [&](int thread, int threads) {
        const size_t panel_bytes = sub / int8::kSteps * int8::kStepBytes, sums_bytes = size_t(sums_rows) * kPair * 4;
        const size_t factor_bytes = size_t(l.groups) * 128;
        uint8_t* mine = own.get(2 * panel_bytes + sums_bytes + factor_bytes + padded);
        if (mine == nullptr) failed = true;
        barrier();
        if (failed) return;
        uint8_t* decoded = mine;
        int32_t* c = reinterpret_cast<int32_t*>(mine + 2 * panel_bytes);  // [panel][row][16]
        __m512i* factors = reinterpret_cast<__m512i*>(mine + 2 * panel_bytes + sums_bytes);
        int8_t* row = reinterpret_cast<int8_t*>(mine + 2 * panel_bytes + sums_bytes + factor_bytes);
        const int64_t c_stride = sums_rows * kPanel;
        bf16::enter_amx(int(b.tile_rows));
        for (int64_t start = 0; start < call.rows; start += b.rows) {
            const int64_t here = std::min(b.rows, call.rows - start), used_tiles = (here + b.tile_rows - 1) / b.tile_rows;
            const Range rows = part(sums_rows, thread, threads);
            for (int64_t m = rows.begin; m < rows.end; ++m) {
                if (m < here) row_scales[m] = int8::quantize_row(call.row(start + m), call.type, l.k, padded, row);
                uint8_t* to = tiles + m / b.tile_rows * tile_bytes + m % b.tile_rows * 64;
                for (int64_t s = 0; s < steps; ++s) {
                    if (m < here) std::memcpy(to + s * b.step_bytes(), row + s * 64, 64);
                    else std::memset(to + s * b.step_bytes(), 0, 64);
                }
            }
            barrier();
            shares.each(thread, threads, start / b.rows, [&](int64_t p) {
                float sw[kPair];
                int8::output_scales(l, l.scales(call.blob, p), sw, factors);
                std::memset(c, 0, sums_bytes);
                for (int64_t s = 0; s < l.steps; s += sub) {
                    const int some = int(std::min<int64_t>(sub, l.steps - s)), wide = (some + 1) / int8::kSteps;
                    decode(l, l.pair(call.blob, p) + s * 2 * l.step_bytes, s, some, factors, decoded, panel_bytes);
                    for (int64_t t = 0; t < used_tiles; ++t) {
                        const uint8_t* a = tiles + t * tile_bytes + s / int8::kSteps * b.step_bytes();
                        bf16::multiply_scaled_amx<true>(a, decoded, panel_bytes, wide, int(b.tile_rows), c + t * b.tile_rows * kPanel, c_stride);
                    }
                }
                float* sums = reinterpret_cast<float*>(c);  // in place
                for (int64_t i = 0; i < 2 * sums_rows; ++i) {
                    const int64_t m = i % sums_rows;
                    int8::scale_row(c + i * kPanel, m < here ? row_scales[m] : 0.0f, sw + i / sums_rows * kPanel, sums + i * kPanel);
                }
                finish_rows(call, p, start, here, 1, sums, kPanel, c_stride);
            });
            barrier();
        }
        bf16::leave_amx();
    });
    return failed ? kOutOfMemory : kOk;
}

#endif  // SPARSIFY_COMPILES_AMX

// The fewest rows that int8 compute serves.
static int64_t first_int8_row(bool amx) { return amx ? bf16::kMaxDirectRows + 1 : kInt8Rows; }

static int run_int8(const Call& call, bool amx) {
#if SPARSIFY_COMPILES_AMX
    if (amx) return run_int8_tiles(call);
#endif
    (void)amx;
    return run_blocks(call, Int8Way{call});
}

#endif  // SPARSIFY_COMPILES_AVX512BF16

// ------------------------------------------------------------------------------------------------------ dispatch

// `requested`, or -1 when this machine cannot run it; the fastest level of this machine for a request of -1.
static int best_level(int requested) {
    static const sparsify::CpuFeatures cpu = sparsify::detect_cpu();
    static const bool bf16 = SPARSIFY_COMPILES_AVX512BF16 && cpu.avx512_bf16 && cpu.avx512_vbmi && cpu.avx512_vnni;
    static const bool amx = SPARSIFY_COMPILES_AMX && bf16 && cpu.amx_bf16 && cpu.amx_int8 && sparsify::request_amx();
    static const bool vnni = SPARSIFY_COMPILES_AVXVNNI && cpu.avx_vnni;
    const bool runs[kLevels] = {true, cpu.avx2, vnni, cpu.avx512, bf16, amx};
    for (int level = kLevels - 1; level >= 0; --level) {
        if (runs[level] && (requested < 0 || level == requested)) return level;
    }
    return -1;
}

static F32Kernels f32_kernels(const Layout& l, int level) {
#if SPARSIFY_X86
    if (level >= kAvx512) return avx512::kernels(l);
    if (level >= kAvx2) return avx2::kernels(l);
#endif
    return portable::kernels(l);
}

#if SPARSIFY_X86

constexpr int64_t kFewRows = 4;  // where products of bytes beat those of fp32 for few rows alone, most of these

static ByteKernels byte_kernels(const Layout& l, int parts, int level) {
#if SPARSIFY_COMPILES_AVXVNNI
    if (level == kAvxVnni) return avxvnni::byte_kernels(l, parts);
#endif
    (void)level;
    return avx2::byte_kernels(l, parts);
}

// Bytes of an activation as sparse24_bytes.h takes them, 0 where fp32 kernels serve.
static int bytes_of(const Call& call, int level, int options) {
    if (level < kAvx2 || !call.l.scaled() || options & (kForceDirect | kForceTiles)) return 0;
    if (options & kInt8 && call.rows >= kInt8Rows) return 1;
    const int bytes = call.type == kBf16 ? 2 : 3;
    const bool halves = call.l.bits == 8 && level != kAvxVnni;  // each product of a code is two
    const bool slower = (halves && (bytes == 3 || !call.l.sparse)) || (level == kAvx512 && bytes == 3);
    return slower && call.rows > kFewRows ? 0 : bytes;
}

#endif  // SPARSIFY_X86

#if SPARSIFY_COMPILES_AMX

// Whether AMX multiplies this call in fixed point.
static bool takes_fixed(const Call& call, int options) {
    if (call.type != kBf16 || options & (kForceDirect | kForceTiles) || !fixed::fits_tiles(call.l)) return false;
    if (options & kForceFixed) return true;
    if (options & kInt8 && call.rows >= first_int8_row(true)) return false;
    const int* rows = kFixedRows[scheme_index(call.l)];
    return call.rows >= rows[0] && call.rows <= rows[1];
}

#endif  // SPARSIFY_COMPILES_AMX

static int run(const Call& call, int level, int options) {
#if SPARSIFY_COMPILES_AVX512BF16
    const bool fits = call.l.bits < 16 || call.l.stored_type == kBf16;  // values in fp16 need fp32 products
    if (level >= kAvx512Bf16 && fits) {
        const bool amx = level == kAmx;
#if SPARSIFY_COMPILES_AMX
        if (amx && takes_fixed(call, options)) return run_fixed(call);
#endif
        const bool forced = options & (kForceDirect | kForceTiles);
        if (call.rows == 1 && call.type == kBf16 && call.l.sparse && call.l.bits == 4 && !forced) return run_one_fixed(call);
        if (options & kInt8 && !(options & kForceDirect) && call.l.scaled() && call.rows >= first_int8_row(amx)) return run_int8(call, amx);
        const int64_t rows = call.rows * (call.l.sparse || call.l.bits == 4 ? parts_of(call.type) : 1);
        const int64_t limit = options & kForceDirect ? bf16::kMaxDirectRows : options & kForceTiles ? 0 : kDirectRows[amx][scheme_index(call.l)];
        if (rows <= std::min<int64_t>(bf16::kMaxDirectRows, limit)) return run_direct(call);
        return run_tiles(call, amx);
    }
#endif
#if SPARSIFY_X86
    if (const int bytes = bytes_of(call, level, options)) return run_blocks(call, BytesWay{call, byte_kernels(call.l, bytes, level), bytes});
#endif
    (void)options;
    return run_f32(call, f32_kernels(call.l, level));
}

}  // namespace sparse24

// ------------------------------------------------------------------------------------------------------ interface

extern "C" {

// The level that `requested` (0 portable, 1 avx2, 2 avxvnni, 3 avx512, 4 avx512bf16, 5 amx; -1 the fastest) comes to here, -1 if this
// machine cannot run it.
int sparse24_level(int requested) { return sparse24::best_level(requested); }

// Bytes of the packed form, -1 when no kernel runs such a linear. stored_type: of scales or values, 0 bf16, 1 fp16.
int64_t sparse24_packed_bytes(int64_t n, int64_t k, int bits, int64_t group, int sparse, int stored_type) {
    sparse24::Layout l;
    return sparse24::make_layout(n, k, bits, group, sparse != 0, stored_type, &l) ? l.total_bytes : -1;
}

// Repack a checkpoint's tensors (sizes and contents already checked). Each thread writes, and so places in its memory, the
// pairs that it will read. `out`: 64-byte aligned.
int sparse24_pack(int64_t n, int64_t k, int bits, int64_t group, int sparse, int stored_type, const void* packed,
                  const void* meta, const void* scale, const void* values, void* out) {
    using namespace sparse24;
    Layout l;
    if (!make_layout(n, k, bits, group, sparse != 0, stored_type, &l)) return kBadArgument;
    const Source source{static_cast<const uint8_t*>(packed), static_cast<const uint8_t*>(meta),
                        static_cast<const uint16_t*>(scale), static_cast<const uint16_t*>(values)};
    uint8_t* blob = static_cast<uint8_t*>(out);
    const Header header{kMagic, n, k, l.group, bits, l.sparse, stored_type, 0};
    want_huge_pages(blob, l.total_bytes);
    std::memset(blob, 0, kHeader);
    std::memcpy(blob, &header, sizeof header);
    in_threads(n * k, [&](int thread, int threads) {
        const Range pairs = part(l.pairs, thread, threads);
        for (int64_t p = pairs.begin; p < pairs.end; ++p) pack_pair(l, source, p, blob);
    });
    return kOk;
}

// The options of calls that give none.
void sparse24_set_options(void* packed, int options) {
    sparse24::Header header;
    std::memcpy(&header, packed, sizeof header);
    header.options = options;
    std::memcpy(packed, &header, sizeof header);
}

// y [rows, n] = x [rows, k] W' + bias. type: of x and y, 0 bf16, 1 fp16, 2 fp32; ldx: elements between rows of x; bias: n
// values of bias_type, or null; options: the level plus 1, plus kInt8 and others
// (above); 0: as set for this linear, else the fastest level.
int sparse24_linear(const void* packed, int64_t packed_bytes, const void* x, int type, int64_t rows, int64_t k, int64_t ldx,
                    const void* bias, int bias_type, void* y, int64_t n, int options) {
    using namespace sparse24;
    Call call;
    if (!read_layout(static_cast<const uint8_t*>(packed), packed_bytes, &call.l)) return kBadArgument;
    if (call.l.k != k || call.l.n != n || rows < 0 || type < kBf16 || type > kF32 || (rows > 1 && ldx < k)) return kBadArgument;
    if (options == 0) options = reinterpret_cast<const Header*>(packed)->options;
    const int chosen = best_level(options % kFirstOption - 1);
    if (chosen < 0) return kUnsupported;
    if (rows == 0) return kOk;
    call.blob = static_cast<const uint8_t*>(packed);
    call.x = x, call.type = type, call.rows = rows, call.ldx = ldx;
    call.bias = bias, call.bias_type = bias_type, call.y = y;
    return run(call, chosen, options);
}

// As sparse24_linear, by the plain loops of sparse24_twin.h, one thread; for linears with scales. way: one of twin::Way.
int sparse24_twin(const void* packed, int64_t packed_bytes, const void* x, int type, int64_t rows, int64_t k, int64_t ldx,
                  const void* bias, int bias_type, void* y, int64_t n, int way) {
    using namespace sparse24;
    Call call;
    if (!read_layout(static_cast<const uint8_t*>(packed), packed_bytes, &call.l) || !call.l.scaled()) return kBadArgument;
    if (call.l.k != k || call.l.n != n || type < kBf16 || type > kF32 || way < 0 || way >= twin::kTwinWays) return kBadArgument;
    call.blob = static_cast<const uint8_t*>(packed);
    call.x = x, call.type = type, call.rows = rows, call.ldx = ldx;
    call.bias = bias, call.bias_type = bias_type, call.y = y;
    std::vector<float> row(static_cast<size_t>(k)), sums(static_cast<size_t>(call.l.pairs * kPair));
    for (int64_t m = 0; m < rows; ++m) {
        widen_row(call, m, k, row.data());
        twin::multiply(call.l, call.blob, row, way, type == kBf16 ? 2 : 3, sums.data());
        for (int64_t p = 0; p < call.l.pairs; ++p) finish_f32(call, p, m, sums.data() + p * kPair);
    }
    return kOk;
}

}  // extern "C"
