"""The block walk: every block once, every calibration product once.

Blocks are visited in order, one resident at a time. Inside a block all micro-batches advance in step from one group of
linears to the next: each micro-batch's forward is a coroutine that a pre-hook suspends at the first linear of the next
group. When all have arrived the group's inputs are complete, its weights are rewritten, and all resume through the
rewritten weights. So each group sees the errors made upstream (true-sequential), and the total is one forward pass.

With a dense reference, the untouched block walks beside the compressed one on the dense model's own activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from sparsify.errors import NumericalError, SparsifyError
from sparsify.model.capture import BlockCall, call_of_row, capture_calls, head_inputs, run_block, share_equal
from sparsify.model.decoder import BlockModel
from sparsify.model.linear import LinearWeights
from sparsify.model.linear_groups import PROBE_TOKENS, LinearGroup, find_groups

TOKENS_PER_MICRO_BATCH = 4096


@dataclass
class GroupVisit:
    """All that is known when every micro-batch waits at a group.

    names:        the group's linears that are to be rewritten, full module names
    linears:      their modules, in the same order; weight [N_i, K]
    inputs:       what they read, one [tokens, K] per micro-batch, from the compressed model
    dense_inputs: the same tokens in the dense model; None without a dense reference
    """

    block: int
    names: list[str]
    linears: list[nn.Linear]
    inputs: list[Tensor]
    dense_inputs: list[Tensor] | None


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


class Activations:
    """Hidden states of all micro-batches at the boundary between two blocks, in memory or in a file."""

    def __init__(self, like: Sequence[Tensor], file: Path | None = None):
        self.shapes = [t.shape for t in like]
        sizes = [t.numel() for t in like]
        if file is None:
            flat = torch.empty(sum(sizes), dtype=like[0].dtype, device=like[0].device)
        else:
            flat = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=like[0].dtype)
        self.parts = list(flat.split(sizes))
        for index, tensor in enumerate(like):
            self[index] = tensor

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor:
        return self.parts[index].view(self.shapes[index])

    def __setitem__(self, index: int, value: Tensor) -> None:
        self[index].copy_(value)


def _modes() -> tuple[Any, ...]:
    """torch's thread-local modes, which coroutines of one thread share and therefore must agree on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
    )


class _InStep:
    """The forwards of all micro-batches through one block, suspended together at one linear after the other."""

    def __init__(
        self,
        block: nn.Module,
        stops: Sequence[nn.Linear],
        hidden: Activations,
        calls: Sequence[Sequence[BlockCall]],
        index: int,
    ):
        self.main = getcurrent()
        self.modes = _modes()
        self.hooks = [stop.register_forward_pre_hook(self._wait) for stop in stops]
        self.hidden = hidden
        self.runs = [greenlet(lambda x, call=calls[i][index]: run_block(block, x, call)) for i in range(len(hidden))]
        self.arrived = [run.switch(hidden[i]) for i, run in enumerate(self.runs)]

    def _wait(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert _modes() == self.modes, (
            "the model changes torch's modes around a linear; its forwards cannot be suspended there"
        )
        self.main.switch((module, args[0]))  # returns None: a pre-hook's value would replace the input

    def stop(self) -> nn.Linear | None:
        """The linear that every micro-batch waits at; None when all have left the block."""
        waiting = {id(a[0]): a[0] for a in self.arrived if isinstance(a, tuple)}
        if not waiting:
            return None
        if len(waiting) > 1 or not all(isinstance(a, tuple) for a in self.arrived):
            raise SparsifyError(
                "the micro-batches take different paths through a block; recipes cannot calibrate this model"
            )
        return next(iter(waiting.values()))

    def inputs(self) -> list[Tensor]:
        """What the waiting linear reads: [tokens, K] per micro-batch."""
        return [x.reshape(-1, x.shape[-1]) for _, x in self.arrived]

    def resume(self) -> None:
        for i, run in enumerate(self.runs):
            self.arrived[i] = run.switch()  # one by one: the input held until here is freed before the next one runs

    def finish(self) -> None:
        """Keep the outputs as the hidden states that enter the next block."""
        for i, output in enumerate(self.arrived):
            self.hidden[i] = output
        self.arrived = []

    def close(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


class Walk:
    """One pass over a model's blocks with calibration tokens.

    model:  opened by `open_blocks`
    tokens: int64 [samples, sequence]
    dense_reference: also walk the dense model, so that visits carry its inputs
    spill:  directory for the hidden states; None keeps them in memory
    """

    def __init__(
        self,
        model: BlockModel,
        tokens: Tensor,
        dense_reference: bool = False,
        spill: Path | None = None,
        device: str = "cpu",
    ):
        self.model = model
        self.device = device
        model.load(None)
        model.to(device)
        batch = max(1, TOKENS_PER_MICRO_BATCH // tokens.shape[1])
        entered: list[Tensor] = []
        self.calls: list[list[BlockCall]] = []
        self.tokens = tokens.to(device).split(batch)
        for part in self.tokens:
            hidden, calls = capture_calls(model, part)
            self.calls.append(share_equal(calls, self.calls[0]) if self.calls else calls)
            entered.append(hidden)
        self.hidden = Activations(entered, spill and spill / "hidden")
        self.dense = Activations(entered, spill and spill / "dense") if dense_reference else None
        self.probe = capture_calls(model, tokens[:1, :PROBE_TOKENS].to(device))

    @torch.no_grad()
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
        groups, skipped = find_groups(block, self.probe[0], self.probe[1][index])
        groups = [
            LinearGroup(kept, g.in_features)
            for g in groups
            if (kept := tuple(n for n in g.names if wanted(prefix + n)))
        ]
        reference = copy.deepcopy(block) if self.dense is not None else None
        compressed = self._step(block, groups, self.hidden, index)
        dense = (
            self._step(reference, groups, self.dense, index)
            if reference is not None and self.dense is not None
            else None
        )
        done: dict[str, LinearWeights] = {}
        try:
            while (stop := compressed.stop()) is not None:
                group = next(g for g in groups if block.get_submodule(g.names[0]) is stop)
                linears = [block.get_submodule(name) for name in group.names]
                names = [prefix + name for name in group.names]
                visit = GroupVisit(index, names, linears, compressed.inputs(), dense.inputs() if dense else None)  # type: ignore[arg-type]
                new = rewrite(visit)
                del visit
                self._place(index, block, new, {})
                done |= new
                compressed.resume()
                if dense:
                    dense.resume()
            others: dict[str, Tensor] = {}
            if tune is None or not done:
                compressed.finish()
            else:
                compressed.arrived = []  # these outputs are about to change
                compressed.close()
                others = self._tune(index, block, done, dense, tune)
            if dense:
                dense.finish()
        finally:
            compressed.close()
            if dense:
                dense.close()
        self._leave(index)
        return BlockResult(index, done, {prefix + name: why for name, why in skipped.items()}, others)

    def _tune(
        self, index: int, block: nn.Module, done: dict[str, LinearWeights], dense: _InStep | None, tune: Tune
    ) -> dict[str, Tensor]:
        """Let `tune` change a rewritten block, put what it gives in place, and take the hidden states through."""
        assert dense is not None, "tuning aims at the dense model's outputs"
        visit = BlockVisit(index, block, done, [], [], [])
        for i, output in enumerate(dense.arrived):
            hidden, call = self.hidden[i], self.calls[i][index]
            rows = hidden.shape[0]
            visit.entering += hidden.split(1)
            visit.wanted += output.split(1)
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
    def replay(
        self, index: int, linears: Mapping[str, LinearWeights], others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the hidden states through a block that an earlier run finished with these weights, by full name."""
        block = self._enter(index)
        for i in range(len(self.dense) if self.dense is not None else 0):
            self.dense[i] = run_block(block, self.dense[i], self.calls[i][index])  # type: ignore[index]
        self._place(index, block, linears, others or {})
        for i in range(len(self.hidden)):
            self.hidden[i] = run_block(block, self.hidden[i], self.calls[i][index])
        self._leave(index)

    def head_inputs(self) -> list[Tensor]:
        """What the output head reads when all blocks are done: [tokens, K] per micro-batch."""
        return [head_inputs(self.model, part, self.hidden[i]) for i, part in enumerate(self.tokens)]

    def _enter(self, index: int) -> nn.Module:
        self.model.load(index)
        return self.model.block(index).to(self.device)

    def _leave(self, index: int) -> None:
        self.model.unload(index)
        for i in range(len(self.hidden)):
            if not torch.isfinite(self.hidden[i]).all():
                raise NumericalError(
                    f"{self.model.blocks[index]}: its output holds NaN or Inf on the calibration text; "
                    "check the dense model, or leave this block's linears out with `ignore`"
                )

    def _step(self, block: nn.Module, groups: Sequence[LinearGroup], hidden: Activations, index: int) -> _InStep:
        stops = [block.get_submodule(g.names[0]) for g in groups]
        return _InStep(block, stops, hidden, self.calls, index)  # type: ignore[arg-type]
