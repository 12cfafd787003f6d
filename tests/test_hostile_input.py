"""Input made to hang, to fill the memory or to end in a traceback is refused in one sentence, and soon."""

import io
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sparsify import cli
from sparsify.compiler.plan import make_plan
from sparsify.errors import RecipeError
from sparsify.evaluation.text import file_chunks
from sparsify.formats.inspect import inspect, render
from sparsify.model.permissions import allowing_unknown
from sparsify.recipe import load_recipe, parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text

PATIENCE = 60  # seconds, of a machine that may be busy; what is tested here took minutes, or for ever
BOMB = (
    "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    + "version: 1\n"
)
RECIPE = "version: 1\npasses:\n  - prune: {method: magnitude}\n"


@contextmanager
def patience() -> Iterator[None]:
    def over(*_: object) -> None:
        raise AssertionError(f"it takes longer than {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: object) -> str:
        with patience():
            assert cli.main([str(one) for one in argv]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and "this is a bug" not in last and len(last) < 1500, last[:2000]
        return last

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def put(file: Path, kind: str) -> Path:
    """What is no file, under the name of one."""
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(file.parent)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(file.name)
        finally:
            os.chdir(here)
    else:
        file.symlink_to("/dev/zero")
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 100000 values"),
        ("[" * 100_000, "more than 50 levels of nesting"),
        ("version: 1\npasses: " + "[" * 2000 + "]" * 2000, "more than 50 levels of nesting"),
        ("version: 1\npasses: " + "{a: " * 2000 + "}" * 2000, "more than 50 levels of nesting"),
        (RECIPE + "calibration: {samples: " + "9" * 10_000 + "}\n", "(10000 characters)' is not a valid int"),
        (RECIPE + "calibration: {samples: " + "9" * 4000 + "}\n", "(4000 characters)' is not a valid int"),
        (RECIPE + "solver: {damping: " + "9" * 4000 + "}\n", "(4000 characters)' is not a valid int"),
        (RECIPE + "  - distill: {tokens: " + "9" * 400 + "M}\n", "tokens"),
        (RECIPE + "x" * 300_000 + ": 1\n", "not valid YAML"),
        (RECIPE + "ignore: ['re:(a|aa)+{e}']\n", "more than one meaning"),
    ],
)  # fmt: skip
def test_recipes(text: str, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert said in refused("plan", tmp_path / "recipe.yaml", "--model", "m")


def test_a_recipe_that_is_no_recipe_but_large(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE + "".join(f"k{number}: 1\n" for number in range(200_000)))
    assert "a recipe has at most 1000000 bytes" in refused("plan", tmp_path / "recipe.yaml", "--model", "m")


def test_the_list_of_problems_is_short() -> None:
    with patience(), pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE + "".join(f"k{number}: 1\n" for number in range(5000)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "recipe: and 4980 more problems"
    with pytest.raises(RecipeError) as caught, patience():
        load_recipe({"passes": [{"prune": {"method": "magnitude"}}], **{f"k{number}": 1 for number in range(200_000)}})
    assert "and 199980 more problems" in str(caught.value)


def test_anchors_that_people_use_are_read() -> None:
    text = """
version: 1
passes:
  - quantize: {method: rtn, bits: &bits 4, group_size: 32}
export: {head: {bits: *bits, group_size: 32}}
"""
    recipe = parse_recipe(text)
    assert recipe.quantize is not None and recipe.export.head is not None
    assert recipe.quantize.bits == recipe.export.head.bits == 4


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "LICENSE"])
def test_what_is_no_file_in_a_model(copy: Path, name: str, kind: str, refused: Callable[..., str]) -> None:
    put(copy / name, kind)
    command = ("apply", "magnitude-rtn", "--model", copy, "--output", copy.parent / "out")
    if name == "LICENSE" and kind != "device":  # no link: it is left behind, as everything that is no file
        assert cli.main([str(one) for one in command]) == 0
        return
    said = refused(*command)
    assert name in said and (f"is a {kind}" in said or "outside of" in said)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_where_a_text_is_expected(
    model: Path, tmp_path: Path, kind: str, refused: Callable[..., str]
) -> None:
    recipe = put(tmp_path / "recipe.yaml", kind)
    assert f"is a {kind}" in refused("plan", recipe, "--model", model)
    for name in ("text.txt", "text.jsonl", "text.parquet"):
        text = put(tmp_path / name, kind)
        settings = ["--set", f"calibration.source=file:{text}", "--set", "calibration.sequence_length=32"]
        said = refused("apply", "2of4", "--model", model, "--output", tmp_path / "out", *settings)
        assert f"is a {kind}" in said and name in said
    tiny_text(tmp_path / "tokens.txt")
    assert f"is a {kind}" in refused("eval", model, "--text", tmp_path / "text.txt")
    assert f"is a {kind}" in refused("eval", model, "--tasks", tmp_path / "text.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: "[" * 100_000,
        lambda config: config.replace("{", '{"deep": ' + "[" * 50_000 + "]" * 50_000 + ", ", 1),
        lambda config: config.replace("{", '{"long": ' + "9" * 10_000 + ", ", 1),
        lambda config: json.dumps({**json.loads(config), "hidden_size": int("9" * 4000)}),
        lambda config: json.dumps({**json.loads(config), "num_hidden_layers": int("9" * 30)}),
    ],
    ids=["open", "deep", "long", "huge", "many layers"],
)
def test_configs(copy: Path, damage: Callable[[str], str], refused: Callable[..., str]) -> None:
    (copy / "config.json").write_text(damage((copy / "config.json").read_text()))
    for command in (
        ["plan", "magnitude-rtn", "--model", copy],
        ["eval", copy, "--text", tiny_text(copy.parent / "t.txt")],
    ):
        refused(*command)


def test_a_config_with_very_many_keys(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **{f"k{number}": 1 for number in range(200_000)}}))
    with patience():
        assert cli.main(["plan", "magnitude-rtn", "--model", str(copy)]) == 0


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_deep_json_elsewhere(copy: Path, name: str, refused: Callable[..., str]) -> None:
    text = ('{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}").encode()
    (copy / name).write_bytes(len(text).to_bytes(8, "little") + text if name.endswith("safetensors") else text)
    settings = ["--set", f"calibration.source=file:{tiny_text(copy.parent / 't.txt')}"]
    refused("apply", "2of4", "--model", copy, "--output", copy.parent / "out", *settings)


@pytest.mark.parametrize("output", ["", ".", "/", "..", "a/.."])
@pytest.mark.parametrize("command", ["apply", "export", "search"])
def test_outputs_without_a_name(
    model: Path, tmp_path: Path, output: str, command: str, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = {
        "apply": ["apply", "magnitude-rtn", "--model", model],
        "export": ["export", model, "--format", "dense"],
        "search": ["search", "magnitude-rtn", "--model", model, "--budget", "bits=8"],
    }[command]
    assert "is no name for a new directory" in refused(*argv, "--output", output)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_text_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is a directory, which is not read"):
        file_chunks(tmp_path, None, 32, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["layers.0.input_layernorm.weight", "model.norm.weight"])
def test_what_is_not_finite_outside_of_linears(
    copy: Path, part: str, value: float, refused: Callable[..., str]
) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith(part))
    tensors[name][3] = value
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    out = copy.parent / "out"
    assert name in refused("inspect", copy)
    assert name in refused("apply", "magnitude-rtn", "--model", copy, "--output", out)
    out = copy.parent / "exported"
    assert name in refused("export", copy, "--format", "dense", "--output", out)
    assert not list(copy.parent.glob("exported*"))


def test_names_cannot_control_the_terminal(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"model.layers.0.evil\x1b]0;owned\x07.weight", "model.layers.0.\u202eback.weight", "[bold]x[/bold].y"}
    tensors = load_file(copy / "model.safetensors")
    tensors |= {name: torch.ones(4, 4) for name in names}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert cli.main(["inspect", str(copy)]) == 1  # tensors that the model does not know, by name
    assert cli.main(["inspect", str(copy), "--allow-unknown-tensors"]) == 0
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not set(text) & set("\x1b\x07\u202e")
        assert r"\x1b]0;owned" in text
    assert "[bold]x[/bold].y" in shown.out and r"\u202eback" in shown.out


def test_bracketed_names_are_no_markup(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the tables of Python too, which a user prints with a console of his own."""
    tensors = load_file(copy / "model.safetensors") | {"[bold]x[/bold].y": torch.ones(4, 4)}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(copy.rename(copy.with_name("[red]model")).parent)
    with allowing_unknown(True):
        drawn = (
            render(inspect("[red]model", quiet=True)),
            make_plan(load_recipe("magnitude-rtn"), "[red]model").table(),
        )
    console = Console(width=200, record=True, file=io.StringIO())
    for one in drawn:
        console.print(one)
    text = console.export_text()
    assert "[bold]x[/bold].y" in text and text.count("[red]model") == 2
