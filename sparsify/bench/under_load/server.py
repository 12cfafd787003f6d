"""One `vllm serve` on loopback: started, waited for, watched while it is driven, and stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from sparsify.bench.engine_process import ModelFailed, explain_failure, how_it_ended
from sparsify.bench.serving import LOOPBACK
from sparsify.bench.targets import Target
from sparsify.memory import anonymous_of_session

SERVED = "model"  # the name under which every model is served
POLL_SECONDS = 0.5
ANSWER_SECONDS = 5.0  # in which /health and /metrics answer; an engine that computes does not keep them from it
STOP_SECONDS = 15.0
# What vLLM's log says of loading: the worker, the engine and the cache. Not every device and setting writes each of them.
LOGGED: Mapping[str, tuple[re.Pattern[str], Callable[[str], float]]] = {
    "weights_gib": (re.compile(r"Model loading took ([\d.]+) GiB"), float),
    "weights_seconds": (re.compile(r"Loading weights took ([\d.]+) seconds"), float),
    "engine_seconds": (re.compile(r"init engine \(.*?\) took ([\d.]+) s"), float),
    "compile_seconds": (re.compile(r"(?:torch\.compile took|\(compilation:) ([\d.]+) s"), float),
    "kv_cache_tokens": (re.compile(r"KV cache size: ([\d,]+) tokens"), lambda found: float(found.replace(",", ""))),
}
# Gauges of vLLM's /metrics of which the highest value during a measurement is kept.
GAUGES = {
    "vllm:kv_cache_usage_perc": "kv_cache_usage",  # a share, in spite of its name
    "vllm:num_requests_running": "requests_running",
    "vllm:num_requests_waiting": "requests_waiting",
}


def vllm_command(arguments: Sequence[str]) -> list[str]:
    """A process of vLLM's command line that ends with this one. Tests replace this and nothing else."""
    return [sys.executable, "-m", "sparsify.bench.under_load.vllm_process", *arguments]


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class Server:
    """A server while the block runs. Every method raises ModelFailed once it has ended, with the end of its log."""

    def __init__(
        self, target: Target, arguments: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float
    ) -> None:
        self.target, self.log, self.timeout = target, log, timeout
        self.port = free_port()
        address = ["--host", LOOPBACK, "--port", str(self.port), "--served-model-name", SERVED]
        self.command = ["serve", str(target.directory), *address, *target.engine_args, *arguments]
        self.environment = dict(environment)
        self.open = build_opener(ProxyHandler({})).open  # no proxy reaches loopback
        self.start_seconds: float | None = None
        self.peak_bytes: int | None = None
        self.peaks: dict[str, float] = {}

    def __enter__(self) -> Server:
        self.stream: IO[bytes] = self.log.open("wb")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            vllm_command(self.command), stdout=self.stream, stderr=subprocess.STDOUT, env=self.environment,
            start_new_session=True,  # vLLM starts further processes, and all must end with it
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            if kind is None and self.process.poll() is None:  # it removes its shared memory; one that failed may hang
                self.process.terminate()
                self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stream.close()

    def wait_until_ready(self, watch: Callable[[], None] = lambda: None) -> None:
        """Returns when the server answers that it is healthy. watch: called meanwhile."""
        while True:
            self.check()
            with suppress(OSError, ValueError):
                with self.open(f"{self.url}/health", timeout=ANSWER_SECONDS) as answer:
                    if answer.status == 200:
                        break
            if time.monotonic() - self.started > self.timeout:
                raise self.failure(
                    f"did not answer within {self.timeout:g} s, which is the time limit, after it was started"
                )
            watch()
            time.sleep(POLL_SECONDS)
        self.start_seconds = time.monotonic() - self.started

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{LOOPBACK}:{self.port}"

    def check(self) -> None:
        """ModelFailed where the server has ended; else looks at its memory."""
        status = self.process.poll()
        if status is not None:
            raise self.failure(how_it_ended(status))
        found = anonymous_of_session(self.process.pid)
        self.peak_bytes = max((n for n in (found, self.peak_bytes) if n is not None), default=None)

    def failure(self, what: str) -> ModelFailed:
        """The error of a server of which `what` is true."""
        return ModelFailed(explain_failure(f"{self.target.label}: vLLM's server {what}", self.log), self.log)

    def observe(self) -> None:
        """Looks at memory and gauges, in the middle of a measurement."""
        self.check()
        for name, value in self.metrics().items():
            self.peaks[name] = max(value, self.peaks.get(name, value))

    def metrics(self) -> dict[str, float]:
        """The gauges that are kept, now; empty where the server does not answer in time."""
        try:
            with self.open(f"{self.url}/metrics", timeout=ANSWER_SECONDS) as answer:
                text = answer.read().decode(errors="replace")
        except (URLError, OSError):
            return {}
        found: dict[str, float] = {}
        for line in text.splitlines():
            series, _, value = line.rpartition(" ")
            name = GAUGES.get(series.partition("{")[0])
            if name is not None:
                with suppress(ValueError):
                    join = max if name == "kv_cache_usage" else sum  # over the engines of this server
                    found[name] = join([found.get(name, 0.0), float(value)])
        return found

    def facts(self) -> dict[str, Any]:
        """What starting took and what the log says of it, in seconds, GiB and tokens; memory in bytes at its highest."""
        said = self.log.read_text(errors="replace")
        found: dict[str, Any] = {"start_seconds": self.start_seconds, "memory_bytes": self.peak_bytes}
        for name, (pattern, read) in LOGGED.items():
            values = [read(match[1]) for match in pattern.finditer(said)]
            found[name] = sum(values) if name == "weights_gib" and values else max(values, default=None)
        return found
