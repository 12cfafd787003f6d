"""X'X and A'B at every instruction set, against integers summed exactly and against float64."""

import ctypes

import pytest
import torch
from torch import Tensor

from sparsify import native
from sparsify.errors import SparsifyError
from sparsify.passes.gram import FORCE, LEVELS, cross, gram
from tests.levels import need

PATHS = ("torch", *LEVELS)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that this machine can run, forced."""
    if request.param != "torch":
        library = native.load("cpu/gram")
        if library is None:
            pytest.skip("no C++ compiler")
        need(request.param, library.sparsify_gram_level(LEVELS.index(request.param)) >= 0)
    monkeypatch.setenv(FORCE, request.param)
    return str(request.param)


@pytest.fixture
def kernel() -> ctypes.CDLL:
    library = native.load("cpu/gram")
    if library is None:
        pytest.skip("no C++ compiler")
    return library


def integers(*shape: int, seed: int = 0, bound: int = 8) -> Tensor:
    """Small integers: bf16 holds them and float32 sums their products without rounding, so results must be exact."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.cat(a).double().t() @ torch.cat(b).double()


# Rows around pairs, AMX steps (32), register blocks (256, 1024) and chunks (1024); columns around vectors and panels.
SHAPES = [
    ([0], 5), ([1], 1), ([3], 1), ([2], 16), ([7], 17), ([2, 0, 5], 33), ([31, 1, 1], 48), ([255], 49), ([257, 3], 64),
    ([1023], 31), ([1025], 32), ([1030, 3, 999], 50), ([700, 700, 700], 97), ([40], 385), ([5], 577),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_gram_is_exact_on_integers(path: str, rows: list[int], k: int) -> None:
    xs = [integers(t, k, seed=i) for i, t in enumerate(rows)]
    H = gram(xs)
    assert H.dtype == torch.float32 and H.is_contiguous()
    assert torch.equal(H.double(), product(xs, xs))


@pytest.mark.parametrize(("rows", "k"), SHAPES)
@pytest.mark.parametrize("other", [1, 50])
def test_cross_is_exact_on_integers(path: str, rows: list[int], k: int, other: int) -> None:
    a = [integers(t, k, seed=i) for i, t in enumerate(rows)]
    b = [integers(t, other, seed=100 + i) for i, t in enumerate(rows)]
    assert torch.equal(cross(a, b).double(), product(a, b))
    assert torch.equal(cross(b, a).double(), product(b, a))


def test_large_tiles_and_several_chunks(path: str) -> None:
    """Wide enough for the large output tiles, long enough for more than one chunk of them."""
    x = integers(2100, 1540)
    expected = x.float().t() @ x.float()
    assert torch.equal(gram([x]), expected)
    assert torch.equal(cross([x[:600]], [x[:600, :1537]]), x[:600].float().t() @ x[:600, :1537].float())


def test_adds_to_out_in_place(path: str) -> None:
    x, y = integers(70, 40), integers(33, 40, seed=1)
    H = gram([x])
    assert gram([y], out=H) is H
    assert torch.equal(H.double(), product([x, y], [x, y]))
    C = cross([x], [x[:, :7]])
    assert cross([y], [y[:, :7]], out=C) is C
    assert torch.equal(C.double(), product([x, y], [x[:, :7], y[:, :7]]))


def test_rows_may_have_any_stride_and_nothing_beside_them_is_read(path: str) -> None:
    x = integers(101, 45)
    around = torch.full((230, 80), float("nan"), dtype=torch.bfloat16)
    view = around[3:205:2, 11:56]  # every second row, some of the columns
    view.copy_(x)
    transposed = x.t().contiguous().t()
    repeated = x[:1].expand(5, 45)
    expected = product([x], [x])
    assert torch.equal(gram([view]).double(), expected)
    assert torch.equal(gram([transposed]).double(), expected)
    assert torch.equal(cross([view], [transposed]).double(), expected)
    assert torch.equal(gram([repeated]).double(), product([repeated], [repeated]))


def test_sums_are_float32_and_blocked(path: str) -> None:
    """Activations with a large mean, the hard case: rounding the result to bf16 would lose 4e-3, one long sum 1e-5."""
    generator = torch.Generator().manual_seed(0)
    xs = [(torch.randn(4096, 35, generator=generator) + 3).bfloat16() for _ in range(12)]
    H = gram(xs).double()
    expected = product(xs, xs)
    scale = (expected.diagonal()[:, None] * expected.diagonal()).sqrt()
    assert ((H - expected).abs() / scale).max() < 3e-6


def test_is_symmetric(path: str) -> None:
    x = torch.randn(500, 131, generator=torch.Generator().manual_seed(0)).bfloat16()
    H = gram([x])
    assert torch.allclose(H, H.t(), rtol=0, atol=1e-3 if path == "torch" else 0)


@pytest.mark.parametrize("level", LEVELS)
def test_bits_depend_neither_on_threads_nor_on_micro_batches(
    level: str, kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(level, kernel.sparsify_gram_level(LEVELS.index(level)) >= 0)
    monkeypatch.setenv(FORCE, level)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 300, generator=generator).bfloat16()
    y = torch.randn(2500, 130, generator=generator).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            for cut in ([2500], [1, 1030, 1469], [625] * 4):
                torch.set_num_threads(threads)
                xs, ys = list(x.split(cut)), list(y.split(cut))
                results.append((gram(xs), cross(xs, ys)))
    finally:
        torch.set_num_threads(before)
    for H, C in results[1:]:
        assert torch.equal(H, results[0][0]) and torch.equal(C, results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (96, 52), (40, 31)])
def test_nan_and_inf_show_in_their_row_and_column_only(path: str, bad: float, where: tuple[int, int]) -> None:
    x = integers(97, 53)
    clean = gram([x])
    x[where] = bad
    H = gram([x])
    column = where[1]
    assert not torch.isfinite(H[column, column])
    touched = x[where[0]] != 0  # 0 * Inf is NaN too, but then so it is in float64
    assert not torch.isfinite(H[column][touched]).any() and not torch.isfinite(H[:, column][touched]).any()
    others = torch.arange(53) != column
    assert torch.equal(H[others][:, others], clean[others][:, others])
    C = cross([x], [x[:, :5]])
    assert not torch.isfinite(C[column, 1:5][touched[1:5]]).any()


def test_c_interface_stays_in_its_triangle_and_checks_its_arguments(kernel: ctypes.CDLL) -> None:
    x = integers(50, 20)
    buffer = torch.full((22, 64), 7.0)
    pointers = (ctypes.c_void_p * 1)(x.data_ptr())
    rows, strides = (ctypes.c_int64 * 1)(50), (ctypes.c_int64 * 1)(20)

    def call(k: int = 20, stride: int = 64, threads: int = 1, level: int = -1) -> int:
        count, h = ctypes.c_int64(1), ctypes.c_void_p(buffer.data_ptr())
        wide = ctypes.c_int64
        return int(kernel.sparsify_gram(pointers, rows, strides, count, wide(k), h, wide(stride), threads, level))

    assert call() == 0
    inside = torch.zeros(22, 64, dtype=torch.bool)
    inside[:20, :20] = torch.ones(20, 20).tril().bool()
    expected = product([x], [x]).float() + 7
    assert torch.equal(buffer[:20, :20].tril(), expected.tril())
    assert (buffer[~inside] == 7).all()
    assert call(stride=19) == 1 and call(threads=0) == 1 and call(k=-1) == 1
    rows[0] = -1
    assert call() == 1
    rows[0] = 50
    assert call(level=9) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = product([x], [x])
    assert torch.allclose(gram([x]).double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.allclose(cross([x], [x[:, :9]]).double(), expected[:, :9], rtol=1e-5, atol=1e-3)
    mixed = cross([x], [x.bfloat16()])
    assert torch.allclose(mixed.double(), product([x], [x.bfloat16()]), rtol=1e-5, atol=1e-3)


def test_float32_precision_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None:
        pytest.skip("this torch has no fp32_precision")
    monkeypatch.setenv(FORCE, "torch")
    before = settings.fp32_precision
    gram([integers(8, 8)])
    assert settings.fp32_precision == before
    x = torch.full((64, 64), 1 + 2**-12)  # float32 inputs must never be rounded to bf16
    assert torch.allclose(gram([x]), x.double().t().matmul(x.double()).float(), rtol=1e-6)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = integers(4, 6)
    with pytest.raises(ValueError, match="no micro-batches"):
        gram([])
    with pytest.raises(ValueError, match="must be"):
        gram([x, integers(4, 5)])
    with pytest.raises(ValueError, match="same tokens"):
        cross([x], [x[:3]])
    for out in (torch.zeros(6, 5), torch.zeros(6, 6).double(), torch.zeros(6, 12)[:, ::2]):
        with pytest.raises(ValueError, match="out"):
            gram([x], out=out)
    monkeypatch.setenv(FORCE, "fast")
    with pytest.raises(SparsifyError, match="SPARSIFY_GRAM=fast is unknown; choose from torch, portable"):
        gram([x])


def test_an_absent_instruction_set_is_named(kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [name for number, name in enumerate(LEVELS) if kernel.sparsify_gram_level(number) < 0]
    if not absent:
        pytest.skip("this processor has them all")
    monkeypatch.setenv(FORCE, absent[0])
    with pytest.raises(SparsifyError, match=f"SPARSIFY_GRAM={absent[0]}: this processor"):
        gram([integers(4, 6)])
