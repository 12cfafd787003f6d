"""The CPU kernels of the 2:4 linears at every instruction set, against float64 products written here.

Through the C interface (`kernel.linear`), where the level is an option of the call, and through the op where torch's own
tensors matter. tests/kernels/sparse24_sanitize.cpp runs the same levels under sanitizers.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.files import cache_directory
from sparsify.native import build
from sparsify.processor import FORCE, LEVELS
from sparsify.runtime.backends import cpu
from sparsify.runtime.backends.cpu import TYPES, Cpu
from tests.helpers.levels import need, ruled_out
from tests.helpers.linears import Linear, Made, make

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Half the distance of neighbours relative to a number, and the least magnitude that is certain to survive (bf16 products
# may flush denormals; fp16 must not: there half the distance of its denormals).
UNIT = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}
TINY = {BF16: 2.0**-126, F16: 2.0**-25, F32: 2.0**-126}
SCHEMES = ((4, "2:4"), (8, "2:4"), (16, "2:4"), (4, "dense"), (8, "dense"))
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 64, 65, 129, 300)
# The options that ask for int8 compute, for the kernels of few or of many rows (below avx512bf16: of fp32) and for fixed point
INT8, FEW, MANY, FIXED = 256, 512, 1024, 2048
INT8_PIECE = 512  # without AMX, activations have a scale for at most so many inputs
FOLD_ROWS = 64  # with more bf16 rows the bf16 kernels round each scaled weight to bf16, as a dense bf16 checkpoint does
ROOT = Path(__file__).resolve().parents[2]

# of those this machine can run: indirectly, through the fixture
bf16_levels = pytest.mark.parametrize("level", [4, 5], ids=LEVELS[4:], indirect=True)
int8_levels = pytest.mark.parametrize("level", range(1, 6), ids=LEVELS[1:], indirect=True)
BYTE_ROWS = 4  # the most that are multiplied as bytes where more are faster in fp32
scheme_ids = pytest.mark.parametrize(("bits", "pattern"), SCHEMES, ids=[f"{b} bits {p}" for b, p in SCHEMES])


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Kernel:
    """The C interface."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, wide, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.library = library
        library.sparse24_packed_bytes.argtypes = [wide, wide, number, wide, number, number]
        library.sparse24_packed_bytes.restype = wide
        library.sparse24_pack.argtypes = [*library.sparse24_packed_bytes.argtypes, *[pointer] * 5]
        library.sparse24_linear.argtypes = library.sparse24_twin.argtypes = [
            *(pointer, wide, pointer, number, wide, wide, wide, pointer, number, pointer, wide, number)
        ]

    def runs(self, level: int) -> bool:
        return bool(self.library.sparse24_level(level) == level) and not ruled_out(LEVELS[level])

    def pack(self, linear: Linear, made: Made | None = None) -> Tensor:
        tensors = (made or make(linear)).tensors
        blob = torch.empty(self.library.sparse24_packed_bytes(*linear.arguments) + 64, dtype=torch.uint8)
        blob = blob[-blob.data_ptr() % 64 :][:-64]
        blob = blob[: self.library.sparse24_packed_bytes(*linear.arguments)]
        names = ("weight_packed", "weight_meta", "weight_scale", "weight_values")
        addresses = [address(tensors.get(name)) for name in names]
        assert self.library.sparse24_pack(*linear.arguments, *addresses, blob.data_ptr()) == 0
        return blob

    def linear(
        self, blob: Tensor, n: int, x: Tensor, bias: Tensor | None, level: int, y: Tensor | None = None
    ) -> Tensor:
        """x: [M, K], rows any distance apart. Returns [M, N]."""
        if y is None:
            y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype)
        assert self.status(blob, n, x, bias, level, y) == 0
        return y

    def status(self, blob: Tensor, n: int, x: Tensor, bias: Tensor | None, level: int, y: Tensor) -> int:
        return int(self.library.sparse24_linear(*self._arguments(blob, n, x, bias, y), level + 1))

    def twin(self, blob: Tensor, n: int, x: Tensor, bias: Tensor | None, way: int) -> Tensor:
        """What the plain loops of kernels/cpu/sparse24_twin.h make of the same. Returns [M, N]."""
        y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype)
        assert self.library.sparse24_twin(*self._arguments(blob, n, x, bias, y), way) == 0
        return y

    @staticmethod
    def _arguments(blob: Tensor, n: int, x: Tensor, bias: Tensor | None, y: Tensor) -> tuple[Any, ...]:
        rows, k = x.shape
        kind = 0 if bias is None else TYPES[bias.dtype]
        row = (address(x), TYPES[x.dtype], rows, k, x.stride(0))
        return address(blob), blob.numel(), *row, address(bias), kind, address(y), n


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    library = build.load("cpu/sparse24")
    if library is None:
        pytest.skip("no C++ compiler")
    return Kernel(library)


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest, kernel: Kernel) -> int:
    """Each level that this machine can run."""
    need(LEVELS[request.param], kernel.runs(request.param))
    return int(request.param)


@pytest.fixture
def op(kernel: Kernel) -> Cpu:
    """The back end, with its op loaded."""
    backend = Cpu()
    if reason := backend.reason_unavailable():
        pytest.skip(reason)
    return backend


def activations(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def folds(linear: Linear, level: int, x: Tensor) -> bool:
    return LEVELS[level] in ("avx512bf16", "amx") and linear.bits < 16 and x.dtype == BF16 and x.shape[0] > FOLD_ROWS


@functools.cache
def fixed_rows() -> dict[tuple[int, str], tuple[int, int]]:
    """From and up to how many rows of bf16 AMX takes fixed point by itself: the table that is compiled in."""
    text = (ROOT / "kernels" / "cpu" / "sparse24_crossovers.h").read_text(encoding="utf-8")
    rows = re.findall(r"\{(\d+), (\d+)\}", text[text.index("kFixedRows[5][2]") :])
    return {scheme: (int(first), int(last)) for scheme, (first, last) in zip(SCHEMES, rows, strict=True)}


def in_bytes(linear: Linear, level: int, x: Tensor, way: int = 0) -> bool:
    """Whether kernels/cpu/sparse24_bytes.h serves a call that does not ask for int8."""
    name, three_bytes = LEVELS[level], x.dtype != BF16
    halves = linear.bits == 8 and name != "avxvnni"
    slower = (halves and (three_bytes or linear.pattern == "dense")) or (name == "avx512" and three_bytes)
    served = name in ("avx2", "avxvnni", "avx512") and linear.bits < 16 and way not in (FEW, MANY)
    return served and (not slower or len(x) <= BYTE_ROWS)


def fixed_point(linear: Linear, level: int, x: Tensor, weight: Tensor, way: int) -> Tensor | float:
    """What fixed point, where it serves, may take from activations (kernels/cpu/sparse24_fixed.h, sparse24_bytes.h): per
    piece of K its largest |x| times 1.01 x 2^-15 for each weight, of fp16 and fp32 2^-23."""
    scheme, rows, group = (linear.bits, linear.pattern), len(x), linear.group
    first, last = fixed_rows()[scheme]
    one_row = LEVELS[level] in ("avx512bf16", "amx") and scheme == (4, "2:4") and rows == 1
    fits = linear.bits < 16 and (group == linear.k or group % 64 == 0)
    in_tiles = LEVELS[level] == "amx" and fits and (way == FIXED or first <= rows <= last)
    by_level = way in (0, FIXED) and x.dtype == BF16 and (one_row or in_tiles)
    if not by_level and not in_bytes(linear, level, x, way):
        return 0.0
    size, step = min(group, 256), 1.01 * 2.0 ** (-15 if x.dtype == BF16 else -23)
    return sum(
        x[:, i : i + size].double().abs().amax(1, keepdim=True) * step * weight[:, i : i + size].abs().sum(1)
        for i in range(0, linear.k, size)
    )


def worst(y: Tensor, linear: Linear, x: Tensor, bias: Tensor | None, level: int, way: int = 0) -> float:
    """The largest error as a part of what the arithmetic allows; above 1 is a mistake.

    With exact = sum w x + b and magnitude = sum |w| |x| + |b|, an output of type T may differ from exact by

        sums = (K + K/G + 8) 2^-24 magnitude      sums in fp32: an addition per product, one scaling per group, the bias and
                                                  the parts of an activation; with `folds` 2^-8 magnitude more, else
                                                  `fixed_point` more
        UNIT[T] (|exact| + sums) + sums + TINY[T] half the distance of neighbours in T

    and by 2^-126 sum |w| for each of up to three parts of an activation that may be flushed to zero as denormal bf16.
    """
    weight = make(linear).weight
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    sums = (linear.k + linear.k // linear.group + 8) * 2.0**-24 * magnitude
    sums = sums + (2.0**-8 * magnitude if folds(linear, level, x) else fixed_point(linear, level, x, weight, way))
    sums = sums + 3 * 2.0**-126 * weight.abs().sum(1)
    bound = UNIT[y.dtype] * (exact.abs() + sums) + sums + TINY[y.dtype]
    ratio = (y.double() - exact).abs() / bound
    return float(ratio.nan_to_num(nan=torch.inf).max())  # a NaN, as an output that nobody wrote, is infinitely wrong


# ------------------------------------------------------------------------------------------------------ selection

NS, KS = (1, 15, 16, 17, 32, 33, 48, 100), (16, 48, 80, 128, 384, 1040)
DIMENSIONS = (NS, KS, (32, 64, 128, "channel"), ROWS, (BF16, F16), (BF16, F16, F32), (None, BF16, F16, F32))
Case = tuple[Linear, int, torch.dtype, torch.dtype | None]


@functools.cache
def cases(bits: int, pattern: str) -> tuple[Case, ...]:
    """A few cases in which every two values of two different dimensions meet where they can (greedy pairwise cover)."""

    def allowed(k: Any, group: Any) -> bool:
        return group == "channel" or (bits < 16 and k % group == 0)

    def pairs(values: tuple) -> set:
        return set(itertools.combinations(enumerate(values), 2))

    pick = random.Random(f"{bits} {pattern}")

    def case_with(pair: tuple) -> tuple:
        while True:
            values = [pick.choice(dimension) for dimension in DIMENSIONS]
            for position, value in pair:
                values[position] = value
            if allowed(values[1], values[2]):
                return tuple(values)

    numbered = [[(i, value) for value in dimension] for i, dimension in enumerate(DIMENSIONS)]
    numbered[2] = [(2, group) for group in DIMENSIONS[2] if bits < 16 or group == "channel"]
    every = [pair for a, b in itertools.combinations(numbered, 2) for pair in itertools.product(a, b)]
    missing = {
        (a, b): None for a, b in every if (a[0], b[0]) != (1, 2) or allowed(a[1], b[1])
    }  # a dict keeps its order
    chosen = []
    while missing:
        candidates = [case_with(next(iter(missing))) for _ in range(20)]
        best = max(candidates, key=lambda values: len(pairs(values) & missing.keys()))
        for pair in pairs(best):
            missing.pop(pair, None)
        chosen.append(best)
    return tuple(
        (Linear(bits, pattern, k if group == "channel" else group, n, k, stored, seed=n + k), rows, dtype, bias)
        for n, k, group, rows, stored, dtype, bias in chosen
    )


@scheme_ids
def test_equals_the_float64_product(kernel: Kernel, level: int, bits: int, pattern: str) -> None:
    wrong = []
    for linear, rows, dtype, bias_type in cases(bits, pattern):
        x = activations(rows, linear.k, dtype)
        bias = None if bias_type is None else activations(1, linear.n, bias_type, seed=2)[0]
        y = kernel.linear(kernel.pack(linear), linear.n, x, bias, level)
        if not (error := worst(y, linear, x, bias, level)) <= 1:
            wrong.append((linear, rows, dtype, bias_type, error))
    assert not wrong, f"{len(wrong)} of {len(cases(bits, pattern))}, first {wrong[0]}"


@scheme_ids
@pytest.mark.parametrize("way", [FEW, MANY], ids=["few rows", "many rows"])
@int8_levels
def test_both_ways_whatever_the_crossovers_say(kernel: Kernel, level: int, way: int, bits: int, pattern: str) -> None:
    """Which kernel serves how many rows is a measured table; each must be right for all that the table may give it."""
    for group, rows, dtype in itertools.product((32, 64, 128), range(1, 9), TYPES):
        linear = Linear(bits, pattern, 384 if bits == 16 else group, 33, 384)
        x, bias = activations(rows, 384, dtype), activations(1, 33, F32, seed=2)[0]
        y = kernel.linear(kernel.pack(linear), 33, x, bias, level + way)
        assert worst(y, linear, x, bias, level, way) <= 1, (group, rows, dtype)


@bf16_levels
@pytest.mark.parametrize("group", [32, 64, 128, 512, "channel"])
def test_one_row_in_fixed_point(kernel: Kernel, level: int, group: int | str) -> None:
    """Pieces of every length that a group may have."""
    for k in (1024, 2560) if group == 512 else (128, 384, 1152) if group != "channel" else (16, 48, 272, 1040):
        linear = Linear(4, "2:4", k if group == "channel" else int(group), 50, k)
        x = activations(1, k, BF16) * 2.0 ** torch.randint(-9, 9, (1, k), generator=torch.Generator().manual_seed(3))
        y = kernel.linear(kernel.pack(linear), 50, x.to(BF16), None, level)
        assert worst(y, linear, x.to(BF16), None, level) <= 1, k


@scheme_ids
def test_fixed_point_activations(kernel: Kernel, bits: int, pattern: str) -> None:
    """Every number of rows of a block and several blocks; pieces of a group, of a part of one, and of a last part that is shorter."""
    if bits == 16:
        pytest.skip("16 bits have no codes")
    need("amx", kernel.runs(LEVELS.index("amx")))
    for (k, group), rows in itertools.product(
        [(384, 64), (384, 128), (512, 256), (1024, 512), (48, 48), (1040, 1040), (96, 96)],
        [*range(1, 18), 24, 31, 32, 33, 50, 64],
    ):
        linear = Linear(bits, pattern, group, 33, k)
        x, bias = activations(rows, k, BF16), activations(1, 33, F32, seed=2)[0]
        # as in models, few are large
        x *= 2.0 ** torch.randint(-9, 9, x.shape, generator=torch.Generator().manual_seed(3))
        y = kernel.linear(kernel.pack(linear), 33, x, bias, LEVELS.index("amx") + FIXED)
        assert worst(y, linear, x, bias, LEVELS.index("amx"), FIXED) <= 1, (k, group, rows)


@scheme_ids
@pytest.mark.parametrize("group", [128, "channel"])
def test_many_inputs_and_rows(kernel: Kernel, level: int, bits: int, pattern: str, group: int | str) -> None:
    """So many that two blocks of rows are multiplied in more than one pass over K, with sums that wait in between."""
    k = 2176 if group == 128 else 2064
    if bits == 16 and group != "channel":
        pytest.skip("16 bits have no groups")
    linear = Linear(bits, pattern, k if group == "channel" else int(group), 33, k)
    for rows, dtype in ((300, BF16), (100, F32)):
        x = activations(rows, k, dtype)
        assert worst(kernel.linear(kernel.pack(linear), 33, x, None, level), linear, x, None, level) <= 1


def test_the_bound_tells_one_wrong_weight(kernel: Kernel, level: int) -> None:
    """The checks above would be worth nothing if their bounds let a code or a position pass that is wrong."""
    linear = Linear(4, "2:4", 128, 48, 1024 + 128)
    made = make(linear)
    packed = made.tensors["weight_packed"].clone()
    packed.view(torch.uint8)[7, 3] ^= 1  # the least change of one of 27648 codes
    damaged = replace(made, tensors={**made.tensors, "weight_packed": packed})
    for rows in (1, 5, 40):
        x = activations(rows, linear.k, F32)
        y = kernel.linear(kernel.pack(linear, damaged), linear.n, x, None, level)
        assert worst(y, linear, x, None, level) > 1


# ------------------------------------------------------------------------------------------------------ exactness


@scheme_ids
def test_is_exact_on_integers(kernel: Kernel, bits: int, pattern: str) -> None:
    """Integers and powers of two, all sums of which fp32 holds: the same bits at every level, for every number of rows."""
    levels = [level for level in range(len(LEVELS)) if kernel.runs(level)]
    for (n, k, group), dtype in itertools.product([(33, 48, 48), (48, 256, 64), (100, 384, 128), (17, 96, 32)], TYPES):
        group = k if bits == 16 else group
        linear = Linear(bits, pattern, group, n, k, stored=F16 if n % 2 else BF16, exact=True)
        blob, weight = kernel.pack(linear), make(linear).weight
        generator = torch.Generator().manual_seed(n)
        x = torch.randint(-2, 3, (130, k), generator=generator).to(dtype)
        bias = torch.randint(-9, 10, (n,), generator=generator).to(dtype)
        exact = x.double() @ weight.T + bias.double()
        assert (x.double().abs() @ weight.abs().T * 8).max() < 2**24 and exact.abs().max() < 65504
        for level, rows in itertools.product(levels, (1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 32, 64, 65, 130)):
            y = kernel.linear(blob, n, x[:rows], bias, level)
            assert torch.equal(y, exact[:rows].to(dtype)), (linear, LEVELS[level], rows)


# ----------------------------------------------------------------------------------------------------- int8 compute

int8_schemes = pytest.mark.parametrize(("bits", "pattern"), [scheme for scheme in SCHEMES if scheme[0] < 16])


def int8_variance(linear: Linear, level: int, x: Tensor) -> Tensor:
    """The variance of what rounding to int8 does to each output (kernels/cpu/sparse24_int8.h), if roundings are independent
    and even: a twelfth of a squared step each."""
    made, x = make(linear), x.double()
    weight, per_output = made.weight.square(), LEVELS[level] == "amx"
    piece = linear.k if per_output else min(linear.group, INT8_PIECE)
    total = torch.zeros(len(x), linear.n, dtype=torch.float64)
    for i in range(0, linear.k, piece):
        step = x[:, i : i + piece].abs().amax(1, keepdim=True) / 127
        total += step.square() / 12 @ weight[:, i : i + piece].sum(1, keepdim=True).T
    if per_output:  # the codes of an output's groups are brought to one scale as well
        step = made.tensors["weight_scale"].double().abs().amax(1) * (8 if linear.bits == 4 else 128) / 127
        total += (x.square() @ made.kept.T.double()) * step.square() / 12
    return total


@int8_schemes
@int8_levels
@pytest.mark.parametrize("group", [32, 64, 512, "channel"])
def test_int8_errs_as_its_roundings_do(kernel: Kernel, level: int, bits: int, pattern: str, group: int | str) -> None:
    for k, rows, dtype in [
        (1024, 9, BF16),
        (1024, 24, BF16),
        (1040 if group == "channel" else 1536, 65, F16),
        (2048, 200, F32),
        (512, 17, BF16),
    ]:
        linear = Linear(bits, pattern, k if group == "channel" else int(group), 100, k)
        x = activations(rows, k, dtype)
        x[:, k // 2] *= 8  # an outlier, in one of the pieces
        y = kernel.linear(kernel.pack(linear), linear.n, x, None, level + INT8)
        exact = x.double() @ make(linear).weight.T
        # what storing the output rounds is even, too: a twelfth of the distance of neighbours
        variance = int8_variance(linear, level, x) + (2 * UNIT[dtype] * exact).square() / 12
        error = ((y.double() - exact).square() / variance).mean().sqrt()
        assert 0.6 < error < 1.2, (k, rows, dtype, error)  # below: these products were not made in int8


@int8_schemes
@pytest.mark.parametrize("level", range(1, 5), ids=LEVELS[1:5], indirect=True)
@pytest.mark.parametrize("group", [32, 64, 512, "channel"])
def test_int8_is_exact_where_activations_are(
    kernel: Kernel, level: int, bits: int, pattern: str, group: int | str
) -> None:
    """Without AMX the codes are not rounded; nor are activations of up to 127 steps of a power of two."""
    sizes, counts = (512, 1040 if group == "channel" else 1536), (4, 9, 16, 33, 193, 400)
    for k, rows, dtype in itertools.product(sizes, counts, TYPES):
        linear = Linear(bits, pattern, k if group == "channel" else int(group), 50, k)
        generator = torch.Generator().manual_seed(k + rows)
        x = torch.randint(-127, 128, (rows, k), generator=generator).float()
        piece = min(linear.group, INT8_PIECE)
        for i in range(0, k, piece):
            x[:, i] = 127
            x[:, i : i + piece] *= 2.0 ** torch.randint(-12, -6, (rows, 1), generator=generator)
        x = x.to(dtype)
        y = kernel.linear(kernel.pack(linear), linear.n, x, None, level + INT8)
        weight = make(linear).weight
        exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        sums = (k // piece + 8) * 2.0**-23 * magnitude
        assert ((y.double() - exact).abs() <= UNIT[dtype] * (exact.abs() + sums) + sums).all(), (k, rows, dtype)


@int8_schemes
@int8_levels
def test_int8_leaves_few_rows_alone(kernel: Kernel, level: int, bits: int, pattern: str) -> None:
    few = 8 if LEVELS[level] == "amx" else 2
    linear = Linear(bits, pattern, 64, 48, 256)
    blob, x = kernel.pack(linear), activations(16, 256, BF16)
    for rows in (few, few + 1):
        exact, y = (kernel.linear(blob, 48, x[:rows], None, level + option) for option in (0, INT8))
        assert torch.equal(exact, y) == (rows == few)
    x[3, 5], x[11, 7], x[4] = float("inf"), float("nan"), 0
    y = kernel.linear(blob, 48, x, None, level + INT8)
    assert y[3].isnan().all() and y[11].isnan().all() and not y[4].any()
    assert y[[i for i in range(16) if i not in (3, 11)]].isfinite().all()


# --------------------------------------------------------------------------------------------------- the plain loops

TWIN_FIXED, TWIN_PIECES, TWIN_ROWS = range(3)  # as kernels/cpu/sparse24_twin.h numbers them
TWIN_SHAPES = ((33, 48, 48), (50, 256, 64), (17, 96, 32), (20, 1152, 128), (33, 1040, 1040), (1, 1536, 512))


def uneven(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Activations of which few are large, as in models: some lose bits in fixed point."""
    generator = torch.Generator().manual_seed(3)
    return (activations(rows, k, F32) * 2.0 ** torch.randint(-9, 9, (rows, k), generator=generator)).to(dtype)


@int8_schemes
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_plain_loops_equal_the_float64_product(kernel: Kernel, bits: int, pattern: str, dtype: torch.dtype) -> None:
    """On any processor, so that what kernels are held against is known to be right where none of them runs."""
    avx2 = LEVELS.index("avx2")  # whose bound it has
    for n, k, group in TWIN_SHAPES:
        linear = Linear(bits, pattern, group, n, k)
        x, bias = uneven(3, k, dtype), activations(1, n, F32, seed=2)[0]
        y = kernel.twin(kernel.pack(linear), n, x, bias, TWIN_FIXED)
        assert worst(y, linear, x, bias, avx2) <= 1, (n, k, group)


@int8_schemes
@pytest.mark.parametrize("way", [TWIN_PIECES, TWIN_ROWS], ids=["pieces", "rows"])
def test_the_plain_loops_of_int8_err_as_their_roundings_do(kernel: Kernel, way: int, bits: int, pattern: str) -> None:
    level = LEVELS.index("amx" if way == TWIN_ROWS else "avx2")
    linear = Linear(bits, pattern, 64, 100, 1024)
    x = activations(9, 1024, F32)
    error = kernel.twin(kernel.pack(linear), 100, x, None, way).double() - x.double() @ make(linear).weight.T
    assert 0.8 < (error.square() / int8_variance(linear, level, x)).mean().sqrt() < 1.2


@int8_schemes
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_of_bytes_are_those_of_the_plain_loops(
    kernel: Kernel, level: int, bits: int, pattern: str, dtype: torch.dtype
) -> None:
    """Bit for bit, at every level that multiplies integers: all tails, numbers of rows and kinds of tiles."""
    name = LEVELS[level]
    if name == "portable":
        pytest.skip("it multiplies in fp32")
    compared = 0
    for (n, k, group), rows in itertools.product(TWIN_SHAPES, (1, 2, 3, 4, 5, 8, 9, 17, 130)):
        linear = Linear(bits, pattern, group, n, k)
        blob, x, bias = kernel.pack(linear), uneven(rows, k, dtype), activations(1, n, dtype, seed=2)[0]
        one_row = name in ("avx512bf16", "amx") and (bits, pattern, rows, dtype) == (4, "2:4", 1, BF16)
        in_tiles = name == "amx" and dtype == BF16 and (group == k or group % 64 == 0) and rows <= 17
        calls = {}  # by the options of a call
        if in_bytes(linear, level, x) or one_row or in_tiles:
            calls[FIXED if in_tiles else 0] = TWIN_FIXED
        if rows > (8 if name == "amx" else 2):
            calls[INT8] = TWIN_ROWS if name == "amx" else TWIN_PIECES
        for option, way in calls.items():
            compared += 1
            y = kernel.linear(blob, n, x, bias, level + option)
            assert torch.equal(y, kernel.twin(blob, n, x, bias, way)), (n, k, group, rows, way)
    assert compared


# ------------------------------------------------------------------------------------------- numbers that are special


@scheme_ids
@pytest.mark.parametrize("rows", [1, 3, 5, 40])
def test_denormals_of_fp16_count(kernel: Kernel, level: int, bits: int, pattern: str, rows: int) -> None:
    """Activations, scales or values, and results that are denormal in fp16, exactly."""
    linear = Linear(bits, pattern, 64 if bits < 16 else 192, 33, 192, stored=F16, exact=True)
    made = make(linear)
    generator = torch.Generator().manual_seed(3)
    x = (torch.randint(-2, 3, (rows, 192), generator=generator) * 2.0**-24).to(F16)
    assert (x[x != 0].abs() < 2.0**-14).all()
    y = kernel.linear(kernel.pack(linear), 33, x, None, level)
    assert torch.equal(y, (x.double() @ made.weight.T).to(F16))

    name = "weight_values" if bits == 16 else "weight_scale"
    stored = made.tensors[name]
    count = torch.randint(1, 4, stored.shape, generator=generator)
    small = (count * 2.0**-24).to(F16)
    if bits == 16:
        weight = torch.zeros(linear.n, linear.k, dtype=torch.float64)
        weight[made.kept] = small.double().flatten()
    else:
        weight = made.codes.double() * small.double().repeat_interleave(linear.group, 1)
    blob = kernel.pack(linear, replace(made, tensors={**made.tensors, name: small}))
    large = torch.randint(-2, 3, (rows, 192), generator=generator).to(F16)
    assert torch.equal(kernel.linear(blob, 33, large, None, level), (large.double() @ weight.T).to(F16))


@scheme_ids
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_denormals_of_bf16_are_kept_or_flushed(kernel: Kernel, level: int, bits: int, pattern: str, rows: int) -> None:
    """Nothing but zero may become of them: an activation near 2^-126 is off by at most itself."""
    linear = Linear(bits, pattern, 96, 33, 96)
    for dtype in (BF16, F32):
        tiny = (activations(rows, 96, F32) * 2.0**-128).to(dtype)
        y = kernel.linear(kernel.pack(linear), 33, tiny, None, level)
        assert worst(y, linear, tiny, None, level) <= 1
        mixed = activations(rows, 96, dtype)
        mixed[:, ::3] = tiny[:, ::3]
        y = kernel.linear(kernel.pack(linear), 33, mixed, None, level)
        assert worst(y, linear, mixed, None, level) <= 1


def special(value: str, dtype: torch.dtype) -> Tensor:
    """One number of `dtype`; Python's floats would lose the payload of a NaN."""
    if value == "nan, low payload":
        bits = {F32: (0x7F800001, torch.int32), F16: (0x7C01, torch.int16), BF16: (0x7F81, torch.int16)}[dtype]
        return torch.tensor([bits[0]], dtype=bits[1]).view(dtype)
    return torch.tensor([float(value)], dtype=dtype)


@scheme_ids
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "nan, low payload"])
def test_inf_and_nan_show_in_their_row_only(
    kernel: Kernel, level: int, bits: int, pattern: str, dtype: torch.dtype, value: str
) -> None:
    linear = Linear(bits, pattern, 64 if bits < 16 else 128, 33, 128)
    made, blob = make(linear), kernel.pack(linear)
    for rows in (1, 2, 4, 6, 9, 40, 66):
        x = activations(rows, 128, dtype)
        clean = kernel.linear(blob, 33, x, None, level)
        row, column = rows // 2, 64 + 37 + rows % 4
        x[row, column] = special(value, dtype)
        y = kernel.linear(blob, 33, x, None, level)
        meets = made.kept[:, column] & (made.weight[:, column] != 0)
        assert meets.any()
        if "nan" in value:
            assert y[row][meets].isnan().all(), rows
        else:
            assert not y[row][meets].isfinite().any(), rows
        others = torch.arange(rows) != row
        assert torch.equal(y[others], clean[others]), rows


@scheme_ids
def test_results_that_fp16_cannot_hold_are_infinite(kernel: Kernel, level: int, bits: int, pattern: str) -> None:
    linear = Linear(bits, pattern, 32 if bits < 16 else 96, 17, 96, stored=F16)
    for rows in (1, 4, 7, 40):
        x = activations(rows, 96, F32).mul(2000).to(F16)
        bias = torch.zeros(17)
        bias[3], bias[4], bias[5] = 1e6, -1e6, torch.inf
        y = kernel.linear(kernel.pack(linear), 17, x, bias, level)
        exact = x.double() @ make(linear).weight.T + bias.double()
        assert (y[:, 3] == torch.inf).all() and (y[:, 4] == -torch.inf).all() and (y[:, 5] == torch.inf).all()
        clear = (exact.abs() < 65000) | (exact.abs() > 66000)  # 65520 and more round to infinity
        assert torch.equal(y.isinf()[clear], (exact.abs() > 65520)[clear])
        assert torch.equal(y.sign()[clear], exact.to(F16).sign()[clear])


@scheme_ids
def test_negative_zero_is_zero(kernel: Kernel, level: int, bits: int, pattern: str) -> None:
    linear = Linear(bits, pattern, 96, 33, 96)
    blob = kernel.pack(linear)
    for rows, dtype in itertools.product((1, 5, 40), TYPES):
        x = activations(rows, 96, dtype)
        x[:, ::2] = 0
        negative = torch.where(x == 0, torch.tensor(-0.0, dtype=dtype), x)
        bias = torch.full((33,), -0.0, dtype=dtype)
        expected = kernel.linear(blob, 33, x, None, level)
        assert torch.equal(kernel.linear(blob, 33, negative, bias, level), expected)
        assert (kernel.linear(blob, 33, torch.full_like(x, -0.0), bias, level) == 0).all()


# ------------------------------------------------------------------------------------------------- where tensors lie


@scheme_ids
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_may_be_apart_and_misaligned(
    kernel: Kernel, level: int, bits: int, pattern: str, dtype: torch.dtype
) -> None:
    """Nothing around x counts, nothing around y is written; no pointer needs more alignment than its type."""
    for n, k in ((33, 80), (17, 128)):
        linear = Linear(bits, pattern, k, n, k)
        blob = kernel.pack(linear)
        for rows, offset in itertools.product((1, 3, 5, 9, 33, 70), (1, 3)):
            x, bias = activations(rows, k, dtype), activations(1, n, dtype, seed=2)[0]
            expected = kernel.linear(blob, n, x, bias, level)
            around = torch.full((rows * (k + 13) + offset + 64,), float("nan"), dtype=dtype)
            apart = around[offset:].as_strided((rows, k), (k + 13, 1), storage_offset=offset).copy_(x)
            beside = torch.full((n + offset + 32,), float("nan"), dtype=dtype)
            beside[offset : offset + n] = bias
            out = torch.full((rows * n + offset + 64,), 7.0, dtype=dtype)
            view = out[offset : offset + rows * n].view(rows, n)
            assert view.data_ptr() % 16 and apart.data_ptr() % 16
            kernel.linear(blob, n, apart, beside[offset : offset + n], level, view)
            assert torch.equal(view, expected)
            assert (out[:offset] == 7).all() and (out[offset + rows * n :] == 7).all()


def prepared(op: Cpu, kernel: Kernel, linear: Linear, level: int = -1) -> Tensor:
    """What the back end keeps of a linear; the op finds the level in it."""
    (blob,) = op.prepare(make(linear).tensors, linear.scheme, BF16)
    kernel.library.sparse24_set_options(ctypes.c_void_p(blob.data_ptr()), level + 1)
    return blob


def served(x: Tensor, blob: Tensor, bias: Tensor | None, n: int) -> Tensor:
    result: Tensor = torch.ops.sparsify.sparse24_linear_cpu(x, blob, bias, n)
    return result


@scheme_ids
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_op_takes_tensors_of_any_form(
    op: Cpu, kernel: Kernel, level: int, bits: int, pattern: str, dtype: torch.dtype
) -> None:
    linear = Linear(bits, pattern, 64 if bits < 16 else 192, 33, 192)
    blob, n = prepared(op, kernel, linear, level), linear.n
    x, bias = activations(12, 192, dtype), activations(1, n, dtype, seed=2)[0]
    expected = served(x, blob, bias, n)
    assert expected.dtype == dtype and expected.shape == (12, n) and worst(expected, linear, x, bias, level) <= 1

    wide = torch.full((12, 400), float("nan"), dtype=dtype)
    wide[:, 101:293] = x
    every_second = torch.full((24, 192), float("nan"), dtype=dtype)
    every_second[::2] = x
    every_input = torch.full((12, 384), float("nan"), dtype=dtype)
    every_input[:, ::2] = x
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(12, 192)
    for form in (x.t().contiguous().t(), wide[:, 101:293], every_second[::2], every_input[:, ::2], shifted):
        assert torch.equal(served(form, blob, bias, n), expected)
    repeated = served(x[:1].expand(12, 192), blob, bias, n)
    assert torch.equal(repeated, served(x[:1].repeat(12, 1), blob, bias, n))

    folded = served(x.view(2, 3, 2, 192), blob, bias, n)
    assert folded.shape == (2, 3, 2, n) and torch.equal(folded.view(12, n), expected)
    turned = served(x.view(3, 4, 192).transpose(0, 1), blob, bias, n)
    assert torch.equal(turned, expected.view(3, 4, n).transpose(0, 1))
    row = served(x[5], blob, bias, n)
    assert row.shape == (n,) and torch.equal(row, served(x[5:6], blob, bias, n)[0])
    for shape in ((0, 192), (2, 0, 192)):
        empty = served(x.new_empty(shape), blob, bias, n)
        assert empty.shape == (*shape[:-1], n) and empty.dtype == dtype
    other = torch.cat([bias.new_zeros(1), bias])[1:]
    assert torch.equal(served(x, blob, other, n), expected)


def test_no_rows(kernel: Kernel, level: int) -> None:
    linear = Linear(4, "2:4", 64, 33, 64)
    y = torch.full((1, 33), 7.0)
    assert kernel.status(kernel.pack(linear), 33, torch.empty(0, 64), None, level, y) == 0
    assert (y == 7).all()


# ------------------------------------------------------------------------------------- what a result may depend on


@scheme_ids
def test_bits_do_not_depend_on_threads(kernel: Kernel, level: int, bits: int, pattern: str) -> None:
    before = torch.get_num_threads()
    linear = Linear(bits, pattern, 128 if bits < 16 else 1152, 100, 1152)
    blob = kernel.pack(linear)
    try:
        for rows, dtype in itertools.product((1, 4, 20, 250), (BF16, F16)):
            x, results = activations(rows, 1152, dtype), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                again = kernel.pack(linear)
                assert torch.equal(again, blob)
                results.append(kernel.linear(again, 100, x, None, level))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), (rows, dtype)
    finally:
        torch.set_num_threads(before)


@scheme_ids
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(
    kernel: Kernel, level: int, bits: int, pattern: str, dtype: torch.dtype
) -> None:
    linear = Linear(bits, pattern, 64 if bits < 16 else 192, 33, 192)
    blob = kernel.pack(linear)
    for rows in (*range(2, 17), 66):
        x, other = activations(rows, 192, dtype), activations(rows, 192, dtype, seed=5)
        kept = rows // 2
        other[kept] = x[kept]
        first, second = (kernel.linear(blob, 33, given, None, level) for given in (x, other))
        assert torch.equal(first[kept], second[kept]), rows


@scheme_ids
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("level", range(4), ids=LEVELS[:4], indirect=True)
def test_a_row_alone_is_a_row_among_few(
    kernel: Kernel, level: int, bits: int, pattern: str, dtype: torch.dtype
) -> None:
    """With fp32 products 1 to 4 rows give the same bits wherever they stand, and so do more than 4; with products of bytes
    all numbers of rows do.

    Not so at the bf16 levels, which cut rows into parts and choose among kernels that sum in other orders.
    """
    linear = Linear(bits, pattern, 64 if bits < 16 else 192, 33, 192)
    blob, x = kernel.pack(linear), activations(1, 192, dtype)
    always = in_bytes(linear, level, x.repeat(17, 1))
    for few in [(*range(1, 18), 40, 130)] if always else (range(1, 5), range(5, 18)):
        first = kernel.linear(blob, 33, x.repeat(few[0], 1), None, level)[0]
        for rows in few:
            assert (kernel.linear(blob, 33, x.repeat(rows, 1), None, level) == first).all(), rows


# ---------------------------------------------------------------------------------------------------------- refusals


def test_damaged_blobs_are_refused(kernel: Kernel, level: int) -> None:
    linear = Linear(4, "2:4", 64, 33, 128)
    blob = kernel.pack(linear)
    x, y = activations(2, 128, BF16), torch.full((2, 40), 7.0, dtype=BF16)

    def status(given: Tensor, n: int = 33, x: Tensor = x) -> int:
        return kernel.status(given, n, x, None, level, y)

    for at, value in ((0, b"X"), (8, struct.pack("<q", 34)), (16, struct.pack("<q", 64)), (24, struct.pack("<q", 32)),
                      (32, struct.pack("<i", 8)), (32, struct.pack("<i", 5)), (36, struct.pack("<i", 0)),
                      (40, struct.pack("<i", 2)), (8, struct.pack("<q", -1)), (8, struct.pack("<q", 1 << 62)),
                      (16, struct.pack("<q", 0)), (24, struct.pack("<q", 0))):  # fmt: skip
        damaged = blob.clone()
        damaged[at : at + len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        assert status(damaged) == 1, (at, value)
    for size in (0, 1, 63, 64, blob.numel() // 2, blob.numel() - 1):
        assert status(blob[:size].clone()) == 1, size
    assert status(torch.cat([blob, blob[:1]])) == 1
    assert status(torch.zeros_like(blob)) == 1
    assert status(blob, n=32) == 1 and status(blob, n=34) == 1 and status(blob, n=0) == 1
    assert status(blob, x=activations(2, 112, BF16)) == 1 and status(blob, x=activations(2, 144, BF16)) == 1
    assert status(blob, x=activations(1, 128, BF16).expand(2, 128)) == 1, "rows that overlap"
    assert (y == 7).all()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 3, 6, 70])
def test_two_weights_in_one_place_stay_numbers(kernel: Kernel, level: int, bits: int, rows: int) -> None:
    """Positions that no checkpoint holds: memory that is damaged later must not become infinite or NaN."""
    linear = Linear(bits, "2:4", 64 if bits < 16 else 192, 33, 192)
    made = make(linear)
    made.tensors["weight_meta"].fill_(0x5A)  # (2, 2) and (1, 1)
    for way in (0, FEW, MANY):
        y = kernel.linear(kernel.pack(linear, made), 33, activations(rows, 192, BF16), None, level + way)
        assert y.isfinite().all() and y.abs().max() < 1000


def test_unknown_levels_are_refused(kernel: Kernel) -> None:
    linear = Linear(4, "2:4", 64, 33, 128)
    x, y = activations(1, 128, BF16), torch.empty(1, 33, dtype=BF16)
    absent = [number for number in range(len(LEVELS)) if kernel.library.sparse24_level(number) < 0]
    for level in [len(LEVELS), 98, *absent]:
        assert kernel.status(kernel.pack(linear), 33, x, None, level, y) == 2


@pytest.mark.parametrize(
    "arguments",
    [(0, 64, 4, 64, 1, 0), (16, 0, 4, 64, 1, 0), (16, 24, 4, 24, 1, 0), (16, 64, 5, 64, 1, 0), (16, 64, 16, 64, 0, 0),
     (16, 64, 4, 48, 1, 0), (16, 64, 4, 0, 1, 0), (16, 64, 4, -64, 1, 0), (16, 64, 4, 16, 1, 0), (16, 64, 4, 64, 1, 2),
     (-16, 64, 4, 64, 1, 0), (1 << 40, 1 << 40, 4, 64, 1, 0)],
    ids=str,
)  # fmt: skip
def test_linears_without_a_kernel_are_refused(kernel: Kernel, arguments: tuple[int, ...]) -> None:
    assert kernel.library.sparse24_packed_bytes(*arguments) == -1
    assert kernel.library.sparse24_pack(*arguments, None, None, None, None, None) == 1


@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 192, 256, 384, 512, 768])
def test_groups_are_right_or_refused(kernel: Kernel, level: int, group: int) -> None:
    """Of any size: what the kernels cannot cut into steps they must not take."""
    linear = Linear(4, "2:4", group, 17, 1920 if group == 160 else 1536)
    if kernel.library.sparse24_packed_bytes(*linear.arguments) < 0:
        assert group not in (32, 64, 128)
        return
    for rows in (1, 12, 70):
        x = activations(rows, linear.k, F16)
        y = kernel.linear(kernel.pack(linear), linear.n, x, None, level)
        assert worst(y, linear, x, None, level) <= 1, rows


def test_the_op_refuses_what_does_not_belong_together(op: Cpu, kernel: Kernel) -> None:
    linear = Linear(4, "2:4", 64, 33, 128)
    blob, x = prepared(op, kernel, linear), activations(2, 128, BF16)
    together = "do not belong together"
    for weight in (blob[:-1], blob[:10], blob[:0], torch.zeros_like(blob), blob.flip(0), torch.cat([blob, blob])):
        with pytest.raises(RuntimeError, match=together):
            served(x, weight, None, 33)
    for weight in (blob[:1].expand(blob.numel()), blob.to(torch.int32), blob[::2]):
        with pytest.raises(RuntimeError, match="weight"):
            served(x, weight, None, 33)
    with pytest.raises(RuntimeError, match=together):
        served(x, blob, None, 32)
    with pytest.raises(RuntimeError, match=together):
        served(x[:, :112], blob, None, 33)
    for bias in (torch.zeros(32), torch.zeros(66)[::2]):
        with pytest.raises(RuntimeError, match="bias must be contiguous"):
            served(x, blob, bias, 33)
    for given, offset in ((x.double(), None), (x, torch.zeros(33, dtype=torch.float64)), (x.int(), None)):
        with pytest.raises(RuntimeError, match="must be bfloat16, float16 or float32"):
            served(given, blob, offset, 33)
    with pytest.raises(RuntimeError, match="at least one dimension"):
        served(torch.tensor(1.0), blob, None, 33)
    with pytest.raises(RuntimeError, match="cannot run the forced level"):
        served(x, prepared(op, kernel, linear, level=50), None, 33)


@pytest.fixture
def forgets_the_level() -> Iterator[None]:
    cpu._level.cache_clear()
    yield
    cpu._level.cache_clear()


@pytest.mark.usefixtures("forgets_the_level")
def test_environment_forces_a_level(op: Cpu, kernel: Kernel, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, LEVELS[level])
    assert op.describe() == LEVELS[level]
    linear = Linear(8, "2:4", 64, 33, 128)
    x = activations(3, 128, F32)
    y = op.linear(x, op.prepare(make(linear).tensors, linear.scheme, F32), None, linear.scheme)
    assert torch.equal(y, kernel.linear(kernel.pack(linear), 33, x, None, level))


@pytest.mark.usefixtures("forgets_the_level")
def test_a_level_that_is_unknown_or_absent_is_named(op: Cpu, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "sse9")
    with pytest.raises(SparsifyError, match="SPARSIFY_CPU_LEVEL=sse9: expected one of portable, avx2, .*amx"):
        op.describe()

    class Old:  # a processor with nothing but the baseline
        def sparse24_level(self, requested: int) -> int:
            return 0 if requested <= 0 else -1

    monkeypatch.setattr(cpu, "_library", lambda: Old())
    monkeypatch.setenv(FORCE, "avx512")
    with pytest.raises(SparsifyError, match="=avx512: this processor lacks it; the fastest here is portable"):
        op.describe()


# -------------------------------------------------------------------------------------------------------------- pack


def unpack(blob: bytes, linear: Linear) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Codes (the bits of values for 16 bits) [N, K], positions that are kept [N, K] and scales' bits [N, K/G] of a blob,
    read number by number as the comments of kernels/cpu/sparse24_layout.h say."""
    n, k, bits = linear.n, linear.k, linear.bits
    sparse = linear.pattern == "2:4"
    steps, pairs = -(-k // 32), -(-n // 32)
    step_bytes = (64 if sparse else 0) + (16 if sparse else 32) * 16 * bits // 8
    codes, kept = [[0] * (steps * 32) for _ in range(n)], [[0] * (steps * 32) for _ in range(n)]

    def signed(byte: int) -> int:
        return byte - 256 if byte > 127 else byte

    for row, step in itertools.product(range(n), range(steps)):
        pair, half, j = row // 32, row % 32 // 16, row % 16
        start = 64 + ((pair * steps + step) * 2 + half) * step_bytes
        at = blob[start : start + step_bytes]
        words = [int.from_bytes(at[64 * c + 4 * j :][:4], "little") for c in range(len(at) // 64)]
        if not sparse:
            for i in range(32):
                nibble = words[i // 8] >> (i % 2 * 16 + i // 2 % 4 * 4) & 15 if bits == 4 else 0
                codes[row][step * 32 + i] = nibble - 8 if bits == 4 else signed(at[i * 16 + j])
                kept[row][step * 32 + i] = 1
            continue
        for quad, slot in itertools.product(range(8), range(2)):
            t, high = quad % 4, quad // 4
            position = words[0] >> (16 * slot + 4 * t + 2 * high) & 3
            if bits == 4:
                code = (words[1 + high] >> (16 * slot + 4 * t) & 15) - 8
            elif bits == 8:
                code = signed(at[64 + quad * 32 + slot * 16 + j])
            else:
                code = words[1 + quad] >> 16 * slot & 0xFFFF
            where = step * 32 + quad * 4 + position
            assert position > 1 or position == slot, "a value at position 0 or 1 lies in the slot of that number"
            assert not kept[row][where], "two values in one place"
            codes[row][where], kept[row][where] = code, 1
    for row in range(n):  # what fills the last step up multiplies zeros
        assert not any(codes[row][k:])
    groups = 0 if bits == 16 else k // linear.group
    scales = blob[64 + pairs * steps * 2 * step_bytes :]
    assert len(scales) == pairs * groups * 64
    found = [
        [int.from_bytes(scales[((row // 32 * groups + g) * 32 + row % 32) * 2 :][:2], "little") for g in range(groups)]
        for row in range(n)
    ]
    return [row[:k] for row in codes], [row[:k] for row in kept], found


@scheme_ids
@pytest.mark.parametrize("stored", [BF16, F16], ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(1, 16, 16), (17, 48, 48), (33, 64, 32), (50, 256, 128)])
def test_packing_keeps_every_number(
    kernel: Kernel, bits: int, pattern: str, stored: torch.dtype, n: int, k: int, group: int
) -> None:
    linear = Linear(bits, pattern, k if bits == 16 else group, n, k, stored, seed=n)
    made, blob = make(linear), bytes(kernel.pack(linear).tolist())
    magic, *header = struct.unpack("<8sqqqiiii", blob[:48])
    assert magic == b"SPSES401"
    assert header == [n, k, linear.group, bits, int(pattern == "2:4"), TYPES[stored], 0]
    codes, kept, scales = unpack(blob, linear)
    wanted = made.codes.view(torch.int16).int() & 0xFFFF if bits == 16 else made.codes
    assert torch.equal(torch.tensor(codes)[made.kept], wanted[made.kept].long())
    assert torch.equal(torch.tensor(kept).bool(), made.kept)
    assert torch.equal(torch.tensor(codes)[~made.kept], torch.zeros(int((~made.kept).sum()), dtype=torch.long))
    if bits < 16:
        assert torch.equal(torch.tensor(scales), made.tensors["weight_scale"].view(torch.int16).long() & 0xFFFF)


# ----------------------------------------------------------------------------------------------- compilers, fallbacks


# What checks every access for what the processor itself would refuse (null) or for what no code here has (virtual functions)
# triples the time to compile.
SANITIZE = ["-std=c++17", "-O1", "-g1", "-fno-var-tracking-assignments", "-fsanitize=address,undefined"]
SANITIZE += ["-fno-sanitize=null,object-size,vptr", "-fno-sanitize-recover=all"]


def compiled_once(driver: Path, compiler: str, flags: list[str]) -> Path:
    """The program, kept in the cache of the tests until a source, the compiler or a flag changes."""
    sources = [driver, *sorted((ROOT / "kernels" / "cpu").glob("*.h")), ROOT / "kernels" / "cpu" / "sparse24.cpp"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    state = hashlib.sha256(b"".join([version, " ".join(flags).encode(), *(path.read_bytes() for path in sources)]))
    program = cache_directory() / "sanitize" / f"{driver.stem}-{state.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        aside = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, str(driver), "-o", str(aside)], check=True, timeout=1800)
        aside.replace(program)
    return program


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    found = build.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    compiler = found.command[0]
    flags = SANITIZE
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("LD_PRELOAD", None)  # the sanitizer's runtime must come first
    built = subprocess.run([compiler, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if built.returncode or subprocess.run([tmp_path / "probe"], env=environment, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizer runtime here")
    program = compiled_once(Path(__file__).with_name("sparse24_sanitize.cpp"), compiler, flags)
    run = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert " 0 failures" in run.stdout and int(run.stdout.split()[0]) > 1000


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_take_every_level(compiler: str, tmp_path: Path) -> None:
    """Clang, and a processor that has none of the faster levels. -O0: targets are checked there too, in a fraction of the time."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    source = ROOT / "kernels" / "cpu" / "sparse24.cpp"
    command = [compiler, "-std=c++17", "-O0", "-fPIC", "-c", str(source), "-o", str(tmp_path / "sparse24.o")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[:4000]


def test_one_build_holds_every_level_that_its_compiler_knows(kernel: Kernel) -> None:
    """Levels that this processor cannot run are in the library all the same: it may be carried to one that can."""
    if shutil.which("objdump") is None or not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("needs objdump and an x86-64 Linux")
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", kernel.library._name], capture_output=True, text=True)
    levels = ("vpermilps", "vfmadd231ps", "vcvtph2ps", "vpmaddubsw", "%zmm", "vdpbf16ps", "vpmultishiftqb", "tdpbf16ps")
    for instruction in (*levels, "{vex} vpdpbusd"):
        assert instruction in code.stdout, instruction


FIRST_USE = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import choose_backend, get_backend
print("chosen", choose_backend(ModuleScheme(4, 64, "2:4", (16, 64)), torch.device("cpu"), torch.bfloat16).name)
print("cpu:", get_backend("cpu").reason_unavailable())
"""


@pytest.mark.parametrize("obstacle", ["switched off", "no compiler"])
def test_without_kernels_the_reference_serves_and_it_is_said_why(obstacle: str, tmp_path: Path) -> None:
    environment = os.environ | {"SPARSIFY_CACHE": str(tmp_path)}
    for name in ("SPARSIFY_BACKEND", "CXX", build.DISABLE):
        environment.pop(name, None)
    environment |= {build.DISABLE: "0"} if obstacle == "switched off" else {"PATH": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_USE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "chosen reference" in run.stdout
    reason = "switched off by SPARSIFY_NATIVE=0" if obstacle == "switched off" else "install g++"
    assert reason in run.stdout + run.stderr, run.stdout + run.stderr
