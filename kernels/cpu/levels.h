// The instruction sets that kernels are compiled for, as LEVELS of sparsify/processor.py counts them; the two change together.
#pragma once

#include "amx.h"
#include "cpu_features.h"

namespace sparsify {

enum Level { kPortable = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512 = 3, kAvx512Bf16 = 4, kAmx = 5, kLevels = 6 };

inline const CpuFeatures& cpu() {
    static const CpuFeatures features = detect_cpu();
    return features;
}

// Whether floating-point code of a level runs here. AVX-VNNI multiplies integers: in floating point it is AVX2.
inline bool has_level(int level) {
    switch (level) {
        case kPortable:
            return true;
        case kAvx2:
        case kAvxVnni:
            return cpu().avx2;
        case kAvx512:
            return cpu().avx512;
#if SPARSIFY_COMPILES_AVX512BF16
        case kAvx512Bf16:
            return cpu().avx512_bf16;
#endif
#if SPARSIFY_COMPILES_AMX
        case kAmx: {
            static const bool granted = cpu().amx_bf16 && request_amx();
            return granted;
        }
#endif
        default:
            return false;
    }
}

}  // namespace sparsify
