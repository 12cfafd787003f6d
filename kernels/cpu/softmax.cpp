// softmax of the scores of a tile of causal attention, in place (sparsify/model/attention.py): a query gives nothing to the keys
// that come after it, which are not even read.
//
// Scores and probabilities are bfloat16, everything between them is float32. Sums are those of 64 interleaved parts, added to each
// other in one order, so the result is the same to the last bit for any number of threads and at every level.
#include "exact.h"

#include <omp.h>

#include <new>
#include <vector>

namespace {

constexpr int kLanes = 64;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kSmallest = -127.0f;  // an exponent that gives 0
constexpr uint16_t kInfinity = 0x7f80, kMinusInfinity = 0xff80, kNaN = 0x7fc0;

template <typename To, typename From>
INLINE To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To same;
    std::memcpy(&same, &x, sizeof same);
    return same;
}

INLINE float widen(uint16_t x) { return bits_of<float>(uint32_t(x) << 16); }
INLINE uint16_t narrow(float x) { return static_cast<uint16_t>(bits_of<uint32_t>(sparsify::round_to_bf16(x)) >> 16); }

// An integer that is the larger the larger the number with these bits is, and the same operation back.
INLINE int32_t ordered(int32_t x) { return x ^ ((x >> 31) & 0x7fffffff); }

// 2^x for x <= 0, within 3e-7 of it: 2^f by its Taylor series (f within 0.5 of 0, seven terms), times 2^n put together from its bits.
// Comparing numbers would keep compilers from vectorising it; of negative ones the bits are in reverse order.
INLINE float exp2_of(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in its last bits
    const uint32_t bits = bits_of<uint32_t>(x), least = bits_of<uint32_t>(kSmallest);
    x = bits_of<float>(bits < least ? bits : least);
    const float shifted = x + magic, f = x - (shifted - magic);
    const float power = bits_of<float>((bits_of<uint32_t>(shifted) + 127u) << 23);  // more of magic is shifted out
    float sum = 1.54035304e-4f * f + 1.33335581e-3f;
    sum = sum * f + 9.61812911e-3f;
    sum = sum * f + 5.55041087e-2f;
    sum = sum * f + 2.40226507e-1f;
    sum = sum * f + 6.93147181e-1f;
    sum = sum * f + 1.0f;
    return sum * power;
}

// scores: [columns]; the first `seen` count. e: room for `columns` numbers in whole parts of kLanes.
INLINE void softmax_row(uint16_t* __restrict scores, int64_t columns, int64_t seen, float* __restrict e) {
    const int64_t padded = (seen + kLanes - 1) / kLanes * kLanes;
    int32_t top = INT32_MIN, size = 0;
    for (int64_t c = 0; c < seen; c++) {
        const int32_t x = static_cast<int32_t>(uint32_t(scores[c]) << 16), place = ordered(x);
        top = top > place ? top : place;
        size = size > (scores[c] & 0x7fff) ? size : scores[c] & 0x7fff;
        e[c] = widen(scores[c]);
    }
    std::memset(scores + seen, 0, 2 * (columns - seen));
    if (size > kInfinity) {
        for (int64_t c = 0; c < seen; c++) scores[c] = kNaN;
        return;
    }
    const float largest = bits_of<float>(ordered(top));
    for (int64_t c = seen; c < padded; c++) e[c] = widen(kMinusInfinity);
    float sum[kLanes] = {};
    for (float* part = e; part < e + padded; part += kLanes)
        for (int i = 0; i < kLanes; i++) {
            part[i] = exp2_of((part[i] - largest) * kLog2e);
            sum[i] += part[i];
        }
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    const float each = 1.0f / sum[0];
    for (int64_t c = 0; c < seen; c++) scores[c] = narrow(e[c] * each);
}

using Row = void (*)(uint16_t* scores, int64_t columns, int64_t seen, float* e);

void portable(uint16_t* scores, int64_t columns, int64_t seen, float* e) { softmax_row(scores, columns, seen, e); }

#if SPARSIFY_X86
TARGET_AVX2
void avx2(uint16_t* scores, int64_t columns, int64_t seen, float* e) { softmax_row(scores, columns, seen, e); }

TARGET_AVX512
void avx512(uint16_t* scores, int64_t columns, int64_t seen, float* e) { softmax_row(scores, columns, seen, e); }

constexpr Row kRows[] = {portable, avx2, avx512};
#else
constexpr Row kRows[] = {portable};
#endif

}  // namespace

// scores: bfloat16 [rows, columns], changed; row r is the query (r mod queries) of its tile, which sees the first
// columns - queries + 1 + (r mod queries) keys. level: as compilation_of takes it. Returns 0, or 1 without memory.
extern "C" int sparsify_causal_softmax(uint16_t* scores, int64_t rows, int64_t columns, int64_t queries, int threads,
                                       int level) {
    const Row row = kRows[sparsify::compilation_of(level)];
    const int64_t each = columns + kLanes;
    std::vector<float> exponentials;  // of the row that each thread is at
    try {
        exponentials.resize(each * threads);
    } catch (const std::bad_alloc&) {
        return 1;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        float* e = exponentials.data() + each * omp_get_thread_num();
        row(scores + r * columns, columns, columns - queries + 1 + r % queries, e);
    }
    return 0;
}
