"""The parts of the pages that come from the code, so that they cannot be stale. A hook of MkDocs; no page is written.

A line `<!-- generated: NAME -->` of a page becomes what GENERATED[NAME] returns, and `<!-- include: PATH -->` the text of a
file of the repository. Links to files of the repository outside docs/ become their paths, since a site does not hold them; formulas
become MathML, which browsers show without any script, and so without the network.

    python docs/generate.py NAME      prints one of them
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^<!-- (generated|include): (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
log = logging.getLogger("mkdocs.hooks.generate")  # warnings end `mkdocs build --strict`


# ---------------------------------------------------------------------------------------------------- recipe reference


def recipe_reference() -> str:
    """Every key of a recipe with its type, default and meaning, from the JSON schema of the recipe classes."""
    from sparsify.recipe import json_schema

    schema = json_schema()
    parts = ["## The whole recipe", settings(schema, schema["$defs"])]
    for entry in schema["properties"]["passes"]["items"]["oneOf"]:
        (kind,) = entry["properties"]
        definition = schema["$defs"][entry["properties"][kind]["$ref"].rpartition("/")[2]]
        parts += [f"## Pass `{kind}`", entry.get("description", ""), settings(definition, schema["$defs"])]
    passes = {
        e["properties"][k]["$ref"] for e in schema["properties"]["passes"]["items"]["oneOf"] for k in e["properties"]
    }
    for name, definition in schema["$defs"].items():
        if f"#/$defs/{name}" not in passes and definition.get("properties"):
            parts += [f"## `{name}`", definition.get("description", ""), settings(definition, schema["$defs"])]
    return "\n\n".join(part for part in parts if part)


def settings(definition: dict[str, Any], known: dict[str, Any]) -> str:
    """The table of the keys of one mapping. known: the definitions that it refers to."""
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for key, node in definition["properties"].items():
        default = "required" if key in definition.get("required", ()) else written(node.get("default"))
        lines.append(f"| `{key}` | {cell(kind_of(node))} | {cell(default)} | {cell(said_of(node, known))} |")
    return "\n".join(lines)


def said_of(node: dict[str, Any], known: dict[str, Any]) -> str:
    """What a key means; where only the mapping under it says so, its first sentence."""
    refers = [one["$ref"] for one in (node, *node.get("anyOf", ())) if "$ref" in one]
    if "description" not in node and refers:
        text = str(known[refers[0].rpartition("/")[2]].get("description", "")).partition(". ")[0].rstrip(".")
        return text[:1].lower() + text[1:]
    return str(node.get("description", ""))


def written(value: Any) -> str:
    """A default as YAML writes it; a mapping of defaults is told where its keys are."""
    if isinstance(value, dict):
        return "its defaults"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{json.dumps(value) if value is None or isinstance(value, bool) else value}`"


def kind_of(node: dict[str, Any]) -> str:
    """What a key accepts, in words."""
    if "$ref" in node:
        return reference(node["$ref"])
    for several in ("anyOf", "oneOf"):
        if several in node:
            return " or ".join(dict.fromkeys(kind_of(one) for one in node[several]))
    if "const" in node:
        return written(node["const"])
    if "enum" in node:
        return ", ".join(written(value) for value in node["enum"])
    if node.get("type") == "array":
        passes = "oneOf" in node.get("items", {})
        return "list of passes" if passes else f"list of {kind_of(node['items'])}"
    if node.get("type") == "object":
        return "mapping"
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return word.get(node.get("type", ""), node.get("type", "")).replace("null", "`null`") + limits(node)


def limits(node: dict[str, Any]) -> str:
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node and abs(node[key]) < 2**53]
    return f" {', '.join(said)}" if said else ""


def reference(target: str) -> str:
    name = target.rpartition("/")[2]
    return f"[{name}](#{name.lower()})"


def cell(text: str) -> str:
    """Text that can stand in a cell of a table."""
    return " ".join(str(text).replace("|", "\\|").split())


# ------------------------------------------------------------------------------------------------------- command line


def command_line() -> str:
    """Every command with its arguments and examples, from the parser."""
    from sparsify.cli.parser import command_parser

    return "\n\n".join(part for parser, about in commands(command_parser(), "") for part in described(parser, about))


def commands(parser: argparse.ArgumentParser, about: str) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The parser of every command that runs something, with its sentence, in the order of the help page."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield parser, about
    for action in nested:
        sentences = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, command in action.choices.items():
            yield from commands(command, sentences.get(name, ""))


def described(parser: argparse.ArgumentParser, about: str) -> Iterator[str]:
    yield f"## {parser.prog}"
    yield (about[:1].upper() + about[1:] + ".").replace("%%", "%").replace("<", "&lt;")
    rows = [
        (name_of(action), action)
        for action in parser._actions
        if action.help != argparse.SUPPRESS and action.dest != "help"
    ]
    if rows:
        lines = ["| argument | meaning |", "| --- | --- |"]
        yield "\n".join(lines + [f"| {cell(name)} | {cell(meaning(action))} |" for name, action in rows])
    if examples := re.findall(
        r"^ +(\S.*?)(?: {3,}.*)?$", (parser.epilog or "").partition("examples:")[2], re.MULTILINE
    ):
        yield "```bash\n" + "\n".join(examples) + "\n```"


def name_of(action: argparse.Action) -> str:
    """An argument as a user writes it."""
    value = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if isinstance(value, tuple):
        value = " ".join(value)
    many = " ..." if action.nargs in ("*", "+") else ""
    if not action.option_strings:
        return f"`{value}{many}`"
    return ", ".join(f"`{option}{f' {value}{many}' if action.nargs != 0 else ''}`" for option in action.option_strings)


def meaning(action: argparse.Action) -> str:
    said = (action.help or "").replace("%%", "%").replace("<", "&lt;")
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    return said + choices + ("; required" if action.required and action.option_strings else "")


# ------------------------------------------------------------------------------------------------------------- Python


def python_interface() -> str:
    """What `import sparsify` gives: signatures and docstrings of sparsify/api.py, read and not imported, which would load torch."""
    tree = ast.parse((ROOT / "sparsify" / "api.py").read_text(encoding="utf-8"))
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    parts = []
    for node in public:
        returned = ast.unparse(node.returns) if node.returns else "None"
        signature = ",\n".join(f"    {argument}" for argument in arguments(node.args))
        parts += [f"### `sparsify.{node.name}`", f"```text\n{node.name}(\n{signature}\n) -> {returned}\n```"]
        parts.append(f"```text\n{ast.get_docstring(node) or ''}\n```")
    return "\n\n".join(parts)


def arguments(found: ast.arguments) -> Iterator[str]:
    """The arguments of a function one by one, as they stand in its head."""
    defaults = [None] * (len(found.args) - len(found.defaults)) + found.defaults
    for argument, default in zip(found.args, defaults, strict=True):
        yield ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")
    if found.kwonlyargs:
        yield "*"
    for argument, default in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        yield ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")


GENERATED: dict[str, Callable[[], str]] = {
    "recipe-reference": recipe_reference,
    "command-line": command_line,
    "python-interface": python_interface,
}


# --------------------------------------------------------------------------------------------------------------- hook


def filled(markdown: str, place: str) -> str:
    """The page with its generated and included parts. place: of the page below docs/."""

    def put(found: re.Match[str]) -> str:
        kind, name = found.groups()
        return GENERATED[name]() if kind == "generated" else included(name, place)

    return MARKER.sub(put, markdown)


def included(name: str, place: str) -> str:
    """The text of a file of the repository, its links as seen from the page."""
    here = posixpath.dirname(f"docs/{place}")

    def moved(found: re.Match[str]) -> str:
        said, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        return (
            f"[{said}]({posixpath.relpath(posixpath.normpath(posixpath.join(posixpath.dirname(name), target)), here)})"
        )

    return LINK.sub(moved, (ROOT / name).read_text(encoding="utf-8"))


def paths_in_place_of_links(markdown: str, place: str) -> str:
    """Links that leave docs/ as the path in the repository. What is not there is a warning."""

    def told(found: re.Match[str]) -> str:
        said, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(place), target.partition("#")[0]))
        if path.startswith("docs/"):
            return found[0]
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not in the repository", place, path)
        return f"`{path}`" if said in (path, target) else f"{said} (`{path}`)"

    return LINK.sub(told, markdown)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return paths_in_place_of_links(filled(markdown, page.file.src_uri), page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        return convert(unescape(found[3]), display="inline" if found[2] == "(" else "block")

    return FORMULA.sub(drawn, html)


if __name__ == "__main__":
    print(GENERATED[sys.argv[1]]())
