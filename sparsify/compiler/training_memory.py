"""What a training pass takes of memory in each process, by item, before anything is computed.

A pass holds most at one of three moments, and its peak is that of the largest: at the end of a forward pass (what the backward
pass needs, and the weights that products are made with), at the end of a backward pass (the gradients of those weights), or
while the optimizer steps (gradients in float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from sparsify import memory
from sparsify.compiler.activations import FLOAT, MASK, block_activations
from sparsify.compiler.memory import LESS, in_words
from sparsify.compute import for_precision
from sparsify.distributed import device
from sparsify.model.output_head import is_tied
from sparsify.recipe import Distill, Lora
from sparsify.training.eight_bits import BLOCK
from sparsify.training.losses import ENTRIES
from sparsify.training.processes import rows_at_once
from sparsify.units import size

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan
    from sparsify.compiler.plan_training import PlannedTraining

LATER = 290_000_000  # what libraries take once they train: as in `memory`, and the Trainer and peft, which nothing else imports
LOGIT = 20  # bytes per logit of a chunk: student's, teacher's and the gradient in float32, and two of them in bfloat16
EIGHT = 1 + FLOAT / BLOCK  # bytes of a moment in 8 bits
GATHERED = 3  # blocks that FSDP2 holds whole: the one that runs, the next, and one whose gradients are being summed


@dataclass(frozen=True)
class TrainingMemory:
    """What a pass takes at the moment when it takes most, in bytes by item, in each of several processes.

    host, gpu: gpu is empty without one
    budget, gpu_budget: what a process may take; None where the system does not say what is free
    instead: where that is too little: settings with which it takes less, as `--set` takes them, and the peak with each, of the
        GPU where that does not fit
    """

    kind: str
    host: dict[str, int]
    gpu: dict[str, int]
    budget: int | None = None
    gpu_budget: int | None = None
    instead: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Of the host."""
        return sum(self.host.values())

    @property
    def gpu_peak(self) -> int:
        """Of the GPU, 0 without one."""
        return sum(self.gpu.values())

    @property
    def too_much_on_host(self) -> bool:
        return self.budget is not None and self.peak > self.budget

    @property
    def too_much_on_gpu(self) -> bool:
        return self.gpu_budget is not None and self.gpu_peak > self.gpu_budget

    @property
    def too_much(self) -> bool:
        """Whether it does not fit."""
        return self.too_much_on_host or self.too_much_on_gpu

    def describe(self) -> list[str]:
        """Lines of a plan."""
        lines = [f"memory of {self.kind} {size(self.peak)}: {in_words(self.host)}"]
        lines += [f"of the GPU {size(self.gpu_peak)}: {in_words(self.gpu)}"] if self.gpu else []
        if self.too_much:
            said = [f"{size(peak)} with --set passes.{self.kind}.{name}" for name, peak in self.instead.items()]
            free = [size(self.budget or 0)] if self.too_much_on_host else []
            free += [f"{size(self.gpu_budget or 0)} of the GPU"] if self.too_much_on_gpu else []
            lines.append(
                f"does not fit: {self.kind} may take {' and '.join(free)} here; "
                + (", ".join(said) or "no setting takes less")
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "peak": self.peak, "gpu_peak": self.gpu_peak}


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. model: all; compressed: of compressed linears; masked: of those with a mask; outside: before and
    after the blocks; scales: of compressed linears; block: of the largest block."""

    model: int
    compressed: int
    masked: int
    outside: int
    scales: int
    block: int


def counts_of(plan: Plan) -> Counts:
    """Of the student of a plan."""
    stored = [(p.weights, scheme) for p in plan.linears.values() if (scheme := p.stored()) is not None]
    compressed = sum(weights for weights, _ in stored)
    masked = sum(weights for weights, scheme in stored if scheme.pattern == "2:4")
    scales = sum(weights // scheme.group_size for weights, scheme in stored if scheme.bits < 16)
    blocks = plan.model.weights
    whole = sum(
        p.numel() for p in plan.model.model.parameters()
    )  # a tied head may be a parameter of its own here, or not
    one = plan.head is None and is_tied(plan.model.model)
    embedding, head = (_weight(plan, kind) for kind in ("input", "output"))
    whole += plan.model.head_weights() * ((head is embedding) - one)
    return Counts(whole, compressed, masked, whole - sum(blocks), scales, max(blocks))


Activations = Callable[[bool, torch.dtype, tuple[int, int]], tuple[list[int], int]]

SMALLER: dict[str, Any] = {  # settings that training takes less memory with
    "gradient_checkpointing": True,
    "micro_batch_size": 1,
    "teacher_logits": "cached",
    "optimizer": "adamw_8bit",
    "offload": "optimizer",
}


def _weight(plan: Plan, kind: str) -> Any:
    """The weight of the "input" or "output" embeddings, None without one."""
    return getattr(getattr(plan.model.model, f"get_{kind}_embeddings")(), "weight", None)


def training_memory(plan: Plan, planned: PlannedTraining) -> TrainingMemory:
    """Of one pass, in each of the processes that `plan.limits` says. What does not fit is told with what takes less."""
    limits = plan.limits
    taken = partial(_taken, plan, counts_of(plan), cache(partial(_activations, plan)))
    found = replace(
        taken(planned), budget=memory.budget(limits.memory), gpu_budget=memory.gpu_budget(limits.gpu_memory)
    )
    if not found.too_much:
        return found
    instead = {}
    for name, value in SMALLER.items():
        if getattr(planned.settings, name, value) != value:
            other = taken(replace(planned, settings=planned.settings.model_copy(update={name: value})))
            instead[f"{name}={str(value).lower()}"] = other.gpu_peak if found.too_much_on_gpu else other.peak
    now = found.gpu_peak if found.too_much_on_gpu else found.peak
    instead = {name: peak for name, peak in instead.items() if peak < LESS * now}
    return replace(found, instead=dict(sorted(instead.items(), key=lambda item: item[1])))


def _taken(plan: Plan, counts: Counts, activations_of: Activations, planned: PlannedTraining) -> TrainingMemory:
    """Where the model cannot run on tensors without numbers, what the backward pass needs is guessed from widths."""
    settings, among = planned.settings, plan.limits.among
    dtype = for_precision(settings.precision)
    rows = rows_at_once(settings, among)
    lora = isinstance(settings, Lora)
    merges = isinstance(settings, Lora) and settings.export == "merge"
    trained = _trained(plan, settings, counts)
    fixed = _parameters(plan, settings, counts, among) | _teacher(planned, dtype)
    learned = isinstance(settings, Distill) and settings.learned_masks is not None
    masks = 1 if lora else 2 + learned  # beside them those that they are compared with, and those of the start
    fixed |= {"masks": round(masks * MASK * counts.masked)} if merges or not lora else {}
    kept = (isinstance(settings, Distill) and settings.held_out is not None) + (settings.average > 0)
    fixed |= {"mean and best weights": FLOAT * kept * trained} if kept else {}
    moments = {
        "optimizer states": round(2 * (EIGHT if settings.optimizer == "adamw_8bit" else FLOAT) * trained) // among
    }
    passes = settings.batch_size // (rows * among)
    depth = 1 if settings.gradient_checkpointing else len(plan.model.blocks)
    share = depth / len(plan.model.blocks)
    products = round(_of_products(settings, dtype) * counts.compressed * (share if lora or among > 1 else 1))
    norms = not lora and "norms" in settings.train
    per_block, hidden = activations_of(norms, dtype, (rows, settings.sequence_length))
    activations = sum(per_block) if depth > 1 else max(per_block) + len(per_block) * hidden
    before = 0 if lora else FLOAT * counts.compressed // among if passes > 1 else 0
    candidates = [
        {
            "activations": activations,
            "weights of the products": products,
            "logits": _logits(plan, settings, dtype, rows),
            "gradients": before,
        },
        {
            "activations": max(per_block),
            "weights of the products": products,
            "gradients": trained * (FLOAT if passes > 1 or among > 1 or lora else dtype.itemsize) // among,
        },
        {"gradients": FLOAT * trained // among},
    ]
    most = max(candidates, key=lambda items: sum(items.values()))
    if among > 1:
        most |= {"gathered parameters": FLOAT * (GATHERED * counts.block + counts.outside)}
    inside = fixed | most
    base = {"interpreter and libraries": (memory.anonymous() or 0) + LATER}
    if device() == "cpu":
        return TrainingMemory(settings.kind, base | inside | moments, {})
    if settings.offload == "optimizer":
        return TrainingMemory(settings.kind, base | moments, inside)
    return TrainingMemory(settings.kind, base, inside | moments)


def _trained(plan: Plan, settings: Any, counts: Counts) -> int:
    """How many numbers the optimizer moves."""
    if isinstance(settings, Lora):
        shapes = [p.shape for p in plan.linears.values() if p.stored() is not None]
        return sum(settings.rank * (n + k) for n, k in shapes)
    found = (
        counts.compressed + (counts.scales if settings.quantize_in_loop else 0) if "linears" in settings.train else 0
    )
    if "embedding" in settings.train:
        found += _weight(plan, "input").numel()
    return found


def _parameters(plan: Plan, settings: Any, counts: Counts, among: int) -> dict[str, int]:
    """The student's own, as they are held."""
    if not isinstance(settings, Lora):
        return {"student in float32": FLOAT * (counts.model + counts.scales) // among}
    codes = sum(
        p.weights * (min(8, scheme.bits) / 8 if settings.quantized_base and scheme.bits < 16 else 2)
        for p in plan.linears.values()
        if (scheme := p.stored()) is not None
    )
    adapters = FLOAT * _trained(plan, settings, counts)
    others = FLOAT * (counts.model - counts.compressed)
    return {"base": round(codes) + 2 * counts.scales, "adapters": adapters // among, "not compressed": others // among}


def _teacher(planned: PlannedTraining, dtype: torch.dtype) -> dict[str, int]:
    teacher = planned.teacher
    cached = isinstance(planned.settings, Distill) and planned.settings.teacher_logits == "cached"
    if teacher is None or (cached and planned.settings.held_out is None):  # type: ignore[union-attr]
        return {}
    return {"teacher": dtype.itemsize * sum(math.prod(teacher.shape(name)) for name in teacher.names())}


def _of_products(settings: Any, dtype: torch.dtype) -> int:
    """Bytes per weight of a compressed linear that lie beside its parameters until the backward pass has reached it.

    One process rounds the weights once a step; several, and adapters that are merged, in every forward pass. The sum of
    weight and adapter stays in float32 for the gradient that passes the rounding.
    """
    if not isinstance(settings, Lora):
        return dtype.itemsize
    if settings.export == "merge":
        return dtype.itemsize + FLOAT * settings.quantize_in_loop
    return dtype.itemsize if settings.quantized_base else 0


def _logits(plan: Plan, settings: Any, dtype: torch.dtype, rows: int) -> int:
    """Of the tokens whose logits are there at once, and the head in the type of the products."""
    head = _weight(plan, "output")
    if head is None:
        return 0
    entries = min(rows * settings.sequence_length, max(1, ENTRIES // head.shape[0])) * head.shape[0]
    return LOGIT * entries + (head.numel() * dtype.itemsize if dtype != torch.float32 else 0)


def _activations(plan: Plan, norms: bool, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[list[int], int]:
    """What the backward pass needs of the forward pass of each block, and of one hidden state. norms: whether they are trained;
    shape: rows and tokens per row of a micro-batch"""
    compressed = {name for name, planned in plan.linears.items() if planned.stored() is not None}
    return block_activations(plan, compressed, norms, dtype, shape)
