"""The stage that llm-compressor runs before the passes. A stand-in for its Python does what a test needs;
`tests/peers/test_llmcompressor.py` takes the real one."""

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
from sparsify.formats.reader import open_compressed
from sparsify.formats.writer import partial_directory
from sparsify.recipe import recipe_from
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
    """A program in place of llm-compressor's Python: doubles every matrix of layer 0, and counts in a file how often it ran."""
    code = tmp_path / "stand_in.py"
    code.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file, save_file\n"
        "job = json.loads(Path(sys.argv[3]).read_text())\n"
        "here = Path(__file__).parent\n"
        "(here / 'runs').open('a').write('x')\n"
        "if (here / 'fail').exists():\n"
        "    sys.exit('ValueError: no such modifier')\n"
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
    assert result.metrics["recipe"]["llm_compressor"] == [SMOOTH] and result.record["llmcompressor"] == "0.14.0.1"
    files = {file.name for file in (stand_in / "out").iterdir()}
    assert files == {file.name for file in (stand_in / "plain").iterdir()}  # tokenizer and all; nothing of the stage
    assert ".partial" not in "".join((stand_in / "out" / name).read_text() for name in ("README.md", "recipe.yaml"))
    assert not partial_directory(stand_in / "out").exists()


def test_a_resumed_run_finds_the_stage_done_and_another_run_does_it_again(
    stand_in: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
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
    assert "first, in llm-compressor: SmoothQuantModifier" in str(made.table().caption)
    assert made.to_json()["llm_compressor"] == [SMOOTH]
