"""vLLM serves what we write: the numbers of the dense export, merged and split, eager and compiled, ours and stock.

Every engine is a process of its own and costs half a minute, so each one answers all prompts once and the tests compare
the answers. Greedy tokens may differ only where the two best are closer than the rounding of bfloat16.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsify.bench import BenchOptions, ThroughputWorkload, throughput
from sparsify.compiler.convert import export
from sparsify.formats import ModuleScheme
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.processor import FORCE, available_levels, other_variables
from sparsify.runtime.vllm_versions import CPU_BUILD, installed_as
from tests.end_to_end.engine import BFLOAT16_NOISE, Answers, assert_follows, assert_same, serve
from tests.helpers.bitmask import checkpoint
from tests.helpers.compressed import MIXED, compress, make_dense

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny Qwen2 (biases on q, k and v; 2 key-value heads) with linears of every kind, in either format.

    It ties its head to the embedding; the export unties and quantizes it. vLLM pads its 96 tokens to 128.
    """
    root = tmp_path_factory.mktemp("qwen2")
    make_dense("qwen2", root / "model", tie_word_embeddings=True)
    compress(root / "model", root / "tied", "sparse24", {**MIXED, "lm_head": None})
    export(root / "tied", "sparse24", root / "sparse24", head_bits=8, quiet=True)
    export(root / "sparse24", "dense", root / "dense", quiet=True)
    opened = open_compressed(root / "sparse24")
    assert opened.modules["lm_head"] == ModuleScheme(8, 64, "dense", (96, 128))
    assert "lm_head.weight" not in open_checkpoint(root / "tied")
    return lambda format: root / format


def mixed_requests(count: int = 32) -> list[tuple[list[int], int]]:
    """(prompt, new tokens): prompts of 1 to 90 random tokens, 1 to 30 new ones; 120 at most, as the engine allows 128."""
    chance = random.Random(0)
    return [
        ([chance.randrange(3, 96) for _ in range(chance.randint(1, 90))], chance.randint(1, 30)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def eager(qwen2: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return serve(qwen2("sparse24"), tmp_path_factory.mktemp("eager"), mixed=mixed_requests())


def test_sparse24_gives_the_tokens_of_the_dense_export(
    qwen2: Callable[[str], Path], eager: Answers, tmp_path: Path
) -> None:
    dense = serve(qwen2("dense"), tmp_path)
    assert "sparse24: back end" in eager.log  # it was our linears that answered,
    assert "sparse24: back end" not in dense.log  # and only there
    assert_same(eager, dense)


def test_many_requests_at_once_are_answered_as_one_at_a_time(eager: Answers) -> None:
    """Prompts and new tokens of many share each product, so a kernel sees every number of rows from 1 to some hundred."""
    assert eager.together is not None and eager.alone is not None
    assert [len(tokens) for tokens in eager.together.tokens] == [new_tokens for _, new_tokens in mixed_requests()]
    # bfloat16 products of one row and of many round differently (log-probabilities differ by 0.015 at most): of 470 choices
    # two were closer than that. All 32 answers were equal where this was written; elsewhere such a tie may fall otherwise.
    assert_same(eager.together, eager.alone, tie=BFLOAT16_NOISE / 2)
    equal = [a == b for a, b in zip(eager.together.tokens, eager.alone.tokens, strict=True)]
    assert len(equal) == 32 and sum(equal) >= 30


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


@pytest.mark.parametrize("kind", ["marlin-24", "none", "int8", "float8"])
def test_orphaned_sparse_checkpoints_are_served_as_they_are(tmp_path: Path, kind: str) -> None:
    """marlin-24 and sparse-24-bitmask (16 bits, int8, float8), which vLLM itself refuses: the tokens of their dense export."""
    make_dense("llama", tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)
    old = tmp_path / "old"
    if kind == "marlin-24":
        compress(tmp_path / "model", old, kind, group_size=128, scale_dtype=torch.float16)
        config = json.loads((old / "config.json").read_text())
        # as llm-compressor left it there
        config["quantization_config"]["sparsity_config"] = {"format": "dense", "targets": ["Linear"], "ignore": []}
        (old / "config.json").write_text(json.dumps(config))
    else:
        checkpoint(tmp_path / "model", old, kind)
    assert open_compressed(old).format == (kind if kind == "marlin-24" else "sparse-24-bitmask")
    export(old, "dense", tmp_path / "dense", quiet=True)
    served = serve(old, tmp_path)
    assert "sparse24: back end" in served.log
    assert_follows(served, tmp_path / "dense", noise=BFLOAT16_NOISE)
    if kind == "marlin-24":
        assert_same(served, serve(tmp_path / "dense", tmp_path))
        # in float32 the dense export is another model: its weights are rounded to 16 bits
        export(old, "sparse24", tmp_path / "sparse24", quiet=True)
        parallel = serve(old, tmp_path, tensor_parallel_size=2, dtype="float32")
        assert_follows(parallel, tmp_path / "sparse24", noise=1e-3)


def test_zero_points_are_served(tmp_path: Path) -> None:
    """With 4 bits and 8, 2:4 and dense, merged linears among them: the tokens of the dense export."""
    make_dense("qwen2", tmp_path / "model")
    other = {
        r"0\.self_attn\.o_proj": {"bits": 8, "symmetric": False},
        r"1\.self_attn\.o_proj": {"bits": 8, "symmetric": False, "pattern": "dense"},
        r"1\.mlp\.down_proj": {"group_size": 0, "symmetric": False, "pattern": "dense"},
    }
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format, other, group_size=32, symmetric=False)
    served = serve(tmp_path / "sparse24", tmp_path)
    assert "asymmetric 4-bit 2:4 linears are held with 8 bits: 5 bits per weight in memory, 3 on disk" in served.log
    assert "asymmetric 8-bit dense linears are held dense: 16 bits per weight in memory, 8 on disk" in served.log
    assert_same(served, serve(tmp_path / "dense", tmp_path))


@pytest.mark.parametrize(("packed", "symmetric"), [("pack-quantized", True), ("gptq", True), ("pack-quantized", False)])
def test_stock_vllm_serves_what_others_read(tmp_path: Path, packed: str, symmetric: bool) -> None:
    """pack-quantized with a packed head of the very setting of the blocks, which vLLM finds by its name only."""
    make_dense("llama", tmp_path / "model")
    head = {"lm_head": {"pattern": "dense", "symmetric": symmetric}} if packed == "pack-quantized" else None
    for format in (packed, "dense"):
        compress(tmp_path / "model", tmp_path / format, format, head, group_size=64, symmetric=symmetric)
    try:
        stock = serve(tmp_path / packed, tmp_path, {"VLLM_PLUGINS": ""})
    except AssertionError as error:
        if "has no attribute 'cpu_gemm_wna16'" in str(error):
            pytest.skip("this vLLM build has no W4A16 kernel for this processor")
        raise
    assert "sparsify" not in stock.log.replace(str(tmp_path), "")
    # vLLM's CPU kernel for 4-bit weights rounds more than a bfloat16 product does: measured 0.065
    assert_follows(stock, tmp_path / "dense", noise=0.15)


def test_a_table_outlives_what_vllm_has_no_kernel_for(tmp_path: Path) -> None:
    """Held down to AVX2, vLLM's CPU build has no W4A16; its other rows, and ours, are there."""
    if installed_as() != CPU_BUILD or "avx2" not in available_levels():
        pytest.skip("needs vLLM's build for CPUs and AVX2")
    make_dense("llama", tmp_path / "dense")
    for format in ("pack-quantized", "sparse24"):
        compress(tmp_path / "dense", tmp_path / format, format, group_size=64)
    models = [tmp_path / name for name in ("dense", "pack-quantized", "sparse24")]
    options = BenchOptions(
        eager=True, one_process=True, environment={FORCE: "avx2", **other_variables("avx2")}, quiet=True, timeout=900,
        engine_args=("--dtype", "float32"),
    )  # fmt: skip
    dense, peer, ours = throughput(models, ThroughputWorkload(8, 8, prompts=4, warmup=0), options).models
    assert dense.failure is None and ours.failure is None and ours.throughput is not None
    assert ours.ratios["throughput"] > 0 and peer.throughput is None
    assert peer.failure is not None and peer.failure.short == "vLLM lacks it"
    assert "cpu_gemm_wna16" in peer.failure.reason
