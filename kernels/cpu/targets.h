// A stretch of code compiled for more than the baseline of the architecture; only a run-time check may lead into it.
#pragma once

#include "cpu_features.h"

#define SPARSIFY_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(features) \
    SPARSIFY_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END SPARSIFY_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define TARGET_BEGIN(features) SPARSIFY_PRAGMA(GCC push_options) SPARSIFY_PRAGMA(GCC target(features))
#define TARGET_END SPARSIFY_PRAGMA(GCC pop_options)
#endif
