"""Finding, reading and overriding recipes."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.errors import RecipeError
from sparsify.recipe import Head, Override, ignored_by, load_recipe, parse_recipe, ready_recipes
from sparsify.recipe.builtin import recipe_directories

ROOT = Path(__file__).parents[2]
TEXT = "version: 1\npasses:\n  - prune:\n      method: sparsegpt\n"


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ ready recipes


def test_ready_recipes_are_found_by_name_and_say_what_they_are() -> None:
    ready = ready_recipes()
    assert {"quickstart", "2of4", "w4a16", "2of4-w4a16", "magnitude-rtn"} <= set(ready)
    for name, path in ready.items():
        recipe, text = load_recipe(name), path.read_text()
        assert recipe == load_recipe(path)
        assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
        assert all(f"# {word}:" in text for word in ("Cost", "Gain", "Limit"))
        assert len(text.splitlines()) <= 40
        assert f"sparsify apply {name} " in text


def test_the_ready_recipes_do_what_their_names_say() -> None:
    quickstart, joint = load_recipe("quickstart"), load_recipe("2of4-w4a16")
    assert quickstart.model == "embedded:smollm2-135m-instruct"
    assert (quickstart.calibration.samples, quickstart.calibration.sequence_length) == (64, 128)
    for recipe in (quickstart, joint):
        assert recipe.prune is not None and recipe.quantize is not None
        assert recipe.quantize.method == "gptq"
        assert (recipe.quantize.bits, recipe.quantize.group_size, recipe.solver.error_propagation) == (4, 64, 0.4)
        assert recipe.export.format == "sparse24"
    assert (quickstart.prune.method, joint.prune.method) == ("sparsegpt", "alps")
    assert load_recipe("2of4").quantize is None and load_recipe("w4a16").prune is None
    free = load_recipe("magnitude-rtn")
    assert [step.method for step in free.passes] == ["magnitude", "rtn"]


def test_the_solver_of_each_ready_recipe() -> None:
    """damping, error propagation and passes of coordinate descent decide bytes; the published figures are of these."""
    joint, propagating, plain = (0.004, 0.4, 5), (0.01, 0.5, 5), (0.01, 0.0, 5)
    expected = {"quickstart": (0.01, 0.4, 5), "2of4": propagating, "2of4-distill": propagating, "w4a16": plain}
    expected |= {"magnitude-rtn": plain, "depth-2of4-w4a16": joint}
    expected |= dict.fromkeys(("2of4-w4a16", "2of4-w4a16-distill", "balanced"), (0.004, 0.4, 8))  # after masks of ALPS
    compressing = {name: recipe for name in ready_recipes() if (recipe := load_recipe(name)).prune or recipe.quantize}
    for name, recipe in compressing.items():
        solver = recipe.solver
        found = (solver.damping, solver.error_propagation, solver.coordinate_descent)
        assert found == expected.get(name, joint), name
    assert set(expected) < set(compressing) and len(compressing) == 12


def test_recipes_of_an_installed_wheel_are_found_and_a_strangers_are_not(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "sparsify"
    stranger = tmp_path / "site-packages" / "recipes"
    ours = package / "_recipes"
    for directory in (stranger, ours):
        directory.mkdir(parents=True)
        (directory / "a.yaml").write_text(TEXT)
    assert recipe_directories(package) == []
    (ours / "schema.json").write_text("{}")
    assert recipe_directories(package) == [ours]
    assert recipe_directories(ROOT / "sparsify")[-1] == ROOT / "recipes"


def test_a_file_wins_over_a_ready_name_and_a_directory_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert load_recipe("quickstart").model is not None
    Path("2of4").write_text(TEXT)
    assert load_recipe("2of4").solver.error_propagation == 0


@pytest.mark.parametrize("name", ["w4a61", "dir/w4a61.yaml"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' is neither a recipe file.*did you mean 'w4a16'.*2of4-w4a16"):
        load_recipe(name)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    binary = tmp_path / "model.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(binary)
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    with pytest.raises(RecipeError, match="is empty; start from a ready one"):
        load_recipe(empty)


def test_errors_name_the_file_relative_to_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(TEXT + "foo: 1\n")
    with pytest.raises(RecipeError, match=r"^my\.yaml:5: unknown key"):
        load_recipe(tmp_path / "my.yaml")


def test_checking_a_recipe_loads_no_torch() -> None:
    code = (
        "import sys; from sparsify.recipe import load_recipe; load_recipe('quickstart'); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "False"


# --------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT + "      method: wanda\n", "r.yaml:5: the key 'method' was already given on line 4"),
        (TEXT + "version: 1\n", "r.yaml:5: the key 'version' was already given on line 1"),
        ("a: [1, 2\nb: 3", "r.yaml:2: not valid YAML"),
        ("version: 1\n\tmodel: x\n", "r.yaml:2: not valid YAML"),
        ("version: \x00", "not valid YAML"),
        ('a: b\nc: "x\\ud83d"\n', "r.yaml:2: not valid YAML: \\ud83d is half of a surrogate pair"),
        ('"\\udc00": 1\n', "r.yaml:1: not valid YAML: \\udc00 is half of a surrogate pair"),
        ("- a\n", "r.yaml:1: a recipe is a mapping"),
        ("version: 1\n---\nversion: 1\n", "not valid YAML"),
        ("version: 1\npasses: &a\n  - *a\n", "alias"),
        ("version: !!python/object:os.system 1", "r.yaml:1: YAML tag"),
        ("version: !!int x", "r.yaml:1: 'x' is not a valid int"),
        ("? [a]\n: 1\n", "r.yaml:1: a key must be a plain word"),
    ],
)
def test_yaml_that_is_no_recipe(text: str, words: str) -> None:
    assert words in refused(text)


def test_scalars_mean_what_a_newcomer_expects() -> None:
    recipe = parse_recipe(TEXT + "      pattern: 2:4\nsolver:\n  damping: 1e-2\nmodel: off\n")
    assert recipe.prune is not None
    assert (recipe.prune.pattern, recipe.solver.damping, recipe.model) == ("2:4", 0.01, "off")


# ---------------------------------------------------------------------------------------------------------- overrides


def test_overrides_set_values_by_path() -> None:
    recipe = parse_recipe(
        TEXT,
        overrides=[
            "calibration.samples=64",
            "calibration.source=file:a=b.txt",
            "solver.damping=2e-2",
            "passes.0.prune.method=alps",
            "ignore=[lm_head, 're:.*router']",
            "overrides=[{match: o_proj, prune: null}]",
            "overrides.0.match=down_proj",
            "evaluation.text=file:x.txt",
            "export={format: dense}",
        ],
    )
    assert recipe.calibration.samples == 64 and recipe.calibration.source == "file:a=b.txt"
    assert recipe.prune is not None and recipe.prune.method == "alps" and recipe.solver.damping == 0.02
    assert recipe.ignore == ["lm_head", "re:.*router"]
    assert recipe.overrides == [Override(match="down_proj", prune=None)]
    assert recipe.evaluation is not None and recipe.evaluation.text == "file:x.txt"
    assert recipe.export.format == "dense"


def test_an_override_can_fill_an_empty_pass_and_a_list_entry() -> None:
    text = "version: 1\npasses:\n  - prune:\n"
    recipe = parse_recipe(text, overrides=["passes.prune.method=wanda", "ignore=[a, b]", "ignore.1=c"])
    assert recipe.prune is not None and recipe.prune.method == "wanda" and recipe.ignore == ["a", "c"]
    recipe = parse_recipe(text, overrides=["passes.0={prune: {method: wanda}}", "passes.prune.method=alps"])
    assert recipe.prune is not None and recipe.prune.method == "alps"


def test_the_model_argument_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT + "model: a\n")
    assert load_recipe(path).model == "a"
    assert load_recipe(path, model="b").model == "b"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("calibration.samples", "write an override as path=value"),
        ("=3", "write an override as path=value"),
        ("calibration..samples=3", "write an override as path=value"),
        ("calibration.sample=3", "unknown key 'sample' in calibration; did you mean 'samples'?"),
        ("calibraton.samples=3", "unknown key 'calibraton' in the recipe; did you mean 'calibration'?"),
        ("passes.2.prune.method=alps", "passes has no entry '2'; it has 0 (prune)"),
        ("passes.quantize.bits=4", "passes has no entry 'quantize'; it has 0 (prune)"),
        ("passes.0.prune.method.x=1", "passes.0.prune.method is one value, so it has no 'x' inside"),
        ("passes.prune.correction=0", "it stands in solver: {error_propagation: ...}"),
        ("solver.damping=high", "must be a number, not the text 'high'"),
        ("calibration.samples=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(assignment: str, words: str) -> None:
    message = refused(TEXT, "export.format=dense", assignment)
    assert message.startswith(f"--set {assignment}:") and words in message


def test_an_index_of_thousands_of_digits_is_refused() -> None:
    assert "passes has no entry '1999" in refused(TEXT, "export.format=dense", f"passes.1{'9' * 5000}=4")


# ------------------------------------------------------------------------------------------------------------- ignore


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head_extra", False),
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("proj", "model.layers.0.mlp.down_proj", False),
        ("model.layers.0.*", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.*", "model.layers.01.mlp.down_proj", False),
        ("layers.?.mlp.*", "model.layers.7.mlp.up_proj", True),
        ("re:.*lm_head", "lm_head", True),
        ("re:.*layers\\.[01]\\.", "model.layers.1.mlp.up_proj", True),
        ("re:.*layers\\.[01]\\.", "model.layers.11.mlp.up_proj", False),
        ("re:.*gate$", "model.layers.1.mlp.gate_proj", False),
        ("re:mlp", "model.layers.1.mlp.gate_proj", True),
        ("re:^mlp", "model.layers.1.mlp.gate_proj", False),
        ("re:^model.layers.1", "model.layers.1.mlp.gate_proj", True),
    ],
)
def test_ignore_patterns(pattern: str, module: str, matches: bool) -> None:
    assert ignored_by(module, ["nothing", pattern]) == (pattern if matches else None)


def test_the_head_of_a_ready_recipe_can_be_left_out_and_set() -> None:
    assert load_recipe("2of4-w4a16").export.head == Head(bits=8, group_size=64)
    assert load_recipe("2of4-w4a16", ["export.head=null"]).export.head is None
    assert load_recipe("2of4", ["export.head.bits=4", "export.head.group_size=channel"]).export.head == Head(
        bits=4, group_size="channel"
    )
    with pytest.raises(RecipeError, match="leave head out"):
        load_recipe("2of4-w4a16", ["export.format=dense"])
