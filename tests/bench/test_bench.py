import json
import sys
from dataclasses import asdict

import pytest
from rich.console import Console

import sparsify.cli as cli
from sparsify.bench import (
    BenchOptions,
    LatencyWorkload,
    ThroughputWorkload,
    engine_setup,
    latency,
    measure,
    require_vllm,
    serve,
    serving,
    table,
    throughput,
)
from sparsify.bench.machine import describe_machine, serving_environment, thread_binding
from sparsify.errors import CheckpointError, MissingDependency, SparsifyError

from .conftest import write_checkpoint

QUIET = BenchOptions(quiet=True)


def test_latency_separates_first_token_from_the_rest(models, fake_vllm):
    result = latency(models, LatencyWorkload(input_len=16, output_len=21, batch_size=4, iterations=5), QUIET)
    dense, small = result.models
    assert dense.latency.ttft == pytest.approx(0.1)
    assert dense.latency.itl == pytest.approx(0.01)
    assert dense.latency.request == pytest.approx(0.3)
    assert dense.latency.decode_tokens_per_second == pytest.approx(4 / 0.01)
    assert len(dense.latency.first_token_seconds) == 5
    assert dense.ratios == pytest.approx({"size": 1, "decode": 1, "ttft": 1, "request": 1})
    assert small.ratios == pytest.approx({"size": 4, "decode": 2, "ttft": 2, "request": 2})
    assert (small.format, small.nbytes, dense.format) == ("sparse24", 2000, "dense")
    assert result.throughput is None and small.throughput is None


def test_throughput_counts_output_tokens(models, fake_vllm):
    result = throughput(models, ThroughputWorkload(input_len=30, output_len=10, prompts=8), QUIET)
    dense, small = result.models
    assert dense.throughput.output_tokens_per_second == pytest.approx(8 * 10 / 2)
    assert dense.throughput.total_tokens_per_second == pytest.approx(8 * 40 / 2)
    assert dense.throughput.requests_per_second == pytest.approx(4)
    assert small.ratios == pytest.approx({"size": 4, "throughput": 2})
    assert dense.latency is None


def test_both_benchmarks_share_one_start(models, fake_vllm):
    result = measure(models, LatencyWorkload(), ThroughputWorkload(), QUIET)
    assert [entry["model"] for entry in fake_vllm() if "start" in entry] == ["dense", "small"]
    assert set(result.models[1].ratios) == {"size", "decode", "ttft", "request", "throughput"}


def test_repeats_interleave_and_never_overlap(models, fake_vllm):
    result = latency(models, LatencyWorkload(iterations=3), BenchOptions(repeats=2, quiet=True))
    entries = fake_vllm()
    assert [e["model"] for e in entries if "start" in e] == ["dense", "small", "dense", "small"]
    assert ["start" in e for e in entries] == [True, False] * 4
    times = [e.get("start", e.get("end")) for e in entries]
    assert times == sorted(times)
    assert len(result.models[0].latency.request_seconds) == 6


def test_every_model_gets_the_same_engine_and_environment(models, fake_vllm, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    options = BenchOptions(eager=True, engine_args=["--dtype", "bfloat16"], environment={"VLLM_X": "1"}, quiet=True)
    result = latency(models, LatencyWorkload(input_len=100, output_len=20), options)
    first, second = [e for e in fake_vllm() if "start" in e]
    assert first["environment"] == second["environment"]
    assert first["engine"][2:] == second["engine"][2:]
    assert {"--enforce-eager", "--dtype", "--no-enable-prefix-caching"} <= set(first["engine"])
    limit = int(first["engine"][first["engine"].index("--max-model-len") + 1])
    assert 120 < limit <= 152
    environment = result.environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0", "what the shell sets wins over the default"
    assert environment["VLLM_X"] == "1" and int(environment["VLLM_CPU_KVCACHE_SPACE"]) >= 1


def test_environment_override_wins_over_the_shell(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert serving_environment({"VLLM_CPU_OMP_THREADS_BIND": "0-1"})["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"


def test_models_answer_prompts_outside_the_timings(models, fake_vllm):
    result = latency(models, options=BenchOptions(prompts=["hello"], quiet=True))
    assert result.prompts == ["hello"]
    assert [model.answers for model in result.models] == [["dense says hello"], ["small says hello"]]
    engine = fake_vllm()[0]["engine"]
    assert int(engine[engine.index("--max-model-len") + 1]) >= 256, "a chat template needs room"


def test_scratch_is_removed_after_success(models, fake_vllm, tmp_path):
    latency(models, options=QUIET)
    assert not list(tmp_path.glob("sparsify-bench-*"))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("crash", r"small: vLLM failed with exit status 3: ValueError: the flux capacitor is cold\nlast lines"),
        ("killed", r"was killed by signal SIGKILL \(too little memory\?\)"),
        ("nothing", "ended without writing its result"),
    ],
)
def test_failing_process_is_one_clear_error(models, fake_vllm, monkeypatch, mode, message):
    monkeypatch.setenv("FAKE_MODE", mode)
    with pytest.raises(SparsifyError, match=message) as caught:
        latency(models[1:], options=QUIET)
    assert "INFO starting" in str(caught.value) or mode == "killed"


def shown(result, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table(result))
    return console.export_text()


def test_a_missing_op_is_a_row_and_the_others_go_on(models, fake_vllm, monkeypatch, tmp_path, capsys):
    peer = write_checkpoint(tmp_path / "peer", 100, {"max_position_embeddings": 2048, "vocab_size": 49152})
    monkeypatch.setenv("FAKE_BROKEN", "peer")
    options = BenchOptions(repeats=2, prompts=["hello"])
    result = measure([models[0], peer, models[1]], LatencyWorkload(), ThroughputWorkload(), options)
    dense, missing, small = result.models
    assert missing.failure.short == "vLLM lacks it" and dense.failure is small.failure is None
    assert missing.failure.reason.startswith("peer: vLLM failed with exit status 1: AttributeError: ")
    assert "has no attribute 'cpu_gemm_wna16'" in missing.failure.reason
    assert missing.latency is None and missing.throughput is None and missing.answers == []
    assert missing.ratios == {"size": 4.0} and small.ratios["decode"] == pytest.approx(2)
    started = [entry["model"] for entry in fake_vllm() if "start" in entry]
    assert started == ["dense", "peer", "small", "dense", "small"], "what failed once is not started again"
    assert missing.failure.reason in capsys.readouterr().err
    text = shown(result)
    assert "vLLM lacks it" in text and "2.00x" in text and "cpu_gemm_wna16" in text
    assert json.loads(json.dumps(result.to_json()))["models"][1]["failure"] == asdict(missing.failure)
    [log] = tmp_path.glob("sparsify-bench-*/vllm.log")
    assert "INFO loading weights" in log.read_text(), "the log of a failure stays"


def test_without_the_first_model_there_are_no_ratios(models, fake_vllm, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_BROKEN", "dense")
    arguments = ["bench", "latency", str(models[0]), str(models[1]), "--iterations", "2"]
    assert cli.main([*arguments, "--json"]) == 1, "nothing to compare with"
    rows = json.loads(capsys.readouterr().out)["models"]
    assert rows[0]["failure"]["short"] == "vLLM lacks it" and rows[1]["failure"] is None
    assert rows[1]["latency"]["ttft"] > 0 and rows[1]["ratios"] == {"size": 4.0}
    assert cli.main(arguments) == 1
    assert "no ratios: dense did not run" in capsys.readouterr().out
    monkeypatch.setenv("FAKE_BROKEN", "small")
    assert cli.main(arguments) == 0


def test_when_no_model_runs_the_error_says_why_for_each(models, fake_vllm, monkeypatch):
    monkeypatch.setenv("FAKE_BROKEN", "dense,small")
    with pytest.raises(SparsifyError, match=r"(?s)dense: vLLM failed .*cpu_gemm_wna16.*others.*small: vLLM failed"):
        latency(models, options=QUIET)


def test_a_thread_setting_that_fails_leaves_the_other(models, fake_vllm, monkeypatch):
    every = thread_binding("all")
    monkeypatch.setenv("FAKE_BROKEN", f"small {every}")
    result = latency(models, options=BenchOptions(best_threads=True, quiet=True))
    small = result.models[1]
    assert small.failure is None and small.threads == "auto" and small.ratios["decode"] == pytest.approx(2)
    assert [setting.failure is None for setting in small.settings] == [True, False]
    assert "cpu_gemm_wna16" in shown(result)


def test_hanging_process_is_stopped(models, fake_vllm, monkeypatch):
    monkeypatch.setenv("FAKE_MODE", "sleep")
    with pytest.raises(SparsifyError, match="longer than the time limit"):
        latency(models, options=BenchOptions(timeout=1, quiet=True))


def test_labels(models, fake_vllm):
    named = [f"base={models[0]}", models[1]]
    assert [m.model for m in throughput(named, options=QUIET).models] == ["base", "small"]
    assert [m.model for m in throughput(models, options=QUIET, labels=["a", "b"]).models] == ["a", "b"]
    with pytest.raises(SparsifyError, match="two models are called dense"):
        throughput([models[0], models[0]], options=QUIET)
    with pytest.raises(SparsifyError, match="1 labels for 2 models"):
        throughput(models, options=QUIET, labels=["a"])


def test_bad_requests_start_nothing(models, fake_vllm, tmp_path):
    tiny = write_checkpoint(tmp_path / "tiny", 10, {"max_position_embeddings": 64, "vocab_size": 100})
    for call, message in (
        (lambda: latency([]), "at least one model"),
        (lambda: latency([models[0], "./nowhere"]), "nowhere"),
        (lambda: measure(models), "ask for latency or throughput"),
        (lambda: latency(models, LatencyWorkload(output_len=1)), "output length of at least 2"),
        (lambda: throughput(models, ThroughputWorkload(prompts=0)), "prompts is 0"),
        (lambda: latency(models, options=BenchOptions(repeats=0)), "repeats is 0"),
        (lambda: throughput([tiny]), "reads at most 64 tokens"),
        (lambda: latency([tiny], LatencyWorkload(input_len=4, output_len=4)), "has 100 tokens"),
    ):
        with pytest.raises(SparsifyError, match=message):
            call()
    with pytest.raises(FileNotFoundError):
        fake_vllm()  # no process ran, so nothing wrote its log


def test_json_and_table(models, fake_vllm):
    result = measure(models, LatencyWorkload(), ThroughputWorkload(), QUIET)
    parsed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert parsed == json.loads(json.dumps(asdict(result)))
    assert parsed["machine"]["cores"] >= 1 and parsed["machine"]["cpu"]
    assert len(parsed["commands"]) == 3 and all(" bench " in c for c in parsed["commands"])
    assert str(models[0]) not in json.dumps(parsed), "results are shared: no path of this machine"
    text = shown(result, width=80)
    assert "4.00x" in text and "2.00x" in text and "…" not in text and "sparse24" in text
    assert text.index("2.00x") < text.index("200.0 tok/s")


def test_missing_vllm_says_how_to_get_it(monkeypatch, models):
    monkeypatch.setattr(engine_setup, "find_spec", lambda name: None)
    for call in (require_vllm, lambda: latency(models), lambda: serve(models[0])):
        with pytest.raises(MissingDependency, match=r"pip install 'sparsify-24\[cpu\]'"):
            call()


def test_serve_becomes_vllm(models, monkeypatch):
    monkeypatch.setattr(serving, "require_vllm", lambda: None)
    calls = []
    serve(models[1], ["--port", "9"], replace=lambda *call: calls.append(call))
    [(program, command, environment)] = calls
    assert program == sys.executable
    assert command[1:5] == ["-m", "sparsify.bench.vllm_cli", "serve", str(models[1])]
    assert command[5:] == ["--port", "9", "--host", "127.0.0.1", "--served-model-name", "small"]
    assert "VLLM_CPU_KVCACHE_SPACE" in environment
    serve(models[1], ["--served-model-name=mine"], replace=lambda *call: calls.append(call))
    assert calls[1][1][5:] == ["--served-model-name=mine", "--host", "127.0.0.1"]
    with pytest.raises(CheckpointError, match="nowhere"):
        serve("./nowhere", replace=lambda *call: calls.append(call))


@pytest.mark.parametrize(
    ("host", "arguments", "listens", "warned"),
    [
        (None, [], "127.0.0.1", False),
        (None, ["--port", "9"], "127.0.0.1", False),
        ("0.0.0.0", [], "0.0.0.0", True),
        ("::1", [], "::1", False),
        (None, ["--host=0.0.0.0"], "0.0.0.0", True),
        (None, ["--host", ""], "", True),
        (None, ["--host", "0.0.0.0", "--api-key", "secret"], "0.0.0.0", False),
        ("10.0.0.7", ["--api_key=secret"], "10.0.0.7", False),
        (None, ["--config", "all.yaml"], "0.0.0.0", True),
        (None, ["--config", "key.yaml"], "0.0.0.0", False),
        (None, ["--config", "nothing.yaml"], "127.0.0.1", False),
        (None, ["--uds", "socket"], None, False),
    ],
)
def test_serve_listens_on_loopback_unless_told(models, monkeypatch, tmp_path, capfd, host, arguments, listens, warned):
    monkeypatch.setattr(serving, "require_vllm", lambda: None)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tmp_path / "all.yaml").write_text("host: 0.0.0.0\n")
    (tmp_path / "key.yaml").write_text("host: 0.0.0.0\napi-key: secret\n")
    monkeypatch.chdir(tmp_path)
    calls = []
    serve(models[1], arguments, replace=lambda *call: calls.append(call), host=host)
    command = calls[0][1]
    assert serving._value(command, "--host") == listens
    assert sum(argument.partition("=")[0] == "--host" for argument in command) == (listens is not None)
    assert ("checks no key" in capfd.readouterr().err) == warned
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    serve(models[1], arguments, replace=lambda *call: None, host=host)
    assert "checks no key" not in capfd.readouterr().err


def test_serve_takes_one_host(models, monkeypatch):
    monkeypatch.setattr(serving, "require_vllm", lambda: None)
    with pytest.raises(SparsifyError, match=r"given twice, as 127\.0\.0\.1 and behind -- as 0\.0\.0\.0"):
        serve(models[1], ["--host=0.0.0.0"], replace=lambda *call: None, host="127.0.0.1")


def test_describe_machine_is_json():
    assert json.loads(json.dumps(describe_machine()))["memory_gib"] > 0
