"""The Triton back end: its kernels in Triton's interpreter against float64, and compiled for GPUs that are not here."""

import importlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.model.linear import LinearWeights
from sparsify.runtime.backends import choose_backend, get_backend
from sparsify.runtime.backends import triton as backend
from sparsify.runtime.backends import triton_tuning as tuning
from sparsify.runtime.backends.triton_config import Config, heuristic
from sparsify.runtime.backends.triton_experts import Routes
from sparsify.runtime.backends.triton_launch import run_experts
from sparsify.runtime.op import sparse24_linear
from tests.helpers.floats import hard_bits, is_nan, to_bfloat16

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

CPU = torch.device("cpu")
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, relative, at most
GEMV = Config("gemv", 1, 64, 128, 1, 4, 1)
GEMM = Config("gemm", 16, 32, 64, 1, 4, 1)
SPLIT = Config("gemm", 32, 64, 64, 2, 4, 1)
TALL = Config("gemm", 64, 64, 128, 1, 4, 1)
DECODE = Config("decode", 1, 32, 64, 1, 4, 1)


@pytest.fixture
def interpreter() -> Iterator[ModuleType]:
    """The kernels as interpreted functions. Triton decides that when it decorates them, so they are loaded anew."""
    from sparsify.runtime.backends import triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.reload(triton_kernels)
    importlib.reload(triton_kernels)


def made(scheme: ModuleScheme, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Checkpoint tensors placed bit by bit by the table of the design, and the float64 weight [N, K] that they mean."""
    generator = torch.Generator().manual_seed(seed)
    n, k = scheme.shape
    sparse = scheme.pattern == "2:4"
    weight = torch.zeros(n, k, dtype=torch.float64)
    half = 1 << (scheme.bits - 1)
    per_word = 32 // scheme.bits
    scale = (torch.rand(n, k // scheme.group_size, generator=generator) * 0.1 + 0.01).to(dtype)
    kept, meta = [], torch.zeros(n, k // 8, dtype=torch.uint8)
    if sparse:
        pairs = torch.combinations(torch.arange(4), 2)
        kept = pairs[torch.randint(0, 6, (n, k // 4), generator=generator)].tolist()
    codes = torch.randint(-half, half, (n, k // 2 if sparse else k), generator=generator)
    values = torch.randn(n, k // 2, generator=generator).to(dtype)
    words = [[0] * (codes.shape[1] // per_word) for _ in range(n)]
    for row in range(n):
        for i, code in enumerate(codes[row].tolist()):
            column = 4 * (i // 2) + kept[row][i // 2][i % 2] if sparse else i
            if scheme.bits == 16:
                weight[row, column] = values[row, i].double()
            else:
                weight[row, column] = code * scale[row, column // scheme.group_size].double()
                words[row][i // per_word] |= (code + half) << (i % per_word * scheme.bits)
        for quad, (first, second) in enumerate(kept[row] if sparse else []):
            meta[row, quad // 2] |= (first | second << 2) << (quad % 2 * 4)
    tensors = {"weight_meta": meta} if sparse else {}
    if scheme.bits == 16:
        return {**tensors, "weight_values": values}, weight
    packed = torch.tensor([[word - (word >> 31 << 32) for word in row] for row in words], dtype=torch.int32)
    return {**tensors, "weight_packed": packed, "weight_scale": scale}, weight


def check(
    config: Config, rows: int, scheme: ModuleScheme, tensors: dict[str, Tensor], weight: Tensor, dtype: torch.dtype,
    bias: bool,
) -> None:  # fmt: skip
    """One product within one rounding of its float64 value; `decode` rounds each weight once as well."""
    generator = torch.Generator().manual_seed(rows)
    n, k = scheme.shape
    x = torch.randn(rows, k, generator=generator).to(dtype)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    y = torch.full((rows, n), float("nan"), dtype=dtype)
    backend.run(config, x, get_backend("triton").prepare(tensors, scheme, dtype), offset, scheme, y)
    exact = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    if offset is not None:
        exact += offset.double()
        magnitude += offset.double().abs()
    bound = exact.abs() * UNIT[dtype] + magnitude * k * 2**-24  # sums in float32
    if config.kind == "decode":
        bound += magnitude * UNIT[dtype]
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, 0], ids=["32", "64", "128", "channel"])
def test_sweep(interpreter: ModuleType, group_size: int, dtype: torch.dtype) -> None:
    """Rows 1 to 130, outputs and inputs that fill no tile, both kinds of scales, with and without bias and splits."""
    n, k = 40, {32: 160, 64: 192, 128: 256, 0: 208}[group_size]
    scheme = ModuleScheme(4, group_size or k, "2:4", (n, k))
    tensors, weight = made(scheme, torch.float16 if group_size == 64 else torch.bfloat16)
    for rows, config in ((1, GEMV), (3, GEMV), (1, GEMM), (5, SPLIT), (17, GEMM), (40, SPLIT), (130, TALL)):
        check(config, rows, scheme, tensors, weight, dtype, bias=rows % 2 == 0 or config is GEMV)


OTHERS = {
    "8 bits": ModuleScheme(8, 32, "2:4", (33, 96)),
    "8 bits, channel": ModuleScheme(8, 80, "2:4", (33, 80)),
    "16 bits": ModuleScheme(16, 80, "2:4", (33, 80)),
    "4 bits, dense": ModuleScheme(4, 32, "dense", (33, 96)),
    "8 bits, dense": ModuleScheme(8, 64, "dense", (20, 192)),
    "8 bits, dense, channel": ModuleScheme(8, 80, "dense", (33, 80)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", OTHERS.values(), ids=OTHERS)
def test_other_schemes(interpreter: ModuleType, scheme: ModuleScheme, dtype: torch.dtype) -> None:
    tensors, weight = made(scheme, torch.bfloat16 if scheme.bits < 16 else dtype)
    for rows, config in ((1, GEMV), (3, GEMM), (6, SPLIT), (5, DECODE)):
        check(config, rows, scheme, tensors, weight, dtype, bias=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decodes_to_the_dense_weights_of_the_reference(interpreter: ModuleType, dtype: torch.dtype) -> None:
    """Long prompts: the same bits as the reference back end multiplies."""
    scheme = ModuleScheme(4, 32, "2:4", (40, 96))
    tensors, _ = made(scheme, torch.bfloat16)
    y = torch.empty(96, 40, dtype=dtype)
    backend.run(
        DECODE, torch.eye(96, dtype=dtype), get_backend("triton").prepare(tensors, scheme, dtype), None, scheme, y
    )
    assert torch.equal(y.T, get_format("sparse24").decode("x", tensors, scheme).dense(dtype))


def test_bfloat16_is_rounded_and_widened_bit_by_bit(interpreter: ModuleType) -> None:
    """On integers, so that no processor's way with denormals or NaN can show or hide anything."""
    from tests.helpers import triton_probes

    bits = hard_bits()
    numbers = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    rounded, widened = torch.empty(len(bits), dtype=torch.bfloat16), torch.empty(len(bits))
    importlib.reload(triton_probes).convert[(1,)](numbers, rounded, widened, len(bits))
    for given, found, wide in zip(
        bits, rounded.view(torch.uint16).tolist(), widened.view(torch.uint32).tolist(), strict=True
    ):
        assert is_nan(found << 16) if is_nan(given) else found == to_bfloat16(given), hex(given)
        assert wide == found << 16, hex(given)


@pytest.mark.parametrize("config", [GEMV, GEMM, SPLIT], ids=["gemv", "gemm", "split"])
def test_zeros_and_denormals_come_out_as_they_are(interpreter: ModuleType, config: Config) -> None:
    """A row of zeros gives zeros; bias and activations may be denormals of bfloat16. Compared as bits."""
    scheme = ModuleScheme(16, 128, "2:4", (32, 128))
    kept = torch.zeros(32, 64, dtype=torch.bfloat16)
    kept[1, 0] = 1.0  # the first of the two kept inputs of the first four
    tensors = {"weight_meta": torch.full((32, 16), 0x44, dtype=torch.uint8), "weight_values": kept}
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x.view(torch.uint16)[0, 0] = 0x0003
    bias = torch.zeros(32, dtype=torch.bfloat16)
    bias.view(torch.uint16)[2] = 0x8001
    y = torch.full((1, 32), float("nan"), dtype=torch.bfloat16)
    backend.run(config, x, get_backend("triton").prepare(tensors, scheme, torch.bfloat16), bias, scheme, y)
    assert y.view(torch.uint16)[0].tolist() == [0, 0x0003, 0x8001, *[0] * 29]


EXPERTS = {
    "ragged": [[0, 1], [1, 4], [4, 0], [1, 3], [1, 5], [1, 4]] * 3,  # none for expert 2; 5: of no expert here
    "one token each": [[0, 1], [2, 3], [4, 5]],
    "all on one": [[3, 5]] * 20,
    "none at all": [[5, 5]] * 2,
}


def check_experts(
    scheme: ModuleScheme,
    ids: list[list[int]],
    dtype: torch.dtype,
    block_m: int = 16,
    block_n: int = 32,
    biases: bool = False,
) -> None:
    """One linear of five experts, tokens by their experts and back: within one rounding of float64."""
    n, k = scheme.shape
    made_of = [made(scheme, torch.bfloat16 if scheme.bits < 16 else dtype, seed) for seed in range(5)]
    each = [get_backend("triton").prepare(tensors, scheme, dtype) for tensors, _ in made_of]
    stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    generator = torch.Generator().manual_seed(len(ids))
    x = torch.randn(len(ids), k, generator=generator).to(dtype)
    gates = torch.rand(len(ids), 2, generator=generator)
    routes = Routes.of(torch.tensor(ids), 5, block_m)
    bias = torch.randn(5, n, generator=generator).to(dtype) if biases else None
    config = Config("experts", block_m, block_n, 64, 1, 4, 1)
    for first in (True, False):
        y = torch.full((2 * len(ids), n), float("nan"), dtype=dtype if first else torch.float32)
        rows = x if first else x.repeat_interleave(2, 0)[routes.order]
        run_experts(config, rows, stacked, bias, scheme, routes, None if first else gates, y)
        for place, entry in enumerate(routes.order.tolist()):
            token, expert, gate = entry // 2, ids[entry // 2][entry % 2], gates.view(-1)[entry].double()
            found = y[place if first else entry].double()
            if expert == 5:
                assert found.isnan().all()  # not touched
                continue
            exact = made_of[expert][1] @ x[token].double() + (0 if bias is None else bias[expert].double())
            bound = made_of[expert][1].abs() @ x[token].double().abs() * k * 2**-24  # sums in float32
            if first:
                assert ((found - exact).abs() <= exact.abs() * UNIT[dtype] + bound).all()
            else:
                assert ((found - gate * exact).abs() <= gate * (exact.abs() * 2**-23 + bound)).all()


@pytest.mark.parametrize("ids", EXPERTS.values(), ids=EXPERTS)
def test_experts_whatever_tokens_they_are_given(interpreter: ModuleType, ids: list[list[int]]) -> None:
    check_experts(ModuleScheme(4, 32, "2:4", (33, 64)), ids, torch.bfloat16)


@pytest.mark.parametrize(
    "scheme",
    [ModuleScheme(4, 64, "2:4", (33, 64)), ModuleScheme(4, 80, "2:4", (33, 80)), *OTHERS.values()],
    ids=["4 bits", "4 bits, channel", *OTHERS],
)
def test_experts_of_every_scheme(interpreter: ModuleType, scheme: ModuleScheme) -> None:
    check_experts(scheme, EXPERTS["ragged"][:5], torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_with_biases(interpreter: ModuleType, dtype: torch.dtype) -> None:
    check_experts(ModuleScheme(4, 32, "2:4", (33, 64)), EXPERTS["ragged"][:5], dtype, biases=True)


@pytest.mark.parametrize("block_m", [32, 64])
def test_experts_in_larger_tiles(interpreter: ModuleType, block_m: int) -> None:
    check_experts(ModuleScheme(4, 32, "2:4", (33, 64)), EXPERTS["all on one"] * 2, torch.bfloat16, block_m, 64)


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("block_m", [16, 64])
def test_routes_are_the_tokens_of_each_expert_in_blocks(tokens: int, block_m: int) -> None:
    ids = torch.randint(0, 8, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    routes, found = Routes.of(ids, 7, block_m), []
    for expert, start in zip(routes.block_expert.tolist(), routes.block_start.tolist(), strict=True):
        if expert < 7:
            stop = min(start + block_m, int(routes.starts[expert + 1]))
            found += [(expert, entry) for entry in routes.order[start:stop].tolist()]
    assert found == sorted((expert, entry) for entry, expert in enumerate(ids.view(-1).tolist()) if expert < 7)
    assert len(routes.block_expert) <= 3 * tokens


def test_our_own_packer(interpreter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sparsify apply` writes, through the op and with the configuration that the rule chooses."""
    monkeypatch.setenv("SPARSIFY_BACKEND", "triton")
    generator = torch.Generator().manual_seed(3)
    dense = torch.randint(-8, 8, (50, 128), generator=generator)
    dense[:, 0::4] = dense[:, 3::4] = 0
    scale = (torch.rand(50, 2, generator=generator) + 0.1).bfloat16()
    linear = LinearWeights(4, "2:4", 64, codes=dense.to(torch.int8), scale=scale)
    tensors = get_format("sparse24").encode(linear)
    scheme = ModuleScheme.of(linear)
    chosen = choose_backend(scheme, CPU, torch.bfloat16)
    assert chosen.name == "triton"
    prepared = chosen.prepare(tensors, scheme, torch.bfloat16)
    weight = linear.dense(torch.float64)
    for shape in ((128,), (2, 3, 128), (0, 128)):
        x = torch.randn(shape, generator=generator).bfloat16()
        y = sparse24_linear(x, prepared, None, scheme, "triton")
        exact = x.double() @ weight.T
        assert y.shape == (*shape[:-1], 50)
        magnitude = x.double().abs() @ weight.abs().T
        assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + magnitude * 2**-17).all()


def test_activations_may_begin_and_lie_anywhere(interpreter: ModuleType) -> None:
    scheme = ModuleScheme(4, 32, "2:4", (32, 64))
    tensors, weight = made(scheme, torch.bfloat16)
    served = get_backend("triton")
    prepared = served.prepare(tensors, scheme, torch.bfloat16)
    memory = torch.randn(2 * 3 * 64 + 1).bfloat16()
    for x in (memory[1 : 1 + 64], memory[: 2 * 3 * 64].view(3, 128)[:, ::2], memory[: 3 * 64].view(64, 3).T):
        y = served.linear(x, prepared, None, scheme)
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=2**-7, atol=2**-7)


def test_result_is_the_same_every_time(interpreter: ModuleType) -> None:
    """Sums of a split are added in one order: no atomics."""
    scheme = ModuleScheme(4, 32, "2:4", (32, 256))
    tensors, _ = made(scheme, torch.bfloat16)
    prepared, x = get_backend("triton").prepare(tensors, scheme, torch.float16), torch.randn(2, 256).half()
    results = [torch.empty(2, 32).half() for _ in range(2)]
    for y in results:
        backend.run(SPLIT, x, prepared, None, scheme, y)
    assert torch.equal(*results)


def test_serves_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scheme, served = ModuleScheme(4, 64, "2:4", (64, 64)), get_backend("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in (served.reason_unavailable() or "")
    assert "not on cpu" in (served.supports(scheme, CPU, torch.bfloat16) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert served.reason_unavailable() is None
    gpu = torch.device("cuda")
    monkeypatch.setattr(backend, "_capability", lambda device: (7, 5))
    assert "8.0" in (served.supports(scheme, gpu, torch.bfloat16) or "")
    monkeypatch.setattr(backend, "_capability", lambda device: (9, 0))
    assert served.supports(scheme, gpu, torch.bfloat16) is None
    assert "float32" in (served.supports(scheme, gpu, torch.float32) or "")


# ------------------------------------------------------------------------------------------------------------ tuning


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_tuning_keeps_the_fastest_for_later_processes(interpreter: ModuleType, cache: Path) -> None:
    scheme = ModuleScheme(4, 64, "2:4", (64, 1024))
    rule = tuning.choose_config(3, scheme, CPU)
    assert rule == heuristic(3, scheme, tuning.UNKNOWN_PROCESSORS)
    times = iter(range(100, 0, -1))  # later candidates are faster
    found = tuning.tune([(3, scheme)], CPU, measure=lambda call: next(times))
    last = tuning.candidates(3, scheme, tuning.UNKNOWN_PROCESSORS)[-1]
    assert found == {(3, scheme): last} and last != rule
    tuning._table.cache_clear()  # as a new process
    assert tuning.choose_config(3, scheme, CPU) == last
    assert tuning.choose_config(16, scheme, CPU) == last  # the same bucket
    assert tuning.choose_config(17, scheme, CPU) == heuristic(17, scheme, tuning.UNKNOWN_PROCESSORS)
    assert [path.name for path in (cache / "triton").iterdir()] == [tuning.table_path(CPU).name]


def test_candidates_that_fail_are_passed_over(interpreter: ModuleType, cache: Path) -> None:
    scheme = ModuleScheme(4, 64, "2:4", (64, 64))

    def fails(call: object) -> float:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(SparsifyError, match="no Triton configuration runs 1 rows"):
        tuning.tune([(1, scheme)], CPU, measure=fails)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"a": {"kind": "gemv"}}', json.dumps({"a": {**vars(GEMV), "kind": "rm"}}), json.dumps({"a": 3})],
)
def test_a_damaged_table_is_named_and_not_used(text: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tuning.table_path(CPU)
    path.parent.mkdir()
    path.write_text(text)
    scheme = ModuleScheme(4, 64, "2:4", (64, 64))
    assert tuning.choose_config(1, scheme, CPU) == heuristic(1, scheme, tuning.UNKNOWN_PROCESSORS)
    assert str(path) in caplog.text and "remove it" in caplog.text


def test_every_configuration_of_the_rule_can_run(interpreter: ModuleType) -> None:
    """A tile of inputs must be whole units and lie in one group; gemv reads whole units."""
    for rows in (1, 2, 16, 17, 64, 65, 128, 512, 1024, 5000):
        for n, k in ((16, 16), (1024, 4096), (4096, 14336), (28672, 4096)):
            for group_size in (32, 64, 128, k):
                if k % group_size:
                    continue
                scheme = ModuleScheme(4, group_size, "2:4", (n, k))
                for config in tuning.candidates(rows, scheme, 132):
                    assert config.tile_k(scheme) % 32 == 0 and config.block_n % 16 == 0 and config.splits >= 1
                    assert group_size % config.tile_k(scheme) == 0 or group_size == k or config.kind != "gemm"
                assert rows <= tuning.bucket(rows) or tuning.bucket(rows) == 2048


def test_only_0_and_1_switch_tuning(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SPARSIFY_TRITON_TUNE", "yes")
    with pytest.raises(SparsifyError, match="SPARSIFY_TRITON_TUNE=yes: expected 0 or 1"):
        tuning.choose_config(1, ModuleScheme(4, 64, "2:4", (64, 64)), CPU)


# ----------------------------------------------------------------------------------------------------- ahead of time


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_without_a_gpu(target: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel for every target, without spills. The results stay in a cache, so only the first run takes long."""
    from sparsify.runtime.backends import triton_compile, triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.rootpath / ".pytest_cache" / "triton"))
    if triton_kernels.INTERPRETED:  # by the user: the fixture above takes its own setting back
        pytest.skip("TRITON_INTERPRET=1: Triton's compiler is replaced")
    scheme = ModuleScheme(4, 128, "2:4", (4096, 4096))
    for config in triton_compile.CONFIGS:
        for first in (True, False) if config.kind == "experts" else (True,):
            resources = triton_compile.compile_for(target, config, scheme, first=first)
            assert resources.code_bytes > 0 and 0 <= resources.shared_bytes <= triton_compile.shared_limit(target)
            if resources.registers is not None:
                assert 0 < resources.registers <= 512 and resources.spilled_bytes == 0
