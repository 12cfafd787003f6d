// What this machine can do at most: bytes read per second, and multiply-adds per second in fp32 and bf16.
//
// Kernels are measured against these. Both probes do their work for real and hand back its result, so that a compiler
// cannot leave any of it out and a test can check it: reading returns the sum of all 64-bit words, and arithmetic
// multiplies ones with ones, so that the sum of its accumulators is the number of multiply-adds that ran.
//
// Levels are numbered as in sparsify/processor.py. A level without bf16 instructions of its own has no bf16 peak: there a
// kernel widens to fp32 and is bound by the fp32 one. AVX-VNNI adds integer instructions only: its peaks are AVX2's.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "levels.h"

#if SPARSIFY_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from within GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))
#define TARGET_512 TARGET("avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace {

using namespace sparsify;

enum Status { kOk = 0, kBadArgument = 1, kUnsupported = 2 };
enum Kind { kFloat32 = 0, kBfloat16 = 1 };

constexpr int64_t kLine = 64;
// Multiply-adds per accumulator between two emptyings: the largest sum, 32 per step with AMX, stays below 2^24, up to
// which fp32 counts without rounding.
constexpr int64_t kSteps = 8192;

// --------------------------------------------------------------------------------------------------- reading

// Sum of the 64-bit words of `lines` cache lines at p, read as `streams` runs side by side, `ahead` bytes prefetched.
typedef uint64_t (*Reader)(const char* p, int64_t lines, int streams, int64_t ahead);

typedef uint64_t Word2 __attribute__((vector_size(16)));

struct PlainLine {
    Word2 sum[4] = {};
    void add(const char* p, int64_t ahead) {
        __builtin_prefetch(p + ahead);
        for (int i = 0; i < 4; ++i) {
            Word2 value;
            std::memcpy(&value, p + 16 * i, sizeof value);
            sum[i] += value;
        }
    }
    uint64_t total() const {
        uint64_t all = 0;
        for (int i = 0; i < 4; ++i) all += sum[i][0] + sum[i][1];
        return all;
    }
};

template <int S>
uint64_t read_plain_streams(const char* p, int64_t lines, int64_t ahead) {
    PlainLine sums;
    const int64_t run = lines / S * kLine;
    for (int64_t at = 0; at < run; at += kLine)
        for (int s = 0; s < S; ++s) sums.add(p + s * run + at, ahead);
    for (int64_t at = S * run; at < lines * kLine; at += kLine) sums.add(p + at, 0);
    return sums.total();
}

uint64_t read_plain(const char* p, int64_t lines, int streams, int64_t ahead) {
    if (streams == 4) return read_plain_streams<4>(p, lines, ahead);
    if (streams == 2) return read_plain_streams<2>(p, lines, ahead);
    return read_plain_streams<1>(p, lines, ahead);
}

#if SPARSIFY_X86

template <int S>
TARGET("avx2")
uint64_t read_avx2_streams(const char* p, int64_t lines, int64_t ahead) {
    __m256i low[S], high[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) low[s] = high[s] = _mm256_setzero_si256();
    const int64_t run = lines / S * kLine;
    for (int64_t at = 0; at < run; at += kLine) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const char* line = p + s * run + at;
            _mm_prefetch(line + ahead, _MM_HINT_T0);
            low[s] = _mm256_add_epi64(low[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
            high[s] = _mm256_add_epi64(high[s], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32)));
        }
    }
    uint64_t total = read_plain_streams<1>(p + S * run, lines - S * (run / kLine), 0);
    for (int s = 0; s < S; ++s) {
        alignas(32) uint64_t words[4];
        _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_add_epi64(low[s], high[s]));
        total += words[0] + words[1] + words[2] + words[3];
    }
    return total;
}

uint64_t read_avx2(const char* p, int64_t lines, int streams, int64_t ahead) {
    if (streams == 4) return read_avx2_streams<4>(p, lines, ahead);
    if (streams == 2) return read_avx2_streams<2>(p, lines, ahead);
    return read_avx2_streams<1>(p, lines, ahead);
}

template <int S>
TARGET_512 uint64_t read_avx512_streams(const char* p, int64_t lines, int64_t ahead) {
    __m512i sum[S], other[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) sum[s] = other[s] = _mm512_setzero_si512();
    const int64_t run = lines / S / 2 * 2 * kLine;  // two lines per step
    for (int64_t at = 0; at < run; at += 2 * kLine) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const char* line = p + s * run + at;
            _mm_prefetch(line + ahead, _MM_HINT_T0);
            _mm_prefetch(line + ahead + kLine, _MM_HINT_T0);
            sum[s] = _mm512_add_epi64(sum[s], _mm512_loadu_si512(line));
            other[s] = _mm512_add_epi64(other[s], _mm512_loadu_si512(line + kLine));
        }
    }
    uint64_t total = read_plain_streams<1>(p + S * run, lines - S * (run / kLine), 0);
    for (int s = 0; s < S; ++s) total += uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(sum[s], other[s])));
    return total;
}

uint64_t read_avx512(const char* p, int64_t lines, int streams, int64_t ahead) {
    if (streams == 4) return read_avx512_streams<4>(p, lines, ahead);
    if (streams == 2) return read_avx512_streams<2>(p, lines, ahead);
    return read_avx512_streams<1>(p, lines, ahead);
}

#endif  // SPARSIFY_X86

// ------------------------------------------------------------------------------------------------ arithmetic

struct Multiplier {
    int64_t multiply_adds;  // of one step
    double (*run)();        // kSteps steps from zero; returns the sum of all accumulators
    void (*enter)();        // called by each thread before its first run, and after its last
    void (*leave)();
};

void nothing() {}

// Sums that hold the same are one sum to a compiler, unless it cannot know that they do.
#define FORGET(sum) __asm__ volatile("" : "+m"(sum))

// Four floats as one value: SSE, NEON, or whatever the baseline of the architecture has.
typedef float Float4 __attribute__((vector_size(16)));

constexpr int kPlainSums = 8;

double multiply_plain() {
    volatile float one = 1;  // what comes out of it is not known to the compiler
    const float a = one, b = one;
    const Float4 x = {a, a, a, a};
    Float4 y = {b, b, b, b};
    Float4 sum[kPlainSums] = {};
    FORGET(sum);
    for (int64_t step = 0; step < kSteps; ++step) {
        // Without this a compiler may compute x * y once.
        __asm__ volatile("" : : "r"(&y) : "memory");
#pragma GCC unroll 8
        for (int i = 0; i < kPlainSums; ++i) sum[i] += x * y;
    }
    double total = 0;
    for (int i = 0; i < kPlainSums; ++i)
        for (int j = 0; j < 4; ++j) total += sum[i][j];
    return total;
}

#if SPARSIFY_X86

constexpr int kAvx2Sums = 12, kAvx512Sums = 16;

TARGET("avx2,fma") double multiply_avx2() {
    volatile float one = 1;
    const __m256 x = _mm256_set1_ps(one), y = _mm256_set1_ps(one);
    __m256 sum[kAvx2Sums];
#pragma GCC unroll 12
    for (int i = 0; i < kAvx2Sums; ++i) sum[i] = _mm256_setzero_ps();
    FORGET(sum);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kAvx2Sums; ++i) sum[i] = _mm256_fmadd_ps(x, y, sum[i]);
    }
    double total = 0;
    for (int i = 0; i < kAvx2Sums; ++i) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, sum[i]);
        for (float lane : lanes) total += lane;
    }
    return total;
}

TARGET_512 double multiply_avx512() {
    volatile float one = 1;
    const __m512 x = _mm512_set1_ps(one), y = _mm512_set1_ps(one);
    __m512 sum[kAvx512Sums];
#pragma GCC unroll 16
    for (int i = 0; i < kAvx512Sums; ++i) sum[i] = _mm512_setzero_ps();
    FORGET(sum);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < kAvx512Sums; ++i) sum[i] = _mm512_fmadd_ps(x, y, sum[i]);
    }
    double total = 0;
    for (int i = 0; i < kAvx512Sums; ++i) total += double(_mm512_reduce_add_ps(sum[i]));
    return total;
}

#endif  // SPARSIFY_X86

#if SPARSIFY_COMPILES_AVX512BF16

constexpr int kOnePair = 0x3f803f80;  // two bf16 ones

TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16") double multiply_bf16() {
    volatile int ones = kOnePair;
    const __m512bh x = (__m512bh)_mm512_set1_epi32(ones), y = (__m512bh)_mm512_set1_epi32(ones);
    __m512 sum[kAvx512Sums];
#pragma GCC unroll 16
    for (int i = 0; i < kAvx512Sums; ++i) sum[i] = _mm512_setzero_ps();
    FORGET(sum);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < kAvx512Sums; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
    }
    double total = 0;
    for (int i = 0; i < kAvx512Sums; ++i) total += double(_mm512_reduce_add_ps(sum[i]));
    return total;
}

#endif  // SPARSIFY_COMPILES_AVX512BF16

#if SPARSIFY_COMPILES_AMX

#define TARGET_AMX TARGET("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")
constexpr int kTileDwords = 256;

TARGET_AMX void enter_amx() { sparsify::configure_tiles(16, 7); }

TARGET_AMX void leave_amx() { _tile_release(); }

TARGET_AMX double multiply_amx() {
    alignas(64) uint32_t ones[kTileDwords];
    for (uint32_t& pair : ones) pair = kOnePair;
    __asm__ volatile("" : : "r"(ones) : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (int64_t step = 0; step < kSteps; ++step) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float sum[4][kTileDwords];
    _tile_stored(0, sum[0], 64);
    _tile_stored(1, sum[1], 64);
    _tile_stored(2, sum[2], 64);
    _tile_stored(3, sum[3], 64);
    __asm__ volatile("" : : "r"(sum) : "memory");
    double total = 0;
    for (int tile = 0; tile < 4; ++tile)
        for (float value : sum[tile]) total += double(value);
    return total;
}

#endif  // SPARSIFY_COMPILES_AMX

// ------------------------------------------------------------------------------------------------- dispatch

// AVX-VNNI reads, and multiplies floats, as AVX2 does.
bool available(int level) { return level != kAvxVnni && has_level(level); }

Reader reader_of(int level) {
#if SPARSIFY_X86
    if (level >= kAvx512) return read_avx512;
    if (level >= kAvx2) return read_avx2;
#endif
    return read_plain;
}

// Null where the level has no instructions of its own for this kind.
const Multiplier* multiplier_of(int level, int kind) {
    static const Multiplier plain{kPlainSums * 4, multiply_plain, nothing, nothing};
    if (level == kPortable) return kind == kFloat32 ? &plain : nullptr;
#if SPARSIFY_X86
    static const Multiplier avx2{kAvx2Sums * 8, multiply_avx2, nothing, nothing};
    static const Multiplier avx512{kAvx512Sums * 16, multiply_avx512, nothing, nothing};
    if (level == kAvx2) return kind == kFloat32 ? &avx2 : nullptr;
    if (level == kAvx512) return kind == kFloat32 ? &avx512 : nullptr;
#endif
#if SPARSIFY_COMPILES_AVX512BF16
    static const Multiplier bf16{kAvx512Sums * 32, multiply_bf16, nothing, nothing};
    if (level == kAvx512Bf16) return kind == kBfloat16 ? &bf16 : nullptr;
#endif
#if SPARSIFY_COMPILES_AMX
    static const Multiplier amx{4 * 16 * 16 * 32, multiply_amx, enter_amx, leave_amx};
    if (level == kAmx) return kind == kBfloat16 ? &amx : nullptr;
#endif
    return nullptr;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// From the start of the first thread to the end of the last.
struct Stopwatch {
    double first = 0, last = 0;
    bool any = false;
    void include(double begin, double end) {
        first = any ? std::min(first, begin) : begin;
        last = any ? std::max(last, end) : end;
        any = true;
    }
    double seconds() const { return last - first; }
};

}  // namespace

extern "C" {

// 1 if this machine can run `level` (0 portable .. 5 amx), else 0; 0 for avxvnni, which has nothing to measure here.
int sparsify_peaks_available(int level) { return available(level) ? 1 : 0; }

// Writes `value` into every 64-bit word, each thread the part that it will read: on machines with several memory nodes
// a page lies where it was first written.
int sparsify_peaks_fill(uint64_t* words, int64_t bytes, uint64_t value, int threads) {
    if (!words || bytes < 0 || bytes % kLine || threads < 1) return kBadArgument;
    const int64_t lines = bytes / kLine, words_per_line = kLine / int64_t(sizeof(uint64_t));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t t = 0; t < threads; ++t)
        std::fill(words + lines * t / threads * words_per_line, words + lines * (t + 1) / threads * words_per_line,
                  value);
    return kOk;
}

// Reads `bytes` (whole cache lines) `passes` times, one contiguous part per thread; within it `streams` (1, 2, 4) runs
// side by side, prefetching `ahead` bytes. *sum = sum of all 64-bit words read, *seconds = how long it took.
int sparsify_peaks_read(const void* data, int64_t bytes, int64_t passes, int streams, int64_t ahead, int threads,
                        int level, uint64_t* sum, double* seconds) {
    if (!data || !sum || !seconds || bytes < 0 || bytes % kLine || passes < 1 || threads < 1 || ahead < 0 ||
        (streams != 1 && streams != 2 && streams != 4))
        return kBadArgument;
    if (!available(level)) return kUnsupported;
    const Reader read = reader_of(level);
    const char* begin = static_cast<const char*>(data);
    const int64_t lines = bytes / kLine;
    uint64_t total = 0;
    Stopwatch watch;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
#pragma omp barrier
        const double start = now();
#pragma omp for schedule(static, 1) nowait
        for (int64_t t = 0; t < threads; ++t) {
            const int64_t first = lines * t / threads, end = lines * (t + 1) / threads;
            for (int64_t pass = 0; pass < passes; ++pass)
                total += read(begin + first * kLine, end - first, streams, ahead);
        }
        const double stop = now();
#pragma omp critical(sparsify_peaks_watch)
        watch.include(start, stop);
    }
    *sum = total;
    *seconds = watch.seconds();
    return kOk;
}

// Multiplies ones with ones in registers, `repeats` times on each thread. kind: 0 fp32, 1 bf16 with fp32 sums.
// *multiply_adds = how many ran, *sum = what they added up to (the same number), *seconds = how long that takes at the sum
// of the threads' own speeds: they begin together, but one whose core is busy with another program does not count as slow.
int sparsify_peaks_multiply(int kind, int64_t repeats, int threads, int level, double* multiply_adds, double* sum,
                            double* seconds) {
    if (!multiply_adds || !sum || !seconds || repeats < 1 || threads < 1 || (kind != kFloat32 && kind != kBfloat16))
        return kBadArgument;
    const Multiplier* multiplier = available(level) ? multiplier_of(level, kind) : nullptr;
    if (!multiplier) return kUnsupported;
    double total = 0, parts_per_second = 0;  // a part: what one thread does
#pragma omp parallel num_threads(threads) reduction(+ : total, parts_per_second)
    {
        multiplier->enter();
#pragma omp barrier
#pragma omp for schedule(static, 1) nowait
        for (int64_t t = 0; t < threads; ++t) {
            const double start = now();
            for (int64_t i = 0; i < repeats; ++i) total += multiplier->run();
            parts_per_second += 1 / std::max(now() - start, 1e-9);
        }
        multiplier->leave();
    }
    *multiply_adds = double(multiplier->multiply_adds) * double(kSteps) * double(repeats) * double(threads);
    *sum = total;
    *seconds = double(threads) / parts_per_second;
    return kOk;
}

}  // extern "C"
