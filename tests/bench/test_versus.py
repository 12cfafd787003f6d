"""`make versus`: what is kept of a run that is killed, fails or is begun anew, with stand-ins for all packages; and our own rows."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.versus import run as versus
from benchmarks.versus import score
from benchmarks.versus.__main__ import parser, settings_from
from benchmarks.versus.page import accuracy, page, speeds
from benchmarks.versus.rows import RESULT, ROWS, Row, peer_python
from benchmarks.versus.run import Run, only
from benchmarks.versus.settings import QUICK, ROOT, Settings
from sparsify import api
from sparsify.bench.machine import describe_machine
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evaluation import evaluate
from sparsify.files import read_json, write_json
from sparsify.recipe import load_recipe
from tests.helpers.tiny import save_tiny, tiny_text

FAKE = Path(__file__).with_name("fake_peer.py")
SETTINGS = Settings(model="org/tiny", timeout=60, **{k: v for k, v in QUICK.items() if k != "timeout"})
NO_PEER = "not-there"


def fake(kind, job):
    return [sys.executable, "-I", "-S", str(FAKE), kind, str(job)]


def compress(work):
    job = work.aside / "job.json"
    write_json(job, {"output": str(work.artifact), "result": str(work.aside / RESULT)})
    return fake("compress", job)


def missing(work):
    return [peer_python(f".venv-{NO_PEER}")]


FAKES = (Row("dense", "dense", None), Row("first", "a peer", compress), Row("second", "another", compress))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Replaces all programs; returns a function that lists what ran since it was last asked, as (kind, row)."""
    log = tmp_path / "ran.jsonl"
    log.touch()
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_MACHINE", json.dumps(describe_machine()))
    monkeypatch.setattr(versus, "program", fake)
    seen = [0]

    def since():
        lines = [json.loads(line)[:2] for line in log.read_text().splitlines()]
        found, seen[0] = [tuple(line) for line in lines[seen[0] :]], len(lines)
        return found

    return since


def test_every_step_runs_once_and_rounds_of_speed_go_over_all_rows(ran, tmp_path):
    settings = replace(SETTINGS, rounds=2)
    result = Run(settings, tmp_path / "out", FAKES).run()
    names = ["dense", "first", "second"]
    assert ran() == [
        ("prepare", "out"), ("score", "dense"), ("compress", "first"), ("score", "first"), ("compress", "second"),
        ("score", "second"), *[("speed", name) for _ in range(2) for name in names],
    ]  # fmt: skip
    assert result["complete"] and Run(settings, tmp_path / "out", FAKES).run()["complete"] and ran() == []
    more = Run(replace(settings, rounds=3), tmp_path / "out", FAKES).run()
    assert ran() == [("speed", name) for name in names] and [len(row["speed"]) for row in more["rows"]] == [3, 3, 3]
    row = read_json(tmp_path / "out" / "first" / "row.json")
    assert row["compress"]["versions"] == {"peer": "1.2"} and row["compress"]["seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row["compress"]["date"])
    assert more["prepared"]["machine"] == describe_machine() and "command" in row["compress"]


def test_a_failed_row_has_its_last_lines_and_is_tried_again(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_ROWS", json.dumps({"first": "fail"}))
    rows = (*FAKES, Row("absent", "not here", missing))
    result = Run(SETTINGS, tmp_path / "out", rows).run()
    dense, first, second, absent = result["rows"]
    assert [row["complete"] for row in result["rows"]] == [True, False, True, False] and not result["complete"]
    (failure,) = first["failures"]
    assert failure["step"] == "compress" and failure["short"] == "too little memory"
    assert failure["log"] == [
        "begin",
        "MemoryError: cannot allocate what OUT/first/.compress/model/model.safetensors needs",
    ]
    assert "failed with exit status 1" in failure["reason"] and str(tmp_path) not in json.dumps(result)
    assert absent["failures"][0]["short"] == "not installed" and "make versus-peers" in absent["failures"][0]["reason"]
    assert ("score", "first") not in ran() and not (tmp_path / "out" / "first" / "model").exists()
    told = (tmp_path / "out" / "versus.md").read_text()
    assert (
        "| a peer | too little memory |" in told and "MemoryError: cannot allocate" in told and "Not complete" in told
    )
    monkeypatch.setenv("FAKE_ROWS", "{}")
    again = Run(SETTINGS, tmp_path / "out", rows[:3]).run()
    assert again["complete"] and ran() == [("compress", "first"), ("score", "first"), ("speed", "first")]
    assert again["rows"][1]["failures"] == [] and "What did not run" not in (tmp_path / "out" / "versus.md").read_text()


def test_a_peer_that_ends_well_and_writes_nothing_has_failed(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_ROWS", json.dumps({"first": "nothing"}))
    result = Run(SETTINGS, tmp_path / "out", FAKES[:2]).run()
    assert result["rows"][1]["failures"][0]["reason"] == "a peer: ended without writing model"


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.bench import test_versus as test
test.versus.program = test.fake
test.Run(test.SETTINGS, Path({output!r}), test.FAKES).run()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(ran, tmp_path, monkeypatch, number):
    output, log = tmp_path / "out", tmp_path / "ran.jsonl"
    monkeypatch.setenv("FAKE_ROWS", json.dumps({"second": "hang"}))
    code = KILLED.format(root=str(ROOT), output=str(output))
    running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    peer = wait_for(
        lambda: next((int(json.loads(line)[2]) for line in log.read_text().splitlines() if "second" in line), None)
    )
    wait_for(lambda: (output / "second" / ".compress" / "model" / "model.safetensors").exists())
    before = (output / "first" / "compress.json").read_bytes()
    running.send_signal(number)
    running.wait()
    wait_for(lambda: not alive(peer))  # else it would go on beside the next run
    assert not (output / "second" / "model").exists() and not (output / "second" / "compress.json").exists()
    ran()
    monkeypatch.setenv("FAKE_ROWS", "{}")
    result = Run(SETTINGS, output, FAKES).run()
    assert result["complete"] and (output / "first" / "compress.json").read_bytes() == before
    assert [line for line in ran() if line[0] != "speed"] == [("compress", "second"), ("score", "second")]
    assert (output / "second" / "model" / "model.safetensors").read_bytes() == b"whole"
    assert not list(output.rglob("*.partial")) and not list(output.glob("*/.compress"))


def wait_for(condition, seconds=600):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_another_run_is_refused_by_what_differs(ran, tmp_path):
    Run(SETTINGS, tmp_path / "out", FAKES[:1]).run()
    with pytest.raises(CheckpointError, match="begun with another limit, samples"):
        Run(replace(SETTINGS, samples=8, limit=5), tmp_path / "out", FAKES[:1]).run()
    run = tmp_path / "out" / "prepared.json"
    write_json(run, {**read_json(run), "machine": {"cpu": "another"}})
    with pytest.raises(CheckpointError, match="another machine"):
        Run(SETTINGS, tmp_path / "out", FAKES[:1]).run()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(CheckpointError, match="no directory of a run"):
        Run(SETTINGS, tmp_path / "foreign", FAKES[:1]).run()


def test_a_step_that_takes_too_long_is_ended(ran, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_ROWS", json.dumps({"first": "hang"}))
    slow = Run(replace(SETTINGS, timeout=60), tmp_path / "out", FAKES[:2])
    slow.begin()
    slow.prepare()
    slow.settings = replace(SETTINGS, timeout=2)
    assert not slow.step(FAKES[1], "compress", slow.compress)
    (failure,) = slow.gathered(FAKES[1])["failures"]
    assert failure["short"] == "took too long"


def test_estimate_counts_what_is_left(ran, tmp_path):
    run = Run(SETTINGS, tmp_path / "out", FAKES)
    run.begin()
    run.prepare()
    assert "another: about" in run.estimate() and "(compress, score, speed-1)" in run.estimate()
    run.run()
    assert run.estimate().splitlines() == [
        "estimate, on two quiet cores: 0.0 s", "  dense: done", "  a peer: done", "  another: done",
    ]  # fmt: skip


def test_defaults_end_in_less_than_three_hours(tmp_path):
    run = Run(replace(Settings(), tasks="tasks"), tmp_path / "out")
    run.prepared = {"parameters": versus.USUAL_PARAMETERS, "shape": [128, 512]}
    hours, minutes = re.match(r"estimate, on two quiet cores: (\d+) h (\d+) min", run.estimate()).groups()
    assert 1 <= int(hours) < 3


def supervised(tmp_path, code):
    result = tmp_path / "cost.json"
    command = [sys.executable, str(versus.SUPERVISE), str(result), sys.executable, "-I", "-S", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, start_new_session=True, check=False, timeout=600)
    return ended.returncode, read_json(result) if result.is_file() else None


def test_supervisor_sees_the_memory_of_a_process_and_of_its_children(tmp_path):
    held = "import time; block = bytearray(150_000_000); time.sleep(3)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {held!r}])"
    for code in (held, child):
        status, cost = supervised(tmp_path, code)
        assert status == 0 and 150e6 < cost["peak_bytes"] < 200e6 and cost["seconds"] >= 3
    assert supervised(tmp_path / "new", "import sys; sys.exit(3)") == (3, None)
    assert supervised(tmp_path / "new", "import os; os.kill(os.getpid(), 9)") == (-9, None)


# -------------------------------------------------------------------------------------------------------------- the page


def measured(name, first, request, elapsed):
    rounds = [{"first_token_seconds": f, "request_seconds": r, "elapsed_seconds": [e], "date": "2026-11-29 10:00:00"}
              for f, r, e in zip(first, request, elapsed, strict=True)]  # fmt: skip
    return {
        "row": name,
        "title": name,
        "engine": "vLLM",
        "compress": None,
        "score": None,
        "speed": rounds,
        "failures": [],
    }


def test_speeds_are_those_of_the_raw_seconds():
    result = {"settings": {"input_len": 128, "output_len": 64, "prompts": 32}}
    row = measured("dense", [[1, 1, 1], [1, 1, 1]], [[2.26, 2.26, 9], [2.26, 2.26, 2.26]], [8, 12])
    one, many = speeds(result, row)
    assert math.isclose(one, 63 / 1.26) and math.isclose(many, 32 * 64 / 10)
    assert speeds(result, {**row, "speed": []}) is None


def test_page_says_what_the_record_says(ran, tmp_path):
    result = Run(SETTINGS, tmp_path / "out", FAKES).run()
    told = page(result)
    assert "| a peer | 4.25 | 50.0% | 5 kB | 20.50 | 0.250 | 75.0% |" in told
    itl = (1.2 - 0.5) / (SETTINGS.output_len - 1)
    many = SETTINGS.prompts * SETTINGS.output_len / 4.0
    assert f"| {1 / itl:.1f} (1.00x) | {many:.1f} (1.00x) |" in told
    assert "Its figures mean nothing" in told and "peer 1.2" in told and "Tasks were not scored" in told
    assert "Not complete" not in told and str(tmp_path) not in told and str(ROOT) not in told


def test_recovery_stands_with_its_interval():
    text = {"perplexity": 20.0, "kl": 0.2, "top1_agreement": 0.8}
    score = {
        "block_bits": 3.25,
        "two_of_four": 1.0,
        "file_bytes": 5000,
        "text": text,
        "tasks": {"easy": {"accuracy": 0.5}},
    }
    mean = {"accuracy": 0.5, "above_chance": 0.6, "difference": -0.04, "difference_stderr": 0.01}
    mean |= {"recovery": 0.9259, "recovery_interval": [0.881, 0.97]}
    scores = {"dense": {**score, "tasks_mean": {**mean, "recovery": 1.0}}, "ours": {**score, "tasks_mean": mean}}
    head, _, dense, ours = accuracy(
        {"rows": [{"row": n, "title": n, "score": s} for n, s in scores.items()]}
    ).splitlines()
    assert head.endswith("| easy | mean | recovery | left above chance |")
    assert dense.endswith("| 50.0% | 50.0% | – | 60.0% |")
    assert ours.endswith("| 50.0% | 50.0% | 92.6% (88.1 to 97.0) | 60.0% (-4.0% ± 1.0) |")


def test_lines_lose_the_folders_of_this_machine(tmp_path):
    run = Run(SETTINGS, tmp_path / "out", FAKES)
    line = f"{tmp_path}/out/first/.compress/job.json {ROOT}/.venv-peers/bin/python file:/data/x/valid.txt a/b 1/2 https://x.org/y"
    assert run.shown(line).startswith("OUT/first/.compress/job.json ./.venv-peers/bin/python file:valid.txt a/b 1/2 ")


# ------------------------------------------------------------------------------------------------------------ our own rows


def test_command_line_becomes_settings(tmp_path):
    text = tiny_text(tmp_path / "valid.txt")
    asked = ["--quick", "--calibration", str(text), "--limit", "7", "--text", str(text)]
    settings = settings_from(parser().parse_args(asked))
    assert settings.calibration == f"file:{text}" and settings.limit == 7 and settings.samples == QUICK["samples"]
    assert settings.recorded()["calibration"] == settings.recorded()["text"] and str(tmp_path) not in str(
        settings.recorded()
    )
    assert settings_from(parser().parse_args([])) == Settings()
    assert [row.name for row in only(["gptqmodel", "dense"])] == ["dense", "gptqmodel"] and only([]) == list(ROWS)
    with pytest.raises(SparsifyError, match="marlin is no row; there are dense, llm"):
        only(["marlin"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dense model, ours of it, a text and tasks."""
    root = tmp_path_factory.mktemp("tiny")
    save_tiny(root / "dense", dtype=torch.bfloat16)
    text = tiny_text(root / "text.txt", 3000)
    changes = ["calibration.samples=4", "calibration.sequence_length=64", f"calibration.source=file:{text}"]
    changes += ["passes.quantize.group_size=32", "export.head.group_size=32"]
    api.apply(load_recipe("2of4-w4a16", changes), root / "dense", root / "ours", quiet=True)
    items = [{"question": "ab" * i, "choices": ["c", "dd"], "answer": i % 2} for i in range(1, 9)]
    (root / "tasks").mkdir()
    (root / "tasks" / "easy.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return root


def scored(tiny, model, folder):
    sizes = {
        "text": str(tiny / "text.txt"),
        "tasks": str(tiny / "tasks"),
        "limit": 6,
        "chunks": 3,
        "sequence_length": 64,
    }
    job = {
        "settings": sizes,
        "model": str(tiny / model),
        "dense": str(tiny / "dense"),
        "result": str(folder / f"{model}.json"),
    }
    write_json(folder / "job.json", {**job, "answers": str(folder / "answers.json")})
    score.main(str(folder / "job.json"))
    return read_json(folder / f"{model}.json")


def test_score_is_that_of_sparsify_eval_and_inspect(tiny, tmp_path):
    dense, ours = scored(tiny, "dense", tmp_path), scored(tiny, "ours", tmp_path)
    assert dense["text"]["kl"] == 0 and dense["block_bits"] == 16 and dense["two_of_four"] < 0.1
    assert dense["tasks_mean"]["difference"] == 0 and dense["tasks"]["easy"]["items"] == 6
    expected = evaluate(
        tiny / "ours", tiny / "dense", str(tiny / "text.txt"), 64, 3, tasks=tiny / "tasks", limit=6, quiet=True
    )  # fmt: skip
    assert math.isclose(ours["text"]["perplexity"], expected.perplexity) and math.isclose(
        ours["text"]["kl"], expected.kl
    )
    assert ours["tasks"]["easy"] == json.loads(json.dumps(expected.to_json()["tasks"]["easy"]))
    assert ours["two_of_four"] == 1.0
    assert ours["block_bits"] == 4 / 2 + 2 / 2 + 16 / 32  # half of the codes, two bits for each one's place, scales
    assert ours["file_bytes"] == (tiny / "ours" / "model.safetensors").stat().st_size


def test_bits_of_a_gguf_file_are_those_of_its_blocks(embedded):
    from benchmarks.versus.prepare import file_type
    from sparsify.model.checkpoint import gguf_file

    file = gguf_file(embedded)
    facts = score.gguf_facts(file)
    assert file_type(file) == "MOSTLY_Q4_1" and facts["file_bytes"] == file.stat().st_size
    assert facts["block_bits"] == 5.0 and facts["types"] == {"Q4_1": 210}  # 32 weights in 20 bytes
