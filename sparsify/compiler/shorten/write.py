"""The shortened model as a directory: an ordinary checkpoint of the same architecture with fewer layers.

It is loaded again and compared, on a few tokens, with the old model run without what was removed: an architecture that decides
something by the number of a layer is noticed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsify.compiler.shorten.choose import Choice
from sparsify.compiler.shorten.config import shortened_config
from sparsify.compiler.shorten.fit import misfit
from sparsify.compiler.shorten.replace import place
from sparsify.compiler.shorten.source import Source, open_source, probe_tokens
from sparsify.depth.layers import Layer
from sparsify.distributed import device
from sparsify.errors import CheckpointError
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.capture import capture_calls, run_block
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.linear import LinearWeights
from sparsify.model.sublayers import KINDS, Structure, run_without
from sparsify.training.block_tuning import Tuned


def write_shortened(source: Source, choice: Choice, structures: Mapping[int, Structure], output: Path) -> None:
    """Write the layers that are left under their new numbers, and everything outside of them as it is."""
    if problem := misfit(source.model, choice.layers):
        raise CheckpointError(f"{source.checkpoint.spec}: {problem}")
    checkpoint = Checkpoint(source.checkpoint.spec, source.checkpoint.directory)
    vars(checkpoint)["config"] = shortened_config(source.checkpoint, choice.layers, len(source.model.blocks))
    writer = CheckpointWriter(output, source.compressed.format, checkpoint)
    for number, layer in enumerate(choice.layers):
        linears: dict[str, LinearWeights] = {}
        tensors: dict[str, Tensor] = {}
        tuned = choice.replaced.get(number)
        for kind in KINDS:
            old = layer.source(kind)
            structure = structures.get(old)
            for name, (target, _) in source.model.sources.items():
                if source.model.owner(target) != old:
                    continue
                inner = target.removeprefix(source.model.blocks[old] + ".")
                if (structure is None and kind != KINDS[0]) or (
                    structure is not None and structure.kind_of(inner) != kind
                ):
                    continue
                zero = layer.absent == kind and structure is not None and structure.is_silenced(inner, kind)
                _take(source, name, inner, renumbered(name, old, number), zero, tuned, linears, tensors)
        writer.write_part(f"block-{number:04d}", linears, tensors)
    outside = [name for name, (target, _) in source.model.sources.items() if source.model.owner(target) is None]
    heads = {f"{m}.weight": m for m in source.compressed.modules}
    linears = {heads[name]: source.compressed.linear(heads[name]) for name in outside if name in heads}
    biases = {f"{module}.bias" for module in linears}
    plain = [name for name in outside if name not in heads and name not in biases]
    tensors = {name: source.checkpoint.tensor(name) for name in plain}
    for name in source.compressed.other_names():
        kept = name if name in source.model.sources else None
        if kept is None and (kept := _carried_name(name, source, choice.layers)) is not None:
            tensors[kept] = source.checkpoint.tensor(name)
    writer.write_part("outside", linears, tensors)
    writer.finish()


def _carried_name(name: str, source: Source, layers: Sequence[Layer]) -> str | None:
    """What a tensor that the model does not know is called in the shortened one; None where its layer is gone.

    A layer behind the last, such as one that predicts further tokens, stays behind the last.
    """
    blocks = source.model.blocks
    parent = re.escape(blocks[0].rpartition(".")[0])
    found = re.match(rf"{parent}\.(\d+)\.", name)
    if found is None:
        return name
    old = int(found.group(1))
    if old >= len(blocks):
        return renumbered(name, old, old - len(blocks) + len(layers))
    new = [number for number, layer in enumerate(layers) if layer.source(KINDS[0]) == old]
    return renumbered(name, old, new[0]) if new else None


def _take(
    source: Source,
    name: str,
    inner: str,
    new_name: str,
    zero: bool,
    tuned: Tuned | None,
    linears: dict[str, LinearWeights],
    tensors: dict[str, Tensor],
) -> None:
    """Put one tensor of an old block, or the compressed linear it stands for, among those of a new one."""
    module, _, last = name.rpartition(".")
    if module in source.compressed.modules:
        if last == "weight":
            own = None if tuned is None else tuned.linears.get(inner.removesuffix(".weight"))
            linear = own or source.compressed.linear(module)
            linears[new_name.removesuffix(".weight")] = linear.zeroed() if zero else linear
        return  # a bias goes with its linear
    tensor = source.checkpoint.tensor(name)
    if tuned is not None:
        tensor = _trained(tuned, inner, tensor)
    tensors[new_name] = torch.zeros_like(tensor) if zero else tensor


def _trained(tuned: Tuned, inner: str, tensor: Tensor) -> Tensor:
    """A parameter as the training of a replacement left it, in the type that it has in the checkpoint."""
    module, _, last = inner.rpartition(".")
    if inner in tuned.others:
        return tuned.others[inner].to(tensor.dtype).cpu()
    if module in tuned.linears:
        linear = tuned.linears[module]
        trained = linear.dense(tensor.dtype) if last == "weight" else linear.bias
        return tensor if trained is None else trained.to(tensor.dtype).cpu()
    return tensor


def renumbered(name: str, old: int, new: int) -> str:
    """`model.layers.7.mlp.up_proj.weight` of block 7 as that of block `new`."""
    changed, count = re.subn(rf"^((?:[^.]*\D[^.]*\.)*?){old}(?=\.)", rf"\g<1>{new}", name, count=1)
    if not count:
        raise CheckpointError(f"{name} does not hold the number {old} of its layer, so its layer cannot get another")
    return changed


@torch.no_grad()
def verify(source: Source, choice: Choice, structures: Mapping[int, Structure], output: Path) -> None:
    """Run a few tokens through the written directory and through the old model without what was removed; refuse a difference."""
    tokens = probe_tokens(source)
    old, new = source.model, open_source(output).model
    if len(new.blocks) != len(choice.layers):
        raise CheckpointError(
            f"{source.checkpoint.spec}: config.json with {len(choice.layers)} layers makes a model of {len(new.blocks)}; "
            "the depth pass does not know how this architecture counts its layers"
        )
    old.load_outside(device())
    new.load_outside(device())
    wanted, calls = capture_calls(old, tokens)
    found, new_calls = capture_calls(new, tokens)
    for number, layer in enumerate(choice.layers):
        for kind in KINDS:
            block = layer.source(kind)
            if layer.absent == kind or (kind != KINDS[0] and layer.attention == layer.feed_forward):
                continue
            old.load(block)
            module = old.block(block).to(device())
            if number in choice.replaced:
                place(module, choice.replaced[number])
            if layer.attention == layer.feed_forward:
                wanted = run_block(module, wanted, calls[block])
            else:
                others = [other for other in KINDS if other != kind]
                wanted = run_without(module, structures[block], others, wanted, calls[block])
            old.unload(block)
        new.load(number)
        found = run_block(new.block(number).to(device()), found, new_calls[number])
        new.unload(number)
        close = 1e-2 if old.dtype == torch.bfloat16 else 1e-4
        if not torch.allclose(
            found.float(), wanted.float(), rtol=close, atol=close * float(wanted.float().abs().max())
        ):
            raise CheckpointError(
                f"{source.checkpoint.spec}: layer {number} of the shortened model gives something else than what it was made "
                "from; this architecture decides something by the number of a layer, so layers of it cannot be removed"
            )
