// Tile configuration of AMX, shared by every kernel that multiplies in tiles.
#pragma once

#include "cpu_features.h"

#if SPARSIFY_COMPILES_AMX
#include <immintrin.h>

namespace sparsify {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// All eight tiles get rows of 64 bytes: `rows` of them up to tile `last`, 16 of them after it.
__attribute__((target("amx-tile"))) inline void configure_tiles(int rows, int last) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = uint8_t(tile > last ? 16 : rows);
    }
    __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic declares only the first 8 bytes as read
    _tile_loadconfig(&config);
}

}  // namespace sparsify
#endif  // SPARSIFY_COMPILES_AMX
