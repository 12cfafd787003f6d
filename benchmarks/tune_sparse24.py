"""Measures which kernel is fastest for how many rows, and writes sparse24_crossovers.h.

    python benchmarks/tune_sparse24.py > crossovers.h && mv crossovers.h kernels/cpu/sparse24_crossovers.h

Run it with nothing else running, on the processor that matters most: the table is compiled in. What this processor cannot
measure, because it has no AMX, stays as it was.
"""

import re
import sys
import time
from pathlib import Path

import torch

from sparsify.bench.baselines import random_tensors
from sparsify.formats import ModuleScheme
from sparsify.processor import LEVELS
from sparsify.runtime.backends.cpu import Cpu, _library
from sparsify.runtime.op import sparse24_linear

N, K = 4096, 4096
MOST_DIRECT_ROWS = 8
FIXED_ROWS = (*range(1, 13), 16, 24, 32, 48, 64)
DIRECT, TILES, FIXED = 512, 1024, 2048
SCHEMES = [(4, "2:4"), (8, "2:4"), (16, "2:4"), (4, "dense"), (8, "dense")]
TABLE = Path(__file__).parents[1] / "kernels" / "cpu" / "sparse24_crossovers.h"
HEADER = """// Written by tune_sparse24.py; run it again on another kind of processor.
#pragma once

namespace sparse24 {{

// Most rows for the few-rows kernels: [avx512bf16, amx][2:4 with 4, 8, 16 bits, dense with 4, 8 bits]
constexpr int kDirectRows[2][5] = {{{direct}}};

// With AMX, rows of bf16 from and up to which fixed point is fastest: [2:4 with 4, 8, 16 bits, dense with 4, 8 bits]
constexpr int kFixedRows[5][2] = {{{fixed}}};

}}  // namespace sparse24"""


def packed(scheme: ModuleScheme) -> torch.Tensor:
    # random codes: the time of a product does not depend on them
    (weight,) = Cpu().prepare(random_tensors(scheme), scheme, torch.bfloat16)
    return weight


def seconds(
    level: int, scheme: ModuleScheme, weight: torch.Tensor, rows: int, ways: tuple[int, ...]
) -> dict[int, float]:
    """The fastest of some calls, each way in turn."""
    x = torch.randn(rows, K).bfloat16()
    best = dict.fromkeys(ways, 1e9)
    for _ in range(30):
        for way in ways:
            _library().sparse24_set_options(weight.data_ptr(), level + 1 + way)
            start = time.perf_counter()
            sparse24_linear(x, [weight], None, scheme, Cpu.name)
            best[way] = min(best[way], time.perf_counter() - start)
    print(f"{LEVELS[level]} {scheme.bits} bits {scheme.pattern}, {rows} rows: {best}", file=sys.stderr)
    return best


def direct_rows(level: int, scheme: ModuleScheme) -> int:
    """The most rows for which the few-rows kernel is faster than decoding for all, counted up from one."""
    weight = packed(scheme)
    for rows in range(1, MOST_DIRECT_ROWS + 1):
        best = seconds(level, scheme, weight, rows, (DIRECT, TILES))
        if best[TILES] < best[DIRECT]:
            return rows - 1
    return MOST_DIRECT_ROWS


def fixed_rows(level: int, scheme: ModuleScheme) -> tuple[int, int]:
    """From and up to how many rows fixed point beats both; (1, 0) for never."""
    weight, first, last = packed(scheme), 0, 0
    for rows in FIXED_ROWS if scheme.bits < 16 else ():
        ways = (DIRECT, TILES, FIXED) if rows <= MOST_DIRECT_ROWS else (TILES, FIXED)
        best = seconds(level, scheme, weight, rows, ways)
        if min(best, key=best.__getitem__) == FIXED:
            first, last = first or rows, rows
        elif first:
            break
    return (first, last) if first else (1, 0)


def braces(values: list[list[int]]) -> str:
    return ", ".join("{" + ", ".join(map(str, row)) + "}" for row in values)


def present(name: str) -> list[list[int]]:
    """A table as it is now."""
    text = TABLE.read_text(encoding="utf-8")
    rows = text[text.index(name) :].split(";", 1)[0]
    return [[int(number) for number in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", rows)]


def main() -> None:
    library = _library()
    assert library is not None, "the kernels cannot be built here"
    schemes = [ModuleScheme(b, K if b == 16 else 64, p, (N, K)) for b, p in SCHEMES]
    direct, fixed = present("kDirectRows"), present("kFixedRows")
    levels = [LEVELS.index(name) for name in ("avx512bf16", "amx")]
    for row, level in enumerate(levels):
        if library.sparse24_level(level) == level:
            direct[row] = [direct_rows(level, scheme) for scheme in schemes]
        else:
            print(f"this processor has no {LEVELS[level]}: its rows stay as they are", file=sys.stderr)
    if library.sparse24_level(levels[-1]) == levels[-1]:
        fixed = [list(fixed_rows(levels[-1], scheme)) for scheme in schemes]
    print(HEADER.format(direct=braces(direct), fixed=braces(fixed)))


if __name__ == "__main__":
    main()
