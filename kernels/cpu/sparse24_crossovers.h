// Written by tune_sparse24.py; run it again on another kind of processor.
#pragma once

namespace sparse24 {

// Most rows for the few-rows kernels: [avx512bf16, amx][2:4 with 4, 8, 16 bits, dense with 4, 8 bits]
constexpr int kDirectRows[2][5] = {{8, 8, 8, 7, 8}, {2, 3, 3, 1, 3}};

}  // namespace sparse24
