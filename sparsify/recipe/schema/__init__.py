"""The typed form of a recipe: frozen models that refuse unknown keys, wrong types and impossible combinations.

In YAML a pass is a mapping of one key, `- prune: {...}`; here it is the object under that key, and the key is its
`kind`. To add a kind of pass: write its model in the file of its family and add it to `Pass` and `PASSES` in
`recipe.py`; what it does not go together with is a rule in `sparsify/recipe/rules.py`.
"""

from sparsify.recipe.schema.base import problem_path
from sparsify.recipe.schema.basis import Basis
from sparsify.recipe.schema.calibration import Calibration, SelfText, WeightedSource
from sparsify.recipe.schema.depth import Depth, DepthTarget
from sparsify.recipe.schema.export import Evaluation, Export, Head, head_format_problem
from sparsify.recipe.schema.oneshot import Override, Prune, PruneChange, Quantize, QuantizeChange, Solver, Tune
from sparsify.recipe.schema.recipe import PASSES, Pass, Recipe
from sparsify.recipe.schema.training import (
    Columns,
    Distill,
    Finetune,
    FinetuneLossWeights,
    HeldOut,
    Lora,
    LossWeights,
    MaskLearning,
)

__all__ = [
    "PASSES",
    "Basis",
    "Calibration",
    "Columns",
    "Depth",
    "DepthTarget",
    "Distill",
    "Evaluation",
    "Export",
    "Finetune",
    "FinetuneLossWeights",
    "Head",
    "HeldOut",
    "Lora",
    "LossWeights",
    "MaskLearning",
    "Override",
    "Pass",
    "Prune",
    "PruneChange",
    "Quantize",
    "QuantizeChange",
    "Recipe",
    "SelfText",
    "Solver",
    "Tune",
    "WeightedSource",
    "head_format_problem",
    "problem_path",
]
