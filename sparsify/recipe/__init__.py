"""A YAML file, plain data or typed objects become a validated `Recipe`. Nothing here imports torch: checking takes milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsify.errors import RecipeError
from sparsify.files import encoding_problem, expanded, kind_problem, path_problem
from sparsify.recipe import llmcompressor
from sparsify.recipe.builtin import ready_recipes
from sparsify.recipe.document import Document, dump, parse
from sparsify.recipe.explain import explain
from sparsify.recipe.overrides import override
from sparsify.recipe.patterns import ignored_by
from sparsify.recipe.per_linear import LinearSettings, override_problem, settings_of
from sparsify.recipe.schema import (
    PASSES,
    Basis,
    Calibration,
    Columns,
    Depth,
    DepthTarget,
    Distill,
    Evaluation,
    Export,
    Finetune,
    FinetuneLossWeights,
    Head,
    HeldOut,
    Lora,
    LossWeights,
    MaskLearning,
    Override,
    Pass,
    Prune,
    PruneChange,
    Quantize,
    QuantizeChange,
    Recipe,
    Solver,
    Tune,
    head_format_problem,
)
from sparsify.recipe.wording import closest

__all__ = [
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
    "LinearSettings",
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
    "Solver",
    "Tune",
    "dump_recipe",
    "head_format_problem",
    "ignored_by",
    "json_schema",
    "load_recipe",
    "override_problem",
    "parse_recipe",
    "ready_recipes",
    "recipe_from",
    "settings_of",
]

LARGEST = 1_000_000  # bytes of a recipe


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe | Sequence[Any],
    overrides: Sequence[str] = (),
    model: str | None = None,
) -> Recipe:
    """A recipe from a file, from a ready one by its name (`2of4-w4a16`), from plain data or from a typed one, with `--set`
    overrides and `--model` applied, validated.

    Every problem raises RecipeError, with file and line. Recipes of llm-compressor are translated when they can be, and so is
    a list of its modifier objects."""
    if not isinstance(source, str | Path):
        return recipe_from(source, overrides=overrides, model=model)
    path = find_recipe(source)
    try:
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{path}: a recipe has at most {LARGEST} bytes; is this the file that you meant?")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problem = encoding_problem(path)
        raise RecipeError(f"{path}: not a text file ({problem}); a recipe is YAML in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_recipe(text, _short(path), overrides, model)


def parse_recipe(text: str, name: str = "recipe", overrides: Sequence[str] = (), model: str | None = None) -> Recipe:
    """`load_recipe` for the text of a file that is already at hand; `name` is what errors call it."""
    document = parse(text, name)
    if document.data is None:
        raise RecipeError(f"{name}: the recipe is empty; start from a ready one: {', '.join(ready_recipes())}")
    if isinstance(document.data, dict) and not llmcompressor.recognised(document):
        document = replace(document, data={"version": None, **document.data})  # a file has to say it
    return _validated(document, overrides, model)


def recipe_from(
    data: Mapping[str, Any] | Recipe | Sequence[Any],
    name: str = "recipe",
    overrides: Sequence[str] = (),
    model: str | None = None,
) -> Recipe:
    """A recipe from plain data, as YAML would give it, from a typed one, or from modifier objects of llm-compressor; `version`
    may be left out."""
    if isinstance(data, Recipe):
        if not overrides and model is None:
            return data
        data = data.model_dump(mode="json")
    if llmcompressor.is_modifier(data):
        data = llmcompressor.from_modifiers([data])
    return _validated(Document(name, dict(data) if isinstance(data, Mapping) else data), overrides, model)


def _validated(document: Document, overrides: Sequence[str], model: str | None) -> Recipe:
    if not isinstance(document.data, dict):
        raise document.error((), "a recipe is a mapping that starts with 'version: 1'")
    if llmcompressor.recognised(document):
        document = llmcompressor.translate(document)
    document = override(document, overrides)
    if model is not None:
        document = replace(
            document,
            data={**document.data, "model": model},
            origins={**document.origins, ("model",): f"--model {model}"},
        )
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, document) from None


def find_recipe(source: str | Path) -> Path:
    """The file meant by a path or by the name of a ready recipe. A file wins over a name, a directory does not."""
    if problem := path_problem(source):
        raise RecipeError(f"'{str(source)[:100]}' {problem}")
    path = expanded(source)
    ready = ready_recipes()
    if path.is_file():
        return path
    if str(source) in ready:
        return ready[str(source)]
    what = "is a directory, not a recipe" if path.is_dir() else "is neither a recipe file nor a ready recipe"
    if not path.is_dir() and (problem := kind_problem(path)):
        raise RecipeError(f"'{source}' {problem}")
    guess = closest(path.stem, ready)
    raise RecipeError(f"'{source}' {what}{guess or ';'} ready recipes: {', '.join(ready) or 'none found'}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every setting written out, defaults too; `parse_recipe` gives the same recipe back."""
    return dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors. Passes appear in their YAML form, a mapping of one key."""
    schema = Recipe.model_json_schema(mode="validation")
    schema["required"] = ["version", "passes"]  # in a file
    schema["anyOf"] = [{"properties": {"passes": {"minItems": 1}}}, {"required": ["llm_compressor"]}]
    definitions = schema["$defs"]
    for definition in (schema, *definitions.values()):
        for value in definition["properties"].values():
            value.pop("title", None)  # pydantic's title is the key in capitals, noise in an editor
    schema["properties"]["passes"]["items"] = {
        "oneOf": [
            {
                "type": "object",
                "description": definitions[model.__name__].get("description", ""),
                "properties": {kind: {"$ref": f"#/$defs/{model.__name__}"}},
                "required": [kind],
                "additionalProperties": False,
            }
            for kind, model in PASSES.items()
        ]
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _short(path: Path) -> str:
    """The path as errors show it: relative when it lies below the current directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
