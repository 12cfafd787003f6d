"""Servers under load, with a stand-in for vLLM's command line that serves over HTTP and computes a queue."""

import io
import json
import math
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from sparsify import cli
from sparsify.bench.engine_process import ModelFailed
from sparsify.bench.targets import open_targets
from sparsify.bench.under_load import (
    Dataset,
    UnderLoad,
    driver,
    measure_under_load,
    parse_dataset,
    parse_goodput,
    parse_steps,
    run,
    server,
    startup,
    tables,
)
from sparsify.bench.under_load.driver import completion_rate, without_proxy
from sparsify.bench.under_load.result import point
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.failure import failure_of

LOAD = UnderLoad(parse_steps("0.5,2,inf", None), requests=20, repeats=1, timeout=30, quiet=True)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replaces vLLM's command line. Returns a function that sets the models' behaviour, whose `ran` lists what ran."""
    log, script = tmp_path / "ran.jsonl", Path(__file__).with_name("fake_vllm.py")
    log.touch()
    monkeypatch.setenv("FAKE_LOG", str(log))
    for module in (server, driver, startup):
        monkeypatch.setattr(
            module, "vllm_command", lambda arguments: [sys.executable, "-I", "-S", str(script), *arguments]
        )
    monkeypatch.setattr(run, "require_vllm", lambda: None)
    monkeypatch.setattr(run, "require_startup", lambda: None)
    monkeypatch.setattr(run, "build_for", lambda formats: None)
    monkeypatch.setattr(server, "POLL_SECONDS", 0.05)

    def behave(**models):
        monkeypatch.setenv("FAKE_MODELS", json.dumps({name: {"capacity": 8, **of} for name, of in models.items()}))

    behave(dense={}, small={"capacity": 16})
    behave.ran = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    behave.rates = lambda: [(e["bench"], e["rate"], e["seed"]) for e in behave.ran() if "bench" in e]
    return behave


def test_rates_are_shares_of_the_capacity_of_the_first_model(models, fake, tmp_path):
    result = measure_under_load(models, tmp_path / "out", replace(LOAD, repeats=2))
    each = [math.inf, 4.0, 16.0]
    assert fake.rates() == [(m, rate, seed) for seed in (1, 2) for m in ("dense", "small") for rate in each]  # A B A B
    assert [e["serve"] for e in fake.ran() if "serve" in e] == ["dense", "small"] * 2
    assert result["capacity"] == {"model": "dense", "requests_per_second": pytest.approx(8)}
    dense, small = result["models"]
    assert [(p["load"], p["rate"], p["saturated"]) for p in dense["points"]] == [
        (None, None, True), (0.5, pytest.approx(4), False), (2, pytest.approx(16), True)
    ]  # fmt: skip
    assert [p["saturated"] for p in small["points"]] == [True, False, False]  # it keeps up with 16
    half = dense["points"][1]
    assert half["completion_rate"]["median"] == pytest.approx(4)
    # 1/8 s a request, in the first round; the second is made twice as slow
    assert half["figures"]["p50_e2el_ms"] == {
        "median": pytest.approx(187.5), "least": pytest.approx(125), "greatest": pytest.approx(250),
        "values": [pytest.approx(125), pytest.approx(250)],
    }  # fmt: skip
    assert half["server"] == {
        "kv_cache_usage": {"median": 0.25, "least": 0.25, "greatest": 0.25, "values": [0.25, 0.25]},
        "requests_running": {"median": 5, "least": 5, "greatest": 5, "values": [5, 5]},
        "requests_waiting": {"median": 1, "least": 1, "greatest": 1, "values": [1, 1]},
    }
    # half as long a request where both keep up; twice the tokens where dense does not
    every = dict.fromkeys(("throughput", "ttft", "tpot", "e2el"), 1)
    assert [p["ratios"] for p in dense["points"]] == [{"throughput": 1}, every, {"throughput": 1}]
    at_once, half, twice = (p["ratios"] for p in small["points"])
    assert at_once == {"throughput": pytest.approx(2)} and half["e2el"] == half["ttft"] == half[
        "tpot"
    ] == pytest.approx(2)
    assert set(twice) == {"throughput"} and twice["throughput"] == pytest.approx((20 / 8) / (19 / 16 + 1 / 16))
    assert "2.00x" in shown(result)
    facts = dense["server"]
    assert (facts["compile_seconds"]["median"], facts["weights_seconds"]["median"]) == (2.5, 1.25)
    assert facts["kv_cache_tokens"]["values"] == [12345, 12345] and facts["weights_gib"] is None
    assert facts["start_seconds"]["least"] > 0 and facts["memory_bytes"]["least"] > 1e6
    assert result["complete"] and result == json.loads((tmp_path / "out" / "serve.json").read_text())


def test_what_was_run_is_recorded(models, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    load = replace(LOAD, steps=parse_steps(None, "3"), goodput={"ttft": 500.0}, engine_args=["--dtype", "bfloat16"])
    result = measure_under_load([models[0]], tmp_path / "out", load)
    served, driven = (next(e for e in fake.ran() if kind in e) for kind in ("serve", "bench"))
    assert served["key"] is None and "secret" not in (tmp_path / "out" / "run.json").read_text()
    served, driven = served["arguments"], driven["arguments"]
    assert served[served.index("--host") + 1] == "127.0.0.1"
    assert {"--no-enable-prefix-caching", "--dtype"} <= set(served)
    assert int(served[served.index("--max-model-len") + 1]) == 224
    assert driven[driven.index("--goodput") + 1] == "ttft:500"
    assert {"--ignore-eos", "--save-detailed"} <= set(driven)
    serve, drive = result["commands"]
    assert " serve MODEL --host 127.0.0.1 --port PORT" in serve and serve.endswith("--dtype bfloat16")
    assert "bench serve" in drive and "--request-rate 3 --seed 1" in drive and str(tmp_path) not in drive
    assert result["capacity"] is None and result["versions"] and result["machine"]["cores"]
    [row] = result["models"][0]["points"]
    assert row["figures"]["request_goodput"]["median"] == pytest.approx(20 / (19 / 3 + 1 / 8) / 2)
    measured = json.loads((tmp_path / "out" / "1-dense" / "rate-3-1.json").read_text())
    assert {"itls", "generated_texts"}.isdisjoint(measured["vllm"]) and len(measured["vllm"]["ttfts"]) == 20


FAILURES = {
    "at start": ({"mode": "dies"}, "failed with exit status 3: ValueError: the flux capacitor is cold"),
    "dies": ({"mode": "dies", "at": "4"}, "failed with exit status 4: RuntimeError: out of flux"),
    "refuses": ({"mode": "refuses", "at": "4"}, "refused or dropped 20 of 20 requests: Bad Request: too long"),
    "drops one": ({"mode": "drops", "at": "4"}, "refused or dropped 1 of 20 requests: Bad Request: too long"),
    "driver": ({"mode": "breaks", "at": "4"}, "vllm bench serve failed with exit status 1: ValueError: no tokenizer"),
    "result": ({"mode": "forgets", "at": "4"}, "a result that is not as vLLM 0.32 writes it (KeyError: 'latencies')"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_server_that_fails_ends_its_row_and_no_other(case, models, fake, tmp_path, capsys):
    setting, reason = FAILURES[case]
    fake(dense=setting, small={})
    repeats = 2 if case == "dies" else 1
    load = replace(LOAD, steps=parse_steps(None, "4"), repeats=repeats, quiet=False)
    result = measure_under_load(models, tmp_path / "out", load)
    dense, small = result["models"]
    assert small["failure"] is None and [p["repeats"] for p in small["points"]] == [repeats]
    assert reason in dense["failure"]["reason"] and dense["failure"]["reason"].startswith("dense: ")
    assert dense["points"] == [] and not result["complete"]
    assert len([e for e in fake.ran() if e.get("serve") == "dense"]) == 1  # it is not started again
    assert dense["failure"]["lines"] and dense["failure"]["lines"][-1] in capsys.readouterr().err
    assert dense["failure"]["short"] in shown(result) and reason in shown(result)


def test_a_server_that_hangs_is_ended(models, fake, tmp_path):
    """When it starts, and in the middle of a measurement; whatever it left running ends with it."""
    fake(dense={"mode": "hangs"}, small={"mode": "hangs", "at": "4"})
    dense, small = open_targets(models)
    with pytest.raises(ModelFailed, match=r"dense: vLLM's server did not answer within 0.3 s, which is the time limit"):
        with server.Server(dense, [], os.environ, tmp_path / "dense.log", timeout=0.3) as hanging:
            hanging.wait_until_ready()
    with pytest.raises(
        ModelFailed, match=r"took longer than the time limit of 2 s for 20 requests at 4 per second"
    ) as error:
        with server.Server(small, [], os.environ, tmp_path / "small.log", timeout=60) as running:
            running.wait_until_ready()
            driver.drive(running, replace(LOAD, timeout=2), 4.0, 1, os.environ, tmp_path / "driver.log")
    assert failure_of(error.value, "vLLM").short == "took too long"
    assert hanging.process.returncode is not None and running.process.returncode is not None


def shown(result):
    """The tables as they are printed, in one line."""
    console = Console(width=240, file=io.StringIO())
    console.print(*tables(result))
    return " ".join(console.file.getvalue().split())


def test_without_the_first_model_the_next_sets_the_capacity(models, fake, tmp_path):
    fake(dense={"mode": "dies"}, small={"capacity": 16})
    result = measure_under_load(models, tmp_path / "out", replace(LOAD, steps=parse_steps("0.5", None)))
    assert result["capacity"] == {"model": "small", "requests_per_second": pytest.approx(16)}
    assert fake.rates() == [("small", math.inf, 1), ("small", 8.0, 1)]
    assert [p["load"] for p in result["models"][1]["points"]] == [0.5]  # the capacity was not asked for as a rate


def test_an_interrupted_run_goes_on(models, fake, tmp_path, capsys):
    out, load = tmp_path / "out", replace(LOAD, steps=parse_steps("0.5,inf", None))
    command = ["bench", "serve", *map(str, models), "--load", "0.5,inf", "--requests", "20", "--repeats", "1"]
    command += ["--output", str(out), "--json", "--quiet"]
    fake(dense={}, small={"mode": "dies", "at": "4"})
    assert cli.main(command) == 1
    first = json.loads(capsys.readouterr().out)
    assert first == json.loads((out / "serve.json").read_text())
    assert [p["load"] for p in first["models"][1]["points"]] == [None]  # what it had measured stays
    before = (out / "1-dense" / "inf-1.json").read_bytes(), len(fake.ran())
    assert cli.main(command) == 1 and "exists already; --resume continues" in capsys.readouterr().err
    fake(dense={}, small={})
    assert cli.main([*command, "--resume"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["complete"] and result["models"][1]["failure"] is None
    assert [(e.get("serve"), e.get("rate")) for e in fake.ran()[before[1] :]] == [("small", None), (None, 4)]
    assert (out / "1-dense" / "inf-1.json").read_bytes() == before[0]
    more = measure_under_load(models, out, replace(load, repeats=2), resume=True)
    assert [p["repeats"] for m in more["models"] for p in m["points"]] == [2] * 4
    assert [seed for *_, seed in fake.rates()] == [1] * 5 + [2] * 4
    with pytest.raises(CheckpointError, match="another set of requests or rates"):
        measure_under_load(models, out, replace(load, requests=21), resume=True)
    with pytest.raises(CheckpointError, match="another set of arguments of the server"):
        measure_under_load(models, out, replace(load, eager=True), resume=True)
    (models[0] / "config.json").write_text(json.dumps({"vocab_size": 49151}))
    with pytest.raises(CheckpointError, match="another list of models"):
        measure_under_load(models, out, load, resume=True)
    assert len(fake.ran()) == before[1] + 2 + 6


def test_cold_and_warm_starts_are_those_of_vllms_json(models, fake, tmp_path):
    fake(dense={}, small={"mode": "starts badly", "at": "never"})
    load = replace(LOAD, steps=parse_steps(None, "4"), engine_args=["--dtype", "bfloat16"])
    plain = measure_under_load(models, tmp_path / "out", load)
    assert plain["complete"] and "cold start" not in shown(plain)
    result = measure_under_load(models, tmp_path / "out", replace(load, startup=3), resume=True)
    dense, small = result["models"]
    assert dense["server"]["cold_start_seconds"] == {"median": 31, "least": 30, "greatest": 32, "values": [30, 31, 32]}
    assert dense["server"]["warm_start_seconds"]["values"] == [9, 10, 11]
    assert dense["server"]["cold_compile_seconds"]["median"] == 20 and dense["server"]["start_seconds"]["median"] > 0
    assert "31 s │ 20 s │ 10 s │ 1.5 s" in shown(result)
    assert not result["complete"] and "vllm bench startup failed with exit status 1" in small["failure"]["reason"]
    assert "no flux" in small["failure"]["reason"] and len(small["points"]) == 1
    ran = [e for e in fake.ran() if "startup" in e]
    assert [e["startup"] for e in ran] == ["dense", "small"] and {"--dtype", "--no-enable-prefix-caching"} <= set(
        ran[0]["arguments"]
    )
    assert "bench startup --model MODEL" in result["commands"][-1] and str(tmp_path) not in str(result["commands"])
    fake(dense={}, small={})
    again = measure_under_load(models, tmp_path / "out", replace(load, startup=3), resume=True)
    assert again["complete"] and [e["startup"] for e in fake.ran() if "startup" in e] == ["dense", "small", "small"]


def test_a_vllm_without_startup_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(startup, "find_spec", lambda name: None)
    with pytest.raises(SparsifyError, match="no `vllm bench startup`: leave out --startup"):
        startup.require_startup()


def test_a_model_of_a_shape(fake, tmp_path):
    load = replace(LOAD, steps=parse_steps(None, "inf"))
    result = measure_under_load(["shape:smollm2-135m@dense+layers1"], tmp_path / "out", load)
    [served] = [e for e in fake.ran() if "serve" in e]
    assert served["arguments"][served["arguments"].index("--load-format") + 1] == "dummy"
    assert result["models"][0]["model"] == "smollm2-135m@dense+layers1" and result["complete"]
    again = measure_under_load(["shape:smollm2-135m@dense+layers1"], tmp_path / "out", load, resume=True)
    assert again["models"] == result["models"] and len(fake.ran()) == 2  # its config lay elsewhere, and it is the same


def test_completion_rate_of_few_requests():
    starts = [0.0, 1.0, 2.0, 3.0]
    assert completion_rate(starts, [5.0] * 4) == pytest.approx(1)  # keeps up, though 4 requests took 8 s
    assert completion_rate(starts, [2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.5)  # one every two seconds
    assert completion_rate([0.0], [1.0]) is None and completion_rate([0, 0], [1, 1]) is None


def test_saturated_is_below_nine_tenths_of_the_rate():
    def found(completed):
        measured = {"rate": 10.0, "completion_rate": completed, "vllm": {}, "server": {}}
        return point(None, [measured])["saturated"]

    assert (found(8.9), found(9.1), found(10.2)) == (True, False, False)


def test_loopback_needs_no_proxy():
    assert without_proxy({"no_proxy": "a.b"})["no_proxy"] == "a.b,127.0.0.1"
    assert without_proxy({})["NO_PROXY"] == "127.0.0.1"


def test_rates_and_limits_are_checked(tmp_path):
    assert [step.name for step in parse_steps("0.5,inf", None)] == ["inf", "load-0.5"]
    assert [step.name for step in parse_steps(None, "2,0.5")] == ["rate-2", "rate-0.5"]
    assert [step.name for step in parse_steps(None, None)] == ["inf", "load-0.25", "load-0.5", "load-0.75", "load-0.9"]
    for loads, rates, said in (
        ("0", None, "'0' is no positive number"), ("nan", None, "positive"), (None, "1,x", "--rates 'x'"),
        ("1,1.0", None, "names load-1 twice"), ("1", "1", "not both"),
    ):  # fmt: skip
        with pytest.raises(SparsifyError, match=said):
            parse_steps(loads, rates)
    assert parse_goodput(["ttft:500", "tpot:0.5"]) == {"ttft": 500, "tpot": 0.5}
    for pair in ("itl:5", "ttft", "ttft:x", "ttft:-1", "ttft:inf"):
        with pytest.raises(SparsifyError, match="NAME:MILLISECONDS"):
            parse_goodput([pair])
    for wrong in ({"requests": 1}, {"repeats": 0}, {"warmup": -1}, {"timeout": 0}, {"steps": ()}):
        with pytest.raises(SparsifyError, match="at least|more than"):
            measure_under_load(["x"], tmp_path / "out", replace(LOAD, **wrong))


def test_datasets_are_checked_before_anything_starts(models, fake, tmp_path):
    assert parse_dataset("random:128/64") == Dataset("random", None, 128, 64)
    assert Dataset("random", None, 8, 4).arguments()[:2] == ["--dataset-name", "random"]
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a b", "output_tokens": 4}\n\n')
    assert parse_dataset(f"file:{good}").arguments()[:4] == ["--dataset-name", "custom", "--dataset-path", str(good)]
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"conversations": [{"value": "a"}, {"value": "b"}]}]))
    assert parse_dataset(f"sharegpt:{talk}").described() == "sharegpt:talk.json"
    bad = {
        "empty.jsonl": "",
        "no.jsonl": '{"prompt": "a"}',
        "cut.jsonl": '{"prompt": "a", "output',
        "list.jsonl": "[1]",
        "a.txt": "a",
    }
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(SparsifyError, match=name):
            parse_dataset(f"file:{tmp_path / name}")
    (tmp_path / "talk2.json").write_text('[{"conversations": []}]')
    for text in (
        f"sharegpt:{tmp_path / 'talk2.json'}",
        f"file:{tmp_path}",
        "file:nowhere.jsonl",
        "random:0/4",
        "random:4",
        "hub:x",
    ):
        with pytest.raises(SparsifyError):
            parse_dataset(text)
    with pytest.raises(SparsifyError, match="reads at most 2048 tokens"):
        measure_under_load(models, tmp_path / "out", replace(LOAD, dataset=Dataset("random", None, 2000, 64)))
    assert not (tmp_path / "out").exists() and fake.ran() == []


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install 'sparsify-24[cpu]'")
def test_real_vllm_serves_under_load(tmp_path):
    """A model of a shape, with one layer and random weights; a few requests, and the figures are those of vLLM's JSON."""
    load = UnderLoad(
        parse_steps("0.5,inf", None), Dataset("random", None, 16, 8), requests=6, warmup=1, repeats=1, eager=True,
        goodput={"e2el": 60_000.0}, timeout=900, quiet=True,
    )  # fmt: skip
    result = measure_under_load(["shape:smollm2-135m@dense+layers1"], tmp_path / "out", load)
    [model] = result["models"]
    assert result["complete"], model["failure"]
    at_once, half = model["points"]
    capacity = at_once["figures"]["request_throughput"]["median"]
    assert result["capacity"]["requests_per_second"] == capacity > 0
    assert half["rate"] == pytest.approx(capacity / 2)
    said = json.loads((tmp_path / "out" / "1-smollm2-135m@dense+layers1" / "load-0.5-1.json").read_text())["vllm"]
    assert said["completed"] == 6 and said["total_output_tokens"] == 6 * 8
    for name, found in half["figures"].items():
        assert found["values"] == [said[name]] and said[name] > 0, name
    assert model["server"]["start_seconds"]["median"] > 1 and model["server"]["memory_bytes"]["median"] > 5e7
    assert model["server"]["kv_cache_tokens"]["median"] > 1000
    assert half["server"]["kv_cache_usage"] is not None
