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

#include "cpu_features.h"

// A loop is an INLINE function; a TARGET function into which it is inlined is what the compiler vectorises.
#define INLINE inline __attribute__((always_inline))
#if SPARSIFY_X86
#define TARGET_AVX2 __attribute__((target("avx2")))
#define TARGET_AVX512 __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl")))
#endif

namespace sparsify {

// Which compilation runs at a level of sparsify/processor.py, or the fastest at -1: 0 portable, 1 AVX2, 2 AVX-512; never
// more than the processor has.
inline int compilation_of(int level) {
    static const CpuFeatures cpu = detect_cpu();
    const int here = cpu.avx512 ? 2 : cpu.avx2 ? 1 : 0;
    const int wanted = level < 0 || level >= 3 ? 2 : level >= 1 ? 1 : 0;
    return wanted < here ? wanted : here;
}

}  // namespace sparsify
