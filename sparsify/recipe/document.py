"""YAML text becomes plain Python data plus the line where every value stands, so that errors can say `recipe.yaml:12`.

Two differences from `yaml.safe_load`, both because they bite recipe writers: the same key twice is an error instead of
"last one wins", and scalars follow the YAML 1.2 core schema, so that an unquoted `2:4` is text (YAML 1.1 reads the
base-60 number 124), `1e-2` is a number (YAML 1.1 reads text) and `off` is text.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from sparsify.errors import RecipeError
from sparsify.recipe.wording import shortened

KeyPath = tuple[str | int, ...]
DEEPEST = 50  # levels of nesting
MOST_VALUES = 100_000  # of one document, those counted again that an alias repeats
LARGEST_INTEGER = 2**63 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")  # an escape can write what no file holds

# How PyYAML writes members of enumerations, and so llm-compressor into its recipe.yaml: `!!python/object/apply:MODULE.Class [int]`.
# Nothing is called: the text between the brackets is what is meant.
_ENUMERATION = re.compile(r"tag:yaml\.org,2002:python/object/apply:(?:compressed_tensors|llmcompressor)\.[\w.]+")

_RESOLVERS: list[tuple[str, str, list[str]]] = [  # tag, pattern, the characters a match can start with
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("tag:yaml.org,2002:float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("tag:yaml.org,2002:float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core scalars and bounds on what a few bytes can become."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels of nesting", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if found := _SURROGATE.search(node.value):
            problem = f"\\u{ord(found[0]):04x} is half of a surrogate pair; write the character itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever either YAML version would not read back as text."""

    yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list entries stand two columns right of their key, as in recipes/


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Document:
    """Plain data and, per path into it, the place it was written: `recipe.yaml:12` or `--set a.b=c`."""

    name: str
    data: Any
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """The place of the value at `path`, or of the closest enclosing value that was written somewhere."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.name

    def error(self, path: KeyPath, message: str) -> RecipeError:
        return RecipeError(f"{self.origin(path)}: {message}")


def parse(text: str, name: str) -> Document:
    """Read one YAML document; `name` is what errors call it."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    origins: dict[KeyPath, str] = {}
    data = None if node is None else _build(node, name, (), origins, ())
    return Document(name, data, origins)


def dump(data: Any) -> str:
    """YAML text that `parse` (and any other YAML reader) turns back into `data`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _build(node: yaml.Node, name: str, path: KeyPath, origins: dict[KeyPath, str], enclosing: tuple[int, ...]) -> Any:
    place = f"{name}:{node.start_mark.line + 1}"
    origins.setdefault(path, place)
    if len(origins) > MOST_VALUES:
        raise RecipeError(f"{place}: the recipe has more than {MOST_VALUES} values, aliases written out")
    if id(node) in enclosing:
        raise RecipeError(f"{place}: an alias refers to the value that contains it; write the value out")
    enclosing = (*enclosing, id(node))
    if isinstance(node, yaml.SequenceNode) and _ENUMERATION.fullmatch(node.tag) and node.value:
        return _build(node.value[0], name, path, origins, enclosing)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, name, (*path, index), origins, enclosing) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = f"{name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{here}: a key must be a plain word")
            key = key_node.value
            if key in data:
                first = origins[*path, key].rpartition(":")[2]
                raise RecipeError(f"{here}: the key '{key}' was already given on line {first}; keep one of the two")
            origins[*path, key] = here  # the key's line, not the value's: that is where the eye should land
            data[key] = _build(value_node, name, (*path, key), origins, enclosing)
        return data
    return _scalar(node, place)


def _scalar(node: yaml.Node, place: str) -> Any:
    kind, value = node.tag.rpartition(":")[2], node.value
    if kind == "str":
        return value
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
        if kind == "int":
            if abs(number := int(value)) > LARGEST_INTEGER:
                raise ValueError
            return number
        if kind == "float":
            return float(value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (KeyError, ValueError):
        raise RecipeError(f"{place}: '{shortened(value)}' is not a valid {kind}") from None
    raise RecipeError(f"{place}: YAML tag '{shortened(node.tag)}' has no meaning in a recipe; remove it")
