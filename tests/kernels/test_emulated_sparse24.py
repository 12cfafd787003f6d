"""kernels/cuda/sparse24.cu in the emulator: its products against float64, and bugs planted in it, each of which must be seen."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.files import cache_directory
from sparsify.native import build
from sparsify.native.emulator import FLAGS, EmulatorError, Sparse24
from tests.helpers.linears import Linear, make

BF16, F16 = torch.bfloat16, torch.float16
UNIT = {BF16: 2.0**-8, F16: 2.0**-11}  # half the distance of neighbours relative to a number
SOURCE = build.kernels_directory() / "cuda" / "sparse24.cu"
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 128, 130)  # 15: no divisor of the number of shapes
# Within the contract (multiples of 64), beyond every tile: N of one to five 64s, K of one stage to many, whole and not.
SHAPES = ((64, 64), (192, 320), (128, 192), (320, 448), (256, 640), (64, 1088), (192, 128), (448, 256))
LONG = ((64, 2048), (192, 1088), (128, 1280), (64, 2304))  # enough inputs to be split
GROUPS = (32, 64, 128, 0)  # 0: one scale per channel


@pytest.fixture(scope="module")
def kernel() -> Sparse24:
    return Sparse24(folder=cache_directory() / "emulated-tests")


def fitting(group: int, shape: tuple[int, int]) -> Linear:
    """A linear of about `shape` that groups of `group` divide."""
    n, k = shape
    return Linear(4, "2:4", group or k, n, k if k % (group or 1) == 0 else k + 64)


def rows_of(linear: Linear, m: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [m, K] and a bias [N]. Integers when the linear is exact: then every sum is, in float32, too."""
    generator = torch.Generator().manual_seed(seed)
    if linear.exact:
        x, bias = (
            torch.randint(-4, 5, (m, linear.k), generator=generator),
            torch.randint(-8, 9, (linear.n,), generator=generator),
        )
    else:
        x, bias = torch.randn(m, linear.k, generator=generator), torch.randn(linear.n, generator=generator)
    return x.to(dtype), bias.to(dtype)


def product(
    kernel: Sparse24, linear: Linear, m: int, dtype: torch.dtype, *, biased: bool = False, seed: int = 0, **options: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel makes of random inputs, the exact sums and the sums of magnitudes, [m, N] each."""
    made = make(linear)
    x, bias = rows_of(linear, m, dtype, seed)
    packed = kernel.pack(made.tensors, linear.group)
    found = kernel.linear(
        *(x, packed, linear.n, linear.group, linear.stored),
        bias=bias if biased else None,
        **options,
    )
    shift, weight = bias.double() * biased, made.weight
    if kernel.rounds_weights(m, linear.n, linear.k, linear.group, dtype, linear.stored, options.get("config", -1)):
        weight = weight.to(dtype).double()
    return found, x.double() @ weight.T + shift, x.double().abs() @ weight.abs().T + shift.abs()


def assert_exact(found: Tensor, exact: Tensor, _: Tensor) -> None:
    """Sums of integers that float32 holds: the result is that sum, rounded once."""
    assert exact.abs().max() < 2**20
    assert torch.equal(found, exact.to(found.dtype))


def assert_close(found: Tensor, exact: Tensor, magnitude: Tensor, k: int) -> None:
    """One rounding of the result, and float32 sums: at most one rounding per step of 32 inputs, per group and per split."""
    slack = magnitude * (k / 16 + 16) * 2.0**-24
    assert ((found.double() - exact).abs() <= UNIT[found.dtype] * (exact.abs() + slack) + slack + 2.0**-25).all()


# ---------------------------------------------------------------------------------------------------- products
def sweep(
    configs: int, shapes: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, tuple[int, int], torch.dtype, int]]:
    """Every config with every group size and type; rows and shapes go round."""
    rows, places = itertools.cycle(ROWS), itertools.cycle(shapes)
    for config, group, dtype in itertools.product(range(-1, configs), GROUPS, UNIT):
        yield config, group, next(places), dtype, next(rows)


@pytest.mark.parametrize("splitting", [False, True], ids=["whole", "split"])
def test_products_of_every_config_are_rounded_once(kernel: Sparse24, splitting: bool) -> None:
    split = 0
    for count, (config, group, shape, dtype, m) in enumerate(
        sweep(len(kernel.configs()), LONG if splitting else SHAPES)
    ):
        plain = fitting(group, shape)
        stored = (BF16, F16)[count // 2 % 2]
        linear = Linear(4, "2:4", plain.group, plain.n, plain.k, stored=stored, seed=count, exact=True)
        options = {"config": config, "multiprocessors": 200 if splitting else 1}
        split += kernel.splits(m, linear.n, linear.k, linear.group, **options)
        try:
            assert_exact(*product(kernel, linear, m, dtype, biased=count % 3 > 0, seed=count, **options))
        except (AssertionError, SparsifyError) as error:
            raise AssertionError(f"{linear}, {m} rows of {dtype}, config {config}: {error}") from error
    assert split >= 20 if splitting else split <= count // 2


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_products_of_real_numbers(kernel: Sparse24, group: int, dtype: torch.dtype) -> None:
    for m, multiprocessors, shape in (
        (1, 1, (128, 512)),
        (5, 108, (64, 1024)),
        (40, 16, (192, 640)),
        (130, 1, (64, 256)),
    ):
        linear = fitting(group, shape)
        options = {"multiprocessors": multiprocessors}
        found, exact, magnitude = product(kernel, linear, m, dtype, biased=True, **options)
        assert_close(found, exact, magnitude, linear.k)


def test_every_number_of_rows(kernel: Sparse24) -> None:
    linear = Linear(4, "2:4", 64, 64, 128, exact=True)
    packed = kernel.pack(make(linear).tensors, 64)
    x, bias = rows_of(linear, 130, BF16)
    exact = (x.double() @ make(linear).weight.T + bias.double()).to(BF16)
    for m in range(1, 131):
        assert torch.equal(kernel.linear(x[:m], packed, 64, 64, BF16, bias=bias), exact[:m]), m


def test_rows_may_lie_apart(kernel: Sparse24) -> None:
    linear = Linear(4, "2:4", 64, 128, 192, exact=True)
    for config, m in itertools.product(range(-1, len(kernel.configs())), (1, 11)):
        assert_exact(*product(kernel, linear, m, F16, config=config, stride=192 + 8))


def test_blocks_may_run_in_any_order(kernel: Sparse24) -> None:
    linear = Linear(4, "2:4", 64, 192, 1024)
    kernel.emulated.block_order(descending=True)
    backwards = product(kernel, linear, 20, BF16, multiprocessors=100)[0]
    kernel.emulated.block_order(descending=False)
    assert torch.equal(backwards, product(kernel, linear, 20, BF16, multiprocessors=100)[0])


def test_the_type_of_the_scales_is_not_that_of_the_rows(kernel: Sparse24) -> None:
    for stored, dtype, group in itertools.product(UNIT, UNIT, (32, 64)):
        linear = Linear(4, "2:4", group, 64, 256, stored=stored)
        found, exact, magnitude = product(kernel, linear, 3, dtype)
        assert_close(found, exact, magnitude, 256)


def test_decoded_weights_are_those_of_the_dense_export(kernel: Sparse24) -> None:
    for (stored, dtype), group in itertools.product(itertools.product(UNIT, UNIT), GROUPS):
        plain = fitting(group, (192, 256))
        linear = Linear(4, "2:4", plain.group, plain.n, plain.k, stored=stored)
        packed = kernel.pack(make(linear).tensors, linear.group)
        found = kernel.decode(packed, linear.n, linear.k, linear.group, stored, dtype)
        assert torch.equal(found, make(linear).weight.to(dtype))


def test_what_the_kernel_does_not_serve(kernel: Sparse24) -> None:
    size = kernel.c.sparse24_cuda_packed_bytes
    assert size(64, 64, 64) == 64 * 64 * 3 // 8 + 64 * 2
    for shape in (
        (32, 64, 64),
        (96, 64, 64),
        (64, 32, 32),
        (64, 96, 32),
        (64, 64, 16),
        (64, 128, 48),
        (64, 192, 128),
        (0, 64, 64),
    ):
        assert size(*shape) < 0, shape
    linear = Linear(4, "2:4", 64, 64, 64)
    packed, x = kernel.pack(make(linear).tensors, 64), torch.ones(2, 64, dtype=BF16)
    for options in ({"stride": 68}, {"config": len(kernel.configs())}):
        with pytest.raises(SparsifyError, match="status 1"):
            kernel.linear(x, packed, 64, 64, BF16, **options)


# ---------------------------------------------------------------------------------------------------- what it costs
def test_shared_memory_has_no_bank_conflicts(kernel: Sparse24) -> None:
    kernel.emulated.reset_counters()
    for config in range(len(kernel.configs())):
        product(kernel, Linear(4, "2:4", 64, 256, 512), 130, BF16, config=config)
    counters = kernel.emulated.counters()
    assert counters.ldmatrix > 1000
    assert (counters.ldmatrix_conflicts, counters.copy_conflicts, counters.store_conflicts) == (0, 0, 0)
    assert counters.load_conflicts < counters.copies / 400  # when the smallest tiles hand out their results


def test_a_token_reads_the_weights_once(kernel: Sparse24) -> None:
    linear = Linear(4, "2:4", 128, 512, 512)
    packed = kernel.pack(make(linear).tensors, 128)
    kernel.emulated.reset_counters()
    kernel.linear(torch.ones(1, 512, dtype=BF16), packed, 512, 128, BF16)
    counters = kernel.emulated.counters()
    # 3 bits a weight and, for each 64 inputs, its group's scale; the row of inputs once per block
    weights = 512 * 512 * 3 // 8 + 512 * 512 // 64 * 2
    assert counters.global_bytes_read == weights + counters.blocks * 512 * 2
    assert counters.mma == 512 // 16 * (512 // 32)


# ---------------------------------------------------------------------------------------------------- planted bugs
@dataclass(frozen=True)
class Plant:
    """A bug: `instead` takes the place of the one expression in the source that matches the group in `where`.

    seen: what the emulator says, or None when only the result tells; also: a second place.
    """

    bug: str
    where: str
    instead: str
    seen: str | None
    split: bool = False  # the inputs, among multiprocessors
    also: tuple[str, str] | None = None


PLANTS = (
    # the pipeline
    Plant(
        "no wait for the copies",
        r"(cp_async_wait<C::STAGES - 2>\(\));",
        "void()",
        "cp.async of thread .* not waited for",
    ),
    Plant(
        "a wait for one group too few",
        r"(cp_async_wait<C::STAGES - 2>\(\));",
        "cp_async_wait<C::STAGES - 1>()",
        "not waited",
    ),
    Plant(
        "no barrier after the wait", r"(block_barrier\(\));  // the stage", "void()", "race|nothing has written it yet"
    ),
    Plant(
        "a barrier in the first stage alone",
        r"(block_barrier\(\));  // the stage",
        "(stage == first ? block_barrier() : void())",
        "race|not waited for",
    ),
    Plant(
        "a stage refilled before all have read it",
        r"(cp_async_wait<C::STAGES - 2>\(\));",
        "(load(stage + C::STAGES - 1, next_slot), cp_async_wait<C::STAGES - 1>())",
        "race: cp_async_16 writes .* read by",
        also=(r"(load\(stage \+ C::STAGES - 1, next_slot\));", "void()"),
    ),
    Plant(
        "a stage filled while it is read",
        r"(load\(stage \+ C::STAGES - 1, next_slot\));",
        "load(stage + C::STAGES - 1, slot)",
        "race|not waited for",
    ),
    Plant(
        "a stage filled with the next one's inputs",
        r"(load\(stage \+ C::STAGES - 1, next_slot\));",
        "load(stage + C::STAGES, next_slot)",
        None,
    ),
    Plant(
        "sums handed over with no barrier",
        r"(block_barrier\(\));\n +if \(wk == 0\) \{",
        "void()",
        "race|nothing has written",
    ),
    Plant(
        "rows of no token left as they were",
        r"for \(int i = (tid); i < C::STAGES \* C::WK",
        "1 << 30",
        "ldmatrix_x4: .* nothing has",
    ),
    Plant(
        "too little shared memory",
        r"dim3\(C::THREADS\), (bytes), stream",
        "bytes / 2",
        "of bounds of the block's shared memory",
    ),
    # tails
    Plant(
        "one row too many",
        r"const int tokens = (args.m - token0 < C::TOKENS \? args.m - token0 : C::TOKENS);",
        "args.m - token0 + 1",
        "cp_async_16: .* out of bounds of global",
    ),
    Plant(
        "one token too many in the result",
        r"i < (tokens) \* \(C::ROWS / 8\)",
        "tokens + 1",
        "global_store: .* out of bounds",
    ),
    Plant(
        "a split too many",
        r"split < (args.splits); \+\+split",
        "args.splits + 1",
        "global_load: .* out of bounds",
        split=True,
    ),
    Plant(
        "half a chunk off",
        r"UNIT_INPUTS\) \* 2 \+ (chunk \* CHUNK);",
        "chunk * CHUNK + 8",
        "cp_async_16: global address .* is misaligned",
    ),
    Plant(
        "scales of the next group",
        r": (tile >> shift)\) \* SCALE_BYTES",
        "(tile >> shift) + 1",
        "out of bounds",
    ),
    # splits
    Plant("the sum of a split lost", r"split = (1); split < args.splits", "2", None, split=True),
    Plant(
        "two splits in one place",
        r"\(size_t\((blockIdx.z)\) \* args.m",
        "0",
        "race: global_store .* written by block",
        split=True,
    ),
    # lanes
    Plant(
        "lanes that part",
        r"works && stage \* C::WK \+ wk < (shape.tiles\(\))",
        "shape.tiles() - (lane < 16 ? 0 : 1000)",
        "divergence: lane 0 .* ldmatrix",
    ),
    Plant(
        "a thread that leaves early",
        r"if \((args.splits > 1)\) return;",
        "tid == 7",
        "block_barrier: .* has left the kernel",
    ),
    Plant("the selector of the other step", r"(mma_sp<T, 1>)\(", "mma_sp<T, 0>", None),
    Plant("positions shifted by a bit", r"\(two \+ 1\) << (8)\)", "7", "invalid metadata"),
    Plant("the scale of another row", r"scale_of\(pair, (half), scale_type\)", "0", None),
)


def planted(source: str, plants: tuple[Plant, ...]) -> str:
    """The kernel with all bugs in it, none of them active: `emulator_plant(i)` switches the i-th on."""
    chosen: dict[tuple[int, int], str] = {}  # by place: several bugs may sit in the same one
    for number, plant in enumerate(plants, 1):
        for where, instead in filter(None, ((plant.where, plant.instead), plant.also)):
            matches = list(re.finditer(where, source))
            assert len(matches) == 1, (
                f"the plant {plant.bug!r} fits {len(matches)} places of the kernel; adapt {where!r}"
            )
            place = matches[0].span(1)
            chosen[place] = f"(planted == {number} ? ({instead}) : {chosen.get(place, source[slice(*place)])})"
    for (begin, end), text in sorted(chosen.items(), reverse=True):
        source = source[:begin] + text + source[end:]
    switch = 'static int planted = 0;\nextern "C" void emulator_plant(int number) { planted = number; }\n'
    return source.replace("\nnamespace {\n", f"\n{switch}namespace {{\n", 1)


@pytest.fixture(scope="module")
def with_bugs(tmp_path_factory: pytest.TempPathFactory) -> Sparse24:
    source = tmp_path_factory.mktemp("planted") / SOURCE.name
    source.write_text(planted(SOURCE.read_text(encoding="utf-8"), PLANTS), encoding="utf-8")
    quick = ["-O0" if flag == "-O2" else flag for flag in FLAGS]
    return Sparse24(source, flags=quick, folder=cache_directory() / "emulated-tests")


ALL_SPLIT = [{"config": config, "multiprocessors": 32} for config in range(-1, 4)]


def of_plant(kernel: Sparse24, plant: Plant) -> tuple[Tensor, Tensor, Tensor]:
    linear = Linear(4, "2:4", 64, 64, 4096, exact=True)  # long enough for every stage of the pipeline to be used again
    options = {"config": -1, "multiprocessors": 1}
    if plant.split:
        options = next(o for o in ALL_SPLIT if kernel.splits(11, 64, 4096, 64, **o))
    return product(kernel, linear, 11, BF16, biased=True, **options)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.bug)
def test_a_planted_bug_is_seen(with_bugs: Sparse24, plant: Plant) -> None:
    with_bugs.c.emulator_plant(0)
    assert_exact(*of_plant(with_bugs, plant))
    with_bugs.c.emulator_plant(1 + PLANTS.index(plant))
    try:
        if plant.seen is not None:
            with pytest.raises(EmulatorError, match=plant.seen):
                of_plant(with_bugs, plant)
        else:
            with pytest.raises(AssertionError):
                assert_exact(*of_plant(with_bugs, plant))
    finally:
        with_bugs.c.emulator_plant(0)
