"""What a model calls its decoder blocks with, and what enters and leaves them: learnt by watching the model run."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError
from sparsify.failure import first_words
from sparsify.model.decoder import BlockModel
from sparsify.model.experts import experts_of
from sparsify.model.pretrained import LONGEST


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to a block beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


FAKE_TOKENS = 16
# What a class of transformers raises that is to be given more than text.
WANTS_MORE = re.compile(r"missing \d+ required positional argument|pixel_values")
RETURNED = range(4)
"""How many values a block may return: 0 the hidden state by itself, else a tuple whose first it is (RWKV: three)."""


class _Stop(Exception):
    """Ends the model's forward once the last block has been reached."""


@contextmanager
def replaced_forwards(model: BlockModel, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """No block runs meanwhile: forward_of(i) stands where the forward of block i stood."""
    modules = [model.block(index) for index in range(len(model.blocks))]
    for index, module in enumerate(modules):
        module.forward = forward_of(index)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def leaving(model: BlockModel, hidden: Tensor, returned: int) -> AbstractContextManager[None]:
    """No block runs meanwhile, and `hidden` leaves the last one. returned: how many values a block gives, as `RETURNED`."""
    last = len(model.blocks) - 1

    def given(index: int) -> Any:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return _as_given(hidden if index == last else x, returned)

        return forward

    return replaced_forwards(model, given)


def _recorder(model: BlockModel, calls: list[BlockCall], hidden: list[Tensor], returned: int) -> Callable[[int], Any]:
    """For `replaced_forwards`: every block notes its arguments and returns its input."""

    def record(index: int) -> Any:
        def forward(*given: Any, **kwargs: Any) -> Any:
            if not given:
                raise _not_in_turn(model)
            x, *args = given
            calls.append(BlockCall(tuple(args), kwargs))
            hidden.append(x)
            if index == len(model.blocks) - 1:
                raise _Stop
            return _as_given(x, returned)

        return forward

    return record


def _as_given(hidden: Tensor, returned: int) -> Any:
    """What a block that returns so many values makes of its hidden state."""
    return (hidden, *[None] * (returned - 1)) if returned else hidden


def values_returned(output: Any) -> int:
    """How many values a block returned: the length of the tuple, 0 for the hidden state by itself."""
    return len(output) if isinstance(output, tuple | list) else 0


def hidden_of(output: Any) -> Any:
    """The hidden state of what a block or a part of one returned, which is the first of several values."""
    return output[0] if isinstance(output, tuple | list) else output


def _other_number(error: Exception) -> bool:
    """Whether a model raises this where its blocks return another number of values than it takes: it unpacks them, or takes the
    first row of a hidden state for the first of several values, until there is none."""
    return isinstance(error, IndexError) or "values to unpack" in str(error)


def capture_calls(model: BlockModel, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """The hidden state that enters block 0 and the arguments of every block, without running any block.

    tokens: int64 [B, T]. Returns hidden [B, T, d] and one call per block. What lies before the blocks must be loaded.
    """
    for returned in RETURNED:
        calls: list[BlockCall] = []
        hidden: list[Tensor] = []
        try:
            with replaced_forwards(model, _recorder(model, calls, hidden, returned)), torch.no_grad():
                model.model(input_ids=tokens, use_cache=False)
        except _Stop:
            pass
        except (ValueError, IndexError) as error:
            if not calls or not _other_number(error):
                raise
            continue  # the model takes another number of values
        except NotImplementedError as error:
            raise CheckpointError(
                f"{model.checkpoint.spec}: a tensor needed before the decoder blocks is missing ({error})"
            ) from None
        if len(calls) == len(model.blocks) and all(h.shape == hidden[0].shape for h in hidden):
            has_streams = hidden[0].dim() > 3  # refused where their number is known
            if not has_streams and hidden[0].shape[0] != len(tokens):
                raise CheckpointError(
                    f"{model.checkpoint.spec}: the hidden states of {type(model.model).__name__} have no row of their own for each "
                    "text; it is not supported"
                )
            return hidden[0], calls
    raise _not_in_turn(model)


def _not_in_turn(model: BlockModel) -> CheckpointError:
    return CheckpointError(
        f"{type(model.model).__name__} does not call its blocks one after another on one hidden state; it is not supported"
    )


@contextmanager
def without_numbers(model: BlockModel) -> Iterator[BlockModel]:
    """A copy of the model on torch's fake tensors, which have shapes and types but no numbers: no weight is read. Experts that
    are taken apart are one, under all their names.

    A module whose code looks at numbers raises there, whatever it likes; warnings and what torch logs of that are not shown.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    whole = _with_one_expert(model.model).to("meta")
    with _silent("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True), _whole_rows():
        for module in whole.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False)
        yield replace(model, model=whole)


@contextmanager
def _whole_rows() -> Iterator[None]:
    """Each row of tokens is one text. transformers looks for several in the numbers of positions, and where it cannot, it makes
    masks that a real forward pass of our rows does not have."""
    from transformers import masking_utils

    search = "find_packed_sequence_indices"
    before = getattr(masking_utils, search, None)
    if before is None:
        yield
        return
    setattr(masking_utils, search, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(masking_utils, search, before)


def _with_one_expert(model: nn.Module) -> nn.Module:
    """A copy in which all experts of a layer are the first one: without numbers no other is computed."""
    copied: dict[int, Any] = {}
    for experts in experts_of(model).values():
        first = copy.deepcopy(experts.expert(0), copied)
        copied |= {id(expert): first for expert in experts.children()}
    return copy.deepcopy(model, copied)


@contextmanager
def _silent(logged: str) -> Iterator[None]:
    """Neither warnings nor what this logger says."""
    logger = logging.getLogger(logged)
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.disabled = before


def fake_calls(model: BlockModel) -> tuple[Tensor, list[BlockCall]] | None:
    """`capture_calls` for one row of tokens in a model `without_numbers`; None where that cannot run.

    CheckpointError as `capture_calls` raises it.
    """
    try:
        return capture_calls(model, torch.zeros(1, FAKE_TOKENS, dtype=torch.long))
    except CheckpointError:
        raise
    except Exception as error:
        if WANTS_MORE.search(str(error)):
            raise CheckpointError(
                f"{model.checkpoint.spec}: {type(model.model).__name__} does not run on text alone, on which linears are solved "
                f"({first_words(error, LONGEST)})"
            ) from None
        return None  # found out when it really runs


def fake_hidden(model: BlockModel) -> Tensor | None:
    """A stand-in, without numbers, of the hidden state that enters the blocks: its shape for one row of tokens.

    None where the model cannot run without numbers. CheckpointError as `capture_calls` raises it.
    """
    with without_numbers(model) as hollow:
        found = fake_calls(hollow)
    return None if found is None else found[0]


def head_inputs(model: BlockModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """What the output head reads when `hidden` leaves the last block, that is, after the last norm.

    tokens: int64 [B, T]; hidden: [B, T, d]. Returns [B * T, K]. No block runs; what lies outside of them must be loaded.
    """
    for returned in RETURNED:  # as in `capture_calls`
        try:
            with leaving(model, hidden, returned):
                read = head_input(model.model, tokens)
        except (ValueError, IndexError) as error:
            if not _other_number(error):
                raise
            continue
        if read.shape[:-1] == hidden.shape[:-1]:
            break
    return read.flatten(0, -2)


@torch.no_grad()
def head_input(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the output head of a transformers model reads: [B, T, K]; the head itself does not run. tokens: int64 [B, T].

    CheckpointError when the model does not call its head.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    hook = head.register_forward_pre_hook(note)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Stop:
        return seen[0]
    finally:
        hook.remove()
    raise CheckpointError(
        f"{type(model).__name__} does not give its last hidden states to its output head, so the head can only be rounded "
        "to nearest: export.head.method: rtn, or sparsify export without --calibration"
    )


def share_equal(calls: Sequence[BlockCall], known: Sequence[BlockCall]) -> list[BlockCall]:
    """Replace tensors in `calls` by equal ones of `known`, so that many micro-batches keep one mask and one rotary table."""

    def same(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            equal = value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
            return other if equal else value
        if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
            return tuple(same(v, o) for v, o in zip(value, other, strict=True))
        return value

    return [
        BlockCall(
            tuple(same(v, o) for v, o in zip(new.args, old.args, strict=True)),
            {key: same(value, old.kwargs.get(key)) for key, value in new.kwargs.items()},
        )
        for new, old in zip(calls, known, strict=True)
    ]


def _map_leaves(function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Apply `function` to the list of corresponding leaves of equally nested tuples and dicts."""
    first = values[0]
    if isinstance(first, tuple):
        return tuple(_map_leaves(function, parts) for parts in zip(*values, strict=True))
    if isinstance(first, dict):
        return {key: _map_leaves(function, [value[key] for value in values]) for key in first}
    return function(values)


def call_of_row(call: BlockCall, row: int, rows: int) -> BlockCall:
    """The call of one sequence out of a micro-batch of `rows`: what has a row per sequence is cut, the rest is shared."""

    def cut(values: Sequence[Any]) -> Any:
        value = values[0]
        per_row = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows > 1
        return value[row : row + 1] if per_row else value

    return BlockCall(_map_leaves(cut, [call.args]), _map_leaves(cut, [call.kwargs]))


def join_calls(calls: Sequence[BlockCall]) -> BlockCall:
    """One call for several sequences. The inverse of `call_of_row`."""

    def join(values: Sequence[Any]) -> Any:
        if not isinstance(values[0], Tensor) or values[0].dim() < 2 or all(value is values[0] for value in values):
            return values[0]
        return torch.cat(list(values))

    return BlockCall(_map_leaves(join, [c.args for c in calls]), _map_leaves(join, [c.kwargs for c in calls]))


def run_block(block: nn.Module, x: Tensor, call: BlockCall) -> Tensor:
    """One block on one micro-batch: hidden [B, T, d] in, hidden [B, T, d] out."""
    hidden: Tensor = hidden_of(block(x, *call.args, **call.kwargs))
    return hidden
