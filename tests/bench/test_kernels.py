"""`sparsify bench kernels`: shapes, contestants that multiply correctly, and arithmetic on made-up times."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from statistics import median

import pytest
import torch
from rich.console import Console
from torch import Tensor

import sparsify.bench.kernels as kernels
from sparsify import cli
from sparsify.bench.contestants import Contestant, error_of, ours, random_tensors, torch_linear, vllm_linear
from sparsify.bench.kernels import (
    KernelOptions,
    bench_kernels,
    check_product,
    line_up,
    linears_of,
    make_row,
    table,
    take_turns,
)
from sparsify.bench.peaks import Peaks
from sparsify.bench.shapes import BUILT_IN, Linear, model_shape, parse_shape, shape_of_config
from sparsify.errors import NumericalError, SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.sparse24 import checked_tensors
from tests.tiny import save_tiny

SHAPE = Linear("down", 64, 128)
PEAKS = Peaks(2, 10**6, 40e9, 80e9, 500e9, "avx512", 4000e9, "amx")


class Clock:
    """Time that only the contestants spend."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake(name: str, nbytes: int, calls: list[Callable[[Tensor], Tensor]]) -> Contestant:
    return Contestant(name, calls, nbytes, torch.float32, torch.zeros(1, 128).double(), 1e-6)


# ---------------------------------------------------------------------------------------------------------- shapes


def test_linears_are_merged_as_vllm_does() -> None:
    found = {(linear.name, linear.n, linear.k, linear.count) for linear in linears_of(["smollm2-135m"], [])}
    assert found == {("qkv", 960, 576, 30), ("o", 576, 576, 30), ("gate_up", 3072, 576, 30), ("down", 576, 1536, 30)}
    eight = {(linear.n, linear.k) for linear in linears_of(["llama-3.1-8b"], ["28672x8192"])}
    assert eight == {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (28672, 8192)}
    twice = linears_of(["llama-3.2-1b", "llama-3.2-1b"], ["2048x8192"])
    assert [linear.label for linear in twice] == [
        "qkv 3072x2048", "o 2048x2048", "gate_up 16384x2048", "down, linear 2048x8192",
    ]  # fmt: skip


def test_shapes_of_a_directory(tmp_path) -> None:
    directory = save_tiny(tmp_path / "tiny", "qwen3")
    shape = model_shape(str(directory))
    assert (shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.kv_heads) == (64, 128, 3, 4, 2)
    assert {linear.label for linear in shape.merged()} == {"qkv 128x64", "o 64x64", "gate_up 256x64", "down 64x128"}
    assert len(shape.modules()) == 3 * 7 and shape.modules()["model.layers.2.self_attn.k_proj"] == (32, 64)


def test_what_is_no_shape_is_refused() -> None:
    for text in ("4096", "4096x", "0x16", "ax16", "1x2x3"):
        with pytest.raises(SparsifyError, match="is no shape"):
            parse_shape(text)
    assert parse_shape("14336X4096") == Linear("linear", 14336, 4096)
    with pytest.raises(SparsifyError, match="built-in shapes: smollm2-135m, llama-3.2-1b, llama-3.1-8b"):
        model_shape("./nowhere")
    with pytest.raises(SparsifyError, match="gpt: its config.json has no intermediate_size"):
        shape_of_config("gpt", {"hidden_size": 8, "num_attention_heads": 2, "n_inner": 9})
    with pytest.raises(SparsifyError, match="nothing to measure"):
        linears_of([], [])


def test_head_size_defaults_to_a_share_of_the_hidden_size() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 1}
    shape = shape_of_config("x", {**config, "vocab_size": 7})
    assert (shape.head_dim, shape.kv_heads, shape.tied) == (16, 4, False)


# ------------------------------------------------------------------------------------------------------ contestants

SCHEMES = [
    ModuleScheme(bits, group, pattern, (96, 128))
    for bits, group, pattern in (
        (4, 32, "2:4"), (4, 64, "2:4"), (4, 128, "2:4"), (8, 64, "2:4"), (16, 128, "2:4"), (4, 64, "dense"), (8, 32, "dense"),
    )
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_our_linear_is_valid_and_right(scheme: ModuleScheme, dtype: torch.dtype) -> None:
    tensors = random_tensors(scheme, seed=3)
    checked_tensors("x", tensors, scheme)
    linear = get_format("sparse24").decode("x", tensors, scheme).validate("x")
    assert linear.dense(torch.float32).std() > 0
    contestant = ours(scheme, dtype, copies=2, seed=3)
    assert contestant.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ linear.dense(torch.float32).double().t()
    for call in contestant.calls:
        assert (call(x).double() - exact).abs().max() <= contestant.tolerance * exact.abs().max()
    assert error_of(contestant, x) <= contestant.tolerance


def test_every_valid_position_occurs() -> None:
    meta = random_tensors(ModuleScheme(4, 64, "2:4", (512, 512)))["weight_meta"]
    assert len(meta.unique()) == 36


def test_peers_are_right() -> None:
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    contestant = torch_linear(64, 128, copies=3)
    assert contestant.nbytes == 64 * 128 * 2 and len(contestant.calls) == 3
    assert error_of(contestant, x) <= contestant.tolerance
    assert torch.equal(contestant.calls[0](x), contestant.calls[2](x))


@pytest.mark.e2e
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_vllm_is_prepared_as_vllm_prepares_it(group_size: int, needs_vllm: None) -> None:
    """Not an engine, but importing vLLM takes its time and leaves its mark on the process."""
    contestant = vllm_linear(96, 128, group_size, copies=2)
    if isinstance(contestant, str):
        pytest.skip(contestant)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert error_of(contestant, x) <= contestant.tolerance
    assert torch.equal(contestant.calls[0](x), contestant.calls[1](x))
    assert vllm_linear(30, 128, 64, 1) == "vLLM wna16: Output size (30) not supported by CPUWNA16, " + (
        "supported sizes are multiples of 32"
    )


def test_without_vllm_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.bench.contestants.find_spec", lambda name: None)
    field, remarks = line_up(SHAPE, KernelOptions(), None)
    assert [c.name for c in field] == ["sparsify", "torch bf16"]
    assert remarks == ["vLLM wna16: vLLM is not installed"]


def test_a_wrong_product_is_an_error() -> None:
    right = torch_linear(64, 128, 1)
    check_product(right, SHAPE)
    for wrong in (lambda x: right.calls[0](x) * 1.5, lambda x: right.calls[0](x) * float("nan")):
        with pytest.raises(NumericalError, match="torch bf16 multiplies down 64x128 wrongly"):
            check_product(replace(right, calls=[wrong]), SHAPE)


def test_what_no_format_holds_is_refused() -> None:
    with pytest.raises(SparsifyError, match="64x576 cannot be measured: its 576 inputs are no multiple of the group"):
        line_up(Linear("o", 64, 576), KernelOptions(group_size=128, peers=()), None)


def test_cold_copies_exceed_the_cache() -> None:
    for bits, pattern in ((4, "2:4"), (8, "dense"), (16, "2:4")):
        field, _ = line_up(SHAPE, KernelOptions(bits=bits, pattern=pattern, cold=True, peers=("torch",)), 100_000)
        for contestant in field:
            assert 200_000 <= contestant.nbytes * len(contestant.calls) <= 300_000
    field, _ = line_up(SHAPE, KernelOptions(peers=("torch",)), 100_000)
    assert [len(contestant.calls) for contestant in field] == [1, 1]


# ------------------------------------------------------------------------------------------------------- measuring


def test_contestants_take_turns_and_slow_spells_do_not_count() -> None:
    clock, order = Clock(), []
    slow_until = 20

    def spends(name: str, seconds: float) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            order.append(name)
            clock.now += seconds * (10 if len(order) < slow_until else 1)
            return x

        return call

    field = [fake("a", 10, [spends("a1", 0.5), spends("a2", 0.5)]), fake("b", 10, [spends("b", 2.0)])]
    turns = take_turns(field, m=3, k=128, options=KernelOptions(rounds=9, seconds=2.0), clock=clock)
    assert [len(times) for times in turns] == [9, 9]

    assert median(turns[0]) == pytest.approx(0.5) and median(turns[1]) == pytest.approx(2.0)
    # two calls each to warm up and to count; then turns of three bursts, over all copies in order
    assert order[:4] == ["a1", "a2", "b", "b"]
    turn = order[4:]
    assert turn[0].startswith("a") and turn.index("b") % 3 == 0
    assert [name for name in turn if name.startswith("a")][:4] == ["a1", "a2", "a1", "a2"]
    changes = [x for x, y in zip(turn, ["", *turn], strict=False) if x[:1] != y[:1]]
    assert len(changes) == 2 * 9


def test_the_input_is_what_was_asked_for() -> None:
    seen = []
    field = [fake("a", 1, [lambda x: seen.append((x.shape, x.dtype)) or x])]
    take_turns(field, m=5, k=128, options=KernelOptions(rounds=1, seconds=0))
    assert set(seen) == {((5, 128), torch.float32)}


def test_ratios_and_shares() -> None:
    field = [fake("sparsify", 2 * 10**6, [lambda x: x]), fake("torch bf16", 10**7, [lambda x: x])]
    turns = [[1e-4, 9e-4, 2e-4], [8e-4, 8e-4, 1e-4]]
    row = make_row(Linear("o", 1000, 500), 4, field, turns, KernelOptions(), PEAKS, l3=10**6)
    assert row.ratios == {"torch bf16": pytest.approx(4)}
    assert row.ours.seconds == 2e-4 and row.ours.bandwidth == pytest.approx(1e10)
    assert row.ours.arithmetic == pytest.approx(2 * 1000 * 500 * 4 / 2e-4)
    assert row.exceeds_l3 is True and row.bandwidth_share == pytest.approx(1e10 / 40e9)
    assert row.arithmetic_share == pytest.approx(2e10 / 4000e9)
    # in the cache it is compared with the cache, float32 with float32; copies that exceed the cache come from memory
    inside = make_row(Linear("o", 1000, 500), 4, field, turns, KernelOptions(dtype="float32"), PEAKS, l3=10**7)
    assert inside.exceeds_l3 is False and inside.bandwidth_share == pytest.approx(1e10 / 80e9)
    assert inside.arithmetic_share == pytest.approx(2e10 / 500e9)
    many = replace(field[0], calls=[lambda x: x] * 6)
    assert make_row(SHAPE, 1, [many], turns[:1], KernelOptions(), PEAKS, l3=10**7).exceeds_l3 is True
    unknown = make_row(SHAPE, 1, field, turns, KernelOptions(), None, l3=None)
    assert (unknown.exceeds_l3, unknown.bandwidth_share, unknown.arithmetic_share) == (None, None, None)


@pytest.fixture
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_peaks", lambda threads: PEAKS)
    monkeypatch.setattr(kernels, "cache_bytes", lambda level: 10**6)


def test_table_and_json(no_peaks: None) -> None:
    options = KernelOptions(rows=(1, 3), peers=("torch",), rounds=1, seconds=0, quiet=True)
    result = bench_kernels(linears_of([], ["64x128", "96x64"]), options)
    assert [(row.linear.n, row.m) for row in result.rows] == [(64, 1), (64, 3), (96, 1), (96, 3)]
    parsed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert parsed["peaks"]["read"] == 40e9 and parsed["options"]["rows"] == [1, 3]
    assert parsed["rows"][0]["ratios"].keys() == {"torch bf16"}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(table(result))
    shown = console.export_text()
    for text in ("linear 64x128", "cache, 3.33 kB", "torch bf16", "--cold", "40.0 GB/s from memory, 80.0 from L3"):
        assert text in shown, text
    assert "…" not in shown
    cold = bench_kernels(linears_of([], ["64x128"]), replace(options, cold=True))
    console.print(table(cold))
    assert "memory, 3.33 kB" in console.export_text()


def test_bad_options_measure_nothing() -> None:
    for options, message in (
        (KernelOptions(rows=()), "--rows takes positive"),
        (KernelOptions(rows=(0,)), "--rows takes positive"),
        (KernelOptions(dtype="int8"), "--dtype int8 is unknown"),
        (KernelOptions(peers=("mkl",)), "--against mkl is unknown; choose from torch, wna16, w4a8"),
        (KernelOptions(rounds=0), "--rounds"),
    ):
        with pytest.raises(SparsifyError, match=message):
            bench_kernels([SHAPE], options)


def test_the_command(no_peaks: None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "kernels", "--shape", "64x128", "--rows", "1,2", "--bits", "8", "--group-size", "channel"]
    argv += ["--pattern", "dense", "--dtype", "float32", "--against", "torch", "--rounds", "1", "--quiet"]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = {key: found["options"][key] for key in ("rows", "bits", "group_size", "pattern", "dtype", "peers")}
    assert options == {
        "rows": [1, 2], "bits": 8, "group_size": 0, "pattern": "dense", "dtype": "float32", "peers": ["torch"]
    }  # fmt: skip
    assert len(found["rows"]) == 2
    assert cli.main(argv) == 0
    assert "64x128" in capsys.readouterr().out
    assert cli.main(["bench", "kernels", "--shape", "64"]) == 1
    assert "is no shape" in capsys.readouterr().err


def test_defaults_of_the_command_are_those_of_the_options() -> None:
    args = cli.parse(["bench", "kernels", *BUILT_IN])
    options = cli.kernel_options(args)
    for field in fields(KernelOptions):
        assert getattr(options, field.name) == field.default, field.name
    assert args.models == list(BUILT_IN)
