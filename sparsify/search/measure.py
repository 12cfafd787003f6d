"""The measurements: one walk over the dense model solves every choice of every unit, and each is held against the dense model.

The walk is that of `sparsify apply`, but nothing that it solves goes back into the model: a unit is compressed on what it reads in
the dense model, and measured with everything else dense. What is solved for a block is measured and dropped before
the next one is entered. Every finished block is a file in the work directory, from which a resumed search goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify import memory
from sparsify.compiler.arithmetic import summing
from sparsify.compiler.calibrate import KERNELS, kept_rows
from sparsify.compiler.checkpoint_names import part_name
from sparsify.compiler.plan import Plan
from sparsify.distributed import device
from sparsify.files import as_written, read_json
from sparsify.manifest import keep_json
from sparsify.model.decoder import open_blocks
from sparsify.model.linear import LinearWeights
from sparsify.model.sequential import GroupVisit, Walk
from sparsify.native.build import build_ahead
from sparsify.progress import Task, progress_bar, stage
from sparsify.search.choices import DENSE, Choice, Unit
from sparsify.search.held_out import HeldOut
from sparsify.solver.hessian import Statistics, accumulated
from sparsify.solver.solve import Scheme, solve_layer

Solved = dict[Choice, dict[str, LinearWeights]]
"""The linears of a block, by full name, for each choice; those that stay dense are left out."""


@dataclass(frozen=True)
class Measured:
    """One unit with one choice.

    kl: KL(dense || model with this unit compressed), nats per token of the held-out text
    error: relative output error on the calibration text, the mean of its linears by outputs; None without data
    """

    kl: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        return {"kl": self.kl, "error": self.error}


Measurements = dict[str, dict[str, Measured]]
"""By name of the unit and of the choice. Units that the walk cannot handle are left out."""


def measure(
    plan: Plan, units: Sequence[Unit], held_out: Tensor, work: Path, precision: torch.dtype, quiet: bool
) -> Measurements:
    """Solve and measure every choice of every unit.

    held_out: tokens to measure on, int64 [samples, T]; precision: of the model that is measured
    work: holds a file per finished block
    """
    blocks = plan.model.blocks
    files = [work / f"{part_name(index)}.json" for index in range(len(blocks))]
    if all(file.exists() for file in files):
        return _read(files)
    solver = _Solver(plan, units, work, quiet)
    with stage("held-out text through the dense model", quiet):
        dense = HeldOut(open_blocks(plan.checkpoint, precision), held_out, device(), _fits(plan, precision))
    with summing(), progress_bar("measuring", len(blocks), quiet=quiet) as bar:
        for index, block in enumerate(blocks):
            if files[index].exists():
                bar.describe(f"resuming through {block}")
                solver.replay(index)
            else:
                solved, errors = solver.solve(index, bar)
                keep_json(files[index], _measured(index, block, units, solved, errors, dense, bar))
            dense.advance()
            bar.describe(block)
            bar.advance()
    return _read(files)


def _measured(
    index: int,
    block: str,
    units: Sequence[Unit],
    solved: Solved,
    errors: Mapping[Choice, Mapping[str, float]],
    dense: HeldOut,
    bar: Task,
) -> dict[str, Any]:
    """What the file of a block says."""
    trials: list[tuple[Unit, Choice]] = []
    variants: list[dict[str, Tensor]] = []
    found: dict[str, dict[str, Any]] = {}
    for unit in units:
        if unit.block != index or not _complete(unit, solved):
            continue
        found[unit.name] = {DENSE.name: Measured(0.0, 0.0).to_json()} if DENSE in unit.choices else {}
        for choice in unit.choices:
            if choice != DENSE:
                trials.append((unit, choice))
                variants.append(
                    {
                        module.removeprefix(block + "."): solved[choice][module].dense(torch.float32)
                        for module in unit.modules
                        if module in solved[choice]
                    }
                )
    bar.describe(f"{block}: measuring {len(trials)} choices")
    for (unit, choice), kl in zip(trials, dense.divergences(variants), strict=True):
        own = [errors[choice][module] for module in unit.modules if module in errors[choice]]
        error = sum(own) / len(own) if own else None
        found[unit.name][choice.name] = Measured(kl, error).to_json()
    return found


def _complete(unit: Unit, solved: Solved) -> bool:
    """Whether every linear of a unit was solved for every choice that compresses it; the walk may have skipped it."""
    return all(
        module in solved[choice]
        for choice, schemes in unit.schemes.items()
        for module, scheme in zip(unit.modules, schemes, strict=True)
        if scheme is not None
    )


def _read(files: Sequence[Path]) -> Measurements:
    found: Measurements = {}
    for file in files:
        with as_written(file):
            for unit, choices in read_json(file).items():
                found[unit] = {choice: _one(**values) for choice, values in choices.items()}
    return found


def _one(kl: float, error: float | None) -> Measured:
    """A measurement as `Measured.to_json` gave it."""
    return Measured(float(kl), None if error is None else float(error))


def _fits(plan: Plan, precision: torch.dtype) -> bool:
    """Whether the whole dense model can stay in memory: in half of what is free."""
    nbytes = sum(parameter.numel() for parameter in plan.model.model.parameters()) * precision.itemsize
    if device() != "cpu":
        return bool(nbytes < torch.cuda.mem_get_info()[0] / 2)
    return nbytes < (memory.free() or 0) / 2


class _Solver:
    """Solves every choice of the linears of a block: on what they read in the dense model, or without any text."""

    def __init__(self, plan: Plan, units: Sequence[Unit], work: Path, quiet: bool):
        self.plan = plan
        self.schemes: dict[Choice, dict[str, Scheme]] = {}
        for unit in units:
            for choice, schemes in unit.schemes.items():
                own = self.schemes.setdefault(choice, {})
                own |= {m: s for m, s in zip(unit.modules, schemes, strict=True) if s is not None}
        self.walk: Walk | None = None
        if any(scheme.needs_data for schemes in self.schemes.values() for scheme in schemes.values()):
            tokens = kept_rows(plan, work, quiet)
            build_ahead(KERNELS)
            with stage("calibration text through the embeddings", quiet):
                self.walk = Walk(plan.model, tokens, device=device())

    def replay(self, index: int) -> None:
        """Go through a block that was measured before."""
        if self.walk is not None:
            self.walk.replay(index, {})

    def solve(self, index: int, bar: Task) -> tuple[Solved, dict[Choice, dict[str, float]]]:
        """The linears of a block for each choice, and their output errors."""
        solved: Solved = {choice: {} for choice in self.schemes}
        errors: dict[Choice, dict[str, float]] = {choice: {} for choice in self.schemes}

        def add(weights: Mapping[str, Tensor], statistics: Statistics | None) -> None:
            masks: dict[tuple[str, ...], dict[str, Tensor]] = {}  # choices of several bits share them
            for choice, schemes in self.schemes.items():
                bar.describe(f"{next(iter(weights))}: {choice.describe()}")
                parts: dict[Scheme, dict[str, Tensor]] = {}
                for name, weight in weights.items():
                    if name in schemes:
                        parts.setdefault(schemes[name], {})[name] = weight
                for scheme, part in parts.items():
                    known = masks.setdefault(tuple(part), {})
                    linears, found = solve_layer(part, scheme, statistics, masks_found=known)
                    solved[choice] |= linears
                    errors[choice] |= found

        def visit(group: GroupVisit) -> dict[str, LinearWeights]:
            statistics = accumulated(group.batches)
            add({name: linear.weight for name, linear in zip(group.names, group.linears, strict=True)}, statistics)
            return {}

        wanted = {module for schemes in self.schemes.values() for module in schemes}
        if self.walk is not None:
            self.walk.visit(index, wanted.__contains__, visit)
        else:
            for name, planned in self.plan.linears.items():
                if planned.block == index and name in wanted:
                    add({name: self.plan.checkpoint.tensor(planned.source)}, None)
        return solved, errors
