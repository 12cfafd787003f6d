"""The model in training and its teacher: one forward pass of each gives the hidden states and distributions to compare."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from sparsify.model.capture import hidden_of
from sparsify.model.decoder import find_blocks
from sparsify.recipe import LossWeights
from sparsify.training.losses import (
    Given,
    LogitLoss,
    Projected,
    Target,
    full_loss,
    head_loss,
    squarehead,
)
from sparsify.training.qat_linear import Stored, TrainableLinear
from sparsify.training.sharding import is_sharded

PROBE = 4  # tokens on which it is tried whether logits are hidden @ head'


class BlockOutputs:
    """Collects the hidden state after each decoder block while `recording`; otherwise its hooks do nothing.

    Gradient checkpointing runs blocks a second time in the backward pass, which must not be recorded.
    """

    def __init__(self, model: nn.Module):
        self._found: list[Tensor] | None = None
        self.blocks = [model.get_submodule(name) for name in find_blocks(model)]
        for block in self.blocks:
            block.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._found is not None:
            self._found.append(hidden_of(output))

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        found: list[Tensor] = []
        self._found = found
        try:
            yield found
        finally:
            self._found = None


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says about a micro-batch. hidden: [B, T, d] after each block; target: over B * T tokens."""

    hidden: list[Tensor]
    target: Target | None


class Teacher(nn.Module):
    """The dense model, frozen. Not part of the student: neither saved nor sharded with it.

    blocks: those whose hidden states a student with fewer layers is compared with, one for each of its own; None for all
    """

    def __init__(self, model: Any, feature: bool, logits: bool, blocks: Sequence[int] | None = None):
        super().__init__()
        self.blocks = blocks
        self.model = model.eval().requires_grad_(False)
        self.feature, self.logits = feature, logits
        self.outputs = BlockOutputs(model)
        self.plain_head = has_plain_head(model)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> TeacherOutputs:
        """input_ids: [B, T]"""
        with self.outputs.recording() as hidden:
            if not self.logits:
                self.model.base_model(input_ids=input_ids, use_cache=False)
                return TeacherOutputs(self._compared(hidden), None)
            if not self.plain_head:
                logits = self.model(input_ids=input_ids, use_cache=False).logits
                return TeacherOutputs(self._compared(hidden), Given(logits.flatten(0, 1)))
            last = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings().weight
        return TeacherOutputs(self._compared(hidden), Projected(last.flatten(0, 1), head))

    def _compared(self, hidden: list[Tensor]) -> list[Tensor]:
        if not self.feature:
            return []
        return hidden if self.blocks is None else [hidden[block] for block in self.blocks]


class Student(nn.Module):
    """The compressed model with its loss. FSDP wraps it as one, so that the head is at hand where the loss is made.

    dtype: of the matrix products. Autocast is ours and not the Trainer's: with FSDP the latter would gather the weights in
    bfloat16, and they must be rounded to the quantization grid from float32, exactly as the export does it.
    """

    def __init__(self, model: Any, weights: LossWeights, temperature: float, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.weights, self.dtype = weights, dtype
        self.logit_loss = LogitLoss(weights.kl, weights.cross_entropy, temperature, weights.reverse_kl)
        self.outputs = BlockOutputs(model)
        # of a model that is sharded only its root may start a forward pass, so that it is found out in the first one
        self._plain_head = None if is_sharded(model) else has_plain_head(model)

    @property
    def plain_head(self) -> bool:
        """Whether logits are the product with the output head, see `has_plain_head`."""
        if self._plain_head is None:
            training = self.model.training
            self._plain_head = has_plain_head(self.model.eval())
            self.model.train(training)
        return self._plain_head

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        items: Tensor,
        teacher_outputs: TeacherOutputs | None = None,
        keep: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of one micro-batch, as its share of a step whose losses are averaged over `items` tokens.

        input_ids: [B, T]; labels: [B, T], the next token, IGNORED where nothing counts; keep: bool [B, T], no padding
        """
        teacher_outputs = teacher_outputs or TeacherOutputs([], None)
        counted = labels.ne(-100).sum()
        loss = torch.zeros((), device=input_ids.device)
        parts: dict[str, Tensor] = {}
        scored = self._scored
        plain_head = self.plain_head  # found out before anything is recorded
        with self.outputs.recording() as hidden:
            last = self._run(input_ids, scored, plain_head)
        if self.weights.squarehead:
            distance = squarehead(hidden, teacher_outputs.hidden, keep)
            loss = loss + self.weights.squarehead * distance * (counted / items)
            parts["squarehead"] = distance.detach() * (counted / items)
        if scored:
            total, kl, cross_entropy, reverse_kl = self._next_token(
                last.flatten(0, 1), teacher_outputs.target, labels.flatten(), self.logit_loss
            )
            loss = loss + total / items
            parts["cross_entropy"] = cross_entropy / items
            if self.logit_loss.divergence:
                parts["kl"] = kl / items
            if self.weights.reverse_kl:
                parts["reverse_kl"] = reverse_kl / items
        return {"loss": loss, **parts}

    @torch.no_grad()
    def divergence(self, input_ids: Tensor, labels: Tensor, target: Target) -> Tensor:
        """KL(teacher || student) at temperature 1, summed over the tokens whose label counts. Arguments as of `forward`."""
        last = self._run(input_ids, True, self.plain_head)
        return self._next_token(last.flatten(0, 1), target, labels.flatten(), LogitLoss(1.0, 0.0))[1]

    @property
    def _scored(self) -> bool:
        """Whether a loss of next tokens counts."""
        return self.logit_loss.divergence or bool(self.weights.cross_entropy)

    def _run(self, input_ids: Tensor, scored: bool, plain_head: bool) -> Tensor:
        """The last hidden state [B, T, d], or logits [B, T, V] where those are more than a product with the head."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if plain_head or not scored:
                return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return self.model(input_ids=input_ids, use_cache=False).logits

    def _next_token(
        self, last: Tensor, target: Target | None, labels: Tensor, loss: LogitLoss
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.plain_head:
            head = self.model.get_output_embeddings().weight
            return head_loss(last, head, target, labels, loss, self.dtype)
        return full_loss(last, target, labels, loss)


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether logits are exactly the product of the last hidden state with the output head: no bias, scale or cap.

    Tried and not looked up, since no table of architectures could be complete: the head is made to say numbers of all
    sizes, which must arrive unchanged, and what it reads must be the last hidden state.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    ids = torch.arange(PROBE, device=head.weight.device)[None] % head.out_features
    said = torch.linspace(-1000, 1000, head.out_features, device=head.weight.device).expand(1, PROBE, -1)
    read: list[Tensor] = []

    def say(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        read.append(args[0])
        return said.to(output.dtype)

    hook = head.register_forward_hook(say)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    last = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    return (
        last is not None
        and len(read) == 1
        and torch.equal(read[0], last)
        and torch.equal(logits.float(), said.to(logits.dtype).float())
    )


def trainable_parameters(
    model: nn.Module,
    linears: Mapping[str, TrainableLinear],
    train: Sequence[str],
    stored: Mapping[str, torch.dtype],
    among: Collection[str] | None = None,
) -> dict[str, list[nn.Parameter]]:
    """Freeze all but what `train` names, and sort it by learning rate: weights, scales, norms.

    What is trained is rounded in the forward pass to what will be stored, so that the exported model is the trained one.

    train: of "linears", "norms", "embedding". A parameter that a head and an embedding share is the embedding's; a head of
    its own stays as it is. stored: type in the checkpoint of each parameter that is a tensor there, by name; what transformers
    assembles from several could not be written back, and stays as it is too.
    among: names of the parameters that are treated, those of `linears` included; None for all of the model
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "norms": []}
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    plain: dict[nn.Parameter, torch.dtype] = {}
    treated = {name: p for name, p in model.named_parameters() if among is None or name in among}
    for parameter in treated.values():
        parameter.requires_grad_(False)
    if "linears" in train:
        groups["weights"] = [linear.weight for linear in linears.values()]
        groups["scales"] = [m.scale for m in linears.values() if m.scale is not None and m.quantize_in_loop]
    biases = [linear.bias for linear in linears.values() if linear.bias is not None]  # these round themselves
    if "norms" in train:
        named = {p: name for name, p in treated.items() if p.dim() == 1 and all(p is not b for b in biases)}
        plain = {p: stored[name] for p, name in named.items() if name in stored}
        groups["norms"] = [*plain, *biases]
    if "embedding" in train and (name := next((n for n, p in treated.items() if p is embedding.weight), None)):
        plain |= {embedding.weight: stored[name]} if name in stored else {}
        groups["weights"] += [embedding.weight] if name in stored else []
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in plain:
                register_parametrization(module, name, Stored(plain[parameter]), unsafe=True)
    for parameters in groups.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return {kind: parameters for kind, parameters in groups.items() if parameters}
