// Written by tune_sparse24.py; run it again on another kind of processor.
#pragma once

namespace sparse24 {

// Most rows for the few-rows kernels: [avx512bf16, amx][2:4 with 4, 8, 16 bits, dense with 4, 8 bits]
constexpr int kDirectRows[2][5] = {{1, 1, 1, 3, 2}, {2, 3, 4, 1, 3}};

// With AMX, rows of bf16 from and up to which fixed point is fastest: [2:4 with 4, 8, 16 bits, dense with 4, 8 bits]
constexpr int kFixedRows[5][2] = {{2, 8}, {1, 32}, {1, 0}, {1, 16}, {1, 32}};

}  // namespace sparse24
