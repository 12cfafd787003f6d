"""Measures servers under load: each model's server is started in turn and driven at every rate, round after round."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsify.bench import vllm_cli
from sparsify.bench.engine_process import ModelFailed, last_lines
from sparsify.bench.engine_setup import (
    build_for,
    int8_environment,
    one_process_environment,
    require_vllm,
    tensor_parallel_ranks,
)
from sparsify.bench.machine import BIND, serving_environment, thread_binding, thread_environment
from sparsify.bench.serving import KEY
from sparsify.bench.targets import Target, open_targets
from sparsify.bench.under_load.driver import drive, told_rate
from sparsify.bench.under_load.record import CAPACITY, FAILURE, Record, settings
from sparsify.bench.under_load.server import SERVED, Server
from sparsify.bench.under_load.startup import measure_startup, require_startup, startup_arguments
from sparsify.bench.under_load.workload import (
    Step,
    UnderLoad,
    check_load,
    check_target,
    driver_arguments,
    server_arguments,
)
from sparsify.failure import failure_of
from sparsify.files import write_json
from sparsify.lock import only_run
from sparsify.progress import Task, progress_bar, silenced

AT_ONCE = Step(load=float("inf"))


def measure_under_load(
    models: Sequence[str | Path], output: str | Path, load: UnderLoad, resume: bool = False
) -> dict[str, Any]:
    """Measures every model's server at every rate into the directory `output`; returns what its serve.json holds.

    models: directories, or anything `open_checkpoint` opens, or `shape:NAME@FORMAT`; `LABEL=DIR` names one
    resume: continue the run in `output`; what was measured is kept, and models that failed are tried again
    A model whose server fails has the rates measured until then, and the reason; the others go on.
    """
    check_load(load)
    require_vllm()
    if load.startup:
        require_startup()
    output, environment = Path(output), _environment(load)
    with tempfile.TemporaryDirectory(prefix="sparsify-shapes-") as scratch:
        targets = open_targets(models, None, Path(scratch))
        for target in targets:
            check_target(target, load)
        run = settings(models, targets, load, environment)
        with only_run(output):
            record = Record(output, targets)
            record.begin(run, resume)
            with silenced(load.quiet):
                build_for(target.format for target in targets)
            _measure_all(targets, record, load, environment)
            _measure_starts(targets, record, load, environment)
            return record.write_result(load, targets, commands(targets, load, record))


def _environment(load: UnderLoad) -> dict[str, str]:
    """Of every server and of what drives it. A server on loopback asks for no key."""
    overrides = {BIND: thread_binding(load.threads, tensor_parallel_ranks(load.engine_args))} if load.threads else {}
    overrides |= one_process_environment(load.engine_args) if load.one_process else {}
    environment = serving_environment({**overrides, **int8_environment(load.int8)})
    environment.pop(KEY, None)
    return environment | thread_environment(environment[BIND], environment)


@dataclass
class _Session:
    """One start of one model's server."""

    target: Target
    repeat: int
    record: Record
    load: UnderLoad
    environment: Mapping[str, str]
    bar: Task

    def run(self) -> None:
        """Measures what is missing of this round. ModelFailed ends it; what was measured until then stays."""
        steps = self.missing()
        self.bar.advance(len(self.load.steps) - sum(step in self.load.steps for step in steps))
        if not steps:
            return
        file = self.record.server(self.target.label, self.repeat)
        log = file.with_suffix(".log")
        timeout, arguments = self.load.timeout, server_arguments(self.load)
        with Server(self.target, arguments, self.environment, log, timeout) as server:
            self.describe("vLLM starts")
            server.wait_until_ready(lambda: self.describe("vLLM starts"))
            write_json(file, server.facts())
            for step in steps:
                self.measure(server, step)
                write_json(file, server.facts())
                if step in self.load.steps:
                    self.bar.advance()

    def missing(self) -> list[Step]:
        """The rates without a file, all at once first where no capacity is known for shares of it."""
        label = self.target.label
        steps = [s for s in self.load.steps if not self.record.measurement(label, s, self.repeat).is_file()]
        if self.load.needs_capacity and self.record.capacity() is None and AT_ONCE not in steps:
            return [AT_ONCE, *steps]
        return steps

    def measure(self, server: Server, step: Step) -> None:
        """One rate into its file."""
        label = self.target.label
        capacity = self.record.capacity()
        rate = step.requests_per_second(capacity["requests_per_second"] if capacity else None)
        file = self.record.measurement(label, step, self.repeat)
        self.describe(told_rate(rate))
        found = drive(server, self.load, rate, self.repeat, self.environment, file.with_suffix(".log"))
        write_json(file, found)
        if step.at_once and capacity is None and self.load.needs_capacity:
            reached = found["vllm"]["request_throughput"]
            write_json(self.record.directory / CAPACITY, {"model": label, "requests_per_second": reached})

    def describe(self, what: str) -> None:
        """Shows what is done now."""
        of_round = f", round {self.repeat}" if self.load.repeats > 1 else ""
        self.bar.describe(f"{self.target.label}{of_round}: {what}")


def _measure_all(targets: Sequence[Target], record: Record, load: UnderLoad, environment: Mapping[str, str]) -> None:
    """All rounds over all models, with the result so far written after each start of a server."""
    failed: set[str] = set()
    total = load.repeats * len(targets) * len(load.steps)
    with progress_bar("bench", total=total, quiet=load.quiet) as bar:
        for repeat in range(1, load.repeats + 1):
            for target in targets:
                if target.label in failed:  # it would fail again
                    bar.advance(len(load.steps))
                    continue
                before = bar.done
                try:
                    _Session(target, repeat, record, load, environment, bar).run()
                except ModelFailed as error:
                    failed.add(target.label)
                    _record_failure(error, target, record, load.quiet)
                    bar.advance(before + len(load.steps) - bar.done)
                record.write_result(load, targets, commands(targets, load, record))


def _measure_starts(targets: Sequence[Target], record: Record, load: UnderLoad, environment: Mapping[str, str]) -> None:
    """Cold and warm starts of the models that were asked for and not measured before, but for those that have failed."""
    wanted = [
        target
        for target in targets
        if load.startup
        and not record.startup(target.label).is_file()
        and not (record.folders[target.label] / FAILURE).is_file()
    ]
    with progress_bar("starts", total=len(wanted), quiet=load.quiet) as bar:
        for target in wanted:
            bar.describe(f"{target.label}: cold and warm starts")
            file = record.startup(target.label)
            try:
                write_json(file, measure_startup(target, load, environment, file.with_suffix(".log")))
            except ModelFailed as error:
                _record_failure(error, target, record, load.quiet)
            bar.advance()


def _record_failure(error: ModelFailed, target: Target, record: Record, quiet: bool) -> None:
    """Into failure.json, with the last lines of the log; and printed at once, because the other models may take long."""
    failure = failure_of(error, "vLLM")
    found = {"short": failure.short, "reason": failure.reason, "log": error.log.name, "lines": last_lines(error.log)}
    write_json(record.folders[target.label] / FAILURE, found)
    Console(stderr=True, quiet=quiet, soft_wrap=True).print(str(error), style="yellow", markup=False, highlight=False)


def commands(targets: Sequence[Target], load: UnderLoad, record: Record) -> list[str]:
    """What a person types for the same by hand, MODEL being a directory: the server's command, and one for each rate."""
    prefix = vllm_cli.prefix()
    serve = [*prefix, "serve", "MODEL", "--host", "127.0.0.1", "--port", "PORT", "--served-model-name", SERVED]
    own = sorted({tuple(target.engine_args) for target in targets})
    lines = [shlex.join([*serve, *args, *server_arguments(load)]) for args in own]
    capacity = record.capacity()
    per_second = capacity["requests_per_second"] if capacity else None
    drive_with = ["--host", "127.0.0.1", "--port", "PORT", "--model", SERVED, "--tokenizer", "MODEL"]
    for step in load.steps:
        if step.load is None or step.at_once or per_second is not None:
            arguments = driver_arguments(load, step.requests_per_second(per_second), 1)
            lines.append(
                shlex.join([*prefix, "bench", "serve", "--backend", "openai", *drive_with, *_shared(arguments)])
            )
    if load.startup:
        lines += [
            shlex.join([*prefix, "bench", "startup", "--model", "MODEL", *arguments])
            for arguments in sorted({tuple(startup_arguments(target, load)) for target in targets})
        ]
    return lines


def _shared(arguments: Sequence[str]) -> list[str]:
    """The arguments without the folders of files: what is recorded is shared."""
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]
