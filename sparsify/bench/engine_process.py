"""One vLLM process that measures one model: started, watched, and its results or the reason why there are none."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.bench.targets import Target
from sparsify.bench.workload import BenchOptions, LatencyWorkload, ThroughputWorkload, benchmark_arguments
from sparsify.errors import SparsifyError
from sparsify.failure import Failure
from sparsify.files import write_json
from sparsify.progress import Task

TAIL_LINES = 12
# The engine process reports the cause first and everybody above it repeats that something failed.
CAUSE = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (\S.*)")
CONSEQUENCE = "Engine core initialization failed"


@dataclass
class Samples:
    """Raw times of one model, gathered over the rounds."""

    first: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: list[str] = field(default_factory=list)
    failure: Failure | None = None


class ModelFailed(SparsifyError):
    """vLLM did not measure a model; the message holds the end of its log, which stays for the one who reads it."""

    def __init__(self, message: str, log: Path):
        super().__init__(message)
        self.log = log


def worker_command(job: Path) -> list[str]:
    """The process that measures one model. Tests replace this and nothing else."""
    return [sys.executable, "-m", "sparsify.bench.worker", str(job)]


def measure_once(
    target: Target,
    engine: Sequence[str],
    latency: LatencyWorkload | None,
    throughput: ThroughputWorkload | None,
    environment: Mapping[str, str],
    options: BenchOptions,
    samples: Samples,
    bar: Task,
) -> None:
    """One process: starts the engine, runs every benchmark, adds the times to `samples`. bar: shows how far that is."""
    scratch = Path(tempfile.mkdtemp(prefix="sparsify-bench-"))
    runs = benchmark_arguments(latency, throughput)
    outputs = [scratch / f"{i}-{name}.json" for i, (name, _) in enumerate(runs)]
    job = {
        "engine": ["--model", str(target.directory), *target.engine_args, *engine],
        "runs": [
            {"benchmark": name, "arguments": [*arguments, "--output-json", str(output)]}
            for (name, arguments), output in zip(runs, outputs, strict=True)
        ],
        "greedy": options.greedy,
        "prompts": list(options.prompts),
        "answers": str(scratch / "answers.json"),
    }
    write_json(scratch / "job.json", job)
    log = scratch / "vllm.log"
    doing = bar.text

    def watch() -> None:
        done = sum(output.exists() for output in outputs)
        what = "vLLM starts and runs" if not done else "vLLM runs"
        bar.describe(f"{doing}: {what} benchmark {min(done + 1, len(outputs))} of {len(outputs)}")

    status = run_logged(worker_command(scratch / "job.json"), environment, log, options.timeout, watch)
    bar.describe(doing)
    answers = [scratch / "answers.json"] if options.prompts else []
    missing = [output for output in (*outputs, *answers) if not output.exists()]
    if status != 0 or missing:
        raise ModelFailed(describe_failure(target.label, status, log), log)
    results: list[dict[str, Any]] = [json.loads(output.read_text()) for output in outputs]
    if latency:
        samples.first += results[0]["latencies"]
        samples.full += results[1]["latencies"]
    if throughput:
        samples.elapsed.append(results[-1]["elapsed_time"])
        samples.tokens = results[-1]["total_num_tokens"]
    for file in answers:
        samples.answers = json.loads(file.read_text())
    shutil.rmtree(scratch)


def run_logged(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    timeout: float,
    watch: Callable[[], None] = lambda: None,
) -> int | None:
    """Runs a command with its output in `log`; returns its exit status, or None when it took too long.

    watch: called every second meanwhile. The command gets a session of its own, because vLLM starts further processes and
    all must end with it, also on Ctrl-C.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        until = time.monotonic() + timeout
        try:
            while (left := until - time.monotonic()) > 0:
                watch()
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, 1.0))
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def describe_failure(label: str, status: int | None, log: Path) -> str:
    """One clear sentence, the cause when the log shows one, and the end of the log. status: None took too long."""
    what = "ended without writing its result" if status == 0 else how_it_ended(status)
    return explain_failure(f"{label}: vLLM {what}", log)


def how_it_ended(status: int | None) -> str:
    """What an exit status says, for a sentence; None is that of a process that took too long."""
    if status is None:
        return "took longer than the time limit"
    if status < 0:
        return f"was killed by signal {signal.Signals(-status).name}" + (
            " (too little memory?)" if -status == signal.SIGKILL else ""
        )
    return f"failed with exit status {status}" if status else "ended by itself"


def explain_failure(sentence: str, log: Path) -> str:
    """The sentence with the cause behind it when the log shows one, and the end of the log."""
    lines = last_lines(log, None)
    causes = [match for match in map(CAUSE.search, lines) if match and CONSEQUENCE not in match[2]]
    cause = f": {causes[0][1]}: {causes[0][2]}" if causes else ""
    tail = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"
    return f"{sentence}{cause}\nlast lines of its log ({log}):\n{tail}"


def last_lines(log: Path, count: int | None = TAIL_LINES) -> list[str]:
    """The last lines of a log that are not empty; None for all of them."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines if count is None else lines[-count:]
