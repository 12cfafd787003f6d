"""The arithmetic that a run was begun in, kept in its work directory: a resumed run goes on in it on any processor.

Three things decide bits beside the recipe and the versions: the type that the model is computed in, whether attention in
bfloat16 is computed by tiles, and the order in which the statistics add up products, which follows the instruction set. All
are chosen once, before the first part is written, and hold for every part of the run: the text that the model writes, the
walk, the head, the training passes, and the runs inside of it that a depth pass has.

The limit: products that PyTorch computes (the model's own forward pass, factorizations) are summed as PyTorch and its
libraries do on the processor at hand. SPARSIFY_CPU_LEVEL changes nothing about them, so a run that goes on under another
level gives the same bytes; another processor, or another ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA or MKL_ENABLE_INSTRUCTIONS,
gives the same types and the same orders in our own kernels, but bits that differ in the rounding of PyTorch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparsify import compute
from sparsify.compute import FORCE, TYPES, Choice
from sparsify.distributed import device
from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.manifest import keep_json
from sparsify.solver.gram import native_order, summation_order

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan

RECORD = "compute.json"

_current: ContextVar[Arithmetic | None] = ContextVar("arithmetic", default=None)


@dataclass(frozen=True)
class Arithmetic:
    """What a run computes in.

    choice: the type of products of the model, why, and the kind of attention
    order:  of sums in statistics, as `passes.gram` names it; None where there are none, or a GPU adds them up
    resumed: it is that of an earlier process
    """

    choice: Choice
    order: str | None = None
    resumed: bool = False

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Whatever is computed meanwhile is computed so."""
        token = _current.set(self)
        try:
            with compute.using(self.choice):
                yield
        finally:
            _current.reset(token)

    def for_statistics(self) -> Arithmetic:
        """With the order in which this machine adds up, where none is known yet. It may build the kernel."""
        if self.order is not None or device() != "cpu":
            return self
        return replace(self, order=native_order(self.choice.dtype))

    def keep(self, work: Path) -> None:
        """Write it into a work directory."""
        keep_json(work / RECORD, self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {**self.choice.to_json(), "order": self.order}

    def describe(self) -> str:
        """One line for the person who started the run."""
        if not self.resumed:
            return self.choice.describe()
        here = compute.for_this_machine()
        goes_on = f"goes on in {self.choice.name}, in which this run was begun"
        if here.dtype == self.choice.dtype:
            return goes_on
        if compute.asked() is not None:
            return f"{goes_on}; {FORCE}={here.name} counts for new runs only"
        return f"{goes_on}; a new run would compute in {here.name}: {here.why}"


@contextlib.contextmanager
def summing() -> Iterator[None]:
    """Statistics that are made meanwhile are added up in the order of the run that is going on."""
    current = _current.get()
    if current is None or current.order is None:
        yield
        return
    with summation_order(current.order):
        yield


def begin(work: Path, resume: bool) -> Arithmetic:
    """The arithmetic of the run in this work directory: its own when it goes on, else that of the run around it, else chosen.

    Raises CheckpointError for a damaged record, and for parts of a run that has none.
    """
    if resume and (work / RECORD).exists():
        return _read(work / RECORD)
    if resume and any(work.glob("parts*/*.safetensors")):
        raise CheckpointError(
            f"{work} was begun by an older version of sparsify, which did not record what it computed in; "
            "remove that directory and start again"
        )
    current = _current.get()
    return current if current is not None else Arithmetic(compute.choose(measure=True))


def _read(file: Path) -> Arithmetic:
    found = read_json(file)
    try:
        choice = Choice(TYPES[found["dtype"]], str(found["why"]), bool(found["tiles"]))
        return Arithmetic(choice, found["order"], resumed=True)
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{file} does not say what the run computes in; remove {file.parent} and start again"
        ) from None


def announced(arithmetic: Arithmetic, plan: Plan, quiet: bool) -> Arithmetic:
    """Say on stderr what a run computes in, unless it is part of another one. Returns `arithmetic`."""
    if plan.computes and _current.get() is None:
        trains = bool(plan.training) or plan.recipe.tune is not None
        with arithmetic.in_force():
            own = plan.compute  # a checkpoint without bfloat16 is computed in float32 whatever the choice is
        line = arithmetic.describe() if trains or own.dtype == arithmetic.choice.dtype else own.describe()
        Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True).print(line, markup=False)
    return arithmetic


def computed(plan: Plan) -> dict[str, Any]:
    """What run.json says of the run that is going on: the type that its model was computed in, why, the kind of
    attention and the order of sums."""
    current = _current.get()
    return {**plan.compute.to_json(), "order": None if current is None else current.order}
