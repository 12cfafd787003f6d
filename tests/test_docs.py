"""The README and the pages of docs/: what they say can be run, read, found and drawn."""

import argparse
import ast
import importlib.util
import inspect
import json
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import sparsify.api
from sparsify import cli
from sparsify.cli.parser import command_parser
from sparsify.formats import get_format
from sparsify.formats.packing import kept_nibbles
from sparsify.model.linear import LinearWeights
from sparsify.recipe import json_schema, parse_recipe
from sparsify.solver.masks.magnitude import keep_two_of_four

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".github").glob("*.md"),
        *(ROOT / name / "README.md" for name in ("", "kernels")),
    ]
)
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
FRAGMENT = "a fragment of a recipe"
# Messages of other software that the page of troubleshooting explains.
OF_OTHERS = {
    "operator torchvision::nms does not exist",
    "Unknown quantization method: sparse24",
    "'_C' object has no attribute 'cpu_gemm_wna16'",
    "Unsupported quantization config: bits=4, sym=False",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of one language, each with the comment before it."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if found["language"] == language:
            yield found["text"], found["mark"] or ""


def commands(text: str) -> list[list[str]]:
    """The lines of a bash block as arguments, comments and variables in front left out."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in lines if line]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    return load(ROOT / "docs" / "generate.py")


# ---------------------------------------------------------------------------------------------------- what can be run


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_accepted(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text, _ in blocks(page, "bash"):
        for command in commands(text):
            if command[0] == "sparsify":
                cli.parse(command[1:])
            if command[0] == "make":
                assert {word for word in command[1:] if "=" not in word} <= targets, command


def test_commands_are_found_at_all() -> None:
    found = [c for page in PAGES for text, _ in blocks(page, "bash") for c in commands(text)]
    assert sum(c[0] == "sparsify" for c in found) > 50 and sum(c[0] == "make" for c in found) > 10


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "yaml"))], ids=name)
def test_every_recipe_is_accepted(page: Path) -> None:
    for text, mark in blocks(page, "yaml"):
        if mark == FRAGMENT:
            whole = {"version": 1, "passes": [{"prune": {"method": "sparsegpt"}}], **yaml.safe_load(text)}
            text = yaml.safe_dump(whole, sort_keys=False)
        parse_recipe(text, name(page))


def test_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    if find_spec("material") is None or find_spec("latex2mathml") is None:
        pytest.skip("MkDocs Material is not installed; make setup installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    methods = (tmp_path / "site" / "methods.html").read_text(encoding="utf-8")
    assert methods.count("<math") > 20 and "arithmatex" not in methods


# ------------------------------------------------------------------------------------------------ what comes from code


def test_recipe_reference_has_every_key(hook: ModuleType) -> None:
    said, schema = hook.recipe_reference(), json_schema()
    mappings = [schema, *schema["$defs"].values()]
    keys = {key for mapping in mappings for key in mapping.get("properties", {})}
    assert len(keys) > 60
    assert keys - set(re.findall(r"^\| `(\w+)` \|", said, re.MULTILINE)) == set()
    linked = set(re.findall(r"\(#(\w+)\)", said))
    assert linked <= {heading.strip("`").lower() for heading in re.findall(r"^## (\S+)$", said, re.MULTILINE)}


def test_command_line_reference_has_every_option(hook: ModuleType) -> None:
    said = hook.command_line()
    found = list(hook.commands(command_parser(), ""))
    assert len(found) >= 15
    for parser, _ in found:
        section = said.partition(f"## {parser.prog}\n")[2].partition("\n## ")[0]
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        for action in shown:
            assert all(f"`{option}" in section for option in action.option_strings), (parser.prog, action)
            assert cell_of(action) in section


def cell_of(action: argparse.Action) -> str:
    return " ".join((action.help or "").replace("%%", "%").replace("<", "&lt;").replace("|", "\\|").split())


def test_python_reference_has_every_function(hook: ModuleType) -> None:
    said = hook.python_interface()
    functions = [name for name in sparsify.api.__all__ if inspect.isfunction(getattr(sparsify.api, name))]
    assert set(re.findall(r"^### `sparsify\.(\w+)`$", said, re.MULTILINE)) == set(functions)
    for name in functions:
        section = said.partition(f"### `sparsify.{name}`\n")[2].partition("\n### ")[0]
        signature = section.partition(") -> ")[0]
        assert all(
            f"\n    {argument}:" in signature for argument in inspect.signature(getattr(sparsify.api, name)).parameters
        )


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name)
def test_python_in_a_page_names_what_is_there(page: Path) -> None:
    for text, _ in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "sparsify":
                assert all(hasattr(sparsify, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "sparsify":
                    assert hasattr(sparsify, node.attr), node.attr
                if node.value.id == "result":
                    assert node.attr in {"model", "metrics", "output"}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sparsify.apply":
                known = inspect.signature(sparsify.apply).parameters
                assert {keyword.arg for keyword in node.keywords} <= set(known)


def test_pages_ask_for_what_is_generated(hook: ModuleType) -> None:
    asked = {(kind, what) for page in PAGES for kind, what in hook.MARKER.findall(page.read_text(encoding="utf-8"))}
    assert asked == {("generated", what) for what in hook.GENERATED} | {("include", ".github/CONTRIBUTING.md")}
    assert "sparsify/solver/masks/" in hook.filled("<!-- include: .github/CONTRIBUTING.md -->", "contributing.md")


def test_links_of_an_included_file_are_those_of_the_page(hook: ModuleType) -> None:
    text = hook.included(".github/CONTRIBUTING.md", "contributing.md")
    assert "](architecture.md)" in text and "](../LICENSE)" in text and "](../.github/CHANGELOG.md)" in text
    assert (
        hook.paths_in_place_of_links("see [the licence](../LICENSE)", "contributing.md")
        == "see the licence (`LICENSE`)"
    )


def test_every_environment_variable_is_documented_and_none_besides() -> None:
    read = set()
    for file in (ROOT / "sparsify").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                read |= set(re.findall(r"^SPARSIFY_[A-Z0-9_]*[A-Z0-9]$", node.value))
    for file in (ROOT / "kernels").rglob("*.*"):
        read |= set(re.findall(r'getenv\("(SPARSIFY_[A-Z0-9_]+)"\)', file.read_text(encoding="utf-8")))
    assert len(read) >= 10
    table = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(SPARSIFY_[A-Z0-9_]+)` \|", table, re.MULTILINE)) == read


# ------------------------------------------------------------------------------------------- the specification of bytes


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The reader that stands in the specification, which knows nothing of this package."""
    ((text, _),) = blocks(ROOT / "docs" / "formats" / "sparse24.md", "python")
    assert "sparsify" not in text and "torch" not in text
    names: dict[str, Any] = {}
    exec(compile(text, "sparse24.md", "exec"), names)
    return names


def linear(bits: int, pattern: str, group: int, dtype: torch.dtype, symmetric: bool = True) -> LinearWeights:
    n, k = 6, 128
    generator = torch.Generator().manual_seed(bits)
    keep = keep_two_of_four(torch.rand(n, k, generator=generator)) if pattern == "2:4" else torch.ones(n, k).bool()
    if bits == 16:
        values = (torch.randn(n, k, generator=generator) * keep).to(dtype)
        return LinearWeights(16, pattern, k, values=values)
    half = 1 << bits - 1
    codes = (torch.randint(-half, half, (n, k), generator=generator) * keep).to(torch.int8)
    scale = torch.rand(n, k // group, generator=generator).add(0.1).to(dtype)
    if symmetric:
        return LinearWeights(bits, pattern, group, codes=codes, scale=scale)
    zero_point = torch.randint(-half, half, (n, k // group), generator=generator).to(torch.int8)
    codes = torch.where(keep, codes, zero_point.repeat_interleave(group, 1))
    return LinearWeights(bits, pattern, group, codes=codes, scale=scale, zero_point=zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "pattern", "group"),
    [(4, "2:4", 64), (4, "2:4", 128), (8, "2:4", 32), (16, "2:4", 128), (4, "dense", 64), (8, "dense", 32)],
)
def test_the_page_alone_is_enough_for_a_second_reader(
    bits: int, pattern: str, group: int, dtype: torch.dtype, symmetric: bool, reader: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    weights = linear(bits, pattern, group, dtype, symmetric or bits == 16).validate("m")
    tensors = {f"m.{suffix}": tensor for suffix, tensor in get_format("sparse24").encode(weights).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = reader["read_linear"](reader["read_file"](tmp_path / "model.safetensors"), "m", bits, pattern)
    np.testing.assert_array_equal(found, weights.dense(torch.float32).numpy())


def test_the_worked_example_is_what_is_written() -> None:
    page = (ROOT / "docs" / "formats" / "sparse24.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    (\[.*\])$", page, re.MULTILINE)
    codes = torch.tensor([[int(number) for number in re.findall(r"-?\d+", line)]], dtype=torch.int8)
    weights = LinearWeights(4, "2:4", 16, codes=codes, scale=torch.tensor([[0.5]], dtype=torch.bfloat16)).validate("m")
    encoded = get_format("sparse24").encode(weights)
    said = dict(re.findall(r"^\| `(weight_\w+)` \| [^|]*\[1, \d\] \| `([0-9a-f ]+)` \|", page, re.MULTILINE))
    assert said == {suffix: tensor.view(torch.uint8).numpy().tobytes().hex(" ") for suffix, tensor in encoded.items()}
    nibbles = re.findall(r"^\| \d \| .* = (?:\d+ = )?([0-9a-f]) \|", page, re.MULTILINE)
    assert [int(nibble, 16) for nibble in nibbles] == kept_nibbles(codes)[0].tolist()
    (row,) = re.findall(r"The row that they mean: ([^\n]*)\.", page)
    assert [float(number) for number in row.split(",")] == weights.dense(torch.float32)[0].tolist()
    assert struct.pack("<I", 0x88D89F0B).hex(" ") == said["weight_packed"]


# --------------------------------------------------------------------------------------------- figures, links, wording


def test_pictures_are_what_their_script_draws() -> None:
    script = load(ROOT / "benchmarks" / "plot_docs.py")
    drawn = {name: script.alone(svg) for name, svg in script.pictures().items()}
    assert drawn == {file.name: file.read_text(encoding="utf-8") for file in script.IMAGES.glob("*.svg")}
    used = {name for page in PAGES for name in re.findall(r"images/([\w-]+\.svg)\)", page.read_text(encoding="utf-8"))}
    assert used == set(drawn)


def test_tables_are_those_of_their_records() -> None:
    page = (ROOT / "docs" / "benchmarks" / "h100-2026-11.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" *x") for cell in line.strip("|").split("|")] for line in page.splitlines() if "x |" in line]
    record = json.loads((ROOT / "benchmarks" / "results" / "2026-11-22-h100-linears.json").read_text())["rows"]
    told = [[str(row["tokens"]), *(f"{v:.2f}" for v in row["times_faster_than_torch_bf16"].values())] for row in record]
    assert [row[1:] for row in rows if len(row) == 7][: len(told)] == told
    page = (ROOT / "docs" / "benchmarks" / "cpu-avx2.md").read_text(encoding="utf-8")
    for row in json.loads((ROOT / "benchmarks" / "results" / "2026-11-28-kernels-avx2.json").read_text())["rows"]:
        ratios = " | ".join(f"{row['ratios'][peer]:.1f}x" for peer in ("torch fp32", "torch bf16", "llama.cpp Q4_1"))
        (line,) = [line for line in page.splitlines() if line.startswith(f"| avx2, {row['m']} |")]
        assert line.endswith(f"| {ratios} |")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_cell_of_a_table_holds_a_range(page: Path) -> None:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    number = r"\d[\d.]*x?%?"
    ranges = [line for line in lines if re.search(rf"\|\W*{number} ?(to|-|–) ?{number}\W*\|", line)]
    assert not ranges


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170 and len(text.encode()) <= 12_000
    assert text.count("![") == 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target
    places = r"`((?:sparsify(?!/_)|kernels|benchmarks|deploy|recipes|docs|tests|examples)/[\w./-]+)`"
    for path in re.findall(places, text):
        assert (ROOT / path).exists(), path


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    said = [text for file in (ROOT / "sparsify").rglob("*.py") for text in messages(file)]
    said.append((ROOT / "deploy" / "setup.sh").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    parts = {part for row in rows for part in re.findall(r"`([^`]+)`", row)} - OF_OTHERS
    assert len(parts) > 30
    patterns = [re.compile(re.escape(part).replace("smollm2\\-135m\\-instruct", ".?")) for part in sorted(parts)]
    assert [p.pattern for p in patterns if not any(p.search(text) for text in said)] == []


def messages(file: Path) -> Iterator[str]:
    """The texts of a module; what is filled in is one sign."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_use_the_terms_of_the_field(page: Path) -> None:
    private = ("multiplied out", "no number", "is to become of", "the whole story", "contestant", "imitation")
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert [phrase for phrase in private if phrase in text] == []
