"""vLLM serves shortened models: whole layers as stock vLLM runs them, half layers with the products of the other half skipped."""

from pathlib import Path

import pytest

from sparsify.compiler.apply import apply
from sparsify.formats.reader import open_compressed
from sparsify.recipe import parse_recipe
from tests.end_to_end.engine import BFLOAT16_NOISE, assert_follows, serve
from tests.helpers.compressed import make_dense
from tests.helpers.tiny import tiny_text

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]


def shorten(place: Path, settings: str, format: str) -> Path:
    """A tiny Qwen2 with 6 layers (biases, 2 key-value heads), shortened."""
    make_dense("qwen2", place / "model", num_hidden_layers=6)
    text = tiny_text(place / "text.txt")
    recipe = parse_recipe(
        f'version: 1\ncalibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}\n'
        f"passes:\n  - depth: {{method: finercut, {settings}}}\nexport: {{format: {format}}}\n"
    )
    apply(recipe, str(place / "model"), place / "short", quiet=True)
    return place / "short"


def test_pairs_of_sublayers_leave_a_model_for_stock_vllm(tmp_path: Path) -> None:
    short = shorten(tmp_path, "units: pairs, drop: 4", "dense")
    answers = serve(short, tmp_path, environment={"VLLM_PLUGINS": ""})
    assert "sparse24" not in answers.log
    assert_follows(answers, short, noise=BFLOAT16_NOISE)


def test_half_layers_are_skipped(tmp_path: Path) -> None:
    short = shorten(tmp_path, "units: sublayers, drop: 5", "sparse24")
    zero = open_compressed(short).modules
    assert zero, "the test wants a layer of one half"
    answers = serve(short, tmp_path)
    merged = {"q_proj", "k_proj", "up_proj"}  # run as one with v_proj and gate_proj
    skipped = sum(name.rpartition(".")[2] not in merged for name in zero)
    assert answers.log.count("all weights are zero, its products are skipped") == skipped
    assert_follows(answers, short, noise=BFLOAT16_NOISE)
