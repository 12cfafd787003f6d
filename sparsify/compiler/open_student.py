"""Between the parts of a checkpoint and a model that can be trained: read part by part, and written part by part again.

Only one block at a time is a whole of float32 weights in every process, whatever the size of the model: several processes share a
block out (`training.sharding`) as soon as it is read, and gather it again when it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsify.distributed import is_main
from sparsify.errors import CheckpointError
from sparsify.formats.reader import natural
from sparsify.formats.scheme import in_block
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import find_blocks, load_state, meta_model, target_names
from sparsify.model.experts import is_expert, take_apart
from sparsify.model.linear import LinearWeights
from sparsify.training.sharding import gathered_inside, move

Place = Callable[[nn.Module, Mapping[str, LinearWeights]], Mapping[str, Any]]
"""Puts what stands for compressed linears into a model; is given them, and returns what it placed, by name in the model."""


@dataclass
class OpenedStudent:
    """The compressed model as one that can be trained.

    linears:  trainable, by their name in the model; those that end with other weights than they began with
    modules:  name of a compressed linear in the checkpoint -> its name in the model
    tensors:  name of any other tensor in the checkpoint -> name of the parameter that it is
    dtypes:   name of such a parameter -> its type in the checkpoint
    parts:    name of a part -> names of the blocks that it holds tensors of; "" for what lies outside of them
    adapter:  peft's settings of an adapter that is exported beside the weights
    """

    model: Any
    linears: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    parts: dict[str, set[str]] = field(default_factory=dict)
    adapter: Any = None

    def within(self, block: str) -> set[str]:
        """Names of the parameters of a block; of all outside of the blocks for ""."""
        blocks = find_blocks(self.model)
        names = [name for name, _ in self.model.named_parameters()]
        return {name for name in names if _block_of(name, blocks) == block}


def _block_of(name: str, blocks: list[str]) -> str:
    folder = blocks[0].rpartition(".")[0] + "."
    block = folder + name.removeprefix(folder).partition(".")[0]
    return block if name.startswith(folder) and block in blocks else ""


def open_student(
    writer: CheckpointWriter, checkpoint: Checkpoint, place: Place, ready: Callable[[OpenedStudent, str], None]
) -> OpenedStudent:
    """Build the model of `checkpoint` in float32 from the finished parts, its experts as linears where one is compressed.

    place: makes its compressed linears in the blocks what they are in training
    ready: is called with the name of each block when all of it is there, at last with "" for what lies outside
    """
    model: Any = meta_model(checkpoint, torch.float32)
    if any(map(is_expert, writer.linears())):
        take_apart(model)
    opened = OpenedStudent(model)
    blocks = find_blocks(model)
    waiting = list(blocks)
    for part in sorted(writer.parts(), key=natural):
        names = _read_part(opened, part, writer, place)
        opened.parts[part] = {_block_of(name, blocks) for name in names}
        for block in [name for name in waiting if not _lacking(model.get_submodule(name))]:
            ready(opened, block)
            waiting.remove(block)
    model.tie_weights()
    if lacking := _lacking(model):
        raise CheckpointError(
            f"{checkpoint.spec} lacks the tensor {lacking[0]}; is it complete and of this model type?"
        )
    ready(opened, "")
    move(model)
    return opened


def _lacking(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.is_meta]


def _read_part(opened: OpenedStudent, part: str, writer: CheckpointWriter, place: Place) -> set[str]:
    """Put the tensors of a part into the model. Returns the names of its parameters there."""
    model = opened.model
    linears, others = writer.read_part(part)
    targets = target_names(model, [*others, *(f"{module}.weight" for module in linears)])
    modules = {module: targets[f"{module}.weight"][0].removesuffix(".weight") for module in linears}
    state = {name: tensor for name, tensor in others.items() if name in targets}  # the model knows no others
    for module, linear in linears.items():
        state[f"{module}.weight"] = linear.dense(torch.float32)
        if linear.bias is not None:
            state[f"{module}.bias"] = linear.bias
    head = model.get_output_embeddings()
    if any(model.get_submodule(name) is head for name in modules.values()):
        _untie(model)  # it has codes of its own
    load_state(model, state, torch.float32)
    inside = {
        modules[module]: linear  # the linears of a sublayer that was removed stay zero
        for module, linear in linears.items()
        if in_block(modules[module]) and not linear.is_zero()
    }
    opened.linears |= place(model, inside)
    known = {name: target for name, (target, same) in targets.items() if same and name in others}
    opened.modules |= modules
    opened.tensors |= known
    opened.dtypes |= {known[name]: others[name].dtype for name in known}
    return {target for target, _ in targets.values()}


def _untie(model: Any) -> None:
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


@torch.no_grad()
def rewrite(
    writer: CheckpointWriter,
    opened: OpenedStudent,
    student: nn.Module,
    conclude: Callable[[dict[str, LinearWeights]], None],
) -> None:
    """Write all parts again with what was trained; a linear that was not, and every other tensor, stay as they were.

    All processes take part, the main one writes. student: holds the model, and what of it lies outside of the blocks
    """
    inside: dict[str, LinearWeights] = {}
    with writer.next_stage() if is_main() else nullcontext() as write:
        for part in sorted(writer.parts(), key=natural):
            owners = (opened.model.get_submodule(block) if block else student for block in sorted(opened.parts[part]))
            with gathered_inside(owners):
                if write is not None:
                    write(part, *_trained_part(opened, *writer.read_part(part), inside))
        if write is not None:
            conclude(inside)


def _trained_part(
    opened: OpenedStudent,
    linears: dict[str, LinearWeights],
    tensors: dict[str, Tensor],
    inside: dict[str, LinearWeights],
) -> tuple[dict[str, LinearWeights], dict[str, Tensor]]:
    """A part with what was trained of it. inside: gets its linears in the blocks"""
    for module in linears:
        trained = opened.linears.get(opened.modules[module])
        if trained is not None:
            linears[module] = trained.export().to("cpu").validate(module)
        if in_block(opened.modules[module]):
            inside[module] = linears[module]
    for name, tensor in tensors.items():
        owner, _, last = opened.tensors.get(name, "").rpartition(".")
        if name in opened.tensors and is_parametrized(opened.model.get_submodule(owner), last):
            tensors[name] = getattr(opened.model.get_submodule(owner), last).to(tensor.dtype).cpu()
    return linears, tensors
