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
from sparsify.bench.shapes import parse_shape
from sparsify.compiler.checkpoint_names import part_name
from sparsify.compiler.metrics import Notes
from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError, RecipeError, SparsifyError
from sparsify.evaluation.text import file_chunks
from sparsify.formats.foreign import open_dense
from sparsify.formats.inspect import inspect, render
from sparsify.manifest import MANIFEST, missing, refuse_damaged, seal, verify
from sparsify.memory import parse_size
from sparsify.model.permissions import allowing_unknown
from sparsify.native.build_cuda import parse_archs
from sparsify.recipe import load_recipe, parse_recipe
from sparsify.search.budget import parse_budget
from sparsify.training.loss_monitor import LossWatch
from tests.helpers.foreign import awq, compressed_tensors, gptq, quantized_checkpoint
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


# ------------------------------------------------------------------------------------- what fuzzing found (tests/fuzz)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints of three packages, by quant_method."""
    folder = tmp_path_factory.mktemp("quantized")
    block = compressed_tensors("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32])
    made = {
        "compressed-tensors": block,
        "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}, gptq()),
        "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq()),
    }
    for name, (config, write) in made.items():
        quantized_checkpoint(folder / name, config, write, num_hidden_layers=1)
    return {name: folder / name for name in made}


@pytest.mark.parametrize(
    ("method", "path", "value"),
    [
        ("awq", "quant_method", ["awq"]),
        ("awq", "modules_to_not_convert", 3),
        ("gptq", "quant_method", {"awq": 1}),
        ("gptq", "bits", 4.0),
        ("gptq", "checkpoint_format", ["gptq"]),
        ("gptq", "dynamic", {".*": ["a"]}),
        ("compressed-tensors", "format", ["float-quantized"]),
        ("compressed-tensors", "sparsity_config", {"format": []}),
        ("compressed-tensors", "config_groups.group_0.weights.strategy", ["block"]),
        ("compressed-tensors", "config_groups.group_0.weights.group_size", "32"),
        ("compressed-tensors", "config_groups.group_0.weights.block_structure", None),
    ],
)
def test_settings_of_another_kind_in_a_quantization_config(
    quantized: dict[str, Path], method: str, path: str, value: object
) -> None:
    file = quantized[method] / "config.json"
    kept = file.read_text()
    config = json.loads(kept)
    where, *keys = config["quantization_config"], *path.split(".")
    for key in keys[:-1]:
        where = where[key]
    where[keys[-1]] = value
    file.write_text(json.dumps(config))
    try:
        with pytest.raises(CheckpointError):
            open_dense(quantized[method])
    finally:
        file.write_text(kept)


@pytest.mark.parametrize("change", [{"dtype": []}, {"rope_parameters": [1]}, {"quantization_config": 3}])
def test_a_config_that_transformers_stumbles_over(
    copy: Path, change: dict[str, object], refused: Callable[..., str]
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    assert str(copy) in refused("plan", "magnitude-rtn", "--model", copy)


def test_a_damaged_tokenizer(copy: Path, refused: Callable[..., str]) -> None:
    """The library of fast tokenizers raises no narrower class than Exception."""
    (copy / "tokenizer.json").write_text('{"model": 3}')
    settings = ["--set", f"calibration.source=file:{tiny_text(copy.parent / 't.txt')}"]
    assert "tokenizer" in refused("apply", "2of4", "--model", copy, "--output", copy.parent / "out", *settings)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "a/" * 3000])
def test_names_that_no_file_can_have(model: Path, name: str, refused: Callable[..., str]) -> None:
    assert "has a name" in refused("plan", name, "--model", model)
    assert "has a name" in refused("plan", "magnitude-rtn", "--model", name)
    assert "has a name" in refused("eval", model, "--text", name)
    assert "has a name" in refused("eval", model, "--tasks", name)
    settings = ["--set", f'calibration.source="file:{name}"'.replace("\0", "\\0")]
    assert "has a name" in refused("plan", "2of4", "--model", model, *settings)


def test_the_home_of_nobody(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "~nobody-here/a" in refused("plan", "~nobody-here/a", "--model", model)
    assert "~nobody-here/a" in refused("eval", model, "--text", "~nobody-here/a")
    settings = ["--set", "calibration.source=file:~nobody-here/a"]
    assert "~nobody-here/a" in refused("apply", "2of4", "--model", model, "--output", tmp_path / "out", *settings)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 9000, "²", "1" + "0" * 30])
def test_numbers_that_are_none_or_beyond_all_bounds(text: str) -> None:
    asked: list[tuple[Callable[[str], object], str]] = [
        (parse_archs, text), (parse_shape, f"{text}x4"), (parse_budget, f"speed={text}y"),
        (lambda size: parse_size(size, "--memory"), text),
    ]  # fmt: skip
    for read, written in asked:
        with pytest.raises(SparsifyError) as caught:
            read(written)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: [],
        lambda note: {**note, "layers": 3},
        lambda note: {**note, "skipped": []},
        lambda note: {**note, "layers": [{**note["layers"][0], "shape": [64]}]},
        lambda note: {**note, "layers": [{**note["layers"][0], "module": ["a"]}]},
        lambda note: {**note, "layers": [{**note["layers"][0], "sparsity": float("inf")}]},
    ],
)  # fmt: skip
def test_a_damaged_note_of_a_block(damage: Callable[[dict], object], tmp_path: Path) -> None:
    layer = {
        "module": "model.layers.0.mlp.up_proj", "block": 0, "shape": [64, 32], "bits": 4, "pattern": "2:4", "group_size": 32,
        "symmetric": True, "sparsity": 0.5, "relative_error": None,
    }  # fmt: skip
    notes = Notes(tmp_path / "notes")
    notes.write(0, [layer], {"lm_head": "ignored"})
    file = tmp_path / "notes" / f"{part_name(0)}.json"
    note = notes.read(0)
    assert note == {"layers": [layer], "skipped": {"lm_head": "ignored"}, "tuning": None}
    file.write_text(json.dumps(damage(note)))
    with pytest.raises(CheckpointError, match="is damaged; remove"):
        notes.read(0)


@pytest.mark.parametrize(
    "saved",
    [
        [],
        {"window": 2, "losses": "losses", "smoothed": 2.0},
        {"window": 2, "losses": [{"kl": 1.0}], "smoothed": 2.0},
        {"window": 2, "losses": [{"loss": 1.0}, {"loss": 1.0, "kl": 1.0}], "smoothed": 2.0},
        {"window": "a", "losses": [{"loss": 1.0}], "smoothed": 2.0},
    ],
)
def test_damaged_losses_of_a_training_run(saved: dict) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        LossWatch.from_json(saved)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", "[]"),
        ("metrics.json", '{"layers": [{}], "base_model": "a", "sizes": {}}'),
        ("run.json", '{"seconds": [1]}'),
        ("evaluation.json", '[{"texts": 3}]'),
        ("bench.json", '{"models": [1]}'),
        ("search.json", '{"units": 1, "recipe_as_given": 2, "found": 3, "held_out": 4}'),
    ],
)
def test_a_report_on_damaged_records(copy: Path, file: str, text: str, refused: Callable[..., str]) -> None:
    metrics = {"base_model": str(copy), "layers": [], "sizes": {"dense_bytes": 2, "compressed_bytes": 1}, "recipe": {}}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    assert cli.main(["report", str(copy)]) == 0
    (copy / "report.html").unlink()
    (copy / file).write_text(text)
    option = file.partition(".")[0]
    given = [] if option in ("metrics", "run") else [f"--{option}", copy / file]
    named = {"evaluation": "the evaluation", "bench": "the benchmark"}.get(option, file)
    said = refused("report", copy, *given)
    assert "is not as sparsify writes it" in said and named in said
    assert not (copy / "report.html").exists()


def test_a_manifest_of_a_run_with_a_file_further_inside(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.json").write_text("{}")
    seal(tmp_path)
    refuse_damaged(tmp_path)
    (tmp_path / "inside" / "a.json").write_text("{ }")
    with pytest.raises(CheckpointError, match="inside/a.json is damaged"):
        refuse_damaged(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "b", "a\0b"])
def test_a_manifest_with_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / MANIFEST).write_text(f"{'0' * 64}  {name}\n")
    for read in (verify, missing, refuse_damaged):
        with pytest.raises(CheckpointError, match="damaged in line 1"):
            read(tmp_path)
