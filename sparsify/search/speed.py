"""How long one token takes in a linear, by choice: measured on this machine, or modelled from the bytes that are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from sparsify.bench.kernels import KernelOptions, bench_kernels
from sparsify.bench.shapes import Linear
from sparsify.compiler.plan import Plan
from sparsify.errors import RecipeError
from sparsify.search.choices import DENSE, Choice, Unit

Seconds = Mapping[Choice, float]
"""Of one unit, by choice. Modelled ones are bytes: only their ratios count."""
How = Literal["measured", "modelled"]
ROUNDS = 3
STREAMED = 2**18  # weights from which on a linear is measured as it comes from memory; smaller ones lie in a cache


def seconds_of(plan: Plan, units: Sequence[Unit], how: How, quiet: bool) -> list[Seconds]:
    """Of every unit. RecipeError where units cannot stay dense, with which they are compared."""
    if any(DENSE not in unit.choices for unit in units):
        raise RecipeError("a budget of speed is relative to the dense linears; leave dense-16 among the --choices")
    if how == "modelled":
        return [dict(unit.nbytes) for unit in units]
    return _measured(plan, units, quiet)


def _measured(plan: Plan, units: Sequence[Unit], quiet: bool) -> list[Seconds]:
    """By the benchmark of single kernels: each shape and choice once, large weights streamed from memory as in decoding."""
    if torch.cuda.is_available():
        raise RecipeError("kernels are measured on the CPU only so far; on a GPU use --speed modelled")
    name = plan.compute.name
    dense_peer = "torch" if name == "bfloat16" else "torch-fp32"
    table: dict[tuple[tuple[int, int], Choice], float] = {}
    shapes = list(dict.fromkeys(_shape(plan, unit) for unit in units))
    linears = [Linear("linear", n, k) for n, k in shapes]
    kinds = list(dict.fromkeys(choice for unit in units for choice in unit.choices if choice != DENSE))
    for choice in kinds:
        groups = {s.group_size for unit in units for s in unit.schemes.get(choice, ()) if s is not None}
        options = KernelOptions(
            rows=(1,), bits=choice.bits, group_size=max(groups, default=0), pattern="2:4" if choice.pruned else "dense",
            dtype=name, peers=(dense_peer,), cold=min(n * k for n, k in shapes) >= STREAMED, rounds=ROUNDS, peaks=False, quiet=quiet,
        )  # fmt: skip
        for row in bench_kernels(linears, options).rows:
            shape = (row.linear.n, row.linear.k)
            table[shape, choice] = row.ours.seconds
            for timing in row.timings[1:]:
                table[shape, DENSE] = min(timing.seconds, table.get((shape, DENSE), timing.seconds))
    return [{choice: table[_shape(plan, unit), choice] for choice in unit.choices} for unit in units]


def _shape(plan: Plan, unit: Unit) -> tuple[int, int]:
    """(N, K) of the linears of a unit as one."""
    shapes = [plan.linears[module].shape for module in unit.modules]
    return sum(n for n, _ in shapes), shapes[0][1]
