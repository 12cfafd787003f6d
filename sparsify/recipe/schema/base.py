"""What all models of a recipe share: how they refuse, the types of numbers and patterns, the one-key form of a pass."""

import math
import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparsify.matching import pattern_problem, refuse_many
from sparsify.recipe.document import KeyPath
from sparsify.recipe.sources import source_problem


def refuse(message: str, *path: str | int) -> PydanticCustomError:
    """A validation error at `path` below the model that raises it."""
    return PydanticCustomError("refused", "{message}", {"message": message, "path": path})


def problem_path(context: dict[str, Any]) -> KeyPath:
    """Where below its model an error made by `refuse` belongs."""
    return tuple(context.get("path", ()))


class Model(BaseModel):
    """Refuses unknown keys and wrong types; never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def check_pattern(pattern: str, *path: int) -> str:
    """Refuse a pattern that can name no module. path: where it stands below the model."""
    if pattern.startswith("re:"):
        if problem := pattern_problem(pattern[3:]):
            raise refuse(f"'{pattern[:100]}' is not a valid regular expression: {problem}", *path)
    elif not pattern:
        raise refuse("an empty pattern matches nothing; remove it", *path)
    return pattern


def _check_patterns(patterns: list[str]) -> list[str]:
    if problem := refuse_many(patterns):
        raise refuse(problem)
    return [check_pattern(pattern, index) for index, pattern in enumerate(patterns)]


Patterns = Annotated[list[str], AfterValidator(_check_patterns)]
"""Names of modules: in full or their last components, with * wildcards, or re:REGEX."""


def _check_source(source: str) -> str:
    if problem := source_problem(source):
        raise refuse(problem)
    return source


Source = Annotated[str, AfterValidator(_check_source)]
"""A text: self, file:PATH or hub:ID."""


Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def _count(value: Any) -> Any:
    """`2M`, `500k` and `1.5B` as numbers; whatever else is left to the type check."""
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMBG]?)", value.strip())):
        number = float(found[1]) * UNITS[found[2]]
        return value if number == math.inf else round(number)
    return value


Count = Annotated[
    int,
    BeforeValidator(_count),
    Field(ge=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?\s*[kKMBG]?$"},
            ]
        }
    ),
]
"""A number of tokens, written as 2000000, 500k, 2M or 1.5B."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PassModel(Model):
    """Common to all passes: the one-key YAML form, in both directions."""

    kind: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, data: Any) -> Any:
        if isinstance(data, dict) and list(data) == [cls.kind]:
            return {} if data[cls.kind] is None else data[cls.kind]
        if isinstance(data, dict) and data.get("kind") == cls.kind:  # keyword form, Prune(kind="prune", ...)
            return {key: value for key, value in data.items() if key != "kind"}
        return data

    @model_serializer(mode="wrap")
    def _wrap(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.kind: handler(self)}

    def refuse_set(self, method: str, **reasons: str) -> None:
        """Refuse options that the method would silently not honour."""
        for name, reason in reasons.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise refuse(f"{name} has no effect with method {method}: {reason}; remove it", name)
