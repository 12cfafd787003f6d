"""The Python interface: live models, objects as recipes and as calibration text, and what it refuses."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.errors import CalibrationError, RecipeError, SparsifyError
from sparsify.runtime.module import Sparse24Linear
from tests.helpers.tiny import save_tiny, tiny_model, tiny_text, tiny_tokenizer

JOINT = {
    "calibration": {"samples": 4, "sequence_length": 32},
    "solver": {"error_propagation": 0.4, "coordinate_descent": 1},
    "passes": [{"prune": {"method": "sparsegpt"}}, {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}],
    "export": {"format": "sparse24"},
}
DATA_FREE = {
    "passes": [{"prune": {"method": "magnitude"}}, {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}],
}


def token_ids(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def live() -> Any:
    return tiny_model().eval()


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.detach().cpu().float().numpy().tobytes() for name, value in model.state_dict().items()}


def test_a_live_model_is_compressed_and_left_as_it_was(live, tmp_path):
    before, classes = bytes_of(live), [type(module) for module in live.modules()]
    result = sparsify.apply(JOINT, live, calibration=token_ids(), quiet=True)
    assert bytes_of(live) == before and [type(module) for module in live.modules()] == classes
    assert all(not parameter.is_meta for parameter in live.parameters())
    assert type(result.model) is type(live) and result.output is None
    compressed = [name for name, module in result.model.named_modules() if isinstance(module, Sparse24Linear)]
    assert sorted(compressed) == sorted(layer["module"] for layer in result.metrics["layers"]) and compressed
    assert result.model.generate(token_ids(1, 8), max_new_tokens=4, do_sample=False).shape == (1, 12)
    result.model.save_pretrained(tmp_path / "saved")
    assert sparsify.inspect(tmp_path / "saved").totals()["compressed_linears"] == len(compressed)


def test_a_live_model_gives_the_bytes_that_its_directory_gives(live, tmp_path):
    """And the output names the model, not the directory that stood for it."""
    live.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = tiny_text(tmp_path / "text.txt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    sparsify.apply(JOINT, tmp_path / "dense", tmp_path / "path", calibration=text, quiet=True)
    sparsify.apply(JOINT, loaded, tmp_path / "live", calibration=text, quiet=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "path" / name).read_bytes() == (tmp_path / "live" / name).read_bytes(), name
    metrics = json.loads((tmp_path / "live" / "metrics.json").read_text())
    assert metrics["base_model"] == str(tmp_path / "dense")
    for name in ("README.md", "recipe.yaml", "run.json"):
        assert "/live/tmp" not in (tmp_path / "live" / name).read_text(), name


def test_inplace_puts_the_linears_into_the_live_model(live):
    copy = sparsify.apply(JOINT, live, calibration=token_ids(), quiet=True).model
    result = sparsify.apply(JOINT, live, calibration=token_ids(), inplace=True, quiet=True)
    assert result.model is live and any(isinstance(module, Sparse24Linear) for module in live.modules())
    with torch.inference_mode():
        assert torch.equal(live(token_ids()).logits, copy(token_ids()).logits)


@pytest.mark.parametrize("kind", ["documents", "dataset", "path", "tokens"])
def test_calibration_as_people_have_it(kind, tmp_path):
    source = save_tiny(tmp_path / "dense")
    texts = [tiny_text(tmp_path / f"{seed}.txt", 200, seed).read_text() for seed in range(4)]
    given: Any = {"documents": texts, "path": tmp_path / "0.txt", "tokens": token_ids()}.get(kind)
    if kind == "dataset":
        datasets = pytest.importorskip("datasets")
        given = datasets.Dataset.from_dict({"number": [1, 2, 3, 4], "text": texts})
    result = sparsify.apply(JOINT, source, tmp_path / kind, calibration=given, quiet=True)
    assert result.output == tmp_path / kind and result.metrics["calibration"]["tokens"] == 4 * 32
    assert type(result.model).__name__ == "LlamaForCausalLM"


def test_documents_and_a_file_of_records_are_the_same_text(tmp_path):
    source = save_tiny(tmp_path / "dense")
    texts = [tiny_text(tmp_path / f"{seed}.txt", 200, seed).read_text() for seed in range(4)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, given in (("documents", texts), ("file", file)):
        sparsify.apply(JOINT, source, tmp_path / name, calibration=given, quiet=True)
    assert (tmp_path / "documents/model.safetensors").read_bytes() == (tmp_path / "file/model.safetensors").read_bytes()


def test_recipes_are_names_files_dicts_and_objects(tmp_path):
    typed = sparsify.Recipe(
        passes=[sparsify.Prune(method="magnitude"), sparsify.Quantize(method="rtn", bits=4, group_size=32)]
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"version": 1, **DATA_FREE}))
    assert sparsify.load_recipe(file) == sparsify.load_recipe({"version": 1, **DATA_FREE})
    assert sparsify.load_recipe(typed) == typed and sparsify.load_recipe("2of4").quantize is None
    source = save_tiny(tmp_path / "dense")
    made = sparsify.apply(typed, source, tmp_path / "out", quiet=True)
    assert len(made.metrics["layers"]) == len(sparsify.plan(typed, source).schemes)
    with pytest.raises(ValueError, match="dampening"):
        sparsify.Prune(method="magnitude", dampening=0.1)
    with pytest.raises(RecipeError, match="dampening"):
        sparsify.load_recipe({**DATA_FREE, "solver": {"dampening": 0.1}})


def test_plan_of_a_live_model_computes_nothing(live):
    planned = sparsify.plan(JOINT, live)
    assert len(planned.schemes) == 21 and planned.estimate().output_bytes > 0
    assert planned.table().row_count


def test_evaluate_and_export(tmp_path, live):
    live.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    text = tiny_text(tmp_path / "text.txt")
    sparse = sparsify.apply(DATA_FREE, tmp_path / "dense", tmp_path / "out", evaluate=text, quiet=True)
    measured = sparse.metrics["evaluation"]
    settings = {"sequence_length": measured["sequence_length"], "chunks": measured["chunks"], "quiet": True}
    again = sparsify.evaluate(tmp_path / "out", tmp_path / "dense", text, **settings)
    assert again.perplexity == measured["perplexity"] and again.kl == measured["kl"]
    loaded = sparsify.evaluate(sparse.model, live, text, tokenizer=tiny_tokenizer(), **settings)
    assert loaded.kl == pytest.approx(again.kl, rel=1e-3)
    dense = sparsify.export(tmp_path / "out", "dense", tmp_path / "again", quiet=True)
    assert sparsify.evaluate(dense, text=text, **settings).perplexity == pytest.approx(again.perplexity, rel=1e-3)


# ------------------------------------------------------------------------------------------------------- refusals


def test_live_models_that_cannot_be_compressed_are_named(live):
    with pytest.raises(SparsifyError, match="model is a Linear"):
        sparsify.apply(JOINT, torch.nn.Linear(4, 4))
    with torch.device("meta"):
        empty = tiny_model().eval()
    with pytest.raises(SparsifyError, match=r"on the meta device \(model\.embed_tokens\.weight"):
        sparsify.apply(JOINT, empty)
    with pytest.raises(SparsifyError, match="in training mode with gradients on"):
        sparsify.apply(JOINT, tiny_model().train())
    done = sparsify.apply(DATA_FREE, live, quiet=True).model
    with pytest.raises(SparsifyError, match="is quantized already"):
        sparsify.apply(DATA_FREE, done)


def test_what_does_not_go_together_is_refused(live, tmp_path):
    with pytest.raises(SparsifyError, match="inplace=True changes a live model"):
        sparsify.apply(JOINT, str(tmp_path), inplace=True)
    depth = {"calibration": JOINT["calibration"], "passes": [{"depth": {"method": "deepest", "drop": 1}}]}
    with pytest.raises(SparsifyError, match="keeps the layers"):
        sparsify.apply(depth, live, inplace=True)
    first = {**JOINT, "llm_compressor": [{"SmoothQuantModifier": {}}]}
    with pytest.raises(SparsifyError, match="llm-compressor changes that too"):
        sparsify.apply(first, live, inplace=True)
    with pytest.raises(SparsifyError, match="name it with output="):
        sparsify.apply(JOINT, live, resume=True)
    with pytest.raises(RecipeError, match="names no model"):
        sparsify.apply(JOINT)
    with pytest.raises(RecipeError, match="matches no linear"):
        sparsify.apply({**JOINT, "overrides": [{"match": "*no_proj", "prune": None}]}, live, calibration=token_ids())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "not an empty list"),
        (3, "not int"),
        (torch.zeros(3), r"whole numbers \[rows, length\]"),
        (torch.zeros(2, 8), "whole numbers"),
        (torch.full((4, 32), 10_000), "the model knows 0 to"),
        ("nowhere.txt", "does not exist"),
    ],
)
def test_calibration_that_cannot_be_meant(live, given, words):
    with pytest.raises(SparsifyError, match=words):
        sparsify.apply(JOINT, live, calibration=given, tokenizer=tiny_tokenizer(), quiet=True)


def test_text_needs_a_tokenizer(live):
    with pytest.raises(CalibrationError, match=r"no tokenizer.*tokenizer="):
        sparsify.apply(JOINT, live, calibration=["some text"], quiet=True)


def test_importing_the_package_costs_no_torch():
    code = "import sys, sparsify; assert 'apply' in dir(sparsify); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        _ = sparsify.compress


# ------------------------------------------------------------------------------------------------------- examples


def example(repository: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", repository / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_with_a_live_model(repository, tmp_path, capsys):
    source = save_tiny(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    text = example(repository, "compress_live_model").main(str(source))
    assert text.startswith("Thesea")  # the tiny tokenizer knows no blanks
    assert len(text) > 6 and " MB -> " in capsys.readouterr().out


def test_example_with_a_typed_recipe(repository, tmp_path, capsys):
    example(repository, "typed_recipe").main(str(save_tiny(tmp_path / "dense")), str(tmp_path / "out"))
    assert "compressed_bytes" in capsys.readouterr().out
    assert sparsify.inspect(tmp_path / "out").totals()["compressed_linears"] == 21
    assert sparsify.inspect(tmp_path / "out").totals()["outside"]["lm_head"]["bits"] == 8


def test_example_with_overrides(repository, tmp_path):
    found = example(repository, "overrides").main(str(save_tiny(tmp_path / "dense")), str(tmp_path / "out"))
    down = {scheme for name, scheme in found.items() if "down_proj" in name}
    first = {scheme for name, scheme in found.items() if "layers.0." in name and "down_proj" not in name}
    assert down == {"dense, 8 bits", "dense, 4 bits"} and first == {"2:4, 8 bits"}
