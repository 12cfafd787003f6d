"""The house rules about imports: data flows one way, light modules stay light, and what is imported is declared."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# A module may import from those above it, never from those below.
ORDER = (
    "errors", "files", "processor", "threads", "distributed", "progress", "native", "native_cuda", "emulation", "recipe",
    "model", "data", "passes", "formats", "compiler", "runtime", "evaluation", "bench", "report", "demo", "doctor",
    "kernel_builds", "cli", "__main__",
)  # fmt: skip

# The runtime is loaded by every vLLM worker and by transformers: it may know the format and nothing of the compiler.
RUNTIME_MAY_IMPORT = ("errors", "files", "native", "native_cuda", "model.linear", "formats", "runtime")

# What must be importable without the heavy packages, and why.
HEAVY = ("torch", "transformers", "vllm", "numpy", "pydantic", "rich")
LIGHT = {
    "sparsify": HEAVY,  # vLLM's workers and every command import it
    "sparsify.cli": HEAVY,  # help pages
    "sparsify.recipe": ("torch", "transformers", "vllm"),  # editors and CI check recipes
}


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names a source imports anywhere, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parent, base] if base else parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module of ours imports although it stands below it in the house, or outside what the runtime may know."""
    found = []
    layer = module.split(".")[1]
    for name in imported_names(source, module, is_package):
        parts = name.split(".")
        if parts[0] != "sparsify" or len(parts) < 2 or parts[1] not in ORDER:
            continue
        if ORDER.index(parts[1]) > ORDER.index(layer):
            found.append(f"{module} imports {name}, but {parts[1]} comes after {layer}")
        inner = ".".join(parts[1:])
        if layer == "runtime" and not any(inner == m or inner.startswith(m + ".") for m in RUNTIME_MAY_IMPORT):
            found.append(f"{module} imports {name}, and the runtime must stay light")
    return found


def modules(repository: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted((repository / "sparsify").rglob("*.py")):
        parts = path.relative_to(repository).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_no_module_imports_from_below(repository: Path) -> None:
    found = []
    for module, path in modules(repository):
        if module == "sparsify":  # registers the transformers loader; the test of light imports watches it
            continue
        assert module.split(".")[1] in ORDER, f"{module} has no place in the order of the house (tests/test_imports.py)"
        found += violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "module", "is_package", "bad"),
    [
        ("from sparsify.cli import main", "sparsify.recipe.schema", False, True),
        ("def f():\n    import sparsify.compiler.run", "sparsify.passes.sweep", False, True),
        ("from sparsify import bench", "sparsify.evaluation", True, True),
        ("from ..compiler import run", "sparsify.passes.sweep", False, True),
        ("from . import sweep\nfrom .prune import wanda", "sparsify.passes", True, False),
        ("from sparsify.progress import progress", "sparsify.runtime.hf", False, True),
        ("from sparsify.model.blocks import find", "sparsify.runtime.hf", False, True),
        ("from sparsify.model.linear import LinearWeights", "sparsify.runtime.hf", False, False),
        ("from sparsify import __version__\nimport torch", "sparsify.recipe.schema", False, False),
    ],
)
def test_the_rule_itself(source: str, module: str, is_package: bool, bad: bool) -> None:
    assert bool(violations(source, module, is_package)) is bad


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert module in loaded
    assert not loaded & set(LIGHT[module])


def test_every_imported_package_is_declared(repository: Path) -> None:
    """In the dependencies, or in an extra for what a single command needs."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    providers = packages_distributions()
    undeclared = set()
    for module, path in modules(repository):
        for name in imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            top = name.split(".")[0]
            if top == "sparsify" or top in sys.stdlib_module_names:
                continue
            offered = {canonicalize_name(provider) for provider in providers.get(top, [top])}
            if not offered & declared:
                undeclared.add(f"{module} imports {top}")
    assert not undeclared, "declare in pyproject.toml: " + ", ".join(sorted(undeclared))
