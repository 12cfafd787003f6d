"""sparsify: a compiler that turns large language models into 2:4 sparse, 4-bit checkpoints.

    sparsify.apply(recipe, model, ...)    compress a model: a path, a hub id, or a live transformers model
    sparsify.plan, .export, .inspect, .verify, .evaluate, .load_recipe    as the commands of the same names
    sparsify.Recipe, .Prune, .Quantize, ...    the typed form of a recipe

Importing this package is cheap on purpose: these names import what they need on first use. All that happens here is that
transformers learns of sparse24, so that `from_pretrained` loads such checkpoints.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsify._version import __version__ as __version__
from sparsify.runtime.import_hook import register_with_transformers

register_with_transformers()

if TYPE_CHECKING:
    from sparsify.api import Result as Result
    from sparsify.api import apply as apply
    from sparsify.api import evaluate as evaluate
    from sparsify.api import export as export
    from sparsify.api import inspect as inspect
    from sparsify.api import load_recipe as load_recipe
    from sparsify.api import plan as plan
    from sparsify.api import verify as verify
    from sparsify.errors import SparsifyError as SparsifyError
    from sparsify.recipe import Calibration as Calibration
    from sparsify.recipe import Depth as Depth
    from sparsify.recipe import Distill as Distill
    from sparsify.recipe import Evaluation as Evaluation
    from sparsify.recipe import Export as Export
    from sparsify.recipe import Finetune as Finetune
    from sparsify.recipe import Head as Head
    from sparsify.recipe import Lora as Lora
    from sparsify.recipe import Prune as Prune
    from sparsify.recipe import Quantize as Quantize
    from sparsify.recipe import Recipe as Recipe
    from sparsify.recipe import Tune as Tune

_API = ("Result", "apply", "evaluate", "export", "inspect", "load_recipe", "plan", "verify")
_RECIPE = (
    "Calibration", "Depth", "Distill", "Evaluation", "Export", "Finetune", "Head", "Lora", "Prune", "Quantize", "Recipe", "Tune",
)  # fmt: skip
_HOMES = {
    **dict.fromkeys(_API, "sparsify.api"),
    **dict.fromkeys(_RECIPE, "sparsify.recipe"),
    "SparsifyError": "sparsify.errors",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsify' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
