"""X'X and A'B at every instruction set, against integers summed exactly and against float64."""

import ctypes
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sparsify import processor
from sparsify.errors import SparsifyError
from sparsify.native import build
from sparsify.solver.gram import FORCE, LEVELS, ORDERS, cross, gram, mirror, native_order, summation_order
from tests.helpers.levels import need

PATHS = ("torch", *LEVELS)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that this machine can run, forced."""
    if request.param != "torch":
        library = build.load("cpu/gram")
        if library is None:
            pytest.skip("no C++ compiler")
        need(request.param, library.sparsify_gram_level(LEVELS.index(request.param)) >= 0)
    monkeypatch.setenv(FORCE, request.param)
    return str(request.param)


@pytest.fixture
def kernel() -> ctypes.CDLL:
    library = build.load("cpu/gram")
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


@pytest.mark.parametrize("k", [1, 40, 200])
def test_one_triangle_until_it_is_mirrored(path: str, k: int) -> None:
    x, y = integers(70, k), integers(33, k, seed=1)
    H = gram([x], whole=False)
    assert gram([y], H, whole=False) is H and torch.equal(H.double().tril(), product([x, y], [x, y]).tril())
    assert mirror(H) is H and torch.equal(H, gram([y], gram([x])))


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


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("level", LEVELS)
def test_bits_depend_neither_on_threads_nor_on_micro_batches(
    level: str, dtypes: tuple[str, str], kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(level, kernel.sparsify_gram_level(LEVELS.index(level)) >= 0)
    monkeypatch.setenv(FORCE, level)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 300, generator=generator).to(getattr(torch, dtypes[0]))
    y = torch.randn(2500, 130, generator=generator).to(getattr(torch, dtypes[1]))
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

    def call(k: int = 20, stride: int = 64, threads: int = 1, level: int = 0, wide: int = 0, order: int = 0) -> int:
        count, h = ctypes.c_int64(1), ctypes.c_void_p(buffer.data_ptr())
        long = ctypes.c_int64
        return int(kernel.sparsify_gram(
            pointers, rows, strides, count, long(k), wide, h, long(stride), threads, level, order
        ))  # fmt: skip

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
    assert call(level=9) == 2 and call(level=-1) == 2
    assert call(order=3) == 1 and call(order=-1) == 1 and call(wide=1, order=1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = product([x], [x])
    assert torch.allclose(gram([x]).double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.allclose(cross([x], [x[:, :9]]).double(), expected[:, :9], rtol=1e-5, atol=1e-3)
    mixed = cross([x], [x.bfloat16()])
    assert torch.allclose(mixed.double(), product([x], [x.bfloat16()]), rtol=1e-5, atol=1e-3)


# -------------------------------------------------------------------------------------------------- summation orders


def rounded(x: Fraction, flushes: bool) -> Fraction:
    """x as a float32: the nearest, the even one of two. flushes: zero where that is below the normal numbers."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    normal = round(x / Fraction(2) ** (exponent - 23)) * Fraction(2) ** (exponent - 23)
    if abs(normal) >= Fraction(2) ** -126:
        return normal
    return Fraction(0) if flushes else round(x * 2**149) * Fraction(1, 2**149)


def reference(order: str, a: Tensor, b: Tensor) -> float:
    """a'b of two columns in an order of summation, in exact fractions that are rounded where the order rounds."""
    flushes = order != "float32"

    def add(x: Fraction, y: Fraction) -> Fraction:
        return rounded(x + y, flushes)

    def sum_of(rows: list[int]) -> Fraction:
        total = Fraction(0)
        for t in rows:
            total = add(total, left[t] * right[t])
        return total

    left, right = ([rounded(Fraction(v), flushes) for v in column.double().tolist()] for column in (a, b))
    tokens, out = len(left), Fraction(0)
    for first in range(0, tokens, 1024):
        chunk, last = Fraction(0), min(first + 1024, tokens)
        for start in range(first, last, 1024 if order == "amx" else 256):
            rows = list(range(start, min(start + (1024 if order == "amx" else 256), last)))
            if order == "amx":
                total = Fraction(0)
                for step in (rows[i : i + 32] for i in range(0, len(rows), 32)):
                    total = add(total, add(sum_of(step[::2]), sum_of(step[1::2])))
            elif order == "avx512bf16":
                total = sum_of([t for i in range(0, len(rows), 2) for t in rows[i : i + 2][::-1]])
            else:
                total = sum_of(rows)
            chunk = add(chunk, total)
        out = add(out, chunk)
    return float(out)


def hard_columns(tokens: int, k: int, dtype: torch.dtype, scale: int, seed: int) -> Tensor:
    """Numbers of many sizes around 2^scale, of which many cancel."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(scale - 6, scale + 7, (tokens, k), generator=generator).double()
    return (torch.randn(tokens, k, generator=generator).double() * sizes.exp2()).to(dtype)


@pytest.mark.parametrize("scale", [0, -64])  # -64: products are around the smallest normal number
@pytest.mark.parametrize(("order", "dtype"), [*((o, torch.bfloat16) for o in ORDERS[:3]), ("float32", torch.float32)])
def test_every_level_gives_the_bits_of_the_order(path: str, order: str, dtype: torch.dtype, scale: int) -> None:
    if path == "torch":
        pytest.skip("PyTorch has an order of its own")
    for tokens in (3, 67, 1379):
        x, y = hard_columns(tokens, 3, dtype, scale, 1), hard_columns(tokens, 2, dtype, scale, 2)
        y[-1] = -x[-1, :2]  # so that whole sums cancel, too
        expected = torch.tensor([[reference(order, x[:, i], y[:, j]) for j in range(2)] for i in range(3)])
        with summation_order(order):
            assert torch.equal(cross([x], [y]).double(), expected.double())
            H = gram([x])
        assert torch.equal(H[:2, :2].double(), torch.tensor(
            [[reference(order, x[:, i], x[:, j]) for j in range(2)] for i in range(2)], dtype=torch.float64
        ))  # fmt: skip


@pytest.mark.parametrize("order", ORDERS[:3])
def test_all_levels_agree_in_an_order(order: str, kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider and longer than the exact reference can go."""
    x, y = hard_columns(2300, 195, torch.bfloat16, 0, 3), hard_columns(2300, 101, torch.bfloat16, 0, 4)
    found = {}
    for number, level in enumerate(LEVELS):
        if kernel.sparsify_gram_level(number) >= 0:
            monkeypatch.setenv(FORCE, level)
            with summation_order(order):
                found[level] = gram([x]), cross([x], [y])
    for level, (H, C) in found.items():
        assert torch.equal(H, found["portable"][0]) and torch.equal(C, found["portable"][1]), level


def test_denormals_are_kept_or_flushed_as_the_order_says_whatever_the_caller_set(kernel: ctypes.CDLL) -> None:
    x = torch.full((2, 2), 2.0**-70).bfloat16()
    before = {}
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor always flushes denormals, or never")
        for order in ORDERS[:3]:
            with summation_order(order):
                bits = gram([x]).view(torch.int32).tolist()
            assert before.setdefault(order, bits) == bits
    torch.set_flush_denormal(False)
    assert before["float32"] != [[0, 0], [0, 0]] and before["amx"] == before["avx512bf16"] == [[0, 0], [0, 0]]


def test_float32_inputs_have_one_order(kernel: ctypes.CDLL) -> None:
    x = torch.randn(600, 40, generator=torch.Generator().manual_seed(0))
    plain = cross([x], [x.bfloat16()])
    with summation_order("amx"):
        assert torch.equal(cross([x], [x.bfloat16()]), plain)
        assert torch.equal(
            gram([x[:300], x[300:].bfloat16()]), gram([torch.cat([x[:300], x[300:].bfloat16().float()])])
        )
    assert native_order(torch.float32) == "float32"


def test_the_order_is_that_of_the_level(kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    x = hard_columns(700, 30, torch.bfloat16, 0, 5)
    for number, level in enumerate(LEVELS):
        if kernel.sparsify_gram_level(number) >= 0:
            monkeypatch.setenv(FORCE, level)
            order = native_order(torch.bfloat16)
            assert order in ("float32", level)
            with summation_order(order):
                expected = gram([x])
            assert torch.equal(gram([x]), expected)
    monkeypatch.setenv(FORCE, "torch")
    assert native_order(torch.bfloat16) == "torch"
    monkeypatch.delenv(FORCE)
    for level in processor.available_levels():
        monkeypatch.setenv(processor.FORCE, level)
        assert native_order(torch.bfloat16) in ("float32", level)
    monkeypatch.setenv(processor.FORCE, "avx2")
    if "avx2" in processor.available_levels():
        assert native_order(torch.bfloat16) == "float32"


def test_an_order_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsifyError, match="unknown order of summation 'neon'"), summation_order("neon"):
        pass
    monkeypatch.setenv(FORCE, "torch")
    with summation_order("amx"), pytest.raises(SparsifyError, match="'amx' need the native kernel"):
        gram([integers(4, 6)])
    with summation_order("torch"):
        assert torch.equal(gram([integers(4, 6)]).double(), product([integers(4, 6)], [integers(4, 6)]))


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
