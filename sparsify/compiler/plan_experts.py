"""What a plan does with the experts of a mixture: which of them can become linears of the output, and what is said of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsify.compiler.merged import as_sparse24
from sparsify.errors import RecipeError
from sparsify.formats.reader import CompressedCheckpoint
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import BlockModel, meta_model
from sparsify.model.experts import CHOSEN, SeparateExperts, experts_of, is_expert, stored_fused
from sparsify.model.separated import SeparatedCheckpoint
from sparsify.recipe import Lora, Recipe

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan, Planned

ONE_BY_ONE = (
    "pack-quantized"  # compressed-tensors; transformers reads experts of it where files hold one tensor for each
)
HOLDS_EXPERTS = ("sparse24", ONE_BY_ONE, "dense")


def why_not_compressed(recipe: Recipe) -> str | None:
    """Why the experts of whatever model stay dense under a recipe, as fused as they are; None where they need not."""
    adapters = (step for step in recipe.training if isinstance(step, Lora))
    later = [*adapters, *(step for step in (recipe.basis, recipe.depth) if step is not None)]
    if later:
        kinds = ", ".join(dict.fromkeys(step.kind for step in later))
        return f"experts are not compressed in a recipe with {kinds}"
    return None


def why_dense(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """Why the experts of this checkpoint stay dense in the export format of a recipe; None where it holds them."""
    format = recipe.export.encoding
    if format not in HOLDS_EXPERTS:
        return f"{format} is not written with compressed experts; sparse24 is"
    if format == ONE_BY_ONE and isinstance(checkpoint, SeparatedCheckpoint):
        return f"what reads {format} wants the experts of this model in one tensor, as its files have them; sparse24 holds them"
    return None


def experts_problem(opened: CompressedCheckpoint, format: str, linears: Collection[str]) -> str | None:
    """Why a format cannot hold the experts of a compressed checkpoint; None where it does, or where there are none.

    linears: that are to be written compressed
    """
    if not any(map(is_expert, linears)) or format in ("sparse24", "dense"):
        return None
    if format == ONE_BY_ONE and not stored_fused(meta_model(opened.checkpoint, torch.bfloat16)):
        return None
    return f"{opened.checkpoint.spec}: {format} does not hold the compressed experts of this model; export it to sparse24 or dense"


def refuse_unlike(recipe: Recipe, linears: Mapping[str, Planned]) -> None:
    """RecipeError for experts that differ in a format whose readers know one scheme for all experts of a model."""
    if recipe.export.encoding != ONE_BY_ONE:
        return
    experts = {name: planned for name, planned in linears.items() if is_expert(name)}
    stored = {(p.scheme.quantize is not None, p.scheme.bits, p.scheme.group_size, p.scheme.symmetric) if p.scheme else None
              for p in experts.values()}  # fmt: skip
    if len(stored) > 1:
        unlike = next(name for name, p in experts.items() if p.describe() != next(iter(experts.values())).describe())
        raise RecipeError(
            f"transformers reads one scheme for all experts of a {ONE_BY_ONE} checkpoint, and the recipe says of "
            f"{next(iter(experts))}: {next(iter(experts.values())).describe()}; of {unlike}: {experts[unlike].describe()}. "
            "Give all experts the same settings, ignore all of them, or export to sparse24"
        )


def refuse_balancing(recipe: Recipe, plan: Plan) -> None:
    """RecipeError where rows of text are to be chosen for experts, and none is solved on them."""
    solved = any(is_expert(name) and scheme.needs_data for name, scheme in plan.schemes.items())
    if recipe.calibration.experts is not None and not solved:
        raise RecipeError(
            "calibration.experts chooses rows for the experts of a mixture, and this recipe solves none on text here; remove it"
        )


IN_VLLM = "vLLM serves these experts on CPUs; in vLLM on GPUs that was not tried"


def not_in_vllm(plan: Plan) -> str | None:
    """Why vLLM does not serve the compressed experts of a plan with the format sparse24; None where it does or has none."""
    named = {name: planned for name, planned in plan.linears.items() if is_expert(name)}
    if plan.recipe.export.format != "sparse24" or not any(planned.scheme for planned in named.values()):
        return None
    of_layer: dict[str, list[tuple[str, Planned]]] = {}
    for name, planned in named.items():
        of_layer.setdefault(name.rsplit(".", 2)[0], []).append((name, planned))  # without the number and the linear
    for path, experts in experts_of(plan.model.model).items():
        if experts.unusual:
            return experts.unusual
        first: dict[bool, tuple[str, Planned]] = {}  # of the down projections, and of the others
        for name, planned in of_layer.get(path, ()):
            other, one = first.setdefault(name.endswith(".down_proj"), (name, planned))
            if as_sparse24(planned.scheme, planned.shape[1]) != as_sparse24(one.scheme, one.shape[1]):
                return f"it wants all of a layer to be alike, and {name} is not as {other}"
        if any(one.scheme is None for _, one in first.values()) and any(one.scheme for _, one in first.values()):
            return f"some linears of {path} are dense"
    return None


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer: how many there are, and how many are chosen for a token (0: the config does not say)."""

    experts: int
    chosen: int

    @property
    def share(self) -> float:
        """Of the tokens, how many an expert is given on average; all of them where that is not known."""
        return min(1.0, self.chosen / self.experts) if self.chosen else 1.0


def mixture_of(model: BlockModel) -> Mixture | None:
    """Of a model whose experts are taken apart; None where there are none."""
    found: list[SeparateExperts] = [*experts_of(model.model).values()]
    if not found:
        return None
    config: Any = model.model.config
    text = config.get_text_config(decoder=True)
    chosen = (getattr(text, key, None) for key in CHOSEN)
    return Mixture(max(one.count for one in found), next((n for n in chosen if isinstance(n, int)), 0))


def experts_in_words(plan: Plan) -> list[str]:
    """Lines of a plan on its compressed experts; none where there are none."""
    experts = {
        name: planned for name, planned in plan.linears.items() if is_expert(name) and planned.scheme is not None
    }
    mixture = mixture_of(plan.model)
    if not experts or mixture is None:
        return []
    said = []
    if any(planned.scheme is not None and planned.scheme.needs_data for planned in experts.values()):
        tokens = plan.recipe.calibration.samples * plan.recipe.calibration.sequence_length
        inputs = max(planned.shape[1] for planned in experts.values())
        drawn = plan.recipe.calibration.drawn.samples
        chosen = f" (rows chosen among {drawn} to even that out)" if plan.recipe.calibration.experts else ""
        said.append(
            f"{mixture.experts} experts, each solved on the tokens that it is given, about {round(tokens * mixture.share)} of "
            f"{tokens}{chosen}; with fewer than twice its inputs (up to {inputs}) on a Hessian shrunk toward the layer's"
        )
    if plan.recipe.export.format == "sparse24":
        why = not_in_vllm(plan)
        said.append(
            f"vLLM does not serve these experts: {why}; transformers does (after import sparsify), and with ignore: "
            "['*.experts.*'] in the recipe they stay dense, and vLLM serves the model"
            if why
            else IN_VLLM
        )
    return said
