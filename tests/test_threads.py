"""Threads: how many, how they wait, and that torch reads it; control groups of both versions, read from a made-up system."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify import threads
from sparsify.doctor import thread_findings
from sparsify.threads import COUNT, POLICY, SPIN, cpu_quota, defaults, one_per_core

NAMES = (*threads.COUNTS, POLICY, *SPIN)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        # the narrowest of the group and those that hold it
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            3.0,
        ),
        # a container that sees the path on the host, of which only the top is mounted
        ({"proc/self/cgroup": "0::/docker/f00", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4.0),
        # version 1, alone and beside version 2
        ({"proc/self/cgroup": "3:cpu,cpuacct:/x", f"{V1}/x/cpu.cfs_quota_us": "250000", f"{V1}/x/cpu.cfs_period_us": "100000"}, 2.5),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/x", f"{V1}/x/cpu.cfs_quota_us": "-1", f"{V1}/x/cpu.cfs_period_us": "100000"}, None),
        (
            {
                "proc/self/cgroup": "8:pids:/\n2:cpu:/c\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


def siblings(pairs: dict[int, str]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in pairs.items()}


def test_one_thread_per_core(tmp_path: Path) -> None:
    root = write(tmp_path, siblings({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}))
    assert one_per_core([0, 1, 4, 5], root) == [0, 1]
    assert one_per_core([4, 5], root) == [4, 5]
    assert one_per_core([0, 9], root) == [0, 9], "of a CPU of which nothing is known"
    found = threads.threads([0, 1, 4, 5], root)
    assert found.count == 2 and not found.limited and found.reason == "4 logical CPUs on 2 cores"


@pytest.mark.parametrize(("quota", "count"), [("200000", 2), ("150000", 2), ("20000", 1), ("1600000", 8)])
def test_a_container_on_a_large_machine(tmp_path: Path, quota: str, count: int) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    found = threads.threads(range(8), root)
    assert found.count == count and found.cpus == tuple(range(count))
    assert found.limited == (count < 8) and ("control group" in found.reason) == found.limited


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, {COUNT, *SPIN}),
        ({COUNT: "3"}, set(SPIN)),
        ({"MKL_NUM_THREADS": "3"}, set(SPIN)),
        ({COUNT: ""}, {COUNT, *SPIN}),
        ({POLICY: "ACTIVE"}, {COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {COUNT}),
        ({"KMP_BLOCKTIME": "0", COUNT: "1"}, set()),
    ],
)
def test_what_the_user_set_wins(given: dict[str, str], chosen: set[str]) -> None:
    assert set(defaults(given)) == chosen


def test_nothing_is_set_once_torch_is_there() -> None:
    import torch  # noqa: F401

    environment: dict[str, str] = {}
    assert threads.prepare({"TQDM_DISABLE": "1"}, environment) == {} and environment == {}


CHILD = """
import json, os, sys
seen = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen.append({n: os.environ.get(n) for n in NAMES})
sys.meta_path.insert(0, Watch())
START
import torch
print(json.dumps([seen[0], torch.get_num_threads()]))
"""


def child(start: str, **given: str) -> tuple[dict[str, str | None], int]:
    """The environment at the moment at which torch is imported, and the number of its threads."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    code = CHILD.replace("NAMES", repr(NAMES)).replace("START", start)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    at_import, count = json.loads(run.stdout.splitlines()[-1])
    return at_import, count


INSPECT = "from sparsify import cli; cli.main(['inspect', '/nowhere'])"


def test_a_command_decides_before_torch_is_imported() -> None:
    at_import, count = child(INSPECT)
    assert at_import == {COUNT: str(threads.threads().count), "MKL_NUM_THREADS": None, POLICY: None, **SPIN}
    assert count == threads.threads().count


def test_a_command_leaves_what_the_user_set() -> None:
    at_import, count = child(INSPECT, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="ACTIVE")
    assert at_import[COUNT] == "1" and at_import[POLICY] == "ACTIVE" and at_import["GOMP_SPINCOUNT"] is None
    assert count == 1


def test_a_library_leaves_the_environment_alone() -> None:
    at_import, _ = child("import sparsify, sparsify.threads, sparsify.progress, sparsify.cli")
    assert set(at_import.values()) == {None}


def test_vllm_gets_no_number_of_threads_that_a_command_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.bench import machine

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "preloads", lambda: [])
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(threads, "_ours", {COUNT: "2", **SPIN})
    for name, value in threads.chosen_here().items():
        monkeypatch.setenv(name, value)
    environment = machine.serving_environment()
    assert COUNT not in environment and environment["GOMP_SPINCOUNT"] == SPIN["GOMP_SPINCOUNT"]
    monkeypatch.setenv(COUNT, "7")  # other than what was chosen: set by whoever called
    monkeypatch.setenv(POLICY, "ACTIVE")
    environment = machine.serving_environment()
    assert environment[COUNT] == "7" and environment[POLICY] == "ACTIVE" and "GOMP_SPINCOUNT" not in environment


def test_intels_runtime_waits_as_the_user_says() -> None:
    from sparsify.bench.machine import thread_environment

    one = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LD_PRELOAD": "/b/libiomp5.so"}
    assert thread_environment("0", one)["KMP_BLOCKTIME"] == "5"
    assert "KMP_BLOCKTIME" not in thread_environment("0", {**one, POLICY: "PASSIVE"})
    assert "KMP_BLOCKTIME" not in thread_environment("0", {**one, "KMP_BLOCKTIME": "0"})


def test_the_binding_of_vllm_keeps_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.bench import machine

    monkeypatch.setattr(machine, "threads", lambda: threads.Threads((0, 1, 2, 3), "", limited=True))
    assert machine.thread_binding("auto") == "1-3" and machine.thread_binding("all") == "0-3"
    assert machine.thread_binding("all", 2) == "0-1|2-3"
    monkeypatch.setattr(machine, "threads", lambda: threads.Threads((0,), "", limited=True))
    assert machine.thread_binding("auto") == "0"


def test_the_doctor_says_what_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "threads", lambda: threads.Threads((0, 1), "2 cores"))
    monkeypatch.setattr(threads, "_ours", {})
    count, waiting = thread_findings({})
    assert count.detail == "2: 2 cores" and waiting.status == "note"
    assert waiting.fix == "export " + " ".join(f"{name}={value}" for name, value in SPIN.items())
    count, waiting = thread_findings({COUNT: "64", POLICY: "ACTIVE"})
    assert count.status == "note" and count.fix == f"unset {COUNT}" and "OMP_WAIT_POLICY=ACTIVE" in waiting.detail
    monkeypatch.setattr(threads, "_ours", {COUNT: "2", **SPIN})
    count, waiting = thread_findings({COUNT: "2", **SPIN})
    assert count.detail == "2: 2 cores" and waiting.status == "ok" and "then sleep" in waiting.detail
