"""What parts of a recipe do not go together. Each rule raises a problem by `refuse`, with the place that should change."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsify.recipe.llmcompressor.whole import SAVED, names_of, saved_as, unusable
from sparsify.recipe.methods import PRUNE, QUANTIZE, TRANSFORMS
from sparsify.recipe.schema.base import refuse
from sparsify.recipe.schema.training import Distill, Finetune, Lora
from sparsify.recipe.sources import SELF, same_text

if TYPE_CHECKING:
    from sparsify.recipe.schema.recipe import Recipe

NO_EFFECT = {
    "damping": "no Hessian is inverted",
    "error_propagation": "the model never runs, so there are no outputs to aim at",
    "coordinate_descent": "there is no sweep to go on from",
}


def _duplicates(recipe: "Recipe") -> None:
    seen: dict[str, int] = {}
    for index, step in enumerate(recipe.passes):
        if step.kind in seen:
            raise refuse(
                f"pass '{step.kind}' is here a second time (first as passes.{seen[step.kind]}); "
                f"a weight is decided once, so keep one of the two",
                "passes",
                index,
                step.kind,
            )
        seen[step.kind] = index


def _order(recipe: "Recipe") -> None:
    kinds = [step.kind for step in recipe.passes]
    if "prune" in kinds and "quantize" in kinds and kinds.index("quantize") < kinds.index("prune"):
        raise refuse(
            "prune comes after quantize, but then scales would be fitted to weights that are about to be removed "
            "and nothing could repair the pruning; put prune first",
            "passes",
            kinds.index("prune"),
            "prune",
        )
    if "tune" in kinds and not {"prune", "quantize"} & set(kinds[: kinds.index("tune")]):
        raise refuse(
            "tune trains what compression left over, so it comes after prune and quantize; put it after them",
            "passes",
            kinds.index("tune"),
            "tune",
        )
    if "tune" in kinds and kinds.index("tune") < max(
        kinds.index(kind) for kind in kinds if kind in ("prune", "quantize")
    ):
        raise refuse(
            "a pass that decides weights comes after tune, which would undo the tuning; put tune last",
            "passes",
            kinds.index("tune"),
            "tune",
        )


def _depth_between(recipe: "Recipe") -> None:
    """Prune, quantize and tune are one walk over the blocks: depth comes before all of them or after."""
    kinds = [step.kind for step in recipe.passes]
    if "depth" not in kinds:
        return
    place = kinds.index("depth")
    walked = {"prune", "quantize", "tune"}
    if walked & set(kinds[:place]) and walked & set(kinds[place:]):
        raise refuse(
            "depth stands between passes that share one walk over the layers (prune, quantize, tune); "
            "put it before all of them or after",
            "passes",
            place,
            "depth",
        )


def _basis_first(recipe: "Recipe") -> None:
    """Basis rewrites a dense model, and masks and codes belong to one basis."""
    kinds = [step.kind for step in recipe.passes]
    if "basis" not in kinds:
        return
    place = kinds.index("basis")
    before = [kind for kind in kinds[:place] if kind != "depth"]
    if before:
        raise refuse(
            f"basis comes after {before[0]}, whose weights belong to the basis they were made in; put basis first",
            "passes",
            place,
            "basis",
        )
    if "depth" in kinds[place:]:
        raise refuse(
            "depth comes after basis, which is chosen for all layers; put depth before it",
            "passes",
            kinds.index("depth"),
            "depth",
        )
    if not recipe.compresses and recipe.training:
        raise refuse(
            f"basis prepares a model for prune or quantize, and only {recipe.training[0].kind} follows; add one of them, or "
            "leave basis out",
            "passes",
            place,
            "basis",
        )


def _training_last(recipe: "Recipe") -> None:
    """Training needs all masks and scales; nothing after it could compress without undoing it."""
    first = next((index for index, step in enumerate(recipe.passes) if isinstance(step, Distill | Finetune)), None)
    for index, step in enumerate(recipe.passes):
        if first is not None and index > first and not isinstance(step, Distill | Finetune):
            before = recipe.passes[first].kind
            raise refuse(
                f"{step.kind} comes after {before}, which trains the compressed model as a whole; put {step.kind} first",
                "passes",
                index,
                step.kind,
            )


def _adapter_last(recipe: "Recipe") -> None:
    """An adapter belongs to the weights it was trained on."""
    for index, step in enumerate(recipe.passes[:-1]):
        if isinstance(step, Lora) and step.export == "adapter":
            raise refuse(
                f"{recipe.passes[index + 1].kind} comes after lora and would change the weights that its adapter belongs to; "
                "put lora last or merge it",
                "passes",
                index,
                "lora",
                "export",
            )


def _starts_compressed(recipe: "Recipe") -> None:
    """A recipe that only trains reads a compressed checkpoint, which does not say what the dense model was."""
    if recipe.compresses or recipe.depth is not None or recipe.basis is not None:
        return
    for index, step in enumerate(recipe.passes):
        if isinstance(step, Distill) and step.needs_teacher and step.teacher is None:
            raise refuse(
                "this recipe starts from a compressed model, so name the dense one: teacher: MODEL",
                "passes",
                index,
                step.kind,
            )
    if recipe.export.head is not None:
        raise refuse(
            "a recipe that only trains leaves the output head as it is; quantize it with sparsify export --head",
            "export",
            "head",
        )


def _for_linears(recipe: "Recipe") -> None:
    """Settings of linears need a pass that decides them."""
    fields = type(recipe).model_fields
    if recipe.prune is None and recipe.quantize is None:
        for name in ("ignore", "solver", "overrides"):
            if getattr(recipe, name) != fields[name].default:
                raise refuse(f"{name} has no effect: no pass prunes or quantizes; remove it", name)
    for index, override in enumerate(recipe.overrides):
        for name in ("prune", "quantize"):
            change = getattr(override, name)
            if getattr(recipe, name) is None and (change is None or change.changes()):
                what = "leaves out" if change is None else "changes"
                raise refuse(
                    f"the override of '{override.match}' {what} {name}, but there is no such pass; "
                    f"add '- {name}: {{...}}' to passes, or remove {name} here",
                    "overrides",
                    index,
                    name,
                )


def _solver(recipe: "Recipe") -> None:
    """Settings of the solver that no method honours."""
    steps = [step for step in (recipe.prune, recipe.quantize) if step is not None]
    changes = [change for override in recipe.overrides for change in (override.prune, override.quantize) if change]
    methods = list(dict.fromkeys(step.method for step in [*steps, *changes] if step.method is not None))
    needs = [{**PRUNE, **QUANTIZE}[method] for method in methods]
    solver = recipe.solver
    data = any(need.data for need in needs)
    honoured = {
        "damping": any(need.hessian for need in needs) or (data and solver.error_propagation > 0),
        "error_propagation": data,
        "coordinate_descent": any(need.sweep for need in needs),
    }
    for name, used in honoured.items():
        if not used and getattr(solver, name) != type(solver).model_fields[name].default:
            with_what = f"method{'s' if len(methods) > 1 else ''} {' and '.join(methods)}"
            raise refuse(f"{name} has no effect with {with_what}: {NO_EFFECT[name]}; remove it", "solver", name)


def _format(recipe: "Recipe") -> None:
    format = recipe.export.format
    if format in ("pack-quantized", "gptq") and recipe.quantize is None and recipe.compresses:
        raise refuse(
            f"{format} stores integers but no pass quantizes; add a quantize pass or export sparse24",
            "export",
            "format",
        )


def _leak(recipe: "Recipe") -> None:
    scored = None if recipe.evaluation is None else recipe.evaluation.text
    if scored is None:
        return
    for step in recipe.training:
        for text in step.texts:
            if same_text(text, scored):
                held_out = isinstance(step, Distill) and step.held_out is not None and step.held_out.source == text
                raise refuse(
                    f"evaluation reads the text that {step.kind} {'chooses its state by' if held_out else 'trains on'}, which "
                    "would flatter the result; give one of them another file",
                    "evaluation",
                    "text",
                )
    for source, _ in recipe.calibration.mixture:
        if same_text(source, scored):
            raise refuse(
                f"evaluation reads the same text as calibration ({source}), which would flatter the result; "
                "never calibrate on what is evaluated: give one of them another file",
                "evaluation",
                "text",
            )


def _held_out(recipe: "Recipe") -> None:
    """What was trained on says nothing about other text. What the model writes is written anew for it."""
    for index, step in enumerate(recipe.passes):
        if not isinstance(step, Distill) or step.held_out is None or step.held_out.source == SELF:
            continue
        held_out = step.held_out.source
        for source, _ in step.mixture or recipe.calibration.mixture:
            if source == held_out or same_text(source, held_out):
                raise refuse(
                    f"held_out reads a text that {step.kind} trains on ({source}), so it would not see when others are "
                    "forgotten; give it another one",
                    "passes",
                    index,
                    step.kind,
                    "held_out",
                    "source",
                )


def _learned_masks(recipe: "Recipe") -> None:
    for index, step in enumerate(recipe.passes):
        if isinstance(step, Distill) and step.learned_masks is not None and recipe.compresses and recipe.prune is None:
            raise refuse(
                "masks: learned needs masks, and no pass prunes; add '- prune: {...}' before it, or remove masks",
                "passes",
                index,
                step.kind,
                "masks",
            )


def _some_pass(recipe: "Recipe") -> None:
    if not recipe.passes and not recipe.llm_compressor:
        raise refuse(
            "passes is empty, so there is nothing to do; add for instance '- prune: {method: sparsegpt}'", "passes"
        )


def _llm_compressor(recipe: "Recipe") -> None:
    """What runs in llm-compressor first: modifiers that leave a dense model for the passes, or, without passes, all that is
    done."""
    for index, entry in enumerate(recipe.llm_compressor or ()):
        if len(entry) != 1:
            raise refuse("an entry has one key, the name of a modifier", "llm_compressor", index)
    if recipe.whole:
        _runs_whole(recipe)
    elif recipe.llm_compressor:
        _runs_before(recipe, names_of(recipe.llm_compressor))
    if not recipe.whole and recipe.export.format == SAVED:
        raise refuse(
            "compressed-tensors means the files as llm-compressor saves them, so it needs llm_compressor and 'passes: []'; "
            "choose another format",
            "export",
            "format",
        )


def _runs_before(recipe: "Recipe", names: list[str]) -> None:
    for index, name in enumerate(names):
        if name not in (*TRANSFORMS, "QuantizationModifier"):
            raise refuse(
                f"before passes run {', '.join(TRANSFORMS)}, and QuantizationModifier after AWQModifier; {name} needs 'passes: []'",
                "llm_compressor",
                index,
            )
    if ("AWQModifier" in names) != ("QuantizationModifier" in names) or names[0] == "QuantizationModifier":
        raise refuse(
            "AWQModifier needs a QuantizationModifier after it, which says what it prepares for, and nothing else does",
            "llm_compressor",
        )
    if recipe.depth is not None or not recipe.compresses:
        raise refuse("llm_compressor needs a pass that prunes or quantizes, and no depth pass", "llm_compressor")


def _runs_whole(recipe: "Recipe") -> None:
    """All that is done is done by llm-compressor, and the format has to hold it."""
    entries = recipe.llm_compressor or []
    for index, entry in enumerate(entries):
        for name, settings in entry.items():
            if problem := unusable(name, settings):
                raise refuse(f"{name}: {problem[1]}", "llm_compressor", index, name, *problem[0])
    if all(name in TRANSFORMS for name in names_of(entries)):
        raise refuse("none of these modifiers prunes or quantizes, and no pass follows that does", "llm_compressor")
    if recipe.export.head is not None:
        raise refuse("llm-compressor decides on the output head; leave head out", "export", "head")
    kept, format = saved_as(entries), recipe.export.format
    if format == "dense" or format == kept or (kept == "pack-quantized" and format != SAVED):
        return
    if kept == "dense":
        raise refuse(
            f"{format} stores integers or 2:4 zeros, and these modifiers leave neither; use dense", "export", "format"
        )
    if format != SAVED:
        raise refuse(
            f"{format} cannot hold what these modifiers leave (other than 4 or 8 bits, one scale for a whole matrix, zero points, "
            "an embedding, or groups in an order of their own); use compressed-tensors, which keeps it as llm-compressor saves it",
            "export",
            "format",
        )


RULES: tuple[Callable[["Recipe"], None], ...] = (
    _some_pass,
    _duplicates,
    _depth_between,
    _basis_first,
    _training_last,
    _adapter_last,
    _order,
    _llm_compressor,
    _starts_compressed,
    _for_linears,
    _solver,
    _format,
    _leak,
    _held_out,
    _learned_masks,
)
