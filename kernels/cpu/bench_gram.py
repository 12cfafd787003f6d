"""X'X of bf16 inputs: the kernel at every instruction set against PyTorch, interleaved in one run.

    python kernels/cpu/bench_gram.py --columns 576 1536 4096 --tokens 16384

GFLOP/s are dense-equivalent (2 K^2 T per second), so that computing one triangle counts as speed; "ratio" is against
PyTorch's fastest way that sums in float32. Each figure is the best of several rounds. With --threads 1 it is processor
time, which other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify import native
from sparsify.passes.gram import FORCE, LEVELS, gram

ROWS = 4096  # per micro-batch


def float32(xs: list[Tensor], H: Tensor) -> None:
    for x in xs:
        wide = x.float()
        H.addmm_(wide.t(), wide)


def forced(path: str) -> Callable[[list[Tensor], Tensor], None]:
    def run(xs: list[Tensor], H: Tensor) -> None:
        os.environ[FORCE] = path
        gram(xs, out=H)

    return run


def bf16(xs: list[Tensor], H: Tensor) -> None:
    for x in xs:
        torch.mm(x.t(), x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    library = native.open_library("cpu/gram")
    ours = [name for name in arguments.levels if library.sparsify_gram_level(LEVELS.index(name)) >= 0]
    ways = {"torch float32": float32, "torch float32, bf16 products": forced("torch"), "torch bf16 (rounds H)": bf16}
    ways |= {f"kernel {name}": forced(name) for name in ours}
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print(f"default level here: {LEVELS[library.sparsify_gram_level(-1)]}; {arguments.threads} threads")
    for k in arguments.columns:
        xs = [torch.randn(ROWS, k).bfloat16() for _ in range(max(1, arguments.tokens // ROWS))]
        H = torch.zeros(k, k)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                start = clock()
                way(xs, H)
                best[name] = min(best[name], clock() - start)
        base = min(best["torch float32"], best["torch float32, bf16 products"])
        print(f"\nK = {k}, {len(xs)} x {ROWS} tokens\n{'':32}{'GFLOP/s':>9}{'ratio':>8}")
        for name, seconds in best.items():
            print(f"{name:32}{2e-9 * k * k * ROWS * len(xs) / seconds:9.0f}{base / seconds:8.2f}")


if __name__ == "__main__":
    main()
