"""What llm-compressor runs, before the passes or instead of them. A stand-in for its Python does what a test needs;
`tests/peers/test_llmcompressor.py` takes the real one."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify import api
from sparsify.compiler import llmcompressor
from sparsify.compiler.llmcompressor import NOTE, peer_python
from sparsify.errors import CheckpointError, MissingDependency
from sparsify.formats.foreign import open_dense
from sparsify.formats.reader import open_compressed
from sparsify.formats.writer import partial_directory
from sparsify.recipe import recipe_from
from tests.helpers.foreign import change_tensors, compressed_tensors, quantized_checkpoint
from tests.helpers.tiny import save_tiny

SMOOTH = {"SmoothQuantModifier": {"smoothing_strength": 0.5}}
W4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
QUANTIZATION = {"ignore": ["lm_head"], "config_groups": {"g": {"targets": ["Linear"], "weights": W4}}}
PLAIN = {"bits": 4, "group_size": 32, "scale_search": False}


def recipe(*modifiers: dict, method: str = "rtn", **quantize: object) -> dict:
    return {
        "llm_compressor": list(modifiers),
        "passes": [{"quantize": {**PLAIN, "method": method, **quantize}}],
        "export": {"format": "pack-quantized"},
        "solver": {"coordinate_descent": 0} if method == "gptq" else {},
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    save_tiny(directory, dtype=torch.bfloat16)
    return directory


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of llm-compressor's Python: doubles every matrix of layer 0, or of a whole recipe saves what lies in
    `saved`, and counts in a file how often it ran."""
    code = tmp_path / "stand_in.py"
    code.write_text(
        "import json, shutil, sys\n"
        "from pathlib import Path\n"
        "here = Path(__file__).parent\n"
        "if sys.argv[2] == '-c':\n"
        "    print((here / 'version').read_text())\n"
        "    sys.exit()\n"
        "job = json.loads(Path(sys.argv[3]).read_text())\n"
        "(here / 'job.json').write_text(json.dumps(job))\n"
        "(here / 'runs').open('a').write('x')\n"
        "if (here / 'fail').exists():\n"
        "    sys.exit('ValueError: no such modifier')\n"
        "if job['whole']:\n"
        "    shutil.copytree(here / 'saved', job['output'])\n"
        "    print(json.dumps({'llmcompressor': '0.14.0.1'}))\n"
        "    sys.exit()\n"
        "from safetensors.torch import load_file, save_file\n"  # takes seconds
        "tensors = {k: v for f in Path(job['source']).glob('*.safetensors') for k, v in load_file(f).items()}\n"
        "tensors = {k: v * 2 if '.layers.0.' in k and v.dim() == 2 else v for k, v in tensors.items()}\n"
        "extra = here / 'extra'\n"
        "if extra.exists():\n"
        "    tensors[extra.read_text()] = tensors['model.norm.weight'].clone()\n"
        "assert job['rows'] is None or load_file(job['rows'])['tokens'].shape == (4, 16)\n"
        "Path(job['output']).mkdir()\n"
        "save_file(tensors, Path(job['output']) / 'model.safetensors', {'format': 'pt'})\n"
        "print('some text')\n"
        "print(json.dumps({'llmcompressor': '0.14.0.1'}))\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{code}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("SPARSIFY_LLMCOMPRESSOR_PYTHON", str(python))
    return tmp_path


def tokens() -> Tensor:
    return torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))


def dequantized(directory: Path) -> dict[str, Tensor]:
    opened = open_compressed(directory)
    return {module: opened.linear(module).dense(torch.float32) for module in opened.modules}


def test_the_passes_go_on_from_the_model_that_comes_back(stand_in: Path, model: Path) -> None:
    result = api.apply(recipe(SMOOTH), model, stand_in / "out", calibration=tokens(), quiet=True)
    plain = api.apply({**recipe(), "llm_compressor": None}, model, stand_in / "plain", quiet=True)
    changed, same = dequantized(stand_in / "out"), dequantized(stand_in / "plain")
    assert len(changed) == 21
    for name, weight in changed.items():
        assert torch.equal(weight, same[name] * (2 if ".layers.0." in name else 1)), name
    assert result.metrics["base_model"] == str(model) == plain.metrics["base_model"]
    assert result.metrics["llm_compressor"] == {
        "version": "0.14.0.1", "modifiers": ["SmoothQuantModifier"], "whole": False, "stored": None, "zeros": None
    }  # fmt: skip
    assert plain.metrics["llm_compressor"] is None and plain.metrics["calibration"]["tokens"] == 0
    assert result.metrics["calibration"]["tokens"] == 4 * 16 and result.metrics["calibration"]["computed_in"] is None
    assert (
        "| llm-compressor 0.14.0.1 | SmoothQuantModifier, before the passes |"
        in (stand_in / "out/README.md").read_text()
    )
    assert result.metrics["recipe"]["llm_compressor"] == [SMOOTH] and result.record["llmcompressor"] == "0.14.0.1"
    files = {file.name for file in (stand_in / "out").iterdir()}
    assert files == {file.name for file in (stand_in / "plain").iterdir()}  # tokenizer and all; nothing of the stage
    assert ".partial" not in "".join((stand_in / "out" / name).read_text() for name in ("README.md", "recipe.yaml"))
    assert not partial_directory(stand_in / "out").exists()


def test_a_resumed_run_finds_the_stage_done_and_another_run_does_it_again(
    stand_in: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **named: object) -> None:
        raise KeyboardInterrupt

    text = stand_in / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    calibration = {"calibration": {"source": f"file:{text}", "samples": 4, "sequence_length": 16}}

    def killed(out: Path, given: dict) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("sparsify.compiler.apply._carry_out", broken)
            api.apply(given, model, out, quiet=True)

    def runs() -> int:
        return len((stand_in / "runs").read_text())

    asked = recipe(SMOOTH) | calibration
    killed(stand_in / "out", asked)
    assert runs() == 1 and (partial_directory(stand_in / "out") / NOTE).exists()
    api.apply(asked, model, stand_in / "out", resume=True, quiet=True)
    assert runs() == 1
    killed(stand_in / "other", asked)
    changed = recipe({"SmoothQuantModifier": {"smoothing_strength": 0.9}}) | calibration
    with pytest.raises(CheckpointError, match="was begun with another recipe"):
        api.apply(changed, model, stand_in / "other", resume=True, quiet=True)
    api.apply(changed, model, stand_in / "other", quiet=True)
    assert runs() == 3


def test_what_fails_there_is_said_in_one_sentence_and_nothing_is_written(stand_in: Path, model: Path) -> None:
    (stand_in / "fail").touch()
    with pytest.raises(
        CheckpointError, match="llm-compressor failed .*: ValueError: no such modifier; all that it said is in "
    ):
        api.apply(recipe(SMOOTH), model, stand_in / "out", calibration=tokens(), quiet=True)
    (stand_in / "fail").unlink()
    (stand_in / "extra").write_text("model.rotation.weight")
    with pytest.raises(CheckpointError, match="llm-compressor added the tensor model.rotation.weight"):
        api.apply(recipe(SMOOTH), model, stand_in / "out", calibration=tokens(), quiet=True)
    assert not (stand_in / "out").exists()


def test_weights_that_are_no_numbers_are_named(stand_in: Path, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    save_tiny(broken, dtype=torch.bfloat16)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)  # twice that is Inf
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="model.layers.0.mlp.up_proj.weight holds NaN or Inf after"):
        api.apply(recipe(SMOOTH), broken, stand_in / "out", calibration=tokens(), quiet=True)


def test_without_an_environment_the_error_says_how_to_make_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_LLMCOMPRESSOR_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(
        MissingDependency, match=r"SmoothQuantModifier run.* names .*nothing, which is no program: .*'make peers'"
    ):
        api.apply(recipe(SMOOTH), model, tmp_path / "out", calibration=tokens(), quiet=True)
    monkeypatch.delenv("SPARSIFY_LLMCOMPRESSOR_PYTHON")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llmcompressor, "SOURCES", tmp_path / "elsewhere")
    python = tmp_path / ".venv-peers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    with pytest.raises(
        MissingDependency, match=r"there is no \.venv-peers"
    ):  # nothing that lies in the working directory runs
        peer_python(["AWQModifier"])
    monkeypatch.setattr(llmcompressor, "SOURCES", tmp_path)
    assert peer_python(["AWQModifier"]) == str(python)


def test_the_plan_says_what_runs_first(model: Path) -> None:
    made = api.plan(recipe_from(recipe(SMOOTH)), model)
    assert "first, in llm-compressor, on self: SmoothQuantModifier" in str(made.table().caption)
    assert made.to_json()["llm_compressor"] == [SMOOTH]


# ------------------------------------------------------------------------------------------------------ whole recipes


AUTOROUND = {"AutoRoundModifier": {"scheme": "W4A16", "ignore": ["lm_head"]}}
LAYERS = {"num_hidden_layers": 3}


def whole(*modifiers: dict, format: str = "pack-quantized") -> dict:
    return {"llm_compressor": list(modifiers), "passes": [], "export": {"format": format}}


def save(directory: Path, **weights: object) -> tuple[dict, dict[str, Tensor]]:
    """What llm-compressor would save of the tiny model: its config, and the weights that it stands for."""
    config, write = compressed_tensors("pack-quantized", strategy="group", group_size=32, **weights)
    expected = quantized_checkpoint(directory, config, write, **LAYERS)
    change_tensors(directory, lambda tensors: tensors.update(in_bfloat16(tensors)))
    (directory / "recipe.yaml").write_text("default_stage: {}")
    return config, expected


def in_bfloat16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.dtype == torch.float32}


def test_a_whole_recipe_keeps_the_codes_that_llm_compressor_saved(stand_in: Path, model: Path) -> None:
    save(stand_in / "saved", num_bits=4)
    result = api.apply(whole(AUTOROUND), model, stand_in / "out", calibration=tokens(), quiet=True)
    saved, ours = load_file(stand_in / "saved/model.safetensors"), load_file(stand_in / "out/model.safetensors")
    assert set(saved) == set(ours) and all(torch.equal(saved[name], ours[name]) for name in saved)
    assert len(result.metrics["layers"]) == 21 and result.metrics["layers"][0]["bits"] == 4
    made = result.metrics["llm_compressor"]
    assert made["modifiers"] == ["AutoRoundModifier"] and made["whole"] and 0 < made["zeros"] < 0.3
    assert made["stored"] == "compressed-tensors pack-quantized 4-bit, per group of 32"
    assert result.metrics["calibration"]["tokens"] == 64 and result.record["llmcompressor"] == "0.14.0.1"
    assert (
        "| llm-compressor 0.14.0.1 | AutoRoundModifier, all that was done; left"
        in (stand_in / "out/README.md").read_text()
    )
    assert "AutoRoundModifier" in (stand_in / "out/recipe.yaml").read_text()  # ours, not that of llm-compressor
    beside = {file.name for file in model.iterdir()} | {"README.md", "metrics.json", "recipe.yaml", "run.json"}
    beside.add("SHA256SUMS")
    assert {file.name for file in (stand_in / "out").iterdir()} == beside
    job = json.loads((stand_in / "job.json").read_text())
    assert job["modifiers"] == [AUTOROUND] and job["whole"] and job["dtype"] == "bfloat16"


@pytest.mark.parametrize("format", ["gptq", "dense", "sparse24"])
def test_a_whole_recipe_is_written_in_other_formats(format: str, stand_in: Path, model: Path) -> None:
    _, expected = save(stand_in / "saved", num_bits=4)
    api.apply(whole(AUTOROUND, format=format), model, stand_in / "out", calibration=tokens(), quiet=True)
    kept, opened = open_dense(stand_in / "saved"), open_dense(stand_in / "out")
    assert {f"{module}.weight" for module in open_compressed(stand_in / "out").modules} == (
        set() if format == "dense" else set(expected)
    )
    for name in expected:
        assert torch.equal(opened.tensor(name).float(), kept.tensor(name).float()), name


def test_what_no_format_here_holds_stays_as_llm_compressor_saved_it(stand_in: Path, model: Path) -> None:
    config, _ = save(stand_in / "saved", num_bits=3)
    three = {"AutoRoundModifier": {"scheme": "W3A16"}}
    asked = whole(three, format="compressed-tensors")
    result = api.apply(asked, model, stand_in / "out", calibration=tokens(), quiet=True)
    saved, ours = load_file(stand_in / "saved/model.safetensors"), load_file(stand_in / "out/model.safetensors")
    assert set(saved) == set(ours) and all(torch.equal(saved[name], ours[name]) for name in saved)
    assert json.loads((stand_in / "out/config.json").read_text())["quantization_config"] == config
    layer, sizes = result.metrics["layers"][0], result.metrics["sizes"]
    assert (layer["bits"], layer["group_size"]) == (3, 32) and 3 < sizes["bits_per_weight"] < 5
    assert sizes["compressed_bytes"] == sum(tensor.nbytes for tensor in ours.values()) < sizes["dense_bytes"]
    assert json.loads((stand_in / "job.json").read_text())["dtype"] == "auto"
    with pytest.raises(
        CheckpointError, match="3-bit, per group of 32, which pack-quantized cannot hold; .* compressed-tensors"
    ):
        api.apply(whole(AUTOROUND), model, stand_in / "other", calibration=tokens(), quiet=True)


def test_zeros_without_a_pattern_come_back_dense(stand_in: Path, model: Path) -> None:
    shutil.copytree(model, stand_in / "saved")
    pruned = whole({"SparseGPTModifier": {"sparsity": 0.7}}, format="dense")
    with pytest.raises(CheckpointError, match="llm-compressor changed no weight; its modifiers name no linear"):
        api.apply(pruned, model, stand_in / "out", calibration=tokens(), quiet=True)
    assert not (stand_in / "out").exists()
    change_tensors(
        stand_in / "saved", lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "up_proj" in k})
    )
    result = api.apply(pruned, model, stand_in / "out", calibration=tokens(), quiet=True)
    saved, ours = load_file(stand_in / "saved/model.safetensors"), load_file(stand_in / "out/model.safetensors")
    assert all(torch.equal(saved[name], ours[name]) for name in saved)
    layers = {name: tensor for name, tensor in ours.items() if ".layers." in name and tensor.dim() == 2}
    share = sum(int((t == 0).sum()) for t in layers.values()) / sum(t.numel() for t in layers.values())
    assert result.metrics["llm_compressor"]["zeros"] == pytest.approx(share, abs=1e-6) and share > 0.1
    card = (stand_in / "out/README.md").read_text()
    assert "- 2:4" not in card and "no smaller than the original" in card
    plan = api.plan(pruned, model)
    assert plan.to_json()["estimate"] is None and plan.to_json()["calibration"]["source"] == "self"
    planned = str(plan.table().caption)
    assert "its zeros have no pattern: no kernel makes them smaller or faster" in planned
    assert "llm-compressor runs all of this recipe" in planned and "written as dense" in planned


def test_a_whole_recipe_is_resumed_behind_llm_compressor(
    stand_in: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(stand_in / "saved", num_bits=4)
    rounding = {
        "QuantizationModifier": {
            "scheme": {"weights": {"num_bits": 4, "group_size": 32, "observer_kwargs": {"norm": 2}}}
        }
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "sparsify.compiler.apply._carry_out", lambda *_, **named: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        api.apply(whole(rounding), model, stand_in / "out", quiet=True)
    api.apply(whole(rounding), model, stand_in / "out", resume=True, quiet=True)
    assert (stand_in / "runs").read_text() == "x" and len(open_compressed(stand_in / "out").modules) == 21
    assert json.loads((stand_in / "job.json").read_text())["rows"] is None  # rounding reads no text


def test_weights_of_another_model_are_refused(stand_in: Path, model: Path) -> None:
    save(stand_in / "saved", num_bits=4)
    change_tensors(stand_in / "saved", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="llm-compressor left out the tensor model.norm.weight"):
        api.apply(whole(AUTOROUND), model, stand_in / "out", calibration=tokens(), quiet=True)
    assert not (stand_in / "out").exists()


def test_an_order_of_groups_needs_an_older_llm_compressor(stand_in: Path, model: Path) -> None:
    ordered = whole({"GPTQModifier": {"scheme": "W4A16", "actorder": "group"}}, format="compressed-tensors")
    assert "needs llm-compressor 0.13" in str(api.plan(ordered, model).table().caption)
    for version in ("0.14.0.1", "1.0"):
        (stand_in / "version").write_text(version)
        with pytest.raises(
            MissingDependency, match=f"actorder: group is what llm-compressor up to 0.13 does, and .* has {version}:"
        ):
            api.apply(ordered, model, stand_in / "out", calibration=tokens(), quiet=True)
    assert not (stand_in / "runs").exists()
    (stand_in / "version").write_text("0.13.0")
    save(stand_in / "saved", num_bits=4, actorder="group")
    api.apply(ordered, model, stand_in / "out", calibration=tokens(), quiet=True)
    kept, ours = open_dense(stand_in / "saved"), open_dense(stand_in / "out")
    assert all(torch.equal(kept.tensor(name), ours.tensor(name)) for name in kept.names())


def test_experts_that_llm_compressor_quantized_one_by_one_are_taken_over(stand_in: Path, tmp_path: Path) -> None:
    """transformers puts the experts of Mixtral together into one tensor; llm-compressor takes them apart."""
    save_tiny(tmp_path / "moe", "mixtral", torch.bfloat16, num_hidden_layers=1)
    config, write = compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=32)
    quantized_checkpoint(stand_in / "saved", config, write, family="mixtral", num_hidden_layers=1)
    change_tensors(stand_in / "saved", lambda tensors: tensors.update(in_bfloat16(tensors)))
    result = api.apply(whole(AUTOROUND), tmp_path / "moe", stand_in / "out", calibration=tokens(), quiet=True)
    saved, ours = load_file(stand_in / "saved/model.safetensors"), load_file(stand_in / "out/model.safetensors")
    assert set(saved) == set(ours) and all(torch.equal(saved[name], ours[name]) for name in saved)
    experts = [layer["module"] for layer in result.metrics["layers"] if ".experts." in layer["module"]]
    assert len(experts) == 2 * 3 and len(result.metrics["layers"]) == 2 * 3 + 4 + 1
