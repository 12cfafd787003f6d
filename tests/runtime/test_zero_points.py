"""Asymmetric linears at load time: the form in which kernels hold them is the same weights, and what it takes is said."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import sparsify  # noqa: F401  what a user has to write
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.sparse24 import checked_tensors
from sparsify.model.linear import CODE_RANGE, LinearWeights
from sparsify.runtime.backends import BACKENDS, _announce_once, choose_backend
from sparsify.runtime.module import Sparse24Linear
from sparsify.runtime.zero_points import held_in_words, without_zero_points
from tests.helpers.agreement import Agree
from tests.helpers.compressed import compress, make_dense, round_linear

CPU = torch.device("cpu")
N, K = 48, 192
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "4 bits, channel, float16": {"bits": 4, "group_size": 0, "scale_dtype": torch.float16},
    "4 bits, dense": {"bits": 4, "group_size": 64, "pattern": "dense"},
    "8 bits": {"bits": 8, "group_size": 64},
    "8 bits, dense": {"bits": 8, "group_size": 0, "pattern": "dense"},
}
SERVED = {
    (4, "2:4"): (8, 5),
    (4, "dense"): (8, 8),
    (8, "2:4"): (16, 9),
}  # bits of a code, and of a weight with its position


def make(seed: int = 0, **kind: Any) -> LinearWeights:
    """Weights that lean to one side or the other, extreme zero points and codes included."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) + 2 * torch.randn(N, 1, generator=generator)
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    linear = round_linear(weight, symmetric=False, **kind)
    low, high = CODE_RANGE[linear.bits]
    assert linear.zero_point is not None and (linear.zero_point.min(), linear.zero_point.max()) == (low, high)
    assert linear.unscaled().abs().max() == high - low
    return linear


def exact(linear: LinearWeights, x: Tensor) -> Tensor:
    assert linear.codes is not None and linear.scale is not None and linear.zero_point is not None
    zeros, scale = (t.double().repeat_interleave(linear.group_size, 1) for t in (linear.zero_point, linear.scale))
    return x.double() @ (scale * (linear.codes.double() - zeros)).t()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_form_that_kernels_hold_is_the_same_weights(kind: str, dtype: torch.dtype) -> None:
    linear = make(**KINDS[kind])
    stored = ModuleScheme.of(linear)
    tensors, held = without_zero_points(get_format("sparse24").encode(linear), stored, dtype)
    checked_tensors("m", tensors, held)
    again = get_format("sparse24").decode("m", tensors, held)
    assert torch.equal(again.dense(dtype), linear.dense(dtype))
    if linear.bits == 8 and (linear.pattern == "dense" or dtype == torch.float32):
        assert held == stored and held_in_words(stored, held, dtype).startswith("asymmetric 8-bit")
        for backend in BACKENDS:
            problem = backend.supports(held, CPU, dtype)
            assert problem == (None if backend.name == "reference" else "it knows no zero points")
        assert choose_backend(held, CPU, dtype).name == "reference"
    else:
        bits, memory = SERVED[linear.bits, linear.pattern]
        assert held.symmetric and held.bits == bits
        if bits == 8:
            assert torch.equal(again.dense(torch.float32), linear.dense(torch.float32))
        assert f": {memory} bits per weight in memory, " in held_in_words(stored, held, dtype)


def test_a_symmetric_linear_is_left_alone() -> None:
    linear = round_linear(torch.randn(N, K))
    given, scheme = get_format("sparse24").encode(linear), ModuleScheme.of(linear)
    tensors, held = without_zero_points(given, scheme, torch.bfloat16)
    assert held is scheme and all(tensors[name] is tensor for name, tensor in given.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_module_multiplies_with_zero_points(kind: str, dtype: torch.dtype, agree: Agree, caplog: Any) -> None:
    linear = make(**KINDS[kind])
    module = Sparse24Linear("model.layers.0.up", ModuleScheme.of(linear), linear.dtype, False)
    module.load_state_dict(get_format("sparse24").encode(linear))
    x = torch.randn(5, K, dtype=dtype)
    if linear.bits == 8 and (linear.pattern == "dense" or dtype == torch.float32) and agree.__name__ == "close":
        with pytest.raises(SparsifyError, match="cpu: it knows no zero points"):
            module(x)
        return
    _announce_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sparsify"):
        agree(module(x), functional.linear(x, linear.dense(dtype)))
        module(x)
    said = [record.message for record in caplog.records if "asymmetric" in record.message]
    assert len(said) == 1 and f"{linear.bits}-bit {linear.pattern} linears are held" in said[0]
    assert torch.equal(module.weight + 0, linear.dense(dtype))
    saved = module.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in get_format("sparse24").encode(linear).items())
    if dtype == torch.float32:
        torch.testing.assert_close(module(x).double(), exact(linear, x), rtol=1e-5, atol=1e-4)
    x.requires_grad_(True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.dense(dtype).sum(0).expand(5, K), rtol=1e-2, atol=1e-2)


def test_a_zero_point_beyond_its_bits_is_refused_by_name() -> None:
    linear = make(**KINDS["4 bits"])
    module = Sparse24Linear("model.layers.0.up", ModuleScheme.of(linear), linear.dtype, False)
    module.load_state_dict(get_format("sparse24").encode(linear))
    module.get_buffer("weight_zero_point")[2, 3] = -120
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight_zero_point.*-8 to 7, found -120"):
        module(torch.randn(1, K))


def test_transformers_serves_what_the_dense_export_is(tmp_path: Path, agree: Agree) -> None:
    make_dense("llama", tmp_path / "model")
    other = {r"1\.self_attn\.o_proj": {"group_size": 0}, r"1\.mlp\.(gate|up)": {"pattern": "dense", "symmetric": False}}
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format, other, group_size=32, symmetric=False)
    ours, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / format, dtype=torch.bfloat16)
        for format in ("sparse24", "dense")
    )
    kinds = {(m.scheme.pattern, m.scheme.symmetric) for m in ours.modules() if isinstance(m, Sparse24Linear)}
    assert kinds == {("2:4", True), ("2:4", False), ("dense", False)}
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        agree(ours(ids).logits, dense(ids).logits)
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)
