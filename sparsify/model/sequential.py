"""The block walk: every block once, every calibration product once.

Blocks are visited in order, one resident at a time. Inside a block all micro-batches advance in step from one group of
linears to the next: each micro-batch's forward is a coroutine that a pre-hook suspends at the first linear of the next
group. When all have been there the group's statistics are complete, its weights are rewritten, and all resume through the
rewritten weights. So each group sees the errors made upstream (true-sequential), and the total is one forward pass.

What a suspended forward holds is kept while there is room for it. Without room the forward is given up and computed anew
from the hidden states that enter the block, through the groups that are rewritten by then: the same operations on the same
numbers, so the same bits. Then memory does not grow with the number of tokens, and a block of four groups (q, k, v; o; gate,
up; down) costs about two forward passes. The hidden states themselves are in memory, or in a memory-mapped file.

With a dense reference, the untouched block walks beside the compressed one on the dense model's own activations.

The experts of a mixture are one stop, since each of them reads other tokens. What all tokens bring to it is gathered; expert
after expert is then rewritten on the tokens that it was given, its down projection on what its rewritten gate and up
projections make of them. Its original weights are kept meanwhile, those of no other expert: what the dense block makes of
its experts is computed before the first of them changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import memory
from sparsify.errors import CheckpointError, NumericalError
from sparsify.failure import first_words
from sparsify.model.attention import tiled_attention
from sparsify.model.capture import BlockCall, call_of_row, capture_calls, head_inputs, run_block, share_equal
from sparsify.model.decoder import BlockModel
from sparsify.model.experts import LEAVES, experts_of, given
from sparsify.model.finite import all_finite
from sparsify.model.footprint import Footprint, footprint
from sparsify.model.hidden_states import Activations
from sparsify.model.linear import LinearWeights
from sparsify.model.linear_groups import PROBE_TOKENS, LinearGroup, find_groups, is_narrow, kind_of
from sparsify.model.pretrained import LONGEST
from sparsify.model.suspended import InStep, Room, different_paths
from sparsify.phases import phase

TOKENS_PER_MICRO_BATCH = 4096
FORWARD, DENSE_FORWARD = "forward", "dense forward"  # phases: the compressed model, and the dense one beside it
LAYER_TOKENS = 4  # per input, of a layer whose tokens stand in for those that an expert was not given


@dataclass
class GroupVisit:
    """A group of linears that is to be rewritten.

    names:   full module names
    linears: their modules, in the same order; weight [N_i, K]
    batches: what they read, [tokens, K] of one micro-batch after the other, in the compressed model and in the dense model
             (None without a dense reference). Each is computed when it is asked for, so this can be gone through once.
    outputs: of the dense model `batches` hold what the linear makes of its inputs instead, [tokens, N] (`Walk.dense_outputs`)
    layer:   for linears of one of several experts, whose batches hold the tokens that it was given, perhaps none: what they
             would read if it were given all tokens of the layer, of which this takes some at equal distances
    """

    block: int
    names: list[str]
    linears: list[nn.Linear]
    batches: Iterator[tuple[Tensor, Tensor | None]]
    layer: Callable[[], Iterator[tuple[Tensor, Tensor | None]]] | None = None
    outputs: bool = False


@dataclass
class BlockVisit:
    """All that is known when every group of a block is rewritten, with a dense reference.

    module:   the block with its rewritten weights
    linears:  those weights by full module name
    entering: hidden states that enter the compressed block, one [1, T, d] per sequence
    wanted:   what the dense block made of the dense model's hidden states, one [1, T, d] per sequence
    calls:    what else the model passes to the block, one per sequence
    """

    block: int
    module: nn.Module
    linears: dict[str, LinearWeights]
    entering: list[Tensor]
    wanted: list[Tensor]
    calls: list[BlockCall]


@dataclass
class BlockResult:
    """A finished block: its rewritten linears by full module name, other parameters that were changed by full name, and
    why its other linears stayed as they were."""

    block: int
    linears: dict[str, LinearWeights]
    skipped: dict[str, str]
    others: dict[str, Tensor] = field(default_factory=dict)


Rewrite = Callable[[GroupVisit], dict[str, LinearWeights]]
Tune = Callable[[BlockVisit], tuple[dict[str, LinearWeights], dict[str, Tensor]]]
"""Gives a block its final linears and other parameters, both by full name; what it leaves out stays as it is."""


@dataclass
class _Gathered:
    """What all tokens bring to the experts of a layer.

    inputs: in the compressed model and in the dense one (None without a dense reference)
    chosen: the experts that they go to in the compressed model, [tokens, chosen experts]
    """

    inputs: tuple[Activations, Activations | None]
    chosen: Tensor

    def some(self, count: int) -> Tensor:
        """At least so many tokens, where there are as many, at equal distances."""
        tokens = len(self.chosen)
        return torch.arange(0, tokens, max(1, tokens // count))

    def batches(
        self,
        rows: Tensor,
        compressed: Callable[[Tensor], Tensor] | None,
        dense: Callable[[Tensor], Tensor] | None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What linears of an expert read of some tokens, in the compressed and in the dense model.

        compressed, dense: what an expert makes of its inputs before those linears; None where they read the inputs
        """
        inputs, dense_inputs = self.inputs
        for part in rows.split(TOKENS_PER_MICRO_BATCH):
            x, own = inputs.tokens(part), None if dense_inputs is None else dense_inputs.tokens(part)
            yield x if compressed is None else compressed(x), own if own is None or dense is None else dense(own)


def _captured(model: BlockModel, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """`capture_calls`; CheckpointError for what a class says of sizes that it does not take (Reformer)."""
    try:
        return capture_calls(model, tokens)
    except ValueError as error:
        raise CheckpointError(
            f"{model.checkpoint.spec}: {type(model.model).__name__} does not run on rows of {tokens.shape[1]} tokens "
            f"({first_words(error, LONGEST)})"
        ) from None


class Walk:
    """One pass over a model's blocks with calibration tokens.

    model:  opened by `open_blocks`
    tokens: int64 [samples, sequence]
    dense_reference: also walk the dense model, so that visits carry its inputs
    spill:  directory for the hidden states; None keeps them in memory
    place:  the device in whose memory they are kept; default `device`
    room:   bytes for suspended forwards; None for as many as they need
    keeps_outside: what lies outside the blocks stays loaded after the tokens went through it, and the output head is
             loaded too
    dense_outputs: where the last group of a block is one linear without a bias that has fewer outputs than inputs, visits
             carry what the dense model makes of its inputs instead of them
    """

    def __init__(
        self,
        model: BlockModel,
        tokens: Tensor,
        dense_reference: bool = False,
        spill: Path | None = None,
        device: str = "cpu",
        *,
        place: str | None = None,
        room: int | None = None,
        keeps_outside: bool = True,
        dense_outputs: bool = False,
    ):
        self.model = model
        self.dense_outputs = dense_outputs
        self.device = device
        self.room = Room(room)
        self.keeps_outside = keeps_outside
        self.spill = spill
        self.experts: dict[str, Activations] = {}
        self.footprints: dict[Hashable, Footprint] = {}  # of every kind of block
        model.load(None, head=keeps_outside)
        model.to(device)
        self.calls: list[list[BlockCall]] = []
        self.tokens = tokens.to(device).split(rows_of_micro_batch(tokens.shape[1]))
        self.dense: Activations | None = None
        for i, part in enumerate(self.tokens):
            hidden, calls = _captured(model, part)
            self.calls.append(share_equal(calls, self.calls[0]) if self.calls else calls)
            if i == 0:
                shapes = [torch.Size([len(rows), *hidden.shape[1:]]) for rows in self.tokens]
                self.where = (place or device, device)
                self.hidden = Activations(shapes, hidden.dtype, spill and spill / "hidden", *self.where)
                if dense_reference:
                    self.dense = Activations(shapes, hidden.dtype, spill and spill / "dense", *self.where)
            self.hidden[i] = hidden
            if self.dense is not None:
                self.dense[i] = hidden
        self.probe = capture_calls(model, tokens[:1, :PROBE_TOKENS].to(device))
        if not keeps_outside:
            model.unload(None)
        memory.return_freed()  # by the tokenizer and the embeddings

    @torch.no_grad()
    @tiled_attention()
    def visit(
        self, index: int, wanted: Callable[[str], bool], rewrite: Rewrite, tune: Tune | None = None
    ) -> BlockResult:
        """Walk one block.

        wanted:  by full module name, which linears to rewrite
        rewrite: gives the linears of a group their new weights
        tune:    changes the whole block after that; needs a dense reference
        """
        prefix = self.model.blocks[index] + "."
        block = self._enter(index)
        version = self.probe[0]._version
        groups, skipped = find_groups(block, self.probe[0], self.probe[1][index])
        alone = self.probe[0]._version != version  # the block writes into what it is given
        groups = [replace(g, names=kept) for g in groups if (kept := tuple(n for n in g.names if wanted(prefix + n)))]
        dense: InStep | None = None
        last = groups[-1] if groups and groups[-1].experts is None else None  # where dense forwards need not wait
        by_outputs = last if last is not None and self.dense_outputs and is_narrow(block, last) else None
        if self.dense is not None:  # first: a block with the hooks of a walk cannot be copied
            dense = self._step(_beside(block), groups, self.dense, index, alone, DENSE_FORWARD)
            if by_outputs is not None:
                dense.hands_over(dense.block.get_submodule(by_outputs.stop))
        compressed = self._step(block, groups, self.hidden, index, alone, FORWARD)
        done: dict[str, LinearWeights] = {}
        others: dict[str, Tensor] = {}
        try:
            stop, x = compressed.advance(0)
            while stop is not None:
                group = next(g for g in groups if block.get_submodule(g.stop) is stop)
                outputs = dense is not None and group is by_outputs
                batches = _in_turn(compressed, dense, stop, x, group is last, outputs)
                del x
                if group.experts is not None:
                    done |= self._visit_experts(index, block, group, batches, dense, rewrite)
                else:
                    done |= self._visit_group(index, block, group, batches, rewrite, outputs)
                for stream in (compressed, dense):
                    if stream is not None:
                        stream.passed += 1
                stop, x = compressed.advance(0)
            for i in range(len(self.hidden) if dense is not None and last is None else 0):
                dense.finish(i)  # type: ignore[union-attr]
            if tune is None or not done:
                self.hidden[0] = x
                for i in range(1, len(self.hidden)):
                    compressed.finish(i)
            else:
                del x  # it is about to change
                compressed.close()
                with phase("tune", whole=True):
                    others = self._tune(index, block, done, tune)
        finally:
            compressed.close()
            if dense is not None:
                dense.close()
        self._leave(index)
        return BlockResult(index, done, {prefix + name: why for name, why in skipped.items()}, others)

    def _visit_group(
        self,
        index: int,
        block: nn.Module,
        group: LinearGroup,
        batches: Iterator[tuple[Tensor, Tensor | None]],
        rewrite: Rewrite,
        outputs: bool,
    ) -> dict[str, LinearWeights]:
        """Rewrite linears that read the same tensor."""
        prefix = self.model.blocks[index] + "."
        linears: Any = [block.get_submodule(name) for name in group.names]
        new = rewrite(GroupVisit(index, [prefix + name for name in group.names], linears, batches, outputs=outputs))
        for _ in batches:
            pass  # what the caller had no use for
        self._place(index, block, new, {})
        return new

    def _visit_experts(
        self,
        index: int,
        block: nn.Module,
        group: LinearGroup,
        batches: Iterator[tuple[Any, Any]],
        dense: InStep | None,
        rewrite: Rewrite,
    ) -> dict[str, LinearWeights]:
        """Rewrite the experts of a mixture, one after the other."""
        assert group.experts is not None
        prefix = self.model.blocks[index] + "."
        experts: Any = block.get_submodule(group.experts)
        gathered = self._gather(group, batches, dense)
        rows = {number: tokens for number, tokens, _ in given(gathered.chosen, experts.count)}
        none = gathered.chosen.new_empty(0)
        done: dict[str, LinearWeights] = {}
        for number in range(experts.count):
            expert = experts.expert(number)
            original = None if dense is None else copy.deepcopy(expert)
            for leaves in (LEAVES[:2], LEAVES[2:]):
                names = [name for leaf in leaves if (name := f"{group.experts}.{number}.{leaf}") in group.names]
                if not names:
                    continue
                linears: Any = [block.get_submodule(name) for name in names]
                between = [
                    partial(experts.between, one) if leaves == LEAVES[2:] else None for one in (expert, original)
                ]
                read = partial(gathered.batches, compressed=between[0], dense=between[1])
                layer = partial(read, gathered.some(LAYER_TOKENS * linears[0].in_features))
                own = read(rows.get(number, none))
                new = rewrite(GroupVisit(index, [prefix + name for name in names], linears, own, layer))
                self._place(index, block, new, {})
                done |= new
        return done

    def _gather(self, group: LinearGroup, batches: Iterator[tuple[Any, Any]], dense: InStep | None) -> _Gathered:
        """Keep what all micro-batches bring to the experts of a layer, and let the dense block go on from there."""
        assert group.experts is not None
        shapes = [torch.Size([*shape[:2], group.in_features]) for shape in self.hidden.shapes]
        inputs = self._room_for(f"{group.experts} inputs", shapes)
        own = outputs = None
        if dense is not None:
            own, outputs = (self._room_for(f"{group.experts} dense {what}", shapes) for what in ("inputs", "outputs"))
            mixture: Any = dense.block.get_submodule(group.experts)
        chosen = []
        for i, (args, dense_args) in enumerate(batches):
            inputs[i] = args[0].reshape(shapes[i])
            chosen.append(args[1].to("cpu"))
            if own is not None and outputs is not None:
                own[i] = dense_args[0].reshape(shapes[i])
                outputs[i] = mixture.forward(*dense_args).reshape(shapes[i])  # without the hook that waits
        if dense is not None and outputs is not None:
            mixture.known = _of_running(dense, outputs)
        return _Gathered((inputs, own), torch.cat(chosen))

    def _room_for(self, name: str, shapes: Sequence[torch.Size]) -> Activations:
        """Where what enters or leaves the experts of a layer is kept, which is used again for the next layer."""
        key = f"{name} {shapes[0][-1]}"
        if key not in self.experts:
            file = self.spill and self.spill / key.replace(" ", "-")
            self.experts[key] = Activations(shapes, self.hidden.flat.dtype, file, *self.where)
        return self.experts[key]

    def _tune(self, index: int, block: nn.Module, done: dict[str, LinearWeights], tune: Tune) -> dict[str, Tensor]:
        """Let `tune` change a rewritten block, put what it gives in place, and take the hidden states through."""
        assert self.dense is not None, "tuning aims at the dense model's outputs"
        visit = BlockVisit(index, block, done, [], [], [])
        for i in range(len(self.hidden)):
            hidden, call = self.hidden[i], self.calls[i][index]
            rows = hidden.shape[0]
            visit.entering += hidden.split(1)
            visit.wanted += self.dense[i].split(1)
            visit.calls += [call_of_row(call, row, rows) for row in range(rows)]
        linears, others = tune(visit)
        done |= linears
        self._place(index, block, linears, others)
        for i in range(len(self.hidden)):
            self.hidden[i] = run_block(block, self.hidden[i], self.calls[i][index])
        return others

    def _place(
        self, index: int, block: nn.Module, linears: Mapping[str, LinearWeights], others: Mapping[str, Tensor]
    ) -> None:
        """Give a block new weights, by full name."""
        prefix = self.model.blocks[index] + "."
        for name, weights in linears.items():
            block.get_submodule(name.removeprefix(prefix)).weight.copy_(weights.dense(self.model.dtype))  # type: ignore[operator]
        for name, tensor in others.items():
            block.get_parameter(name.removeprefix(prefix)).copy_(tensor)

    @torch.no_grad()
    @tiled_attention()
    def replay(
        self, index: int, linears: Mapping[str, LinearWeights], others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the hidden states through a block that an earlier run finished with these weights, by full name."""
        block = self._enter(index)
        with phase(DENSE_FORWARD):
            for i in range(len(self.dense) if self.dense is not None else 0):
                self.dense[i] = run_block(block, self.dense[i], self.calls[i][index])  # type: ignore[index]
        self._place(index, block, linears, others or {})
        with phase(FORWARD):
            for i in range(len(self.hidden)):
                self.hidden[i] = run_block(block, self.hidden[i], self.calls[i][index])
        self._leave(index)

    def head_inputs(self) -> Iterator[Tensor]:
        """What the output head reads when all blocks are done: [tokens, K] of one micro-batch after the other."""
        if not self.keeps_outside:
            self.model.load(None, head=False)
            self.model.to(self.device)
        for i, part in enumerate(self.tokens):
            yield head_inputs(self.model, part, self.hidden[i])

    def _enter(self, index: int) -> nn.Module:
        with phase("reading"):
            self.model.load(index)
            return self.model.block(index).to(self.device)

    def _leave(self, index: int) -> None:
        self.model.unload(index)
        for i in range(len(self.hidden)):
            if not all_finite(self.hidden[i]):
                raise NumericalError(
                    f"{self.model.blocks[index]}: its output holds NaN or Inf on the calibration text; "
                    "check the dense model, or leave this block's linears out with `ignore`"
                )

    def _step(
        self, block: nn.Module, groups: Sequence[LinearGroup], hidden: Activations, index: int, alone: bool, phase: str
    ) -> InStep:
        stops = [block.get_submodule(g.stop) for g in groups]
        kind = (kind_of(block), tuple(g.stop for g in groups))
        if kind not in self.footprints:
            self.footprints[kind] = footprint(block, stops, self.hidden[0].clone(), self.calls[0][index])
        return InStep(block, stops, hidden, self.calls, index, self.room, self.footprints[kind], alone, phase)


def rows_of_micro_batch(length: int) -> int:
    """How many sequences of so many tokens run together: it depends on nothing else, or another machine would cut the sums
    of the statistics elsewhere."""
    return max(1, TOKENS_PER_MICRO_BATCH // length)


def _of_running(stream: InStep, outputs: Activations) -> Callable[[], Tensor]:
    """Gives the part of the micro-batch that is running."""
    return lambda: outputs[stream.running]


def _beside(block: nn.Module) -> nn.Module:
    """A copy of a block that shares the weights of its experts, since most of its weights are theirs."""
    shared = [parameter for experts in experts_of(block).values() for parameter in experts.parameters()]
    return copy.deepcopy(block, {id(parameter): parameter for parameter in shared})


def _in_turn(
    compressed: InStep, dense: InStep | None, stop: nn.Module, x: Any, ends: bool, outputs: bool
) -> Iterator[tuple[Any, Any]]:
    """What every micro-batch reads at `stop` in both models; x: what the first one reads, which is there already.

    ends:    the dense forwards stop nowhere else, and leave the block one after the other
    outputs: of the dense model give what its linear makes of what it reads
    """
    batch: list[Any] = [x]
    del x
    for i in range(len(compressed.hidden)):
        if i > 0:
            arrived, own = compressed.advance(i)
            if arrived is not stop:
                raise different_paths()
            batch.append(own)
            del own
        if dense is None:
            yield batch.pop(), None
            continue
        linear, own = dense.advance(i, goes_on=ends)
        assert linear is not None
        yield batch.pop(), dense.output(linear, own) if outputs else own
        del own
        if ends:
            dense.finish(i)
