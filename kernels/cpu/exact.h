// For loops that a compiler vectorises and that give the same bits at every level: included before anything else.
//
// A product is rounded before it is added, everywhere: compilers may otherwise contract both into a fused multiply-add where
// the target has one, which rounds once. What is left (+, -, *, /, rint) is rounded alike by every instruction set.
#pragma once

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <array>
#include <cstdint>
#include <cstring>

#include "cpu_features.h"

// A loop is an INLINE function; a TARGET function into which it is inlined is what the compiler vectorises.
#define INLINE inline __attribute__((always_inline))
#if SPARSIFY_X86
#define TARGET_AVX2 __attribute__((target("avx2")))
#define TARGET_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace sparsify {

constexpr int kChunk = 64;  // outputs that a loop takes at once: 128 inputs x 64 outputs x 4 bytes fill 32 KiB

// A mask that keeps every output of a chunk.
constexpr auto kAll = [] {
    std::array<uint8_t, kChunk> ones{};
    for (auto& one : ones) one = 1;
    return ones;
}();

// The zero points of a chunk of a symmetric grid.
constexpr std::array<float, kChunk> kNoZeros{};

// x with `drop` bits fewer than a float32 has, rounded to nearest even. 16: bfloat16; 13: float16 within its range; 0: as it is.
INLINE float round_to(float x, int drop) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t half = (1u << drop) >> 1, odd = (bits >> drop) & (drop > 0);
    bits = (bits + half - (drop > 0) + odd) & ~((1u << drop) - 1u);
    std::memcpy(&x, &bits, 4);
    return x;
}

INLINE float round_to_bf16(float x) { return round_to(x, 16); }

// Which compilation runs at a level of sparsify/processor.py, or the fastest at -1: 0 portable, 1 AVX2, 2 AVX-512; never
// more than the processor has.
inline int compilation_of(int level) {
    static const CpuFeatures cpu = detect_cpu();
    const int here = cpu.avx512 ? 2 : cpu.avx2 ? 1 : 0;
    const int wanted = level < 0 || level >= 3 ? 2 : level >= 1 ? 1 : 0;
    return wanted < here ? wanted : here;
}

}  // namespace sparsify
