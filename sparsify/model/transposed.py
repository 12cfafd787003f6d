"""Linears whose weights a class of transformers holds and stores as [K, N]: the `Conv1D` of GPT-2 and of OpenAI GPT.

Here such a module is an `nn.Linear` like any other, and its weight is [N, K] from the moment it is read from a file until it is
written to one. Only the files, and what transformers makes of them, have it the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparsify.errors import SparsifyError
from sparsify.model.pretrained import causal_lm_of, class_of, load_config

CLASS = "Conv1D"
READ = ("sparse24", "dense")  # formats in which transformers reads one


def straighten(model: Any) -> Any:
    """Put an `nn.Linear` where a transformers model on the meta device has a `Conv1D`. Returns the model."""
    from transformers.pytorch_utils import Conv1D

    for path, module in [*model.named_modules()]:
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = nn.Linear(inputs, outputs, device=module.weight.device, dtype=module.weight.dtype)
            linear.stored_transposed = True  # type: ignore[assignment]  # as `stored_transposed` finds it
            model.set_submodule(path, linear)
    return model


def transposed_weights(model: nn.Module) -> set[str]:
    """The weights of a straightened model that its class holds as [K, N]."""
    return {f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "stored_transposed")}


def stored_transposed(place: Path, spec: str, names: Collection[str]) -> frozenset[str]:
    """Those of the tensors of a checkpoint's files, given by name, that hold the weight of a linear as [K, N].

    place: of its config, as `load_config` takes it. Empty for a config that transformers makes no model of, which is refused
    where the model is needed.
    """
    from accelerate import init_empty_weights

    try:
        config = load_config(place, spec)
        kind = class_of(config)
        if kind is not None and not hasattr(sys.modules[kind.__module__], CLASS):
            return frozenset()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights():
            model = straighten(causal_lm_of(config, place, spec))
    except (SparsifyError, ValueError, KeyError, OSError, ImportError, TypeError, AttributeError):
        return frozenset()
    weights, prefix = transposed_weights(model), f"{model.base_model_prefix}."
    return frozenset(name for name in names if {name, prefix + name, name.removeprefix(prefix)} & weights)


def unread_problem(transposed: Collection[str], format: str) -> str | None:
    """Why no export in this format is made of a model with such weights; None where there are none, or where it is one."""
    if not transposed or format in READ:
        return None
    return (
        f"{next(iter(transposed))} belongs to a {CLASS}, of which transformers reads no {format} (it would draw the weight anew); "
        f"export to {' or '.join(READ)}"
    )


def may_be_transposed(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether some weight has as many columns as its bias has numbers, and another number of rows: no `nn.Linear` has such.

    shapes: of tensors by name
    """
    for name, shape in shapes.items():
        bias = shapes.get(name.removesuffix(".weight") + ".bias") if name.endswith(".weight") else None
        if bias is not None and len(shape) == 2 and bias == shape[1:] and bias != shape[:1]:
            return True
    return False
