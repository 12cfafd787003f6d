"""The op against a float64 product written here, under every tool that has to see through it."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import BACKENDS, announce, choose_backend, get_backend, known_backends
from sparsify.runtime.op import sparse24_linear

CPU = torch.device("cpu")
N, K = 48, 256
SCHEMES = {
    "4 bits, groups": ModuleScheme(4, 64, "2:4", (N, K)),
    "4 bits, channel": ModuleScheme(4, K, "2:4", (N, K)),
    "8 bits, groups": ModuleScheme(8, 32, "2:4", (N, K)),
    "16 bits": ModuleScheme(16, K, "2:4", (N, K)),
    "8 bits, dense": ModuleScheme(8, 128, "dense", (N, K)),
    "4 bits, dense": ModuleScheme(4, 32, "dense", (N, K)),
}


def on_disk(scheme: ModuleScheme, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a checkpoint, made here bit by bit, and the float64 weight [N, K] that they mean."""
    generator = torch.Generator().manual_seed(seed)
    n, k = scheme.shape
    first = torch.randint(0, 3, (n, k // 4), generator=generator)
    second = first + 1 + (torch.rand(n, k // 4, generator=generator) * (3 - first)).long()
    kept = torch.zeros(n, k, dtype=torch.bool)
    quads = kept.view(n, k // 4, 4)
    quads.scatter_(2, first[:, :, None], True)
    quads.scatter_(2, second[:, :, None], True)
    tensors: dict[str, Tensor] = {}
    if scheme.pattern == "2:4":
        nibbles = (first | second << 2).view(n, k // 8, 2)
        tensors["weight_meta"] = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).to(torch.uint8)
    else:
        kept[:] = True
    if scheme.bits == 16:
        values = torch.randn(n, k, generator=generator).bfloat16() * kept
        return {**tensors, "weight_values": values[kept].view(n, k // 2)}, values.double()
    half = 1 << (scheme.bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=generator) * kept
    per_word = 32 // scheme.bits
    words = (codes[kept].view(n, -1, per_word) + half) << (torch.arange(per_word) * scheme.bits)
    words = words.sum(2)
    tensors["weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    scale = (torch.rand(n, k // scheme.group_size, generator=generator) * 0.1 + 0.01).bfloat16()
    tensors["weight_scale"] = scale
    return tensors, codes.double() * scale.double().repeat_interleave(scheme.group_size, 1)


@pytest.fixture(params=SCHEMES, ids=str)
def scheme(request: pytest.FixtureRequest) -> ModuleScheme:
    return SCHEMES[request.param]


@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("backend", known_backends())
def test_equals_the_float64_product(scheme: ModuleScheme, shape: tuple[int, ...], bias: bool, backend: str) -> None:
    tensors, weight = on_disk(scheme)
    generator = torch.Generator().manual_seed(1)
    exact_x = torch.randn(shape, generator=generator).bfloat16()
    offset = torch.randn(N, generator=generator).bfloat16() if bias else None
    exact = exact_x.double() @ weight.T + (0 if offset is None else offset.double())
    magnitude = exact_x.double().abs() @ weight.abs().T + (0 if offset is None else offset.double().abs())
    for dtype, unit in ((torch.float32, 2**-24), (torch.bfloat16, 2**-9), (torch.float16, 2**-12)):
        served = get_backend(backend)
        if served.reason_unavailable() or served.supports(scheme, CPU, dtype):
            continue
        prepared = served.prepare(tensors, scheme, dtype)
        y = sparse24_linear(exact_x.to(dtype), prepared, None if offset is None else offset.to(dtype), scheme, backend)
        assert y.dtype == dtype and y.shape == (*shape[:-1], N)
        # one rounding of each weight, one of the result; sums in float32
        bound = 1.5 * unit * (magnitude + exact.abs()) + K * 2**-24 * magnitude + 1e-6
        assert ((y.double() - exact).abs() <= bound).all()


def test_float32_decodes_in_float32(scheme: ModuleScheme) -> None:
    """Scales in bfloat16 do not make the weights bfloat16."""
    tensors, weight = on_disk(scheme)
    prepared = get_backend("reference").prepare(tensors, scheme, torch.float32)
    y = sparse24_linear(torch.eye(K), prepared, None, scheme, "reference")
    torch.testing.assert_close(y.T.double(), weight, rtol=2**-23, atol=0)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reference_gives_the_bits_of_the_dense_model(scheme: ModuleScheme, tokens: int, dtype: torch.dtype) -> None:
    """oneDNN's blocked layout is an optimisation, not another result."""
    tensors, weight = on_disk(scheme)
    x, bias = torch.randn(tokens, K).to(dtype), torch.randn(N).to(dtype)
    prepared = get_backend("reference").prepare(tensors, scheme, dtype)
    assert torch.equal(
        sparse24_linear(x, prepared, bias, scheme, "reference"), functional.linear(x, weight.float().to(dtype), bias)
    )


def test_activations_need_not_be_contiguous() -> None:
    scheme = SCHEMES["4 bits, groups"]
    tensors, weight = on_disk(scheme)
    prepared = get_backend("reference").prepare(tensors, scheme, torch.bfloat16)
    x = torch.randn(K, 6).bfloat16().T
    assert not x.is_contiguous()
    y = sparse24_linear(x, prepared, None, scheme, "reference")
    assert torch.equal(y, sparse24_linear(x.contiguous(), prepared, None, scheme, "reference"))
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    """PyTorch's own check of schema, fake implementation and compilation.

    With the weight in plain layout: opcheck compares storages, which oneDNN's blocked tensors do not have. Those go
    through torch.compile in the next test and in vLLM's (tests/end_to_end).
    """
    scheme = SCHEMES["4 bits, groups"]
    _, weight = on_disk(scheme)
    x, offset = torch.randn(3, K).to(dtype), torch.randn(N).to(dtype) if bias else None
    rest = (offset, N, "reference", scheme.bits, scheme.group_size, scheme.pattern)
    torch.library.opcheck(torch.ops.sparsify.sparse24_linear.default, (x, [weight.to(dtype)], *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_into_one_graph_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    scheme = SCHEMES["4 bits, groups"]
    tensors, _ = on_disk(scheme)
    prepared = get_backend("reference").prepare(tensors, scheme, dtype)

    def block(x: Tensor) -> Tensor:
        return functional.silu(sparse24_linear(x * 2, prepared, None, scheme, "reference")) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")  # inductor: tests/end_to_end
    with torch.no_grad():
        for tokens in (3, 8):
            x = torch.randn(tokens, K).to(dtype)
            torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)


def test_every_back_end_has_its_own_name() -> None:
    assert len(set(known_backends())) == len(BACKENDS)
    assert known_backends()[-1] == "reference"  # slowest, serves everything


def test_environment_forces_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_BACKEND", "reference")
    assert choose_backend(SCHEMES["16 bits"], CPU, torch.float32).name == "reference"


def test_environment_forces_the_first_of_several_back_ends_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_BACKEND", "cuda, reference, cpu")  # the CUDA kernel serves no 16-bit weights, anywhere
    assert choose_backend(SCHEMES["16 bits"], CPU, torch.float32).name == "reference"


def test_unknown_back_end_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_BACKEND", "warp")
    with pytest.raises(SparsifyError, match=r"SPARSIFY_BACKEND: unknown back end 'warp'; known back ends: .*reference"):
        choose_backend(SCHEMES["16 bits"], CPU, torch.float32)


def test_forced_back_end_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_BACKEND", "reference")
    with pytest.raises(SparsifyError, match=r"reference: activations must be floating point.*unset SPARSIFY_BACKEND"):
        choose_backend(SCHEMES["4 bits, groups"], CPU, torch.int32)


def test_the_log_says_once_who_serves(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("sparsify.test_announce")
    with caplog.at_level(logging.INFO, logger.name):
        for _ in range(2):
            announce(logger, get_backend("reference"), SCHEMES["4 bits, groups"], CPU)
    assert caplog.messages == ["sparse24: back end 'reference' serves 2:4 4-bit linears on cpu"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensors_on_two_devices_are_refused(backend: str) -> None:
    scheme = ModuleScheme(bits=4, group_size=32, pattern="2:4", shape=(64, 64))
    get_backend("cpu").reason_unavailable()  # registers its op, where it can be built
    there, meta = torch.zeros(2, 64), torch.zeros(2, 64, device="meta")
    weight = torch.zeros(4096, dtype=torch.uint8)
    for x, prepared, bias in (
        (there, weight.to("meta"), None),
        (meta, weight, None),
        (meta, weight.to("meta"), torch.zeros(64)),
    ):
        with pytest.raises(RuntimeError, match="must be on one device"):
            sparse24_linear(x, [prepared], bias, scheme, backend)
    assert sparse24_linear(meta, [weight.to("meta")], None, scheme, backend).is_meta


@pytest.mark.skipif(get_backend("cpu").reason_unavailable() is not None, reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("damage", ["empty", "missing", "meta", "type"])
def test_weights_that_are_not_there_are_not_packed(damage: str) -> None:
    scheme = ModuleScheme(bits=4, group_size=32, pattern="2:4", shape=(64, 64))
    tensors = {
        "weight_packed": torch.zeros(64, 4, dtype=torch.int32),
        "weight_meta": torch.full((64, 8), 0x44, dtype=torch.uint8),
        "weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
    }
    assert get_backend("cpu").prepare(tensors, scheme, torch.bfloat16)
    damaged = {
        "empty": {name: tensor[:0] for name, tensor in tensors.items()},
        "missing": {name: tensor for name, tensor in tensors.items() if name != "weight_meta"},
        "meta": {name: tensor.to("meta") for name, tensor in tensors.items()},
        "type": {**tensors, "weight_packed": tensors["weight_packed"].to(torch.int16)},
    }[damage]
    with pytest.raises(SparsifyError, match="cannot pack a linear of .*: weight_"):
        get_backend("cpu").prepare(damaged, scheme, torch.bfloat16)
