"""X'X and A'B: the kernel at every instruction set and in every order of summation against PyTorch, interleaved in one run.

    python benchmarks/bench_gram.py --columns 576 1536 --tokens 8192 --cross 1536 576 --type float32

GFLOP/s count what is needed: one triangle of X'X, diagonal included, or all of A'B; PyTorch, which computes both triangles,
is counted alike. "peak" is the share of the arithmetic peak that the machine reaches with the instructions of that line,
measured in the same run; "ratio" is against PyTorch's fastest way that sums in float32. Each figure is the best of several
rounds. With --threads 1 it is processor time, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.bench import peaks
from sparsify.native import build
from sparsify.solver.gram import FORCE, LEVELS, ORDERS, cross, gram, native_order, summation_order

ROWS = 4096  # per micro-batch
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Way = Callable[[list[Tensor], list[Tensor] | None, Tensor], object]


def float32(left: list[Tensor], right: list[Tensor] | None, out: Tensor) -> None:
    for a, b in zip(left, right or left, strict=True):
        wide = a.float()
        out.addmm_(wide.t(), b.float() if right else wide)


def bf16(left: list[Tensor], right: list[Tensor] | None, out: Tensor) -> None:
    for a, b in zip(left, right or left, strict=True):
        torch.mm(a.t(), b)


def forced(path: str, order: str | None = None) -> Way:
    def run(left: list[Tensor], right: list[Tensor] | None, out: Tensor) -> None:
        os.environ[FORCE] = path
        with summation_order(order or native_order(left[0].dtype)):
            gram(left, out=out) if right is None else cross(left, right, out=out)

    return run


def ways_here(
    levels: list[str], orders: list[str], dtype: torch.dtype
) -> dict[str, tuple[Way, tuple[str, str] | None]]:
    """What to time: a name, the call, and (level, type) of the arithmetic peak that bounds it, None for PyTorch."""
    ways: dict[str, tuple[Way, tuple[str, str] | None]] = {"torch float32": (float32, None)}
    if dtype == torch.bfloat16:
        ways["torch float32, bf16 products"] = (forced("torch"), None)
        ways["torch bf16 (rounds H)"] = (bf16, None)
    library = build.open_library("cpu/gram")
    for level in levels:
        if library.sparsify_gram_level(LEVELS.index(level)) < 0:
            continue
        os.environ[FORCE] = level
        for order in orders if dtype == torch.bfloat16 else ["float32"]:
            own = order == native_order(dtype) and order != "float32"
            bound = (level, "bfloat16") if own else (_fused(level), "float32")
            ways[f"{level}, order {order}"] = (forced(level, order), bound)
    return ways


def _fused(level: str) -> str:
    """The level whose fused multiply-adds a level uses."""
    return "avx512" if level in ("avx512bf16", "amx") else "avx2" if level == "avxvnni" else level


def measured_peaks(bounds: set[tuple[str, str]], threads: int) -> dict[tuple[str, str], float]:
    """Operations per second of each (level, type)."""
    probes, found = peaks.Probes(), {}
    for level, kind in bounds:
        number = [name.replace("_", "") for name in peaks.LEVELS].index(level)
        found[level, kind] = dict(peaks.arithmetic_speeds(probes, kind, threads, [number], 0.1, 3))[number]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="*", default=[576, 1536, 4096], help="K of X'X")
    parser.add_argument("--cross", type=int, nargs="*", default=[], help="K1 K2 [K1 K2 ...] of A'B")
    parser.add_argument("--type", choices=TYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", default=[x for x in LEVELS if x != "avxvnni"], choices=LEVELS)
    parser.add_argument("--orders", nargs="+", default=list(ORDERS[:3]), choices=ORDERS[:3])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = TYPES[arguments.type]
    ways = ways_here(arguments.levels, arguments.orders, dtype)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    shapes = [(k, None) for k in arguments.columns] + list(
        zip(arguments.cross[::2], arguments.cross[1::2], strict=True)
    )
    for k, other in shapes:
        count = max(1, arguments.tokens // ROWS)
        left = [torch.randn(ROWS, k).to(dtype) for _ in range(count)]
        right = [torch.randn(ROWS, other).to(dtype) for _ in range(count)] if other else None
        out = torch.zeros(k, other or k)
        bounds = measured_peaks({bound for _, bound in ways.values() if bound}, arguments.threads)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(arguments.rounds):
            for name, (way, _bound) in ways.items():
                start = clock()
                way(left, right, out)
                best[name] = min(best[name], clock() - start)
        again = measured_peaks(set(bounds), arguments.threads)
        base = min(best[name] for name, (_, bound) in ways.items() if bound is None and "rounds" not in name)
        shape = f"A'B, {k} x {other}" if other else f"X'X, K = {k}"
        print(f"\n{shape}, {count} x {ROWS} tokens of {arguments.type}, {arguments.threads} threads")
        print(f"{'':34}{'GFLOP/s':>9}{'peak':>7}{'ratio':>8}")
        for name, (_, bound) in ways.items():
            speed = (2 * k * other if other else k * (k + 1)) * ROWS * count / best[name]
            share = f"{speed / max(bounds[bound], again[bound]):7.0%}" if bound else f"{'':7}"
            print(f"{name:34}{speed / 1e9:9.0f}{share}{base / best[name]:8.2f}")


if __name__ == "__main__":
    main()
