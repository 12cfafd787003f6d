"""Where a decoder block reads and writes its residual stream, found by watching it run; no table of architectures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError
from sparsify.model.capture import BlockCall, run_block

LOUD = 1e4  # of the inputs on which a norm is measured: what it adds to the variance does not count beside it
TOLERANCE = 1e-4  # relative; an equal block differs by rounding only


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream. name: inside the block; readers: the linears that read what it gives, in call order.

    centred: whether it subtracts the mean, as LayerNorm does; a rotation then has to keep the vector of ones
    """

    name: str
    readers: tuple[str, ...]
    centred: bool


@dataclass(frozen=True)
class Heads:
    """The linear that makes the values of an attention and the one that reads their weighted sums, head by head.

    value_heads: heads of `values`, which `output` reads `query_heads // value_heads` times each
    """

    values: str
    output: str
    value_heads: int
    query_heads: int


@dataclass(frozen=True)
class Channels:
    """The linears before the activation of a feed-forward and the one behind it. before: name -> how many channels each of
    its outputs is of: 1, or 2 where gate and up are one matrix, one below the other."""

    before: Mapping[str, int]
    after: str


@dataclass(frozen=True)
class Structure:
    """What can be rewritten in a block. writers: the linears whose outputs are added to the residual stream."""

    norms: tuple[Norm, ...]
    writers: tuple[str, ...]
    heads: Heads | None
    channels: Channels | None


def gain(norm: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """The gain g and the offset b, float64 [width], of a norm that gives g * normalised + b, whatever it calls them."""
    ones = _alternating(norm, width)
    with torch.no_grad():
        up, down = (norm(sign * LOUD * ones).double().flatten() for sign in (1, -1))
    return ((up - down) / 2 / ones.double().flatten()).cpu(), ((up + down) / 2).cpu()


def is_centred(norm: nn.Module, width: int) -> bool:
    """Whether a norm subtracts the mean of what it reads."""
    ones = _alternating(norm, width)
    with torch.no_grad():
        return bool(torch.allclose(norm(LOUD * ones), norm(LOUD * (ones + 1)), rtol=1e-3, atol=1e-3))


def _alternating(norm: nn.Module, width: int) -> Tensor:
    """1, -1, 1, ...: its mean is zero and its mean square one. [1, 1, width]"""
    like = next(norm.parameters())
    sign = torch.ones(width, dtype=like.dtype, device=like.device)
    sign[1::2] = -1
    return sign[None, None]


def offset_over_gain(name: str, g: Tensor, b: Tensor) -> Tensor:
    """b / g of a norm, 0 where both are 0; CheckpointError where g alone is."""
    dead = g == 0
    if bool((b[dead] != 0).any()):
        raise CheckpointError(
            f"{name} has features with an offset and without a gain, so the residual stream cannot be turned; "
            "set basis.residual: false"
        )
    return torch.where(dead, torch.zeros_like(b), b / torch.where(dead, torch.ones_like(g), g))


@torch.no_grad()
def set_gain(norm: nn.Module, offset: Tensor) -> None:
    """Give a norm the gain 1 and an offset [width]; CheckpointError when its class has no parameters that do so."""
    weights = [parameter for name, parameter in norm.named_parameters() if "bias" not in name]
    biases = [parameter for name, parameter in norm.named_parameters() if "bias" in name]
    for value in (1.0, 0.0):  # some classes multiply by 1 + weight
        for weight in weights:
            weight.fill_(value)
        for bias in biases:
            bias.copy_(offset)
        g, b = gain(norm, offset.numel())
        if torch.allclose(g, torch.ones_like(g), atol=1e-3) and torch.allclose(b, offset.cpu(), atol=1e-3):
            return
    raise CheckpointError(f"a {type(norm).__name__} has no parameters with which it multiplies by one")


Key = tuple[Any, ...]


def _key(t: Tensor) -> Key:
    return (t.data_ptr(), t.shape, t.stride())


@dataclass
class _Seen:
    """What the leaf modules of a block read and gave in one forward, by their names. The tensors stay alive, so that their
    addresses tell them apart."""

    read: dict[str, Tensor]
    gave: dict[str, Tensor]


@torch.no_grad()
def _watch(block: nn.Module, x: Tensor, call: BlockCall) -> _Seen:
    seen = _Seen({}, {})

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                if name in seen.read:
                    raise CheckpointError(f"{name} is called twice in one forward pass")
                seen.read[name], seen.gave[name] = args[0], output

        return hook

    leaves = {n: m for n, m in block.named_modules() if not any(m.children()) and any(True for _ in m.parameters())}
    hooks = [m.register_forward_hook(note(n)) for n, m in leaves.items()]
    try:
        run_block(block, x, call)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def find_structure(
    block: nn.Module, x: Tensor, call: BlockCall, name: str, query_heads: int, value_heads: int, residual: bool = True
) -> Structure:
    """Find what of a loaded float32 block can be rewritten. x: [1, T, d] with T >= 4, a hidden state that enters it.

    query_heads, value_heads: of its attention, as config.json says
    residual: whether its norms and what reads and writes the residual stream are wanted; CheckpointError names the module
    that does not allow it
    """
    width = x.shape[-1]
    seen = _watch(block, x, call)
    linears = [n for n in seen.read if type(block.get_submodule(n)) is nn.Linear]
    norms = _norms(block, seen, linears, width)
    reading = {reader for norm in norms for reader in norm.readers}
    writers = tuple(n for n in linears if n not in reading and block.get_submodule(n).out_features == width)
    if residual:
        _refuse_rest(block, name, norms, writers, width)
    readers = [n for n in linears if n in reading] or linears  # where norms come after the sublayers, none reads one
    heads = _heads(block, x, call, readers, writers, seen, query_heads, value_heads)
    rest = [n for n in writers if heads is None or n != heads.output]
    channels = _channels(block, x, call, readers, tuple(rest), seen)
    return Structure(tuple(norms), writers, heads, channels)


def _norms(block: nn.Module, seen: _Seen, linears: list[str], width: int) -> list[Norm]:
    """The modules with parameters of `width` numbers only whose result linears read."""
    found = []
    for name, gave in seen.gave.items():
        module = block.get_submodule(name)
        if all(p.shape == (width,) for p in module.parameters()):
            readers = tuple(n for n in linears if _key(seen.read[n]) == _key(gave))
            if readers and seen.read[name].shape[-1] == width:
                found.append(Norm(name, readers, is_centred(module, width)))
    return found


def _refuse_rest(block: nn.Module, name: str, norms: list[Norm], writers: tuple[str, ...], width: int) -> None:
    """CheckpointError for a parameter as long as the residual stream that a rotation could not follow."""
    known = {norm.name for norm in norms} | set(writers)
    linears = {n for n, m in block.named_modules() if type(m) is nn.Linear}
    for parameter, value in block.named_parameters():
        owner = parameter.rpartition(".")[0]
        if owner in known or (owner in linears and value.dim() == 1) or owner in linears:
            continue
        if width in value.shape:
            raise CheckpointError(
                f"{name}.{parameter} works on single features of the residual stream and is followed by more than linears, "
                "so the stream cannot be turned; set basis.residual: false"
            )


@torch.no_grad()
def _response(
    block: nn.Module, x: Tensor, call: BlockCall, linear: str, factor: float, token: int | None = None
) -> _Seen:
    """The block while `linear` gives `factor` times as much, for one token only where `token` is given."""

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if token is None:
            return output * factor
        scaled = output.clone()
        scaled[:, token] *= factor
        return scaled

    hook = block.get_submodule(linear).register_forward_hook(scale)
    try:
        return _watch(block, x, call)
    finally:
        hook.remove()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _mixes(block: nn.Module, x: Tensor, call: BlockCall, linear: str, writer: str, seen: _Seen) -> bool:
    """Whether what `linear` gives for an earlier token reaches what `writer` reads of the last one."""
    other = _response(block, x, call, linear, 0.0, x.shape[1] // 2)
    return not torch.equal(other.read[writer][:, -1], seen.read[writer][:, -1])


def _heads(
    block: nn.Module,
    x: Tensor,
    call: BlockCall,
    readers: list[str],
    writers: tuple[str, ...],
    seen: _Seen,
    query: int,
    value: int,
) -> Heads | None:
    """The values: what the output projection reads is a weighted sum over tokens of them, so proportional to them."""
    for name, output in itertools.product(readers, writers):
        if name == output:
            continue
        inputs, rows = _linear(block, output).in_features, _linear(block, name).out_features
        if inputs % query or rows % value or inputs // query != rows // value or query % value:
            continue
        read, doubled = seen.read[output], _response(block, x, call, name, 2.0).read[output]
        close = torch.allclose(doubled, 2 * read, rtol=TOLERANCE, atol=TOLERANCE * float(read.abs().max()))
        if close and _mixes(block, x, call, name, output, seen):
            return Heads(name, output, value, query)
    return None


def _channels(
    block: nn.Module, x: Tensor, call: BlockCall, readers: list[str], writers: tuple[str, ...], seen: _Seen
) -> Channels | None:
    """What the writer behind the activation reads of a token depends on the linears before it at that token alone."""
    for after in writers:
        width = _linear(block, after).in_features
        before: dict[str, int] = {}
        for name in readers:
            rows = _linear(block, name).out_features
            if name == after or rows not in (width, 2 * width) or _mixes(block, x, call, name, after, seen):
                continue
            if not torch.equal(_response(block, x, call, name, 0.0).read[after], seen.read[after]):
                before[name] = rows // width
        if before:
            return Channels(before, after)
    return None
