"""vLLM serves compressed experts: the tokens of the dense export, on one rank and on two."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.formats.reader import open_compressed
from sparsify.model.experts import is_expert
from sparsify.recipe import parse_recipe
from tests.end_to_end.engine import assert_follows, assert_same, serve
from tests.helpers.tiny import tiny_mixture

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]

RECIPE = """
version: 1
passes: [prune: {method: magnitude}, quantize: {method: rtn, bits: 4, group_size: 32}]
"""
# for vLLM's attention, and for groups of 32 of the experts' intermediate size on each of two ranks
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 64}
OF_EXPERTS = {"qwen3_moe": {"moe_intermediate_size": 64}}


def compressed(folder: Path, family: str) -> Path:
    """A tiny mixture with all linears, of every expert too, 2:4 with 4 bits."""
    source = tiny_mixture(folder / "model", family, **{**SIZES, **OF_EXPERTS.get(family, {})})
    output = apply(parse_recipe(RECIPE), str(source), folder / "sparse24", quiet=True).output
    assert len([module for module in open_compressed(output).modules if is_expert(module)]) == 2 * 4 * 3
    return output


def exact(compressed: Path, dense: Path) -> Path:
    """The dense export without its rounding to 16 bits, by which a router may choose another expert."""
    export(compressed, "dense", dense, quiet=True)
    opened, tensors = open_compressed(compressed), load_file(dense / "model.safetensors")
    tensors |= {f"{module}.weight": opened.linear(module).dense(torch.float32) for module in opened.modules}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    return dense


def test_mixtral_gives_the_tokens_of_the_dense_export(tmp_path: Path) -> None:
    output = compressed(tmp_path, "mixtral")
    served = serve(output, tmp_path, dtype="float32")
    assert "sparse24: back end" in served.log
    assert_same(served, serve(exact(output, tmp_path / "dense"), tmp_path, dtype="float32"), noise=1e-3)


def test_qwen3_moe_on_two_ranks(tmp_path: Path) -> None:
    """In float32, where a wrongly split tensor has no rounding to hide behind."""
    output = compressed(tmp_path, "qwen3_moe")
    parallel = serve(output, tmp_path, tensor_parallel_size=2, dtype="float32")
    assert "sparse24: back end" in parallel.log
    assert_follows(parallel, output, noise=1e-3)
