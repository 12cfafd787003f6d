"""The two sublayers of a decoder block, found by watching it run, and running a block without one of them.

A block adds two things to its hidden state, one after the other: x <- x + attention(norm(x)), then x <- x + feed_forward(norm(x)).
Which of its children belong to which is found without a table of architectures. The child through which tokens see each
other is the attention (or whatever mixes tokens in its place); what runs before it, and what reads its output directly,
belongs to it; all that comes after is the feed-forward. That the two really follow each other is tried on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError
from sparsify.model.capture import BlockCall, hidden_of, run_block, values_returned

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
KINDS = (ATTENTION, FEED_FORWARD)  # in the order in which a block runs them
TOLERANCE = 1e-3  # relative; a block that does not add its sublayers in turn is off by far more


@dataclass(frozen=True, order=True)
class Sublayer:
    """One of the two sublayers of a decoder block."""

    block: int
    position: int  # 0: attention, 1: feed-forward

    @property
    def kind(self) -> str:
        return KINDS[self.position]


@dataclass(frozen=True)
class Structure:
    """The children of a block, by sublayer.

    children: names of the direct children that make up each sublayer, by kind
    silent:   those that give zeros when the sublayer is left out, and whose parameters must all be zero for it to add
              nothing: the attention or the linears, and what follows them
    outputs:  what each of these gives: its width, and the length of the tuple around it (0: none)
    """

    children: dict[str, tuple[str, ...]]
    silent: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[int, int]]

    def kind_of(self, parameter: str) -> str:
        """The sublayer that a parameter, named inside the block, belongs to."""
        child = parameter.partition(".")[0]
        return ATTENTION if child in self.children[ATTENTION] else FEED_FORWARD

    def is_silenced(self, parameter: str, kind: str) -> bool:
        """Whether a parameter is zero in a block that keeps no sublayer of this kind."""
        return parameter.partition(".")[0] in self.silent[kind]


@dataclass
class _Seen:
    """One call of a child: the tensor it read, the one it gave, and the length of the tuple around it (0: none)."""

    name: str
    read: Tensor
    gave: Tensor
    around: int


@torch.no_grad()
def find_structure(block: nn.Module, x: Tensor, call: BlockCall, name: str) -> Structure:
    """Find the sublayers of a loaded block. x: [1, T, d] with T >= 4, any hidden state.

    Raises CheckpointError, naming the block, when it has not two sublayers that run one after another.
    """

    def refused(why: str) -> CheckpointError:
        return CheckpointError(
            f"{name} cannot be taken apart into attention and feed-forward: {why}; remove whole layers"
        )

    if own := [p for p, _ in block.named_parameters(recurse=False)]:
        raise refused(f"it holds the parameter {own[0]} itself")
    first = _watch(block, x, call)
    changed = x.clone()
    changed[:, x.shape[1] // 2] += 1 + x.float().abs().mean().to(x.dtype)
    second = _watch(block, changed, call)
    names = [seen.name for seen in first]
    if names != [seen.name for seen in second]:
        raise refused("what it calls depends on its input")
    if idle := [
        n for n, child in block.named_children() if n not in names and next(child.parameters(), None) is not None
    ]:
        raise refused(f"its {idle[0]} does not run")
    mixers = [i for i, (one, two) in enumerate(zip(first, second, strict=True)) if _mixes(one, two)]
    if not mixers:
        raise refused("no part of it lets tokens see each other")
    mixer = mixers[0]
    attention = names[: mixer + 1]
    given = {first[mixer].gave.data_ptr()}
    after = mixer + 1
    while after < len(names) and first[after].read.data_ptr() in given:
        given.add(first[after].gave.data_ptr())
        attention.append(names[after])
        after += 1
    feed_forward = names[after:]
    silent = {ATTENTION: tuple(attention[mixer:]), FEED_FORWARD: _from_first_matrix(block, feed_forward)}
    if not silent[FEED_FORWARD]:
        raise refused("it has no feed-forward")
    structure = Structure(
        {ATTENTION: tuple(dict.fromkeys(attention)), FEED_FORWARD: tuple(dict.fromkeys(feed_forward))},
        silent,
        {seen.name: (seen.gave.shape[-1], seen.around) for seen in first},
    )
    whole = run_block(block, x, call)
    parts = x
    for kind in KINDS:
        parts = run_without(block, structure, [other for other in KINDS if other != kind], parts, call)
    if not torch.allclose(
        whole.float(), parts.float(), rtol=TOLERANCE, atol=TOLERANCE * float(whole.float().abs().max())
    ):
        raise refused("the two do not run one after another")
    return structure


def _watch(block: nn.Module, x: Tensor, call: BlockCall) -> list[_Seen]:
    """The calls of the direct children in one forward pass, in order."""
    seen: list[_Seen] = []

    def note(child: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read, gave = _hidden(args, kwargs), hidden_of(output)
            if isinstance(read, Tensor) and isinstance(gave, Tensor):
                seen.append(_Seen(child, read, gave, values_returned(output)))

        return hook

    hooks = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in block.named_children()]
    try:
        run_block(block, x, call)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _hidden(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden state among the arguments of a module: the first tensor."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _mixes(one: _Seen, two: _Seen) -> bool:
    """Whether the last token's result changed although what the module read of it did not."""
    return torch.equal(one.read[:, -1], two.read[:, -1]) and not torch.equal(one.gave[:, -1], two.gave[:, -1])


def _from_first_matrix(block: nn.Module, children: Sequence[str]) -> tuple[str, ...]:
    """The children from the first one that holds a matrix; norms before it need not be zero."""
    for index, child in enumerate(children):
        if any(p.dim() >= 2 for p in block.get_submodule(child).parameters()):
            return tuple(dict.fromkeys(children[index:]))
    return ()


@contextmanager
def without(block: nn.Module, structure: Structure, kinds: Sequence[str]) -> Iterator[None]:
    """The block adds nothing for the sublayers of these kinds meanwhile, and does not compute them."""

    def stub(width: int, around: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            read = _hidden(args, kwargs)
            assert read is not None
            zeros = read.new_zeros(*read.shape[:-1], width)
            return (zeros, *[None] * (around - 1)) if around else zeros

        return forward

    with ExitStack() as stack:
        for kind in kinds:
            for child in structure.silent[kind]:
                module = block.get_submodule(child)
                module.forward = stub(*structure.outputs[child])
                stack.callback(delattr, module, "forward")
        yield


def run_without(block: nn.Module, structure: Structure, kinds: Sequence[str], x: Tensor, call: BlockCall) -> Tensor:
    """One block without the sublayers of these kinds: hidden [B, T, d] in, hidden [B, T, d] out."""
    if len(kinds) == len(KINDS):
        return x
    with without(block, structure, kinds):
        return run_block(block, x, call)
