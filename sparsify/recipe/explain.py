"""Validation errors in the words of someone who writes a recipe: place, what is wrong, what would be right."""

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sparsify.errors import RecipeError
from sparsify.recipe.document import Document, KeyPath
from sparsify.recipe.schema import PASSES, Recipe, problem_path
from sparsify.recipe.wording import closest, either, is_number, shortened, shown

MOST = 20  # problems that are told at once
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
}
_MOVED: dict[tuple[str, ...], dict[str, str]] = {  # the settings that stand elsewhere, by the kinds of their mappings
    ("prune", "quantize"): {
        "damping": "it stands in solver: {damping: ...}, once for prune and quantize",
        "correction": "it stands in solver: {error_propagation: ...}, once for prune and quantize",
        "refine": "it stands in solver: {coordinate_descent: ...}, once for prune and quantize",
        "ignore": "it stands at the top of the recipe, once for prune and quantize",
    },
    ("distill", "lora", "finetune"): {"weights": "it is loss: {kl, reverse_kl, squarehead, cross_entropy}"},
    ("distill", "lora"): {"method": "loss: {kl, reverse_kl, squarehead, cross_entropy} says it; remove it"},
    ("loss",): {"logits": "it is kl", "feature": "it is squarehead"},
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def explain(error: ValidationError, document: Document) -> RecipeError:
    """Every problem of the document on a line of its own, up to MOST of them."""
    lines: dict[str, None] = {}
    details = error.errors(include_url=False)
    for number, detail in enumerate(details):
        if len(lines) == MOST:
            lines[f"{document.name}: and {len(details) - number} more problems"] = None
            break
        path = detail["loc"]
        if detail["type"] == "refused":
            path += problem_path(detail["ctx"])
        lines[f"{document.origin(path)}: {_message(detail, path)}"] = None
    return RecipeError("\n".join(lines))


def model_at(path: KeyPath) -> type[BaseModel] | None:
    """The model that describes the mapping at `path` of a recipe, None where there is no mapping."""
    model: type[BaseModel] | None = Recipe
    if path[:1] == ("passes",):
        model, path = (PASSES.get(str(path[2])) if len(path) > 2 else None), path[3:]
    for key in path:
        if isinstance(key, int):  # an entry of a list is described by what the list holds
            continue
        field = model.model_fields.get(str(key)) if model else None
        model = _submodel(field.annotation) if field else None
    return model


def _submodel(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None` or a list of them; None in everything else."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_submodel, typing.get_args(annotation))), None)


def options_at(path: KeyPath) -> tuple[Any, ...]:
    """The values a key, or an entry of the list under a key, may take when there are few."""
    entry = isinstance(path[-1], int)
    path = path[:-1] if entry else path
    model = model_at(path[:-1])
    field = model.model_fields.get(str(path[-1])) if model else None
    annotation = field.annotation if field else None
    if entry and typing.get_origin(annotation) is list:
        (annotation,) = typing.get_args(annotation)
    inner = [option for option in typing.get_args(annotation) if option is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType) and len(inner) == 1:  # optional
        (annotation,) = inner
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def unknown_key(path: KeyPath) -> str:
    model = model_at(path[:-1])
    known = list(model.model_fields) if model else []
    where = next((key for key in path[-2::-1] if isinstance(key, str)), "the recipe")
    for kinds, moved in _MOVED.items():
        if where in kinds and path[-1] in moved:
            return f"'{path[-1]}' is no setting of {where}: {moved[str(path[-1])]}"
    guess = closest(str(path[-1]), known) or ";"
    return f"unknown key '{shortened(str(path[-1]))}' in {where}{guess} known keys: {', '.join(known)}"


def _message(detail: ErrorDetails, path: KeyPath) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    name = ".".join(map(str, path)) or "the recipe"
    if kind == "refused":
        return str(context["message"])
    if kind == "extra_forbidden":
        return unknown_key(path)
    if kind == "missing":
        return _missing(path)
    if kind == "literal_error":
        return _wrong_option(path, value)
    if kind == "model_type":
        return f"{name} must be a mapping of settings, not {shown(value)}"
    if kind == "list_type":
        return f"{name} must be a list, one '- ' entry per line, not {shown(value)}"
    if kind == "too_short":
        return f"{name} is empty; give at least one entry or leave it out"
    if kind == "string_too_short":
        return f"{name} is empty"
    if kind == "finite_number":
        return f"{name} must be a finite number, not {shown(value)}"
    if kind in _TYPES:
        return f"{name} must be {_TYPES[kind]}, not {shown(value)}{_quotes(kind, value)}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{name} must be {words} {context[key]}, not {shown(value)}"
    return f"{name}: {detail['msg']}"


def _missing(path: KeyPath) -> str:
    where = next((key for key in path[-2::-1] if isinstance(key, str)), "the recipe")
    options = options_at(path)
    return f"{where} needs the key '{path[-1]}'" + (f": {either(options)}" if options else "")


def _wrong_option(path: KeyPath, value: Any) -> str:
    if path == ("version",) and value is None:
        return "the recipe needs the key 'version'; start the file with 'version: 1'"
    if path == ("version",):
        return f"this sparsify reads recipes of version 1, not {shown(value)}"
    options = options_at(path)
    name = f"an entry of {path[-2]}" if isinstance(path[-1], int) else path[-1]
    message = f"{name} must be {either(options)}, not {shown(value)}"
    if path[-1] == "group_size" and not isinstance(value, bool) and value in (-1, 0, None):
        return f"{message}; for one scale per row write channel"
    if path[-1] == "bits" and value == 16:
        return f"{message}; for 16 bits leave {'head' if path[-2] == 'head' else 'the quantize pass'} out"
    if isinstance(value, str):
        if any(value == str(option) for option in options):
            return f"{message}; remove the quotes"
        return message + closest(value, [option for option in options if isinstance(option, str)])
    return message


def _quotes(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return "; remove the quotes" if isinstance(value, str) and is_number(value) else ""
