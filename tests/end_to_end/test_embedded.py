"""The main job on the real embedded LLM: the contract of `2of4-w4a16`, measured by the protocol and served by vLLM."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sparsify.cli import main
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_two_four
from sparsify.runtime.backends import get_backend
from tests.end_to_end.engine import distances, serve

pytestmark = pytest.mark.e2e

TEXTS = [
    "The capital of France is",
    "In 1969, two astronauts landed on the moon. They",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "She opened the old wooden door and",
]
LINEARS = 30 * 7
# SmolLM2's best logits lie between 16 and 32, where neighbouring bfloat16 numbers are 1/8 apart. A log-probability is the
# difference of two such values, and 30 layers of bfloat16 activations lie behind it.
LOGIT_SPACING = 0.125


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, embedded: str, shared_data: Path) -> Path:
    """`sparsify apply 2of4-w4a16` on an eighth of its tokens of WikiText-2, with the evaluation that its recipe can ask for."""
    output = tmp_path_factory.mktemp("embedded") / "sparse24"
    arguments = ["apply", "2of4-w4a16", "--model", embedded, "--output", str(output), "--quiet"]
    arguments += ["--set", f"calibration.source=file:{shared_data / 'wikitext2-valid.txt'}"]
    arguments += ["--set", "calibration.samples=16"]
    arguments += ["--set", f"evaluation={{text: 'file:{shared_data / 'wikitext2-test.txt'}', chunks: 6}}"]
    assert main(arguments) == 0
    return output


def test_perplexity_is_below_the_bound(compiled: Path) -> None:
    evaluation = json.loads((compiled / "metrics.json").read_text())["evaluation"]
    assert evaluation["dense_perplexity"] == pytest.approx(23.66, abs=0.02)  # 21.30 on the 48 chunks of the protocol
    assert evaluation["perplexity"] < 54  # with an eighth of the calibration text; measured: 50.9


def test_every_target_linear_is_two_four(compiled: Path) -> None:
    opened = open_compressed(compiled)
    assert len(opened.modules) == LINEARS + 1
    head = opened.modules.pop("lm_head")
    assert (head.bits, head.group_size, head.pattern) == (8, 64, "dense")
    for module in opened.modules:
        linear = opened.linear(module)
        assert (linear.bits, linear.group_size, linear.pattern) == (4, 64, "2:4")
        assert is_two_four(linear.dense(torch.float32))


def test_vllm_answers_as_exactly_as_from_the_same_weights_dense(
    compiled: Path, tmp_path: Path, needs_vllm: None
) -> None:
    assert main(["export", str(compiled), "--format", "dense", "--output", str(tmp_path / "dense"), "--quiet"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(compiled)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    dense = serve(tmp_path / "dense", tmp_path, prompts=prompts)
    assert "sparse24: back end" not in dense.log
    rounding = distances(dense, tmp_path / "dense", prompts)[0].square().mean().sqrt()
    assert rounding <= LOGIT_SPACING  # measured: 0.05
    # The CUDA kernel leaves the 8-bit head to Triton.
    for forced in ("cuda,triton", "triton") if torch.cuda.is_available() else ("reference", "cpu"):
        backend = forced.split(",")[0]
        if get_backend(backend).reason_unavailable():
            continue
        sparse = serve(compiled, tmp_path, {"SPARSIFY_BACKEND": forced}, prompts=prompts)
        assert f"sparse24: back end '{backend}'" in sparse.log
        # Other kernels, other roundings of nearly the same numbers. So the two engines are not compared with each other but
        # both with float32: ours must be as near (measured: 1.06 to 1.08 times the distance, on an H100 1.17), and nowhere far
        # off.
        told, chosen = distances(sparse, tmp_path / "dense", prompts)
        assert told.square().mean().sqrt() <= 1.5 * rounding
        assert told.max() <= 4 * LOGIT_SPACING and chosen.max() <= 2 * LOGIT_SPACING  # measured: 0.18, 0.30
