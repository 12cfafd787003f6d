"""Measures where decoding a panel overtakes the few-rows kernels, and writes sparse24_crossovers.h.

    python kernels/cpu/tune_sparse24.py > crossovers.h && mv crossovers.h kernels/cpu/sparse24_crossovers.h

Run it with nothing else running, on the processor that matters most: the table is compiled in.
"""

import sys
import time

import torch

from sparsify.bench.contestants import random_tensors
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.cpu import LEVELS, Cpu, _library
from sparsify.runtime.op import sparse24_linear

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


def crossover(level: int, scheme: ModuleScheme) -> int:
    """The most rows for which the few-rows kernel is faster, counted up from one."""
    # random codes: the time of a product does not depend on them
    (weight,) = Cpu().prepare(random_tensors(scheme), scheme, torch.bfloat16)
    for rows in range(1, MOST_ROWS + 1):
        x = torch.randn(rows, K).bfloat16()
        best = {FORCE_DIRECT: 1e9, FORCE_TILES: 1e9}
        for _ in range(30):
            for force in best:
                _library().sparse24_set_options(weight.data_ptr(), level + 1 + force)
                start = time.perf_counter()
                sparse24_linear(x, [weight], None, scheme, Cpu.name)
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
        table.append([crossover(level, ModuleScheme(b, K if b == 16 else 64, p, (N, K))) for b, p in SCHEMES])
    print(HEADER.format(rows=", ".join("{" + ", ".join(map(str, row)) + "}" for row in table)))


if __name__ == "__main__":
    main()
