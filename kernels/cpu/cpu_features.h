// What this processor, and the operating system under it, lets us run. Shared by every CPU kernel.
//
// Kernels are compiled for the baseline of the architecture and carry their faster variants as functions with a
// `target` attribute, so that one build runs anywhere and no build needs -march=native.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#define SPARSIFY_X86 1
#else
#define SPARSIFY_X86 0
#endif

// AMX intrinsics came with GCC 11 and Clang 12, AVX512-BF16 with GCC 10 and Clang 9.
#if SPARSIFY_X86 && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPARSIFY_COMPILES_AMX 1
#else
#define SPARSIFY_COMPILES_AMX 0
#endif
#if SPARSIFY_X86 && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define SPARSIFY_COMPILES_AVX512BF16 1
#else
#define SPARSIFY_COMPILES_AVX512BF16 0
#endif

// The VEX form of VNNI came with GCC 11 and Clang 12.
#if SPARSIFY_X86 && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPARSIFY_COMPILES_AVXVNNI 1
#else
#define SPARSIFY_COMPILES_AVXVNNI 0
#endif

#if SPARSIFY_COMPILES_AMX && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparsify {

struct CpuFeatures {
    bool intel = false;
    bool avx2 = false;         // AVX2 and FMA
    bool avx_vnni = false;     // VNNI on 256 bits, without AVX-512; implies avx2
    bool avx512 = false;       // F, BW, DQ, VL
    bool avx512_vnni = false;  // each of the following implies avx512
    bool avx512_vbmi = false;
    bool avx512_bf16 = false;
    bool amx_bf16 = false;  // instructions and registers are there; see request_amx()
    bool amx_int8 = false;
};

inline CpuFeatures detect_cpu() {
    CpuFeatures cpu;
#if SPARSIFY_X86
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return cpu;
    cpu.intel = b == 0x756e6547 && d == 0x49656e69 && c == 0x6c65746e;  // "GenuineIntel"
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return cpu;  // OSXSAVE
    const bool fma = c >> 12 & 1;
    // XCR0: what register state the operating system saves. A feature that it does not save must not be used.
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x6) == 0x6;
    const bool saves_zmm = saves_ymm && (low & 0xe0) == 0xe0;
    const bool saves_tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const unsigned leaves = a;
    cpu.avx2 = saves_ymm && fma && (b >> 5 & 1);
    cpu.avx512 = saves_zmm && cpu.avx2 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    cpu.avx512_vnni = cpu.avx512 && (c >> 11 & 1);
    cpu.avx512_vbmi = cpu.avx512 && (c >> 1 & 1);
    cpu.amx_bf16 = cpu.avx512 && saves_tiles && (d >> 22 & 1) && (d >> 24 & 1);
    cpu.amx_int8 = cpu.avx512 && saves_tiles && (d >> 25 & 1) && (d >> 24 & 1);
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        cpu.avx_vnni = cpu.avx2 && (a >> 4 & 1);
        cpu.avx512_bf16 = cpu.avx512 && (a >> 5 & 1);
    }
#endif
    return cpu;
}

// Linux hands out the 8 KB of tile registers only to a process that asks for them. Asking twice is harmless.
inline bool request_amx() {
#if SPARSIFY_COMPILES_AMX && defined(__linux__)
    const int request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    const int tile_data = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace sparsify
