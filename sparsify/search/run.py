"""A search from the recipe to what it writes: `search.json` with every measurement, and a recipe for each budget."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsify._version import __version__
from sparsify.compiler.apply import resumable
from sparsify.compiler.arithmetic import announced, begin
from sparsify.compiler.calibrate import CALIBRATION
from sparsify.compiler.checkpoint_names import exported_name, refuse_unstorable
from sparsify.compiler.plan import Plan
from sparsify.compiler.planning import keep_zeros, make_plan
from sparsify.distributed import processes
from sparsify.errors import CheckpointError, RecipeError, SparsifyError
from sparsify.files import as_written, atomic_write, publish, read_json, write_json
from sparsify.formats.writer import partial_directory
from sparsify.lock import only_run
from sparsify.manifest import MANIFEST, refuse_damaged, seal, unsound
from sparsify.model.experts import is_expert
from sparsify.native.tensor_memory import reusable_tensor_memory
from sparsify.progress import quietly, say, stage
from sparsify.recipe import Recipe, dump_recipe
from sparsify.search.budget import Budget
from sparsify.search.choices import Choice, Unit, choices_of, own_choice, units_of
from sparsify.search.measure import Measured, measure
from sparsify.search.overrides import recipe_with
from sparsify.search.selection import Point, Selection, selection_of
from sparsify.search.speed import How, seconds_of
from sparsify.search.text import HELD_OUT, held_out_rows
from sparsify.search.verify import Verified, verify

VERSION = 1
VERIFIED = "verified"  # folder of the models that were really compressed
RESULT = "search.json"
AS_GIVEN = "the recipe as it was given"
RECORD = "record.json"
SAMPLES = 8
EXPERTS = "*.experts.*"
RECORDED = {
    "version": "version of sparsify",
    "recipe": "recipe",
    "inputs": "model",
    "choices": "list of choices",
    "text": "text",
    "samples": "number of samples",
    "sequence_length": "sequence length",
    "precision": "precision",
}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How to search.

    choices: what a unit may become; None for all that the recipe's passes can express
    text: a source to measure on (file:PATH, hub:ID); None for text after the recipe's calibration rows
    samples: rows of it; sequence_length: tokens of each, None for as many as a calibration row has
    precision: float32, or bfloat16, which is faster on some machines and cannot tell small divergences apart
    speed: how the time of a linear is known, where a budget asks for speed
    verify: how many selections to compress really and to measure: those of the budgets, then others of the front; before them
            the recipe as it was given, by which predictions are scaled
    """

    choices: Sequence[Choice] | None = None
    text: str | None = None
    samples: int = SAMPLES
    sequence_length: int | None = None
    precision: str = "float32"
    speed: How = "measured"
    verify: int = 0


@dataclass(frozen=True)
class Found:
    """A selection and what it was chosen for. file: of its recipe, in the output; verified: measured on the compressed model."""

    label: str
    point: Point
    recipe: Recipe
    file: Path | None = None
    verified: Verified | None = None

    @property
    def name(self) -> str:
        """Of the folder of the compressed model."""
        return self.file.stem if self.file is not None else f"front-{self.point.bits:.4f}"


@dataclass(frozen=True)
class Searched:
    """A finished search. found: one selection for each budget, then those verified besides; own: the recipe as it was given,
    own_verified: measured."""

    output: Path
    model: str
    selection: Selection
    found: Sequence[Found]
    own: Point
    front: Sequence[Point]
    described: dict[str, Any] = field(default_factory=dict)
    own_verified: Verified | None = None

    def to_json(self) -> dict[str, Any]:
        """What search.json holds."""
        times = self.selection.seconds
        return {
            "version": VERSION,
            **self.described,
            "units": [
                {
                    "name": unit.name,
                    "block": unit.block,
                    "modules": list(unit.modules),
                    "weights": unit.weights,
                    "choices": {
                        choice.name: {
                            **self.selection.measured[unit.name][choice.name].to_json(),
                            "bytes": unit.nbytes[choice],
                            **({} if times is None else {"seconds": times[number][choice]}),
                        }
                        for choice in unit.choices
                    },
                }
                for number, unit in enumerate(self.selection.units)
            ],
            "prediction_scale": self.selection.scale,
            "recipe_as_given": {**self._point_json(self.own), "verified": _json_of(self.own_verified)},
            "front": [self._point_json(point) for point in self.front],
            "found": [
                {
                    "for": found.label,
                    "recipe": None if found.file is None else found.file.name,
                    **self._point_json(found.point),
                    "verified": _json_of(found.verified),
                }
                for found in self.found
            ],
        }

    def _point_json(self, point: Point) -> dict[str, Any]:
        chosen = {unit.name: choice.name for unit, choice in zip(self.selection.units, point.choices, strict=True)}
        return {**point.to_json(), "choices": chosen}

    def table(self) -> Table:
        """One row for each selection, the recipe as it was given first."""
        faster = self.own.speed is not None
        verified = self.own_verified is not None or any(found.verified for found in self.found)
        view = Table(
            title=escape(f"{self.model}: {len(self.selection.units)} groups of linears chose"), title_justify="left"
        )
        view.add_column("selection")
        columns = ["bits", "MB", *(["speed of linears"] if faster else []), "predicted KL"]
        for heading in [*columns, *(["measured KL", "perplexity"] if verified else [])]:
            view.add_column(heading, justify="right")
        view.add_column("groups of linears by choice")
        rows = [(AS_GIVEN, self.own, self.own_verified), *((f.label, f.point, f.verified) for f in self.found)]
        for label, point, measured in rows:
            cells = [f"{point.bits:.2f}", f"{point.nbytes / 1e6:.1f}"]
            cells += [f"{point.speed:.2f}x"] if point.speed is not None else []
            cells += [f"{point.kl:.4f}"]
            if verified:
                cells += ["–", "–"] if measured is None else [f"{measured.kl:.4f}", f"{measured.perplexity:.2f}"]
            view.add_row(Text(label), *cells, in_words(point.choices))
        return view


def _json_of(verified: Verified | None) -> dict[str, Any] | None:
    return None if verified is None else verified.to_json()


def in_words(choices: Sequence[Choice]) -> str:
    """`30 dense, 4 bits; 90 2:4, 4 bits`"""
    counted = Counter(choices)
    ordered = sorted(counted, key=lambda choice: (choice.pruned, -choice.bits))
    return "; ".join(f"{counted[choice]} x {choice.describe()}" for choice in ordered)


@quietly
def search(
    recipe: Recipe,
    model: str,
    output: str | Path,
    budgets: Sequence[Budget],
    settings: Settings | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Searched:
    """Choose for every group of linears what it becomes, for each budget, and write recipes and measurements into `output`.

    resume: go on with an interrupted search, or choose for other budgets from the measurements of a finished one
    Raises SparsifyError for anything a user can mend; a budget that cannot be met names the nearest selection.
    """
    settings = settings or Settings()
    output = Path(output)
    recipe = recipe.model_copy(update={"model": model})
    _refuse(recipe, budgets, settings)
    with only_run(output):
        work = partial_directory(output)
        if output.exists() and not resume:
            raise CheckpointError(
                f"{output} exists already; choose another output, or add --resume to choose from its measurements"
            )
        place = output if output.exists() else work
        started = time.perf_counter()
        arithmetic = begin(place, resume)
        with arithmetic.in_force(), stage(f"reading {model}"):
            plan = keep_zeros(make_plan(recipe, model))
            if any(map(is_expert, plan.schemes)):
                say(f"experts are not searched, they stay dense: ignore has {EXPERTS}", quiet)
                recipe = recipe.model_copy(update={"ignore": [*recipe.ignore, EXPERTS]})
                plan = keep_zeros(make_plan(recipe, model))
            refuse_unstorable(plan)
            units = units_of(plan, list(settings.choices or choices_of(recipe)))
        with arithmetic.in_force():
            faster = any(budget.kind == "speed" for budget in budgets)
            seconds = seconds_of(plan, units, settings.speed, quiet) if faster else None
            _refuse_impossible(plan, units, seconds, budgets)
        _record(place, plan, output, settings, resume)
        arithmetic = arithmetic.for_statistics()
        arithmetic.keep(place)
        with announced(arithmetic, plan, quiet).in_force(), reusable_tensor_memory():
            held_out = held_out_rows(plan, settings.text, settings.samples, settings.sequence_length, place, quiet)
            measured = measure(plan, units, held_out, place, PRECISIONS[settings.precision], quiet)
            selection = selection_of(plan, units, measured, seconds)
            if left := [unit.name for unit in units if unit.name not in measured]:
                say(
                    f"{len(left)} groups of linears stay dense, the walk cannot handle them: {', '.join(left[:3])}",
                    quiet,
                )
            compressed = partial(
                _compressed, plan=plan, selection=selection, place=place, held_out=held_out, quiet=quiet
            )
            given = [_own(unit, recipe) for unit in selection.units]
            own_verified: Verified | None = None
            if settings.verify:
                as_given = recipe_with(recipe, selection.units, given, plan.model.blocks)
                own_verified = compressed(as_given, "as-given")
            scale = _scale(own_verified, selection.point(given).kl, place / RESULT)
            selection = replace(selection, scale=scale)
            found = [_found(budget, plan, selection, recipe) for budget in budgets]
            front = selection.front()
            found += _more(front, settings.verify - len(found), plan, selection, recipe)
            found = [
                replace(one, verified=compressed(one.recipe, one.name)) if number < settings.verify else one
                for number, one in enumerate(found)
            ]
        own = selection.point(given)
        described = _described(plan, settings, held_out, seconds, time.perf_counter() - started)
        for one in found:
            _write(one, place)
        result = Searched(output, model, selection, found, own, front, described, own_verified)
        write_json(place / RESULT, _with_earlier(result.to_json(), place / RESULT))
        seal(place, sealed=[file.parent for file in (place / VERIFIED).glob(f"*/{MANIFEST}")])
        if place == work:
            publish(work, output)
        return result


def _refuse(recipe: Recipe, budgets: Sequence[Budget], settings: Settings) -> None:
    """RecipeError for what cannot be searched."""
    if not budgets:
        raise RecipeError("name a budget: --budget bits=3.5")
    if processes() > 1:
        raise SparsifyError("search runs in one process; start it without torchrun")
    if recipe.prune is None and recipe.quantize is None:
        raise RecipeError(
            "search chooses how linears are pruned and quantized, and this recipe does neither; add prune or quantize"
        )
    first = {
        "depth pass": recipe.depth is not None,
        "basis pass": recipe.basis is not None,
        "llm_compressor section": bool(recipe.llm_compressor),
    }
    for what in (name for name, there in first.items() if there):
        raise RecipeError(
            f"this recipe's {what} changes the model before linears can choose; apply it first, then search on the result"
        )
    if recipe.export.format == "dense":
        raise RecipeError("export.format dense stores every choice with the same bytes; set export.format: sparse24")
    if settings.precision not in PRECISIONS:
        raise RecipeError(f"precision {settings.precision} is unknown; choose {' or '.join(PRECISIONS)}")
    if settings.samples < 1 or settings.verify < 0 or (settings.sequence_length or 2) < 2:
        raise RecipeError("--samples takes a positive number, --sequence-length one from 2 up, --verify one from 0 up")
    known = choices_of(recipe)
    for choice in settings.choices or ():
        if replace(choice, group_size=None) not in known:
            lacking = "prune" if choice.pruned and recipe.prune is None else "quantize"
            raise RecipeError(f"choice {choice.name} needs a {lacking} pass, which this recipe has not")
    if len(settings.choices or known) < 2:
        raise RecipeError("there is nothing to choose from with one choice; name at least two")


def _record(place: Path, plan: Plan, output: Path, settings: Settings, resume: bool) -> None:
    """Note in a work directory what is measured there; CheckpointError where that is something else."""
    same = {
        "export": plan.recipe.export.model_copy(update={"head": None}),
        "evaluation": None,
    }  # nothing of it is measured
    record = {
        "version": VERSION,
        "recipe": dump_recipe(resumable(plan.recipe.model_copy(update=same))),
        "inputs": plan.input_digests(output),
        "choices": [choice.name for choice in settings.choices or choices_of(plan.recipe)],
        **{name: getattr(settings, name) for name in ("text", "samples", "sequence_length", "precision")},
    }
    file = place / RECORD
    if file.exists():
        if not resume:
            raise CheckpointError(
                f"{place} holds the beginning of an interrupted search; go on with --resume, or remove that directory"
            )
        with as_written(file):
            before = read_json(file)
            changed = [RECORDED[key] for key in record if before.get(key) != record[key]]
        if changed:
            raise CheckpointError(
                f"{place} was measured with another {changed[0]}; search with the same one, or into another output"
            )
        refuse_damaged(place, (CALIBRATION, HELD_OUT))
        for block in unsound(place, "block-*.json"):
            say(f"{block} is damaged; it is measured again")
            block.unlink()
        return
    if place.exists() and any(place.iterdir()):
        raise CheckpointError(f"{place} is no work directory of a search; choose another output or remove it first")
    place.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def _refuse_impossible(plan: Plan, units: Sequence[Unit], seconds: Any, budgets: Sequence[Budget]) -> None:
    """The error of a budget of size or speed that cannot be met, before anything is measured."""
    unknown = {unit.name: dict.fromkeys((c.name for c in unit.choices), Measured(float("nan"), None)) for unit in units}
    selection = selection_of(plan, units, unknown, seconds)
    for budget in budgets:
        selection.refuse_impossible(budget)


def _own(unit: Unit, recipe: Recipe) -> Choice:
    """What the recipe as it was given makes of a unit; where that is the same as another choice, that one."""
    own = own_choice(recipe)
    return own if own in unit.schemes else min(unit.choices, key=lambda choice: unit.nbytes[choice])


def _found(budget: Budget, plan: Plan, selection: Selection, recipe: Recipe) -> Found:
    point = selection.best(budget)
    changed = recipe_with(recipe, selection.units, point.choices, plan.model.blocks)
    if all(
        scheme is None for unit, c in zip(selection.units, point.choices, strict=True) for scheme in unit.schemes[c]
    ):
        raise RecipeError(f"--budget {budget.text} leaves every linear dense, for which no recipe is needed; lower it")
    return Found(budget.text, point, changed, Path(f"{budget.file}.yaml"))


def _more(front: Sequence[Point], count: int, plan: Plan, selection: Selection, recipe: Recipe) -> list[Found]:
    """Selections of the front that are verified besides, evenly spaced and not dense everywhere."""
    usable = [point for point in front if any(choice.bits < 16 or choice.pruned for choice in point.choices)]
    count = max(0, min(count, len(usable)))
    picked = [usable[round(step * (len(usable) - 1) / max(count - 1, 1))] for step in range(count)]
    return [
        Found(f"{point.bits:.3g} bits", point, recipe_with(recipe, selection.units, point.choices, plan.model.blocks))
        for point in dict.fromkeys(picked)
    ]


def _scale(given: Verified | None, predicted: float, earlier: Path) -> float:
    """What sums over groups are multiplied with: how many times its sum the recipe as it was given loses, as it was measured now,
    or by an earlier search in the same place; else 1."""
    if given is not None and given.kl > 0 and predicted > 0:
        return given.kl / predicted
    return float(read_json(earlier).get("prediction_scale", 1.0)) if earlier.exists() else 1.0


def _compressed(
    recipe: Recipe, name: str, plan: Plan, selection: Selection, place: Path, held_out: Tensor, quiet: bool
) -> Verified:
    """Really compress a selection, under a name, and measure it."""
    linears = [exported_name(plan, module) for module in selection.linears()]
    directory = place / VERIFIED / name
    return verify(recipe, str(plan.checkpoint.spec), directory, held_out, linears, selection.weights, quiet)


def _write(found: Found, place: Path) -> None:
    """Write the recipe of a selection beside the measurements."""
    if found.file is None:
        return
    said = [f"Made by sparsify search for {found.label}: {found.point.describe()}", in_words(found.point.choices)]
    if found.verified is not None:
        said.append(f"Measured on the compressed model: KL {found.verified.kl:.4g}")
    atomic_write(place / found.file, "".join(f"# {line}\n" for line in said) + "\n" + dump_recipe(found.recipe))


def _with_earlier(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """The result with the selections that an earlier search in the same place made for other budgets."""
    if not file.exists():
        return result
    new = {found["for"] for found in result["found"]}
    return {
        **result,
        "found": [*(found for found in read_json(file)["found"] if found["for"] not in new), *result["found"]],
    }


def _described(plan: Plan, settings: Settings, held_out: Tensor, seconds: Any, elapsed: float) -> dict[str, Any]:
    return {
        "sparsify": __version__,
        "model": plan.checkpoint.spec,
        "recipe": plan.recipe.model_dump(mode="json"),
        "calibration_tokens": plan.recipe.calibration.samples * plan.recipe.calibration.sequence_length,
        "held_out": {"text": settings.text, "rows": held_out.shape[0], "row_length": held_out.shape[1]},
        "precision": settings.precision,
        "speed": None if seconds is None else settings.speed,
        "seconds": round(elapsed, 1),
    }
