"""Linears that read the same tensor: they share one Hessian and are solved as one stacked matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsify.model.capture import BlockCall, fake_calls, run_block, without_numbers
from sparsify.model.decoder import ROUTER, ROUTES, BlockModel
from sparsify.model.experts import SeparateExperts, experts_of, is_expert
from sparsify.model.linear import is_plain_linear

Found = TypeVar("Found")
PROBE_TOKENS = 16
NUMBER = re.compile(r"layer_(idx|id|index|number)$|^block_idx$")  # attributes of a block and of its modules
NOT_CALLED = "not called in a forward pass"


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same tensor, in call order. names are relative to the block; K is shared.

    experts: path of a mixture's experts, all of whose linears make one group; K is what the experts read
    """

    names: tuple[str, ...]
    in_features: int
    experts: str | None = None

    @property
    def stop(self) -> str:
        """The module at which a forward has reached the group."""
        return self.experts or self.names[0]


def is_narrow(block: nn.Module, group: LinearGroup) -> bool:
    """Whether a group is one linear y = W x with fewer outputs than inputs."""
    linear: Any = block.get_submodule(group.stop)
    return group.names == (group.stop,) and linear.bias is None and linear.out_features < linear.in_features


def stops_of(block: nn.Module) -> dict[str, nn.Module]:
    """The plain linears of a block outside of its experts, and those experts as one module, by name inside the block."""
    mixtures = experts_of(block)
    inside = {id(linear) for experts in mixtures.values() for linear in experts.modules()}
    linears = {name: m for name, m in block.named_modules() if is_plain_linear(m) and id(m) not in inside}
    return {**linears, **mixtures}


@torch.no_grad()
def find_groups(block: nn.Module, x: Tensor, call: BlockCall) -> tuple[list[LinearGroup], dict[str, str]]:
    """Group the plain linears of a loaded block by the tensor they read, from one probe forward.

    x: [B, T, d], a small hidden state. Returns the groups in call order, and for each linear that the walk cannot
    handle the reason why.
    """
    stops = stops_of(block)
    names: dict[nn.Module, str] = {module: name for name, module in stops.items()}
    seen: dict[str, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(names[module], []).append(args[0])  # keeps the tensor alive, so its place stays unique

    hooks = [module.register_forward_pre_hook(note) for module in names]
    mixtures = [module for module in names if isinstance(module, SeparateExperts)]
    for module in mixtures:
        module.skipped = True  # which experts a few tokens are given to does not matter
    try:
        run_block(block, x, call)
    finally:
        for hook in hooks:
            hook.remove()
        for module in mixtures:
            module.skipped = False
    skipped = {name: NOT_CALLED for name in stops if name not in seen}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        t = inputs[0]
        if ROUTER.search(name):
            skipped[name] = ROUTES
        elif len(inputs) > 1:
            skipped[name] = f"called {len(inputs)} times in one forward pass"
        elif t.numel() != x.shape[0] * x.shape[1] * t.shape[-1]:
            skipped[name] = "does not read every token"
        else:
            mixture = name if stops[name] in mixtures else None
            where = (t.untyped_storage()._cdata, t.storage_offset())  # which fake tensors have too
            groups.setdefault((where, t.shape, t.stride(), mixture), []).append(name)
    found = [
        LinearGroup(tuple(members) if path is None else _linears_of(path, stops[path]), shape[-1], path)
        for (_, shape, _, path), members in groups.items()
    ]
    return found, {
        linear: why
        for name, why in skipped.items()
        for linear in (_linears_of(name, stops[name]) if stops[name] in mixtures else (name,))
    }


def _linears_of(path: str, experts: nn.Module) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name, module in experts.named_modules() if is_plain_linear(module))


def kind_of(block: nn.Module) -> Hashable:
    """What blocks that are made alike have in common: modules, shapes, and settings but for the number of the block."""
    parts = tuple((path, type(module), *_settings(module)) for path, module in block.named_modules())
    return parts, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def by_kind(model: BlockModel, look: Callable[[int], Found]) -> list[Found]:
    """What `look` finds of every block, by its number; of blocks that are made alike (`kind_of`) the first one is looked at."""
    kinds: dict[Hashable, Found] = {}
    found = []
    for index in range(len(model.blocks)):
        kind = kind_of(model.block(index))
        if kind not in kinds:
            kinds[kind] = look(index)
        found.append(kinds[kind])
    return found


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    own = vars(module).items()
    return [
        (key, value) for key, value in own if isinstance(value, bool | int | float | str) and not NUMBER.search(key)
    ]


@torch.no_grad()
def skipped_by_shape(model: BlockModel) -> dict[str, str]:
    """The linears that `find_groups` will skip, by full name, and why: found on tensors of shapes only, without a weight.

    A block is left out that cannot run so, because its code looks at numbers; so is what such numbers decide. Of blocks that are
    made alike (`kind_of`) the first one is looked at.
    """
    found: dict[str, str] = {}
    with without_numbers(model) as hollow:
        if (entering := fake_calls(hollow)) is not None:
            hidden, calls = entering

            def look(index: int) -> dict[str, str]:
                with suppress(Exception):  # whatever the model's own code raises on tensors without numbers
                    return find_groups(hollow.block(index), hidden, calls[index])[1]
                return {}

            for block, skipped in zip(hollow.blocks, by_kind(hollow, look), strict=True):
                found |= {f"{block}.{name}": why for name, why in skipped.items() if why != NOT_CALLED}
    for path, experts in experts_of(model.model).items() if any(map(is_expert, found)) else ():
        for name in _linears_of(path, experts):  # there, the first one stands for all
            number, _, leaf = name.removeprefix(f"{path}.").partition(".")
            first = f"{path}.0.{leaf}"
            found |= {name: found[first]} if number != "0" and first in found else {}
    return found
