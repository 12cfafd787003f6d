"""What a walk takes of memory and disk, by item, before anything is computed; and what a budget makes of it.

Beside the model's block and one micro-batch a walk holds the statistics of one group of linears. What grows with the number
of tokens, hidden states and suspended forwards, takes what the budget leaves: hidden states go to a file and forwards are
computed anew where that is too little. Neither changes a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsify import memory
from sparsify.compiler.activations import FLOAT, MASK, block_activations
from sparsify.compiler.operations import Group, groups_of, hidden_size
from sparsify.distributed import device, processes
from sparsify.errors import SparsifyError
from sparsify.model.capture import capture_calls, without_numbers
from sparsify.model.experts import is_expert
from sparsify.model.footprint import Footprint, footprint
from sparsify.model.linear_groups import by_kind, find_groups
from sparsify.model.sequential import rows_of_micro_batch
from sparsify.recipe import Tune
from sparsify.solver.hessian import PANEL
from sparsify.solver.masks.alps import rows_together
from sparsify.solver.solve import Scheme, factor_is_kept
from sparsify.units import size

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan

LATER = 180_000_000  # what libraries take once they compute: buffers of their products, kernels, tables
PACKED_ROWS = 2048  # of a micro-batch, which the kernel of X'X copies into its own order
TOGETHER = 17  # bytes per weight that ALPS holds of the outputs it solves together: four matrices and a mask


@dataclass(frozen=True)
class Limits:
    """What the user allows. memory, gpu_memory: as given (`16GB`), None for nine tenths of what is free; spill: hidden states
    go to a file in any case; processes: how many a plan is for, None for those that there are."""

    memory: str | None = None
    gpu_memory: str | None = None
    spill: bool = False
    processes: int | None = None

    @property
    def among(self) -> int:
        """Among how many processes the work is shared out."""
        return self.processes or processes()


FREE = Limits()  # what is free


@dataclass(frozen=True)
class WalkMemory:
    """What a walk takes at the moment when it takes most, in bytes by item, and how it fits the budget.

    host, gpu, disk: by item; gpu is empty without one
    least, least_gpu: the smallest budgets that work, with hidden states in a file and no forward kept
    budget, gpu_budget: None where the system does not say what is free
    spills: hidden states are in a file; place: else the device in whose memory they are
    room: for suspended forwards; None where all of them fit
    instead: where the smallest budget is too large: settings with which a smaller one works, as `--set` takes them, and that one
    """

    host: dict[str, int]
    gpu: dict[str, int]
    disk: dict[str, int]
    least: int
    least_gpu: int
    budget: int | None
    gpu_budget: int | None
    spills: bool
    place: str
    room: int | None
    instead: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Of the host, in bytes."""
        return sum(self.host.values())

    def problem(self) -> str | None:
        """What does not fit and what would, as a sentence; None where everything does."""
        if self.budget is not None and self.least > self.budget:
            items = in_words({name: nbytes for name, nbytes in self.host.items() if name not in GROWING})
            least = f"--memory {_up(self.least)} is the least ({items})"
            return f"one block does not fit into {size(self.budget)} of memory: {least}{self._or('--memory')}"
        if self.gpu_budget is not None and self.least_gpu > self.gpu_budget:
            return (
                f"one block does not fit into {size(self.gpu_budget)} of the GPU's memory: --gpu-memory "
                f"{_up(self.least_gpu)} is the least{self._or('--gpu-memory')}; CUDA_VISIBLE_DEVICES= computes on the CPU"
            )
        return None

    def _or(self, option: str) -> str:
        """The settings that need less."""
        said = [f"{option} {_up(least)} with --set {name}" for name, least in self.instead.items()]
        return f", or {', or '.join(said)}" if said else ""

    def describe(self) -> str:
        """One line on what the budget led to."""
        where = "in a file" if self.spills else f"in memory ({self.place})" if self.gpu else "in memory"
        kept = "are kept" if self.room is None else f"are kept up to {size(self.room)}, the others computed anew"
        kept = "are computed anew for every group" if self.room == 0 else kept
        return f"hidden states {where}, suspended forwards {kept}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "peak": self.peak}


MICRO_BATCH = "micro-batch"
TUNING = "training of the block"
HIDDEN, SUSPENDED = "hidden states", "suspended forwards"
OUTSIDE = "embeddings, as they are read"
GROWING = (HIDDEN, SUSPENDED)  # with the number of tokens


def in_words(items: Mapping[str, int]) -> str:
    """`block 0.9 GB, ...`, the largest first."""
    shown = sorted(((nbytes, name) for name, nbytes in items.items() if nbytes >= 1e6), reverse=True)
    return ", ".join(f"{name} {size(nbytes)}" for nbytes, name in shown)


def _up(nbytes: int) -> str:
    """A budget that a user can type, not smaller: `6.3GB`."""
    return f"{math.ceil(nbytes / 1e8) / 10:g}GB"


def walk_memory(plan: Plan, limits: Limits) -> WalkMemory:
    """The walk of a plan that needs data, in this process."""
    calibration, itemsize = plan.recipe.calibration, plan.model.dtype.itemsize
    streams = 2 if plan.needs_dense_reference else 1
    rows = rows_of_micro_batch(calibration.sequence_length)
    samples = math.ceil(calibration.samples / limits.among)
    one = _micro_batch(plan, min(rows, samples))
    hidden = _streams_kept(plan, streams) * samples * calibration.sequence_length * hidden_size(plan) * itemsize
    groups = [*dict.fromkeys(groups_of(plan))]
    leaves = not any(group.expert for group in groups)
    suspended = math.ceil(samples / rows) * (one.with_dense(leaves) if streams == 2 else one.most_waiting)
    base = {"interpreter and libraries": (memory.anonymous() or 0) + LATER}
    steps, outside = _steps_of_walk(plan, one, groups, streams), {OUTSIDE: _outside_bytes(plan)}
    work = max(steps, key=_sum)
    budget, gpu_budget = memory.budget(limits.memory), memory.gpu_budget(limits.gpu_memory)
    on_gpu = device() != "cpu"
    gpu = work if on_gpu else {}
    inside = base | ({"block, as it is read and written": 3 * _block_bytes(plan)} if on_gpu else work)
    least, least_gpu = max(_sum(inside), _sum(base | outside)), _sum(gpu)
    left = None if budget is None else max(0, budget - _sum(inside))
    left_on_gpu = max(0, (gpu_budget or 0) - least_gpu)
    place = device() if on_gpu and hidden <= left_on_gpu and not limits.spill else "cpu"
    here = 0 if place != "cpu" else hidden  # in the memory of the host, or in a file
    spills = limits.spill or (budget is not None and here > max(0, budget - least))
    if not spills and left is not None:
        left -= here
    if on_gpu:
        left = left_on_gpu - (hidden - here)
    room = None if left is None or suspended <= left else left
    kept = suspended if room is None else room
    if room is None and not on_gpu:  # then the one that runs is among those that are kept
        inside = base | max((_without(step, MICRO_BATCH, one.most_waiting) for step in steps), key=_sum)
    host = base | outside | _growing(0 if spills else here, 0)
    inside |= _growing(0 if spills else here, 0 if on_gpu else kept)
    gpu |= _growing(hidden - here, kept) if on_gpu else {}
    disk = {HIDDEN: hidden} if spills else {}
    most = max(inside, host, key=_sum)
    instead: dict[str, int] = {}
    if on_gpu and gpu_budget is not None and least_gpu > gpu_budget:
        instead = _with_other_settings(plan, one, groups, {}, least_gpu, gpu_budget)
    elif not on_gpu and budget is not None and max(_sum(base | outside), budget) < least:
        instead = _with_other_settings(plan, one, groups, base, least, budget)
    return WalkMemory(most, gpu, disk, least, least_gpu, budget, gpu_budget, spills, place, room, instead)


def _with_other_settings(
    plan: Plan, one: Footprint, groups: Sequence[Group], beside: Mapping[str, int], least: int, budget: int
) -> dict[str, int]:
    """Settings of the recipe with which a walk takes less than `least`, as `--set` takes them, and how much; the least first.

    beside: what is there whatever the settings are. Where none of them fits the budget, all of them at once are looked at too.
    """

    def needed(changes: Sequence[str]) -> int:
        other = list(groups)
        for name in changes:
            other = [
                replace(group, members=tuple((shape, SMALLER[name](scheme)) for shape, scheme in group.members))
                for group in other
            ]
        propagates = any(scheme.error_propagation > 0 for group in other for _, scheme in group.members)
        streams = 2 if propagates or plan.recipe.tune is not None else 1
        return max(_sum({**beside, **step}) for step in _steps_of_walk(plan, one, other, streams))

    found = {name: needed([name]) for name in SMALLER}
    found = {name: nbytes for name, nbytes in found.items() if nbytes < LESS * least}
    if len(found) > 1 and min(found.values()) > budget:
        found[" --set ".join(found)] = needed([*found])
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _without_alps(scheme: Scheme) -> Scheme:
    return replace(scheme, prune="sparsegpt") if scheme.prune == "alps" else scheme


SMALLER: dict[str, Callable[[Scheme], Scheme]] = {  # settings that a walk takes less memory with
    "solver.error_propagation=0": lambda scheme: replace(scheme, error_propagation=0.0),
    "solver.coordinate_descent=0": lambda scheme: replace(scheme, coordinate_descent=0),
    "passes.prune.method=sparsegpt": _without_alps,
}
LESS = 0.97  # of the least: what saves less is not named


def _sum(items: Mapping[str, int]) -> int:
    return sum(items.values())


def _without(items: Mapping[str, int], name: str, nbytes: int) -> dict[str, int]:
    """Items of which one is smaller by so much, where it is there."""
    return {key: max(0, value - nbytes) if key == name else value for key, value in items.items()}


def _growing(hidden: int, suspended: int) -> dict[str, int]:
    return {name: nbytes for name, nbytes in ((HIDDEN, hidden), (SUSPENDED, suspended)) if nbytes}


def _outside_bytes(plan: Plan) -> int:
    """Of what lies before and after the blocks while it is read, without the output head: as it is in the files, and in the
    type that the model is computed in."""
    itemsize = plan.model.dtype.itemsize
    infos = [plan.checkpoint.info(name) for name in plan.model.without_head()]
    return sum(info.nbytes + math.prod(info.shape) * itemsize for info in infos)


def refuse_too_small(found: WalkMemory, limits: Limits) -> str | None:
    """SparsifyError where a budget that the user gave is too small for one block; where it is only what is free, a warning."""
    problem = found.problem()
    if problem is not None and (limits.memory or limits.gpu_memory):
        raise SparsifyError(problem)
    return problem


def _micro_batch(plan: Plan, rows: int) -> Footprint:
    """What one micro-batch holds in the block where that is most; found on tensors without numbers, and where the model
    cannot run on those, from the widths of its linears."""
    length = plan.recipe.calibration.sequence_length
    found: list[Footprint] = []
    with suppress(Exception), without_numbers(plan.model) as hollow:
        hidden, calls = capture_calls(hollow, torch.zeros(rows, length, dtype=torch.long))

        def look(index: int) -> Footprint:
            block = hollow.block(index)
            groups, _ = find_groups(block, hidden, calls[index])
            return footprint(block, [block.get_submodule(group.stop) for group in groups], hidden, calls[index])

        found = by_kind(hollow, look)
    if found:
        most = max(found, key=lambda one: one.with_dense(leaves=True))
        return replace(most, peak=max(one.peak for one in found))
    widths = [planned.shape[1] for planned in plan.linears.values()]
    token = plan.model.dtype.itemsize * rows * length
    waiting = token * (2 * min(widths) + max(widths))
    return Footprint((waiting, waiting), token * (8 * min(widths) + 4 * max(widths)))


def _steps_of_walk(plan: Plan, one: Footprint, groups: Iterable[Group], streams: int) -> list[dict[str, int]]:
    """What the walk holds in each step of its work on each group of linears, without what grows with the tokens.

    groups: those that differ; streams: 2 where the dense model is followed
    """
    calibration, itemsize = plan.recipe.calibration, plan.model.dtype.itemsize
    tokens = min(rows_of_micro_batch(calibration.sequence_length), calibration.samples) * calibration.sequence_length
    codes = max(_weights_of_block(plan))
    found: list[dict[str, int]] = []
    for group in groups:
        k = group.inputs
        # H and C or W C, in matrices of [K, K]; those of the layer are there while they are combined
        matrices = (1 + group.followed / k) * (2 if group.expert else 1)
        inputs, packed = tokens * k * itemsize, round(matrices * PACKED_ROWS * k) * itemsize
        reading = max(one.peak + (streams - 1) * inputs, streams * inputs + packed)
        found.append({"statistics and factors": round(4 * matrices * k * k), MICRO_BATCH: reading})
        found += _solving(group, matrices)
    if plan.recipe.tune is not None:
        found.append({TUNING: _tuning_bytes(plan, plan.recipe.tune)})
    fixed = {"block": _block_bytes(plan, streams), "codes of the block": codes}
    return [fixed | step for step in found] or [fixed]


def _tuning_bytes(plan: Plan, tune: Tune) -> int:
    """Of the training of one block: parameters, two moments, the best state and masks, and beside them either gradients or what the
    backward pass needs with the weights that products are made with."""
    dtype, shape = plan.compute.dtype, (tune.batch_size, plan.recipe.calibration.sequence_length)
    per_block, _ = block_activations(plan, set(plan.schemes), True, dtype, shape)
    most = 0
    for index, (weights, activations) in enumerate(zip(_weights_of_block(plan), per_block, strict=True)):
        parameters = plan.model.weights[index]
        beside = max(FLOAT * parameters, activations + dtype.itemsize * weights)
        most = max(most, 4 * FLOAT * parameters + round(2 * MASK * weights) + beside)
    return most


def _block_bytes(plan: Plan, streams: int = 1) -> int:
    """Of the largest block, in the type that the model is computed in. streams: 2 where the dense model is followed; both
    share the weights of experts, of which one has its original ones beside them."""
    held = (
        streams * weights - (streams - 1) * (shared - one)
        for weights, (shared, one) in zip(plan.model.weights, plan.model.expert_weights, strict=True)
    )
    return max(held) * plan.model.dtype.itemsize


def _streams_kept(plan: Plan, streams: int) -> int:
    """How many tensors of the size of the hidden states lie where those do: with experts, what enters them in every stream,
    and what leaves those of the dense model."""
    compresses_experts = any(is_expert(name) for name in plan.schemes)
    return streams + (2 * streams - 1 if compresses_experts else 0)


def _weights_of_block(plan: Plan) -> list[int]:
    """How many weights are compressed in each block."""
    counts = [0] * len(plan.model.blocks)
    for planned in plan.linears.values():
        counts[planned.block] += planned.weights if planned.scheme is not None else 0
    return counts


def _solving(group: Group, matrices: float) -> list[dict[str, int]]:
    """What the solver holds of a group in each of its steps. matrices: of H, and C or W C where errors are propagated."""
    found = []
    for scheme in dict.fromkeys(scheme for _, scheme in group.members):
        weights = group.inputs * sum(n for (n, _), own in group.members if own == scheme)
        for inside, per_weight, together in _steps(scheme, factor_is_kept(group.inputs)):
            outputs = weights // group.inputs
            rows = rows_together(outputs, group.inputs) if together else 0
            found.append(
                {
                    "statistics and factors": round(
                        4 * group.inputs * ((matrices + inside) * group.inputs + 2 * PANEL)
                    ),
                    "weights that are solved": round(per_weight * weights) + TOGETHER * rows * group.inputs,
                }
            )
    return found


def _steps(scheme: Scheme, keeps_factor: bool) -> list[tuple[int, float, bool]]:
    """Steps of the solver: [K, K] matrices beside the statistics, bytes per weight, whether ALPS takes outputs together.

    Weights in float32: as given, the target, and what becomes of them; 8 bits for each code and each entry of a mask.
    """
    target = 4 if scheme.error_propagation > 0 else 0
    mask = 2 if scheme.prune not in (None, "sparsegpt") else 0
    steps: list[tuple[int, float, bool]] = [(1 if scheme.sweeps or target else 0, 4 + target, False)]
    if scheme.prune == "alps":
        steps.append((1 + keeps_factor, 4 + target + 1, True))  # the factor of each round's system; the mask
    if scheme.sweeps:
        steps.append((1, 4 + target + 4 + 2 + mask, False))
        if scheme.coordinate_descent:
            steps.append((0, 4 + target + 12 + 2 + mask, False))
    return steps
