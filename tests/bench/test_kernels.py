"""`sparsify bench kernels`: shapes, baselines that multiply correctly, and arithmetic on made-up times."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import datetime
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sparsify.bench.kernels as kernels
from sparsify import cli
from sparsify.bench import baselines
from sparsify.bench.baselines import PEERS, Baseline, error_of, ours, random_tensors, torch_linear, vllm_linear
from sparsify.bench.kernels import (
    KernelOptions,
    bench_kernels,
    check_product,
    everywhere,
    first_calls,
    line_up,
    linears_of,
    make_row,
    remarks,
    table,
    take_turns,
)
from sparsify.bench.missing import Absence, PeerMissing
from sparsify.bench.peaks import Glance, Peaks
from sparsify.bench.shapes import BUILT_IN, Linear, model_shape, parse_shape, shape_of_config
from sparsify.cli.bench_kernels import kernel_options
from sparsify.errors import NumericalError, SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.sparse24 import checked_tensors
from sparsify.processor import FORCE
from tests.helpers.tiny import save_tiny

SHAPE = Linear("down", 64, 128)
PEAKS = Peaks(2, 10**6, 40e9, 80e9, 500e9, "avx512", 4000e9, "amx")


class Clock:
    """Time that only the baselines spend."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fake(name: str, nbytes: int, calls: list[Callable[[Tensor], Tensor]]) -> Baseline:
    return Baseline(name, calls, nbytes, torch.float32, torch.zeros(1, 128).double(), 1e-6)


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


# ------------------------------------------------------------------------------------------------------ baselines

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
    baseline = ours(scheme, dtype, copies=2, seed=3)
    assert baseline.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ linear.dense(torch.float32).double().t()
    for call in baseline.calls:
        assert (call(x).double() - exact).abs().max() <= baseline.tolerance * exact.abs().max()
    assert error_of(baseline, x) <= baseline.tolerance


def test_every_valid_position_occurs() -> None:
    meta = random_tensors(ModuleScheme(4, 64, "2:4", (512, 512)))["weight_meta"]
    assert len(meta.unique()) == 36


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peers_are_right(dtype: torch.dtype) -> None:
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    baseline = torch_linear(64, 128, copies=3, dtype=dtype)
    assert baseline.nbytes == 64 * 128 * dtype.itemsize and len(baseline.calls) == 3
    assert baseline.name == ("torch bf16" if dtype == torch.bfloat16 else "torch fp32")
    assert error_of(baseline, x) <= baseline.tolerance
    assert torch.equal(baseline.calls[0](x), baseline.calls[2](x))


@pytest.mark.e2e
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_vllm_is_prepared_as_vllm_prepares_it(group_size: int, needs_vllm: None) -> None:
    """Not an engine, but importing vLLM takes its time and leaves its mark on the process."""
    with pytest.raises(
        PeerMissing, match=r"Output size \(30\) not supported by CPUWNA16, supported .* multiples of 32"
    ):
        vllm_linear(30, 128, 64, 1)
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("this vLLM has no cpu_gemm_wna16: its builds for processors below AVX-512 do not")
    baseline = vllm_linear(96, 128, group_size, copies=2)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert error_of(baseline, x) <= baseline.tolerance
    assert torch.equal(baseline.calls[0](x), baseline.calls[1](x))


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.bench.baselines.find_spec", lambda name: None)
    monkeypatch.setattr("sparsify.bench.ggml.find_spec", lambda name: None)
    monkeypatch.delenv("SPARSIFY_LLAMA_CPP", raising=False)
    field, absences = line_up(SHAPE, KernelOptions(), None)
    assert [c.name for c in field] == ["sparsify", "torch bf16", "torch fp32"]
    assert [(one.peer, one.why, one.where) for one in absences] == [
        ("vLLM wna16", "not installed", "down 64x128"), ("llama.cpp Q4_1", "not installed", "down 64x128"),
    ]  # fmt: skip
    assert "pip install llama-cpp-python" in absences[1].reason and "SPARSIFY_LLAMA_CPP" in absences[1].reason


def test_a_wrong_product_is_an_error() -> None:
    right = torch_linear(64, 128, 1)
    check_product(right, SHAPE)
    for wrong in (lambda x: right.calls[0](x) * 1.5, lambda x: right.calls[0](x) * float("nan")):
        with pytest.raises(NumericalError, match=r"torch bf16 \(.+\) multiplies down 64x128 wrongly"):
            check_product(replace(right, calls=[wrong]), SHAPE)


def test_what_no_format_holds_is_refused() -> None:
    with pytest.raises(SparsifyError, match="64x576 cannot be measured: its 576 inputs are no multiple of the group"):
        line_up(Linear("o", 64, 576), KernelOptions(group_size=128, peers=()), None)


def test_cold_copies_exceed_the_cache() -> None:
    for bits, pattern in ((4, "2:4"), (8, "dense"), (16, "2:4")):
        both = ("torch", "torch-fp32")
        field, _ = line_up(SHAPE, KernelOptions(bits=bits, pattern=pattern, cold=True, peers=both), 100_000)
        assert len(field) == 3
        for baseline in field:
            assert 200_000 <= baseline.nbytes * len(baseline.calls) <= 300_000
    field, _ = line_up(SHAPE, KernelOptions(peers=("torch",)), 100_000)
    assert [len(baseline.calls) for baseline in field] == [1, 1]


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

    field = [fake("a", 10, [spends("a1", 0.05), spends("a2", 0.05)]), fake("b", 10, [spends("b", 0.2)])]
    inputs = {torch.float32: torch.zeros(3, 128)}
    running, first, absences = first_calls(field, inputs, "here", clock)
    assert running == field and first == [pytest.approx(0.5), pytest.approx(2.0)] and absences == []
    turns = take_turns(field, inputs, KernelOptions(rounds=9, seconds=0.2), first, lambda: order.append("|"), clock)
    assert median(turns[0]) == pytest.approx(0.05)
    # the first calls, one more of each to count, then rounds of turns of three bursts, over all copies in order
    assert order[:5] == ["a1", "b", "a1", "b", "|"]
    rounds = "".join(name[0] for name in order[4:]).strip("|").split("|")
    assert len(rounds) == 9 and all(turn.startswith("aaa") and turn.count("b") % 3 == 0 for turn in rounds)
    assert [name for name in order[5:] if name.startswith("a")][:4] == ["a2", "a1", "a2", "a1"]
    # as many turns as the time of one baseline allows: 6 s while it was slow
    assert [len(times) for times in turns] == [9, 3] and turns[1][-1] == pytest.approx(0.2)


def test_a_call_of_many_seconds_is_timed_once() -> None:
    calls, rested = [], []
    baseline = replace(fake("a", 1, [lambda x: calls.append(1) or x]), rest=lambda: rested.append(1))
    inputs = {torch.float32: torch.zeros(1, 128)}
    assert take_turns([baseline], inputs, KernelOptions(rounds=2), [40.0]) == [[40.0]]
    assert not calls and len(rested) == 2
    assert len(take_turns([baseline], inputs, KernelOptions(rounds=2, seconds=0), [1e-3])[0]) == 2


def test_the_input_is_what_was_asked_for() -> None:
    seen = []
    field = [fake("a", 1, [lambda x: seen.append((x.shape, x.dtype)) or x])]
    kernels.measure_row(SHAPE, 5, field, KernelOptions(rounds=1, seconds=0), None, None)
    assert set(seen) == {((5, 128), torch.float32)}


def test_ratios_and_shares() -> None:
    field = [fake("sparsify", 2 * 10**6, [lambda x: x]), fake("torch bf16", 10**7, [lambda x: x])]
    turns = [[1e-4, 9e-4, 2e-4], [8e-4, 8e-4, 1e-4]]
    shape = Linear("o", 1000, 500)
    # the machine slows down for the second turn: its neighbours do, too
    glances = [Glance(40e9, 80e9), Glance(10e9, 20e9), Glance(5e9, 10e9), Glance(20e9, 40e9)]
    row = make_row(shape, 4, field, turns, glances, l3=10**6)
    assert row.ratios == {"torch bf16": pytest.approx(4)}
    assert row.ours.seconds == 2e-4 and row.ours.bandwidth == pytest.approx(1e10)
    assert row.ours.arithmetic == pytest.approx(2 * 1000 * 500 * 4 / 2e-4)
    # shares of the three turns: 2 MB in 0.1 ms of 40 GB/s, in 0.9 ms of 10 GB/s, in 0.2 ms of 20 GB/s
    assert row.exceeds_l3 is True and row.bandwidth_share == pytest.approx(0.5)
    assert row.arithmetic_share == pytest.approx(0.5) and row.glances == glances
    # a call that was timed once is set beside the first two
    once = make_row(shape, 4, field, [[1e-4], [1e-4]], glances, l3=10**7)
    assert once.exceeds_l3 is False and once.bandwidth_share == pytest.approx(0.5)
    many = replace(field[0], calls=[lambda x: x] * 6)
    assert make_row(SHAPE, 1, [many], turns[:1], [], l3=10**7).exceeds_l3 is True
    unknown = make_row(SHAPE, 1, field, turns, [], l3=None)
    assert (unknown.exceeds_l3, unknown.bandwidth_share, unknown.arithmetic_share) == (None, None, None)


class FakeMeter:
    """A machine whose peaks are known."""

    def __init__(self, threads: int) -> None:
        self.asked: list[tuple[str, bool]] = []
        METERS.append(self)

    def __enter__(self) -> "FakeMeter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def peaks(self) -> Peaks:
        return PEAKS

    def glance(self, kind: str, from_memory: bool) -> Glance:
        self.asked.append((kind, from_memory))
        return Glance(PEAKS.read, PEAKS.bfloat16)


METERS: list[FakeMeter] = []


@pytest.fixture
def no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "Meter", FakeMeter)
    monkeypatch.setattr(kernels, "cache_bytes", lambda level: 10**6)
    METERS.clear()


def shown(view: Table, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(view)
    return console.export_text()


def test_table_and_json(no_peaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    options = KernelOptions(rows=(1, 3), peers=("torch",), rounds=1, seconds=0, quiet=True)
    result = bench_kernels(linears_of([], ["64x128", "96x64"]), options)
    assert [(row.linear.n, row.m) for row in result.rows] == [(64, 1), (64, 3), (96, 1), (96, 3)]
    # once before and once after the only round of each row, where the weights are
    assert METERS[0].asked == [("bfloat16", False)] * 8
    parsed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert parsed["peaks"]["read"] == 40e9 and parsed["options"]["rows"] == [1, 3]
    assert parsed["rows"][0]["ratios"].keys() == {"torch bf16"} and len(parsed["rows"][0]["glances"]) == 2
    assert parsed["absences"] == [] and parsed["peers"].keys() == {"torch bf16"}
    assert datetime.fromisoformat(parsed["date"]).tzinfo and parsed["versions"]["torch"]
    assert parsed["command"] and parsed["machine"]["cpu"] and parsed["level"] and parsed["forced_level"] is None
    for text in ("linear 64x128", "cache, 3.33 kB", "torch", "bf16", "--cold", "40.0 GB/s from memory, 80.0 from L3"):
        assert text in shown(table(result), 120), text
    assert "…" not in shown(table(result), 120)
    cold = bench_kernels(linears_of([], ["64x128"]), replace(options, cold=True))
    assert METERS[1].asked == [("bfloat16", True)] * 4
    assert "memory, 3.33 kB" in shown(table(cold), 120)


# ----------------------------------------------------------------------------------------------- peers that do not run

MISSING_OP = "'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"


def lacks_op(*_: Any, **__: Any) -> Any:
    raise AttributeError(MISSING_OP)


@pytest.fixture
def vllm_below_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM whose class for W4A16 is there and promises to work, but whose build has no such operator."""

    class Kernel:
        def __init__(self, *_: object) -> None:
            pass

        @staticmethod
        def can_implement(config: object) -> tuple[bool, str]:
            return True, ""

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.isa_hint = "vec"
            layer.use_w4a8 = False

        apply_weights = lacks_op

    linear = "vllm.model_executor.kernels.linear.mixed_precision"
    modules: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.model_executor": {}, "vllm.model_executor.kernels": {},
        "vllm.model_executor.kernels.linear": {}, linear: {}, f"{linear}.cpu": {"CPUWNA16LinearKernel": Kernel},
        f"{linear}.MPLinearKernel": {"MPLinearLayerConfig": SimpleNamespace},
        "vllm.scalar_type": {"scalar_types": SimpleNamespace(uint4b8=None)},
    }  # fmt: skip
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("sparsify.bench.baselines.find_spec", lambda name: name)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missing_operator_is_a_row(
    as_json: bool, no_peaks: None, vllm_below_avx512: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows at the first call; the table is full all the same, and the command succeeds."""
    argv = ["bench", "kernels", "--shape", "64x128", "--shape", "128x64", "--rows", "1,2", "--rounds", "1", "--quiet"]
    argv += ["--against", "wna16", "w4a8", "torch-fp32"]
    assert cli.main([*argv, *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    if not as_json:
        rows = [line.split() for line in out.splitlines()]
        assert ["vLLM", "wna16", "vLLM", "lacks", "it"] in rows
        assert ["vLLM", "w4a8", "not", "on", "this", "processor"] in rows
        assert f"vLLM wna16: AttributeError: {MISSING_OP}" in out
        assert sum("128" in row and "cache," in row for row in rows) == 0 and out.count("cache, ") == 2
        return
    found = json.loads(out)
    assert [list(row["ratios"]) for row in found["rows"]] == [["torch fp32"]] * 4
    assert found["absences"] == [
        {"peer": "vLLM wna16", "why": "vLLM lacks it", "reason": f"AttributeError: {MISSING_OP}", "where": ""},
        {"peer": "vLLM w4a8", "why": "not on this processor", "reason": "vLLM does not use it on this processor", "where": ""},
    ]  # fmt: skip


ERRORS = [
    (AttributeError(MISSING_OP), "{who} lacks it"),
    (ImportError("libfoo.so: cannot open shared object file"), "import fails"),
    (OSError("x.so: invalid ELF header"), "does not load"),
    (RuntimeError("could not create a primitive"), "{who} failed"),
    (NotImplementedError("AVX512 only"), "{who} lacks it"),
    (MemoryError(), "too little memory"),
    (PeerMissing("too new", "this version is too new"), "too new"),
]


@pytest.mark.parametrize(("error", "why"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("when", ["made", "called", "with many rows"])
@pytest.mark.parametrize("key", PEERS)
def test_whatever_a_peer_raises_the_others_go_on(
    key: str, when: str, error: Exception, why: str, no_peaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(x: Tensor) -> Tensor:
        if when == "called" or x.shape[0] > 4:
            raise error
        return right.calls[0](x)

    def peer(wanted: str, n: int, k: int, group_size: int, copies: int) -> Baseline:
        if wanted == key and when == "made":
            raise error
        return replace(right, name=PEERS[wanted], calls=[fails if wanted == key else right.calls[0]])

    why = why.format(who=PEERS[key].split()[0])
    right = torch_linear(64, 128, 1)
    monkeypatch.setattr(baselines, "peer", peer)
    options = KernelOptions(rows=(2, 5), peers=tuple(PEERS), rounds=1, seconds=0, quiet=True)
    result = bench_kernels([SHAPE], options)
    others = [name for name in PEERS.values() if name != PEERS[key]]
    assert list(result.rows[1].ratios) == others
    assert (PEERS[key] in result.rows[0].ratios) == (when == "with many rows")
    (absent,) = result.absences
    assert (absent.peer, absent.why) == (PEERS[key], why)
    assert absent.where == ("down 64x128, 5 rows" if when == "with many rows" else "")
    text = shown(table(result), 160)
    assert why in text and all(name.split()[-1] in text for name in others)
    assert (type(error).__name__ in absent.reason) != isinstance(error, PeerMissing)


def test_a_peer_that_multiplies_wrongly_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_linear(64, 128, 1)
    wrong = replace(right, calls=[lambda x: right.calls[0](x) * 1.5])
    monkeypatch.setattr(baselines, "peer", lambda *_: wrong)
    field, (absent,) = line_up(SHAPE, KernelOptions(peers=("torch",)), None)
    assert len(field) == 1 and absent.why == "wrong product" and "multiplies down 64x128 wrongly" in absent.reason


def test_ours_must_work(monkeypatch: pytest.MonkeyPatch, no_peaks: None) -> None:
    right = torch_linear(64, 128, 1)
    monkeypatch.setattr(baselines, "ours", lambda *_: replace(right, name="sparsify", calls=[lacks_op]))
    with pytest.raises(AttributeError):
        bench_kernels([SHAPE], KernelOptions(peers=(), quiet=True))


def test_what_is_missing_everywhere_is_said_once() -> None:
    first, second = Linear("o", 8, 8), Linear("down", 8, 16)
    never = [Absence("a", "not installed", "r", linear.label) for linear in (first, second)]
    assert everywhere(never, [first, second]) == [Absence("a", "not installed", "r")]
    once = [*never, Absence("b", "refuses this shape", "r", "o 8x8"), Absence("b", "out of memory", "r", "down 8x16")]
    assert everywhere(once, [first, second])[1:] == once[2:]
    assert everywhere(once[2:3] * 2, [first, second]) == once[2:3]


def test_a_level_that_peers_do_not_keep_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in kernels.OTHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(FORCE, raising=False)
    assert remarks(KernelOptions()) == []
    monkeypatch.setenv(FORCE, "avx2")
    assert [text.partition(":")[0] for text in remarks(KernelOptions())] == ["torch is not held to avx2"]
    for name in kernels.OTHER_VARIABLES:
        monkeypatch.setenv(name, "avx2")
    assert remarks(KernelOptions(peers=("torch", "torch-fp32", "llama.cpp"))) == []
    monkeypatch.setenv(FORCE, "amx")
    assert remarks(KernelOptions()) == []


def test_the_table_is_readable_at_120_columns(no_peaks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_linear(64, 128, 1)
    monkeypatch.setattr(baselines, "peer", lambda key, *_: replace(right, name=PEERS[key]))
    result = bench_kernels([SHAPE], KernelOptions(rows=(2048,), rounds=1, seconds=0, quiet=True))
    large = [replace(row, linear=Linear("gate_up", 28672, 4096)) for row in result.rows]
    for row in large:
        row.timings[0] = replace(row.ours, nbytes=94_400_000)
    text = shown(table(replace(result, rows=large)), 120)
    assert "…" not in text and "gate_up 28672x4096" in text and "94.4 MB" in text
    assert max(map(len, text.splitlines())) <= 120


def test_bad_options_measure_nothing() -> None:
    for options, message in (
        (KernelOptions(rows=()), "--rows takes positive"),
        (KernelOptions(rows=(0,)), "--rows takes positive"),
        (KernelOptions(dtype="int8"), "--dtype int8 is unknown"),
        (KernelOptions(peers=("mkl",)), "--against mkl is unknown; choose from torch, torch-fp32"),
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
    options = kernel_options(args)
    for field in fields(KernelOptions):
        assert getattr(options, field.name) == field.default, field.name
    assert args.models == list(BUILT_IN)
