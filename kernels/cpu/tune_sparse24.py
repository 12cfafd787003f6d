"""Measures where decoding a panel overtakes the few-rows kernels, and writes sparse24_crossovers.h.

    python kernels/cpu/tune_sparse24.py > crossovers.h && mv crossovers.h kernels/cpu/sparse24_crossovers.h

Run it with nothing else running, on the processor that matters most: the table is compiled in.
"""

import ctypes
import sys
import time

import torch

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.cpu import LEVELS, _library, _packed_bytes

N, K = 4096, 4096
MOST_ROWS = 8
FORCE_DIRECT, FORCE_TILES = 512, 1024
SCHEMES = [(4, "2:4"), (8, "2:4"), (16, "2:4"), (4, "dense"), (8, "dense")]
HEADER = """// Written by tune_sparse24.py; run it again on another kind of processor.
#pragma once

namespace sparse24 {{

// Most rows for the few-rows kernels: [avx512bf16, amx][2:4 with 4, 8, 16 bits, dense with 4, 8 bits]
constexpr int kDirectRows[2][5] = {{{rows}}};

}}  // namespace sparse24"""


def packed(library: ctypes.CDLL, scheme: ModuleScheme) -> torch.Tensor:
    """A linear of random codes; the time of a product does not depend on them."""
    stored = K // 2 if scheme.pattern == "2:4" else K
    codes = torch.randint(0, 256, (N, stored * scheme.bits // 8), dtype=torch.uint8)
    positions = torch.tensor([4, 8, 12, 9, 13, 14], dtype=torch.uint8)[torch.randint(0, 6, (2, N, K // 8))]
    meta = positions[0] | positions[1] << 4
    ones = torch.ones(N, K // scheme.group_size, dtype=torch.bfloat16)
    out = torch.empty(_packed_bytes(scheme, 0) + 64, dtype=torch.uint8)
    out = out[-out.data_ptr() % 64 :]
    status = library.sparse24_pack(
        N, K, scheme.bits, scheme.group_size, int(scheme.pattern == "2:4"), 0,
        codes.data_ptr(), meta.data_ptr(), ones.data_ptr(), codes.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    assert status == 0, status
    return out[: _packed_bytes(scheme, 0)]


def crossover(library: ctypes.CDLL, level: int, scheme: ModuleScheme) -> int:
    """The most rows for which the few-rows kernel is faster, counted up from one."""
    weight = packed(library, scheme)
    for rows in range(1, MOST_ROWS + 1):
        x, y = torch.randn(rows, K).bfloat16(), torch.empty(rows, N, dtype=torch.bfloat16)
        best = {FORCE_DIRECT: 1e9, FORCE_TILES: 1e9}
        for _ in range(30):
            for force in best:
                start = time.perf_counter()
                library.sparse24_linear(
                    ctypes.c_void_p(weight.data_ptr()), ctypes.c_int64(weight.numel()), ctypes.c_void_p(x.data_ptr()), 0,
                    ctypes.c_int64(rows), ctypes.c_int64(K), ctypes.c_int64(K), None, 0, ctypes.c_void_p(y.data_ptr()),
                    ctypes.c_int64(N), level + 1 + force,
                )  # fmt: skip
                best[force] = min(best[force], time.perf_counter() - start)
        print(f"{LEVELS[level]} {scheme.bits} bits {scheme.pattern}, {rows} rows: {best}", file=sys.stderr)
        if best[FORCE_TILES] < best[FORCE_DIRECT]:
            return rows - 1
    return MOST_ROWS


def main() -> None:
    library = _library()
    assert library is not None, "the kernels cannot be built here"
    table = []
    for name in ("avx512bf16", "amx"):
        level = LEVELS.index(name)
        if library.sparse24_level(level) < 0:
            sys.exit(f"this processor has no {name}; keep that row of the table as it is")
        table.append([crossover(library, level, ModuleScheme(b, K if b == 16 else 64, p, (N, K))) for b, p in SCHEMES])
    print(HEADER.format(rows=", ".join("{" + ", ".join(map(str, row)) + "}" for row in table)))


if __name__ == "__main__":
    main()
