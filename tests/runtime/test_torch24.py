"""16-bit 2:4 through torch's semi-structured tensors, as far as a processor allows.

Torch's own conversion to CUTLASS's layout is plain PyTorch and runs here; the product on that layout, which needs a GPU, is
replaced by one that first converts back with torch's own function.
"""

import dataclasses

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import choose_backend, cuda, measured_choice, torch24, triton
from sparsify.runtime.backends.torch24 import Torch24
from sparsify.runtime.op import sparse24_linear
from tests.runtime.test_op import on_disk

GPU = torch.device("cuda", 0)
SCHEME = ModuleScheme(16, 256, "2:4", (64, 256))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.0 and a torch without cuSPARSELt."""
    monkeypatch.setattr(torch24, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch24, "_has_cusparselt", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measured_choice, "_gpu_name", lambda device: "a GPU that nobody measured")
    monkeypatch.setattr(cuda, "_gpus", lambda: [])


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float16, None),
        ({}, torch.float32, "bfloat16 or float16"),
        ({"bits": 4}, torch.bfloat16, "16-bit 2:4 weights, not 4-bit"),
        ({"shape": (48, 256)}, torch.bfloat16, "multiple of 32 and inputs of 64, not 48 and 256"),
        ({"shape": (64, 80)}, torch.bfloat16, "not 64 and 80"),
    ],
)
def test_what_it_serves(ampere: None, change: dict[str, object], dtype: torch.dtype, reason: str | None) -> None:
    scheme = dataclasses.replace(SCHEME, **change)
    found = Torch24().supports(scheme, GPU, dtype)
    assert found is None if reason is None else found and reason in found
    assert "not on cpu" in (Torch24().supports(scheme, torch.device("cpu"), dtype) or "")


def test_cusparselt_has_other_limits(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(SCHEME, shape=(48, 80), group_size=80)
    monkeypatch.setattr(torch24, "_has_cusparselt", lambda: True)
    assert Torch24().describe() == "cuSPARSELt"
    assert Torch24().supports(small, GPU, torch.bfloat16) is None


def test_capabilities(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch24, "_capability", lambda device: (7, 5))
    assert "this GPU is sm_75" in (Torch24().supports(SCHEME, GPU, torch.bfloat16) or "")
    monkeypatch.setattr(torch24, "_capability", lambda device: (9, 0))
    assert "CUTLASS kernels do not run on sm_90" in (Torch24().supports(SCHEME, GPU, torch.bfloat16) or "")
    monkeypatch.setattr(torch24, "_has_cusparselt", lambda: True)
    assert Torch24().supports(SCHEME, GPU, torch.bfloat16) is None


def test_it_serves_16_bits_on_a_gpu(ampere: None) -> None:
    assert choose_backend(SCHEME, GPU, torch.bfloat16).name == "torch24"


@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_conversion_and_product(
    ampere: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], biased: bool
) -> None:
    def mm(packed: Tensor, meta: Tensor, x: Tensor) -> Tensor:
        return sparse_semi_structured_to_dense_cutlass(packed, meta) @ x

    def addmm(bias: Tensor, packed: Tensor, meta: Tensor, x: Tensor) -> Tensor:
        return mm(packed, meta, x) + bias[:, None]

    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "_validate_device_dim_dtype_shape", lambda weight: None)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    tensors, weight = on_disk(SCHEME)
    prepared = Torch24().prepare(tensors, SCHEME, torch.bfloat16)
    assert [type(t) for t in prepared] == [Tensor, Tensor], "plain tensors, which a module can hold"
    assert prepared[0].shape == (64, 128) and sum(t.numel() * t.element_size() for t in prepared) == 64 * 256 * 9 // 8
    x, bias = torch.randn(shape).bfloat16(), torch.randn(64).bfloat16() if biased else None
    with torch.no_grad():
        y = sparse24_linear(x, prepared, bias, SCHEME, "torch24")
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    assert y.shape == (*shape[:-1], 64)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


def test_cusparselt_gets_the_transposed_product(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSPARSELt's form is one tensor; its product is asked for [M, N] with the bias."""
    monkeypatch.setattr(torch24, "_has_cusparselt", lambda: True)
    monkeypatch.setattr(torch24._kind(), "_validate_device_dim_dtype_shape", lambda weight: None)
    asked = []

    def product(packed: Tensor, x: Tensor, bias: Tensor | None = None, **rest: object) -> Tensor:
        asked.append(rest["transpose_result"])
        y = packed @ x + (0 if bias is None else bias[:, None])
        return y.T if rest["transpose_result"] else y

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    tensors, weight = on_disk(SCHEME)
    [packed] = Torch24().prepare(tensors, SCHEME, torch.bfloat16)
    x, bias = torch.randn(3, 256).bfloat16(), torch.randn(64).bfloat16()
    with torch.no_grad():
        y = sparse24_linear(x, [packed], bias, SCHEME, "torch24")
    torch.testing.assert_close(y.double(), x.double() @ weight.T + bias.double(), rtol=2e-2, atol=2e-2)
    fused = Version(torch.__version__) >= Version("2.13")  # torch 2.10 has it transposed afterwards, to the same result
    assert asked == [True] or not fused
