"""What a plan will cost, before anything runs: bytes on disk, memory, arithmetic and the time that this takes here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsify.basis.residual import SAMPLED
from sparsify.compiler.memory import WalkMemory, walk_memory
from sparsify.compiler.operations import SOLVER, count_operations, hidden_size, in_words
from sparsify.compiler.training_memory import TrainingMemory, training_memory
from sparsify.compute import for_precision, rates
from sparsify.distributed import device
from sparsify.formats import get_format
from sparsify.model.linear import LinearWeights
from sparsify.model.output_head import find_head
from sparsify.recipe.sources import SELF
from sparsify.solver.solve import Scheme

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan, Planned
    from sparsify.compiler.plan_training import PlannedTraining

# a run takes so many times as long as its products alone would: walks 1.4 to 1.7 times on a Zen 5, training 1.9
OVERHEAD = 2.0


@dataclass(frozen=True)
class Estimate:
    """Bytes on disk before and after, the memory that the run needs at least, and its arithmetic without training passes.

    operations: by part, as `operations.count_operations` counts them; a multiply-add is two
    memory: of the walk by item; None where there is none
    training: memory of each training pass by item
    seconds: that the operations take here, an estimate; None where the speed of this machine is not known
    writing_bytes: of the memory, of a model that writes its own calibration text
    """

    dense_bytes: int
    output_bytes: int
    memory_bytes: int
    operations: dict[str, int]
    memory: WalkMemory | None = None
    training: tuple[TrainingMemory, ...] = ()
    seconds: float | None = None
    writing_bytes: int = 0

    @property
    def multiply_adds(self) -> int:
        return sum(self.operations.values()) // 2

    def to_json(self) -> dict[str, Any]:
        memory = None if self.memory is None else self.memory.to_json()
        training = [found.to_json() for found in self.training]
        return {**vars(self), "multiply_adds": self.multiply_adds, "memory": memory, "training": training}


def estimate(plan: Plan) -> Estimate:
    """Sizes are exact up to file headers, without a depth pass; memory is that of the part that needs most."""
    walk = walk_memory(plan, plan.limits) if plan.needs_data and plan.compressed is None else None
    training = tuple(training_memory(plan, planned) for planned in plan.training)
    nbytes, output = _memory_bytes(plan, walk), _output_bytes(plan)
    nbytes = max([nbytes, *(found.peak for found in training)])
    if walk is not None:  # the parts are there until the output is whole
        walk = replace(walk, disk={"finished parts": output, "output": output, **walk.disk})
    operations = count_operations(plan)
    seconds = seconds_of(operations, plan.compute.dtype)
    writing = writing_bytes(plan) if walk is not None else 0
    return Estimate(plan.checkpoint.nbytes(), output, nbytes, operations, walk, training, seconds, writing)


def bits_per_weight(plan: Plan) -> float:
    """Mean bits per weight of the matrices of the blocks as they are written, with scales and zero points, dense ones too:
    linears, routers, and experts that are not taken apart. 0 where there are none."""
    unheld = plan.written_dense()
    kinds = Counter(
        (None if name in unheld else planned.scheme, planned.shape, _dense_bytes_of(plan, planned, name in unheld))
        for name, planned in plan.linears.items()
    )
    nbytes = weights = 0
    for (scheme, shape, as_dense), count in kinds.items():
        weights += count * shape[0] * shape[1]
        nbytes += count * (as_dense if scheme is None else stored_bytes(scheme, shape, plan))
    for index, block in enumerate(plan.model.blocks):
        for name in plan.model.other_parameters(index):
            parameter = plan.model.model.get_parameter(f"{block}.{name}")
            source = plan.model.source_of(f"{block}.{name}")
            weights += parameter.numel()
            nbytes += parameter.numel() * (plan.store if source is None else plan.stored_dtype(source)).itemsize
    return 8 * nbytes / weights if weights else 0.0


def _dense_bytes_of(plan: Plan, planned: Planned, unheld: bool) -> int:
    """Of a linear that no pass compresses, as it is written: packed where it was before, and the format holds it."""
    if planned.given is not None and plan.compressed is not None and not unheld and planned.given.bits < 16:
        return plan.compressed.nbytes(planned.source.removesuffix(".weight"))
    return (
        planned.weights * plan.stored_dtype(planned.source).itemsize if planned.given is None else 2 * planned.weights
    )


def _output_bytes(plan: Plan) -> int:
    share = 1.0 if plan.depth is None else plan.depth.share
    kinds = Counter(
        (planned.scheme, planned.shape, plan.checkpoint.dtype(planned.source).itemsize)
        for planned in plan.linears.values()
        if planned.scheme is not None
    )
    saved = sum(
        count * (shape[0] * shape[1] * itemsize - stored_bytes(scheme, shape, plan))
        for (scheme, shape, itemsize), count in kinds.items()
    )
    blocks = range(len(plan.model.blocks))
    inside = sum(plan.checkpoint.info(name).nbytes for block in blocks for name in _files_of(plan, block))
    saved += round((inside - saved) * (1 - share))
    if plan.head is not None:
        own = 0 if plan.head.head.tied else plan.checkpoint.info(plan.head.head.source).nbytes
        saved += own - stored_bytes(plan.head.scheme, plan.head.head.shape, plan)
    elif plan.recipe.basis is not None and plan.recipe.basis.residual:
        saved -= _own_head_bytes(plan)
    return plan.checkpoint.nbytes() - saved


def _own_head_bytes(plan: Plan) -> int:
    """What an output head that is tied to the embedding adds when it gets weights of its own; 0 where it is not tied."""
    head = find_head(plan.checkpoint, plan.model.model, plan.model.sources)
    return plan.checkpoint.info(head.source).nbytes if head.tied else 0


def _files_of(plan: Plan, block: int) -> list[str]:
    """The tensors of the files that belong to a block, in whatever format they are."""
    if plan.compressed is None:
        return plan.model.source_names(block)
    prefix = plan.model.blocks[block] + "."
    return [name for name in plan.checkpoint.names() if name.startswith(prefix)]


def stored_bytes(scheme: Scheme | None, shape: tuple[int, int], plan: Plan) -> int:
    """Bytes of a linear in the export format, found by describing it without any data."""
    n, k = shape
    if scheme is None or plan.recipe.export.encoding == "dense":
        return n * k * 2
    group = (scheme.group_size or k) if scheme.quantize else k
    empty = {"device": "meta"}
    linear = LinearWeights(
        scheme.bits,
        scheme.pattern,
        group,
        codes=torch.empty((n, k), dtype=torch.int8, **empty) if scheme.quantize else None,  # type: ignore[call-overload]
        scale=torch.empty((n, k // group), dtype=plan.store, **empty) if scheme.quantize else None,  # type: ignore[call-overload]
        values=None if scheme.quantize else torch.empty((n, k), dtype=plan.store, **empty),  # type: ignore[call-overload]
        zero_point=None if scheme.symmetric else torch.empty((n, k // group), dtype=torch.int8, **empty),  # type: ignore[call-overload]
    )
    if get_format(plan.recipe.export.format).supports(linear):
        return n * k * 2
    kept = 0.5 if scheme.pattern == "2:4" and plan.recipe.export.format == "sparse24" else 1.0
    positions = n * k // 8 if kept < 1 else 0
    scales = n * (k // group) * 2 if scheme.quantize else 0
    beside = _beside_codes(scheme, (n, k), k // group, plan.recipe.export.format) if scheme.quantize else 0
    return int(n * k * kept * scheme.bits / 8) + positions + scales + beside


def _beside_codes(scheme: Scheme, shape: tuple[int, int], groups: int, format: str) -> int:
    """Bytes of zero points, and of what else a format stores beside codes and scales."""
    n, k = shape
    if format == "sparse24":
        return 0 if scheme.symmetric else n * groups
    packed = -(-n * scheme.bits // 32) * 4 * groups
    if format == "gptq":  # qzeros, which symmetric linears have too, and g_idx
        return packed + 4 * k
    return 16 + (0 if scheme.symmetric else packed)  # weight_shape


def _memory_bytes(plan: Plan, walk: WalkMemory | None) -> int:
    itemsize = plan.model.dtype.itemsize
    block_bytes = max(plan.model.weights) * itemsize
    if walk is None:
        return 3 * block_bytes
    tokens = plan.recipe.calibration.samples * plan.recipe.calibration.sequence_length
    widest = max(p.shape[1] for p in plan.linears.values())
    outside = sum(math.prod(plan.checkpoint.shape(name)) for name in plan.model.source_names(None)) * itemsize
    activations = tokens * (3 * hidden_size(plan) + widest) * itemsize
    return max(walk.peak, _basis_bytes(plan, outside, activations), writing_bytes(plan))


def _basis_bytes(plan: Plan, outside: int, activations: int) -> int:
    """Of a basis pass: two blocks in float32 and, for all blocks at once, what their readers' inverse Hessians and the sampled
    weights of their readers and writers take."""
    basis = plan.recipe.basis
    if basis is None:
        return 0
    width = hidden_size(plan)
    blocks = plan.model.weights
    kept = 4 * len(blocks) * (2 * width * width + 4 * SAMPLED * width) if basis.residual else 0
    return outside + 2 * 4 * max(blocks) + activations + kept


def writing_bytes(plan: Plan) -> int:
    """Of a model that writes its own text: all of its weights at once, beside the keys and values of a few rows."""
    if all(source != SELF for source, _ in plan.recipe.calibration.mixture):
        return 0
    return sum(p.numel() for p in plan.model.model.parameters()) * plan.compute.dtype.itemsize


def training_in_words(plan: Plan, planned: PlannedTraining) -> str:
    """A training pass with its arithmetic, where the amount of data is known: forward and backward of the student, forward
    of the teacher."""
    weights = sum(p.weights for p in plan.linears.values()) + plan.model.head_weights()
    teacher = 1 if planned.teacher is not None else 0
    work = 2 * weights * ((planned.tokens or 0) * (3 + teacher) + planned.measured_tokens * 2)
    kind, precision = planned.settings.kind, for_precision(planned.settings.precision)
    if not work:
        return planned.describe()
    million = seconds_of({kind: work * 1_000_000 // max(1, planned.tokens or 0)}, precision)
    rate = "" if million is None else f", {_in_units(million)} per million tokens"
    return f"{planned.describe()}; {time_in_words({kind: work}, precision)}{rate}"


def time_in_words(operations: Mapping[str, int], dtype: torch.dtype) -> str:
    """How long so much arithmetic takes, in words; where no speed is known yet, the operations themselves are shown.

    operations, dtype: as for `seconds_of`
    """
    count = in_words(sum(operations.values()))
    if device() != "cpu":
        return f"{count} on the GPU"
    seconds = seconds_of(operations, dtype)
    if seconds is None:
        return f"{count} (how long that takes is known after the first `apply` or `sparsify doctor` on this machine)"
    return f"{count}, about {_in_units(seconds)} on this machine (estimate)"


def _in_units(seconds: float) -> str:
    """`18 minutes`"""
    for step, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * step:
            return f"{seconds / step:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"


def seconds_of(operations: Mapping[str, int], dtype: torch.dtype) -> float | None:
    """How long so much arithmetic takes at the speed of matrix products that was once measured here, with the overhead that a
    walk was seen to have. Measures nothing: None where no speed is known yet, and on a GPU.

    operations: by part; the solver's are in float32, all others in `dtype`
    """
    measured = rates() if device() == "cpu" else None
    if measured is None:
        return None
    seconds = sum(work / measured.of(torch.float32 if part in SOLVER else dtype) for part, work in operations.items())
    return OVERHEAD * seconds / torch.get_num_threads()
