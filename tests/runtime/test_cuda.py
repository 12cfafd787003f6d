"""The CUDA back end without a GPU: what it serves, how it is chosen, and its op over a stand-in for the kernel's library.

The kernel itself is compared with float64 in the emulator (tests/kernels) and on a GPU by `sparsify kernels check --gpu`.
"""

import ctypes
import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.native import build
from sparsify.runtime.backends import choose_backend, cuda, get_backend, measured_choice
from sparsify.runtime.backends.cuda import Cuda
from sparsify.runtime.op import sparse24_linear
from tests.runtime.test_op import on_disk

GPU = torch.device("cuda", 0)
SCHEME = ModuleScheme(4, 64, "2:4", (128, 256))
SM_COUNT = 7


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("stand-in") / "stand_in.so"
    source = Path(__file__).with_name("cuda_stand_in.cpp")
    run = subprocess.run(
        [*compiler.command, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(built)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    loaded = ctypes.CDLL(str(built))
    loaded.last_call.restype = ctypes.POINTER(ctypes.c_int)
    return loaded


@pytest.fixture
def stand_in(library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    with cuda.emulated(library, SM_COUNT):
        yield library


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> None:
    """A machine with an A100, as far as back ends look before they touch a tensor."""
    monkeypatch.setattr(cuda, "_gpus", lambda: [GPU])
    monkeypatch.setattr(cuda, "_capability", lambda device: (8, 0))
    monkeypatch.setattr("sparsify.native.build_cuda.archs_at_hand", lambda: (80,))
    cuda.connect(library, cuda._op(), None, [(SM_COUNT, 0)])
    monkeypatch.setattr(cuda, "_loaded", lambda: library)


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    reason = Cuda().reason_unavailable()
    assert reason and "NVIDIA GPU" in reason
    assert "it runs on NVIDIA GPUs, not on cpu" == Cuda().supports(SCHEME, torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        ({}, torch.bfloat16, None),
        ({}, torch.float16, None),
        ({"group_size": 32}, torch.float16, None),
        ({"group_size": 256}, torch.float16, None),  # one scale per output
        ({}, torch.float32, "bfloat16 or float16"),
        ({"bits": 8}, torch.bfloat16, "4-bit 2:4 weights, not 8-bit 2:4"),
        ({"pattern": "dense"}, torch.bfloat16, "not 4-bit dense"),
        ({"shape": (96, 256)}, torch.bfloat16, "multiples of 64, not 96 and 256"),
        ({"shape": (128, 96), "group_size": 96}, torch.bfloat16, "multiples of 64, not 128 and 96"),
        ({"shape": (128, 1024), "group_size": 256}, torch.bfloat16, "groups of 256"),
    ],
)
def test_what_it_serves(ampere: None, change: dict[str, object], dtype: torch.dtype, reason: str | None) -> None:
    scheme = dataclasses.replace(SCHEME, **change)
    found = Cuda().supports(scheme, GPU, dtype)
    assert found is None if reason is None else found and reason in found


def test_turing_has_no_sparse_tensor_cores(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda device: (7, 5))
    assert "this GPU is sm_75" in (Cuda().supports(SCHEME, GPU, torch.bfloat16) or "")


def test_a_missing_kernel_is_told_and_others_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither nvcc nor a ready build: a line in the log, and the next back end."""
    monkeypatch.setattr(cuda, "_gpus", lambda: [GPU])
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    monkeypatch.setattr("sparsify.native.build_cuda.archs_at_hand", lambda: (90,))
    monkeypatch.setattr("sparsify.native.build_cuda.find_nvcc", lambda: None)
    monkeypatch.setattr("sparsify.native.build_cuda.ready_builds", lambda name: [])
    monkeypatch.setattr(measured_choice, "_gpu_name", lambda device: "a GPU that nobody measured")
    cuda._loaded.cache_clear()
    try:
        assert "log says why" in (Cuda().reason_unavailable() or "")
        assert choose_backend(SCHEME, GPU, torch.bfloat16).name != "cuda"
    finally:
        cuda._loaded.cache_clear()
    assert "no CUDA compiler found to build cuda/sparse24 for sm_90" in caplog.text and "Triton" in caplog.text


def test_it_comes_before_the_others_and_can_be_forced_away(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_choice, "_gpu_name", lambda device: "a GPU that nobody measured")
    assert choose_backend(SCHEME, GPU, torch.bfloat16).name == "cuda"
    monkeypatch.setenv("SPARSIFY_BACKEND", "reference")
    assert choose_backend(SCHEME, GPU, torch.bfloat16).name == "reference"
    monkeypatch.setenv("SPARSIFY_BACKEND", "cuda")
    with pytest.raises(SparsifyError, match="cuda: it multiplies 4-bit 2:4 weights, not 8-bit"):
        choose_backend(dataclasses.replace(SCHEME, bits=8), GPU, torch.bfloat16)


def test_measured_times_decide(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"1": 9.0, "16": 9.0}
    fast = {"1": 5.0, "16": 8.0, "4096": 900.0}  # prompts do not outweigh decoding
    table = {"G": {"2:4 4-bit": {"256x256": {"cuda": slow | {"4096": 100.0}, "reference": fast}}}}
    monkeypatch.setattr(measured_choice, "_measured", lambda: table)
    monkeypatch.setattr(measured_choice, "_gpu_name", lambda device: "G")
    assert choose_backend(SCHEME, GPU, torch.bfloat16).name == "reference"
    table["G"]["2:4 4-bit"]["256x256"]["cuda"] = {"1": 4.0, "16": 7.0}
    assert choose_backend(SCHEME, GPU, torch.bfloat16).name == "cuda"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, None),
        ({"128x256": {"a": {"1": 2.0}, "b": {"1": 1.0}}}, "b"),
        ({"128x256": {"b": {"1": 1.0}}}, None),  # the first choice was not measured
        ({"128x256": {"a": {"1": 2.0}, "b": {"2": 1.0}}}, None),  # nothing in common
        ({"128x256": {"a": {"512": 2.0}, "b": {"512": 1.0}}}, None),  # prompts only
        ({"65536x65536": {"a": {"1": 2.0}, "b": {"1": 1.0}}}, None),  # another kind of shape
        ({"4096x4096": {"a": {"1": 1.0}, "b": {"1": 2.0}}, "200x300": {"a": {"1": 2.0}, "b": {"1": 1.0}}}, "b"),
    ],
)
def test_nearest_measured_shape(times: measured_choice.Times, expected: str | None) -> None:
    assert measured_choice.fastest_of(times, ["a", "b"], (128, 256)) == expected


def test_times_in_the_repository_can_be_read() -> None:
    measured_choice._measured.cache_clear()
    for kinds in measured_choice._measured().values():
        for times in kinds.values():
            assert times
            for shape, backends in times.items():
                measured_choice._shape(shape)
                assert all(microseconds > 0 for rows in backends.values() for microseconds in rows.values())


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.double() @ weight.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (5, 256), (2, 3, 256), (0, 256)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_op(
    stand_in: ctypes.CDLL, dtype: torch.dtype, scale_dtype: torch.dtype, shape: tuple[int, ...], biased: bool
) -> None:
    tensors, weight = on_disk(SCHEME)
    tensors["weight_scale"] = tensors["weight_scale"].to(scale_dtype)
    prepared = get_backend("cuda").prepare(tensors, SCHEME, dtype)
    x, bias = torch.randn(shape).to(dtype), torch.randn(128).to(dtype) if biased else None
    y = sparse24_linear(x, prepared, bias, SCHEME, "cuda")
    assert y.dtype == dtype and y.shape == (*shape[:-1], 128)
    exact = exact_product(x, weight, bias)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-10, atol=1e-5)
    # the general op, as torch.compile's graphs of other versions may hold it
    general = torch.ops.sparsify.sparse24_linear(x, prepared, bias, 128, "cuda", 4, 64, "2:4")
    assert torch.equal(general, y)


def test_rows_that_lie_apart(stand_in: ctypes.CDLL) -> None:
    """Slices are read in place where rows begin at 16 bytes, and copied where they do not."""
    tensors, weight = on_disk(SCHEME)
    prepared = get_backend("cuda").prepare(tensors, SCHEME, torch.bfloat16)
    whole = torch.randn(6, 256 + 72).bfloat16()
    cases = [
        (whole[:, 64:320], 328), (whole[:, 8:264], 328), (whole[:, 3:259], 256), (whole[:1, 1:257], 256),
        (torch.randn(4, 256 + 12).bfloat16()[:, :256], 256), (torch.randn(256, 6).bfloat16().T, 256),
        (torch.randn(3, 4, 300).bfloat16()[:, :, :256], 256), (whole.flatten()[1:513].view(2, 256), 256),
    ]  # fmt: skip
    for x, distance in cases:
        y = sparse24_linear(x, prepared, None, SCHEME, "cuda")
        torch.testing.assert_close(y.double(), exact_product(x, weight, None), rtol=2**-8, atol=1e-5)
        assert stand_in.last_call()[1] == distance, x.stride()


def test_configurations_can_be_forced(stand_in: ctypes.CDLL) -> None:
    tensors, _ = on_disk(SCHEME)
    prepared = get_backend("cuda").prepare(tensors, SCHEME, torch.bfloat16)
    assert cuda.configs() == ["zero", "one"]
    for config in (1, -1):
        cuda.force_config(config)
        sparse24_linear(torch.randn(2, 256).bfloat16(), prepared, None, SCHEME, "cuda")
        assert stand_in.last_call()[2] == config


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_many_rows_are_multiplied_densely(library: ctypes.CDLL, biased: bool) -> None:
    """The very numbers of the dense model, for activations of any shape, and only from as many rows on as told."""
    tensors, weight = on_disk(SCHEME)
    bias = torch.randn(128).bfloat16() if biased else None
    with cuda.emulated(library, SM_COUNT, dense_rows=6):
        prepared = get_backend("cuda").prepare(tensors, SCHEME, torch.bfloat16)
        for shape, decoded in (((2, 3, 256), True), ((6, 256), True), ((5, 256), False)):
            x = torch.randn(shape).bfloat16()
            y = sparse24_linear(x, prepared, bias, SCHEME, "cuda")
            assert (library.last_call()[2] == cuda.DECODE) == decoded
            if decoded:
                assert torch.equal(y, torch.nn.functional.linear(x, weight.bfloat16(), bias))
        cuda.force_config(cuda.DECODE)
        x = torch.randn(1, 256).bfloat16()
        y = sparse24_linear(x, prepared, bias, SCHEME, "cuda")
        assert library.last_call()[2] == cuda.DECODE and y.shape == (1, 128)
        cuda.force_config(0)
        sparse24_linear(torch.randn(9, 256).bfloat16(), prepared, bias, SCHEME, "cuda")
        assert library.last_call()[2] == 0, "a forced tile shape is never replaced"
        cuda.force_config(-1)


def test_which_gpus_multiply_many_rows_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda device: (9, 0))
    assert cuda.dense_rows(GPU) > 64, "never where servers decode"
    monkeypatch.setattr(cuda, "_capability", lambda device: (8, 6))
    assert cuda.dense_rows(GPU) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x.float(), w, None), "must be bfloat16 or float16"),
        (lambda x, w, b: (x[:, :192], w, None), "do not belong together"),
        (lambda x, w, b: (x, w[1:], None), "do not belong together"),
        (lambda x, w, b: (x, w.to(torch.int32), None), "do not belong together"),
        (lambda x, w, b: (x, w, b.half()), "bias must be contiguous"),
        (lambda x, w, b: (x, w, b[:64]), "bias must be contiguous"),
        (lambda x, w, b: (torch.tensor(1.0).bfloat16(), w, None), "at least one dimension"),
    ],
)
def test_what_does_not_fit_is_refused(stand_in: ctypes.CDLL, change: object, message: str) -> None:
    tensors, _ = on_disk(SCHEME)
    packed, scale = get_backend("cuda").prepare(tensors, SCHEME, torch.bfloat16)
    x, w, b = change(torch.randn(2, 256).bfloat16(), packed, torch.randn(128).bfloat16())  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparsify.sparse24_linear_cuda(x, w, b, 128, 64, 0)


def test_compiles_into_one_graph(stand_in: ctypes.CDLL) -> None:
    tensors, _ = on_disk(SCHEME)
    prepared = get_backend("cuda").prepare(tensors, SCHEME, torch.bfloat16)

    def block(x: Tensor) -> Tensor:
        return torch.relu(sparse24_linear(x * 2, prepared, None, SCHEME, "cuda")) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (3, 8):
            x = torch.randn(tokens, 256).bfloat16()
            assert torch.equal(compiled(x), block(x))
    torch.library.opcheck(
        torch.ops.sparsify.sparse24_linear_cuda.default,
        (torch.randn(2, 256).bfloat16(), prepared[0], None, 128, 64, 0),
    )
