"""vLLM serves what we write: the numbers of the dense export, merged and split, eager and compiled, ours and stock.

Every engine is a process of its own and costs half a minute, so each one answers all prompts once and the tests compare
the answers. Greedy tokens may differ only where the two best are closer than the rounding of bfloat16.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compressed import MIXED, compress, make_dense

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]

PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [10, 90, 80, 70, 60, 50, 40, 30], list(range(3, 93))]
BFLOAT16_NOISE = 0.06  # in log-probabilities of these models: measured 0.03 at most
SCRIPT = Path(__file__).with_name("generate.py")


@dataclass(frozen=True)
class Answers:
    """What one engine said. tokens: [prompt][step]; logprobs: [prompt][step] of the best few tokens; log: its output."""

    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    log: str


def serve(model: Path, scratch: Path, environment: dict[str, str] | None = None, **engine: Any) -> Answers:
    """Start vLLM on `model`, answer PROMPTS greedily, stop."""
    settings = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128, "seed": 0, "skip_tokenizer_init": True}
    job = {"prompts": PROMPTS, "engine": {"model": str(model), **settings, **engine}}
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # any machine, any number of ranks
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if "tensor_parallel_size" in engine else "0",
        "OMP_NUM_THREADS": "1" if "tensor_parallel_size" in engine else str(os.cpu_count() or 1),
        **(environment or {}),
    }
    result = scratch / "answers.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(result)],
        input=json.dumps(job), env=variables, cwd=scratch, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert run.returncode == 0 and result.is_file(), f"vLLM failed:\n{run.stdout[-6000:]}"
    answers = json.loads(result.read_text())
    steps = [[{int(t): p for t, p in step.items()} for step in answer["logprobs"]] for answer in answers]
    return Answers([answer["tokens"] for answer in answers], steps, run.stdout)


def assert_same(ours: Answers, theirs: Answers, noise: float = BFLOAT16_NOISE) -> None:
    """Equal tokens, or a tie within `noise` at the first difference; and equal log-probabilities within it until then."""
    for a, b, of_a, of_b in zip(ours.tokens, theirs.tokens, ours.logprobs, theirs.logprobs, strict=True):
        assert len(a) == len(b)
        for chosen_a, chosen_b, p, q in zip(a, b, of_a, of_b, strict=True):
            shared = p.keys() & q.keys()
            assert len(shared) >= 2 and all(abs(p[token] - q[token]) <= noise for token in shared)
            if chosen_a != chosen_b:
                assert {chosen_a, chosen_b} <= shared and abs(p[chosen_a] - p[chosen_b]) <= noise
                break  # the texts part here


def assert_follows(answers: Answers, model: Path, noise: float, dtype: torch.dtype = torch.float32) -> None:
    """The log-probabilities are those that transformers computes for `model` in `dtype`, fed with the same tokens."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    for prompt, tokens, steps in zip(PROMPTS, answers.tokens, answers.logprobs, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        exact = logits.log_softmax(1)
        for step, (token, found) in enumerate(zip(tokens, steps, strict=True)):
            assert exact[step].max() - exact[step, token] <= noise
            for other, logprob in found.items():
                assert abs(exact[step, other].item() - logprob) <= noise


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny Qwen2 (biases on q, k and v; 2 key-value heads) with linears of every kind, in either format."""
    root = tmp_path_factory.mktemp("qwen2")
    make_dense("qwen2", root / "model", tie_word_embeddings=True)
    for format in ("sparse24", "dense"):
        compress(root / "model", root / format, format, MIXED)
    return lambda format: root / format


@pytest.fixture(scope="module")
def eager(qwen2: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return serve(qwen2("sparse24"), tmp_path_factory.mktemp("eager"))


def test_sparse24_gives_the_tokens_of_the_dense_export(
    qwen2: Callable[[str], Path], eager: Answers, tmp_path: Path
) -> None:
    dense = serve(qwen2("dense"), tmp_path)
    assert "sparse24: back end" in eager.log  # it was our linears that answered,
    assert "sparse24: back end" not in dense.log  # and only there
    assert_same(eager, dense)


def test_tensor_parallel_two_equals_one(qwen2: Callable[[str], Path], eager: Answers, tmp_path: Path) -> None:
    """In float32, where a wrongly split tensor has no rounding to hide behind; and against one rank in bfloat16."""
    parallel = serve(qwen2("sparse24"), tmp_path, tensor_parallel_size=2, dtype="float32")
    assert_follows(parallel, qwen2("sparse24"), noise=1e-3)
    assert_same(parallel, eager)


def test_compiled_serves_the_same(tmp_path: Path) -> None:
    """torch.compile sees the op; biases on all attention projections, q, k and v merged."""
    make_dense("llama", tmp_path / "model", attention_bias=True, mlp_bias=True)
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format, MIXED)
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    compiled = serve(tmp_path / "sparse24", tmp_path, cache, enforce_eager=False)
    assert "sparse24: back end" in compiled.log
    assert_follows(compiled, tmp_path / "dense", noise=BFLOAT16_NOISE)


def test_stock_vllm_serves_pack_quantized(tmp_path: Path) -> None:
    make_dense("llama", tmp_path / "model")
    for format in ("pack-quantized", "dense"):
        compress(tmp_path / "model", tmp_path / format, format, group_size=64)
    stock = serve(tmp_path / "pack-quantized", tmp_path, {"VLLM_PLUGINS": ""})
    assert "sparsify" not in stock.log.replace(str(tmp_path), "")
    # vLLM's CPU kernel for 4-bit weights rounds more than a bfloat16 product does: measured 0.065
    assert_follows(stock, tmp_path / "dense", noise=0.15)
