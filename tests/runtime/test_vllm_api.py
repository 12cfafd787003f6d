"""What the plugin takes from vLLM is there and is called as the plugin expects: names, parameters, arguments of calls.

A new version of vLLM that fails here is to be looked at before `VERSIONS` of sparsify/runtime/vllm_versions.py lets it in.
"""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from sparsify.runtime import vllm_experts, vllm_plugin

ROWS = ("bench/baselines.py", "bench/marlin.py")  # what they compare with may be absent, which a row then says
CLASSES = [
    found
    for module in (vllm_plugin, vllm_experts)
    for _, found in inspect.getmembers(module, inspect.isclass)
    if found.__module__ == module.__name__ and any(base.__module__.startswith("vllm.") for base in found.__mro__)
]


def imports(repository: Path) -> Iterator[tuple[str, str, str]]:
    """(file, module of vLLM, name) for every import of vLLM in sparsify."""
    folder = repository / "sparsify"
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder).as_posix()
        if name in ROWS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from ((name, str(node.module), alias.name) for alias in node.names)


def test_every_name_is_there(repository: Path) -> None:
    found = list(imports(repository))
    assert len(found) > 15
    gone = [
        f"{file}: from {module} import {name}"
        for file, module, name in found
        if importlib.util.find_spec(module) is None or not hasattr(importlib.import_module(module), name)
    ]
    assert not gone, "\n".join(gone)


@pytest.mark.parametrize("ours", CLASSES, ids=lambda ours: ours.__name__)
def test_our_classes_take_what_vllm_gives(ours: type) -> None:
    """Every abstract method is there, and every method that vLLM has too takes all of vLLM's parameters, by position and name."""
    assert not inspect.isabstract(ours), ours.__abstractmethods__
    bases = [base for base in ours.__mro__ if base.__module__.startswith("vllm.")]
    checked = 0
    for name, member in vars(ours).items():
        theirs = next((vars(base)[name] for base in bases if name in vars(base)), None)
        function, other = (getattr(one, "__func__", one) for one in (member, theirs))
        if not (inspect.isfunction(function) and inspect.isfunction(other)) or name == "__init__":
            continue
        parameters = list(inspect.signature(other).parameters.values())
        plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        mine = inspect.signature(function)
        try:
            mine.bind(*plain, **named)
            bound = 0 if isinstance(member, staticmethod) else 1  # the instance or the class is given by position
            if not any(p.kind is p.VAR_POSITIONAL for p in mine.parameters.values()):
                mine.bind(*plain[:bound], **{p.name: p for p in plain[bound:]}, **named)
        except TypeError as error:
            pytest.fail(f"{ours.__name__}.{name}{mine} does not take {inspect.signature(other)} of vLLM: {error}")
        checked += 1
    assert checked


def calls(module: str, method: str) -> Iterator[ast.Call]:
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield node


@pytest.mark.parametrize(
    ("module", "fewest"),
    [("vllm.model_executor.layers.linear", 3), ("vllm.model_executor.layers.vocab_parallel_embedding", 1)],
)
def test_weights_are_created_with_the_arguments_that_we_know(module: str, fewest: int) -> None:
    """`create_weights` of vLLM's base class takes anything: what counts is how vLLM calls it."""
    found = list(calls(module, "create_weights"))
    assert len(found) >= fewest
    for method in (vllm_plugin.Sparse24LinearMethod, vllm_plugin.LegacyMethod):
        signature = inspect.signature(method.create_weights)
        for call in found:
            named = {word.arg: word.arg for word in call.keywords if word.arg is not None}
            signature.bind(None, *call.args, **named)
