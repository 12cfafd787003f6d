"""The dense model on text that it is measured on: how far its next-token distribution moves when one block has other weights.

What enters a block is known from the blocks before it, which stay as they are, so only that block and the later ones run. The
distance is KL(dense || changed) in nats per token, as `sparsify eval` measures it, in float32: a single linear moves the
distribution by less than bfloat16 rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsify.errors import NumericalError
from sparsify.model.capture import capture_calls, run_block, values_returned
from sparsify.model.decoder import BlockModel
from sparsify.model.in_memory import finish

TOKENS_AT_ONCE = 1024  # whose logits are alive together
ROWS = 64  # positions that are compared at once: their logits stay in the processor's caches

States = list[Tensor]  # hidden states, one [B, T, d] per micro-batch


class HeldOut:
    """A dense model, its blocks in order, and the hidden states that enter the next of them.

    model:  opened in the type to measure in
    tokens: int64 [samples, T]; the last position of each row predicts nothing that is there, and does not count
    resident: keep all blocks in memory instead of reading each when it runs
    """

    def __init__(self, model: BlockModel, tokens: Tensor, device: str = "cpu", resident: bool = True):
        self.model, self.device, self.resident = model, device, resident
        model.load_outside(device)
        self.tokens = list(tokens.to(device).split(max(1, TOKENS_AT_ONCE // tokens.shape[1])))
        captured = [capture_calls(model, part) for part in self.tokens]
        self.calls = [calls for _, calls in captured]
        self.entering: States = [hidden for hidden, _ in captured]
        self.next = 0
        with torch.no_grad(), self.block(0) as first:
            call = self.calls[0][0]
            self.returned = values_returned(first(self.entering[0], *call.args, **call.kwargs))
        states = self.entering
        for index in range(len(model.blocks)):
            states = self.run(index, states)
        self.leaving = states

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights in memory."""
        module = self.model.block(index)
        if any(parameter.is_meta for parameter in module.parameters()):
            self.model.load(index)
            module.to(self.device)
        try:
            yield module
        finally:
            if not self.resident:
                self.model.unload(index)

    @torch.no_grad()
    def run(self, index: int, states: States) -> States:
        """States through one block of the dense model."""
        with self.block(index) as module:
            return self._through(index, module, states)

    def _through(self, index: int, module: nn.Module, states: States) -> States:
        return [run_block(module, hidden, self.calls[i][index]) for i, hidden in enumerate(states)]

    def advance(self) -> None:
        """Take the states through the next block, which is measured no more."""
        self.entering = self.run(self.next, self.entering)
        if self.resident:
            self.model.unload(self.next)
        self.next += 1

    @torch.no_grad()
    def divergences(self, variants: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """KL(dense || changed), nats per token, of each variant: weights that linears of the next block have instead of their own.

        variants: of each, [N, K] by the name of the linear inside of the block
        Raises NumericalError for a variant that gives NaN or Inf.
        """
        with self.block(self.next) as module:
            states = [self._changed(module, weights) for weights in variants]
        for index in range(self.next + 1, len(self.model.blocks)):
            with self.block(index) as module:
                states = [self._through(index, module, one) for one in states]
        totals = [0.0] * len(variants)
        for batch, tokens in enumerate(self.tokens):
            dense = Reference(finish(self.model, tokens, self.leaving[batch], self.returned)[:, :-1].flatten(0, 1))
            for number, one in enumerate(states):
                logits = finish(self.model, tokens, one[batch], self.returned)[:, :-1].flatten(0, 1)
                totals[number] += dense.kl_sum(logits)
        counted = sum(tokens.shape[0] * (tokens.shape[1] - 1) for tokens in self.tokens)
        found = [total / counted for total in totals]
        for weights, value in zip(variants, found, strict=True):
            if value != value or value == float("inf"):
                name = f"{self.model.blocks[self.next]}.{next(iter(weights))}"
                raise NumericalError(
                    f"{name}: the model gives NaN or Inf with it compressed; leave it out with `ignore`"
                )
        return found

    def _changed(self, module: nn.Module, weights: Mapping[str, Tensor]) -> States:
        """The states through the next block with other weights in it, which it does not keep."""
        own = {name: module.get_parameter(f"{name}.weight") for name in weights}
        kept = {name: parameter.data for name, parameter in own.items()}
        try:
            for name, parameter in own.items():
                parameter.data = weights[name].to(parameter)
            return self._through(self.next, module, self.entering)
        finally:
            for name, parameter in own.items():
                parameter.data = kept[name]


class Reference:
    """The dense model's distributions, softmax(logits) of each position. logits: float32 [S, V]"""

    def __init__(self, logits: Tensor):
        self.logits = logits.float()
        self.log_sum = self.logits.logsumexp(1, keepdim=True)
        self.p = (self.logits - self.log_sum).exp_()

    def kl_sum(self, logits: Tensor) -> float:
        """Sum over positions of KL(dense || softmax(logits)) in nats. logits: [S, V].

        With r the dense logits and z the others, it is log sum p exp(z - r) - sum p (z - r): both terms are small where the two
        hardly differ, and no digits are lost.
        """
        found = 0.0
        for start in range(0, logits.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            z = logits[rows].float()
            mean = ((z - self.logits[rows]).mul_(self.p[rows])).sum(1)
            found += float(((z - self.log_sum[rows]).logsumexp(1) - mean).double().sum())
        return found
