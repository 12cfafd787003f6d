"""Starts vLLM once per model and round, one process after another, and gathers what its benchmarks wrote."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from sparsify.bench import vllm_cli
from sparsify.bench.engine_process import ModelFailed, Samples, measure_once
from sparsify.bench.engine_setup import (
    build_for,
    int8_environment,
    one_process_environment,
    require_vllm,
    thread_settings,
)
from sparsify.bench.machine import (
    BIND,
    describe_machine,
    installed_versions,
    recorded_environment,
    serving_environment,
    thread_environment,
)
from sparsify.bench.result import (
    BenchResult,
    ModelSpeed,
    SettingSpeed,
    latency_figures,
    ratios,
    throughput_figures,
)
from sparsify.bench.targets import Target, check_answers, check_fits, open_targets
from sparsify.bench.workload import (
    BenchOptions,
    LatencyWorkload,
    ThroughputWorkload,
    benchmark_arguments,
    check_workload,
    engine_arguments,
)
from sparsify.errors import SparsifyError
from sparsify.failure import Failure, failure_of
from sparsify.progress import progress_bar, silenced


def measure(
    models: Sequence[str | Path],
    latency: LatencyWorkload | None = None,
    throughput: ThroughputWorkload | None = None,
    options: BenchOptions | None = None,
    labels: Sequence[str] | None = None,
) -> BenchResult:
    """Measures every model on the same workloads; the first is what the others are compared with.

    models: directories or anything `open_checkpoint` opens; `LABEL=DIR` names one
    A model that vLLM cannot run is a row without figures that says why. Raises SparsifyError when it runs none of them.
    """
    options = options or BenchOptions()
    check_workload(latency, throughput, options)
    require_vllm()
    single = one_process_environment(options.engine_args) if options.one_process else {}
    environment = serving_environment({**single, **int8_environment(options.int8), **options.environment})
    settings = thread_settings(options, environment)
    engine = engine_arguments(latency, throughput, options)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparsify-shapes-") as scratch:
        targets = open_targets(models, labels, Path(scratch))
        for target in targets:
            check_fits(target, latency, throughput)
            check_answers(target, options)
        with silenced(options.quiet):
            build_for(target.format for target in targets)
        samples = {(target.label, threads): Samples() for target in targets for threads in settings}
        errors: list[ModelFailed] = []
        with progress_bar("bench", total=options.repeats * len(samples), quiet=options.quiet) as bar:
            for round_number in range(options.repeats):
                for target in targets:
                    for threads in settings:
                        gathered = samples[target.label, threads]
                        if gathered.failure is not None:  # in an earlier round; it would fail again
                            bar.advance()
                            continue
                        described = [target.label]
                        described += [f"threads {threads}"] if len(settings) > 1 else []
                        described += [f"round {round_number + 1}"] if options.repeats > 1 else []
                        bar.describe(", ".join(described))
                        bound = {**environment, **thread_environment(threads, environment)}
                        try:
                            measure_once(target, engine, latency, throughput, bound, options, gathered, bar)
                        except ModelFailed as error:
                            errors.append(error)
                            gathered.failure = failure_of(error, "vLLM")
                            if len(samples) > 1:
                                _report_failure(error, gathered.failure, options.quiet)
                        bar.advance()
    if all(gathered.failure for gathered in samples.values()):
        raise _none_ran(errors)
    if len(settings) == 1:
        environment = {**environment, **thread_environment(settings[0], environment)}
    else:
        del environment[BIND]  # it differs from row to row, where it is recorded
    return BenchResult(
        models=_rows(targets, settings, samples, latency, throughput),
        latency=latency,
        throughput=throughput,
        repeats=options.repeats,
        eager=options.eager,
        commands=[
            shlex.join([*vllm_cli.prefix(), "bench", name, "--model", "MODEL", *own, *engine, *arguments])
            for name, arguments in benchmark_arguments(latency, throughput)
            for own in sorted({tuple(target.engine_args) for target in targets})
        ],
        environment=recorded_environment(environment),
        machine=describe_machine(),
        versions=installed_versions(),
        seconds=time.perf_counter() - started,
        prompts=list(options.prompts),
        greedy=options.greedy,
    )


def _report_failure(error: ModelFailed, failure: Failure, quiet: bool) -> None:
    """Printed at once, because the other models may take long."""
    Console(stderr=True, quiet=quiet, soft_wrap=True).print(
        f"{failure.reason} (log: {error.log})", style="yellow", markup=False, highlight=False
    )


def _none_ran(errors: Sequence[ModelFailed]) -> SparsifyError:
    """One failure as it is; of several the reasons of all, and the log of the first."""
    first, *others = errors
    reasons = [str(error).splitlines()[0] for error in others]
    return SparsifyError("\n".join([str(first), *(["none of the others ran either:"] if reasons else []), *reasons]))


def _rows(
    targets: Sequence[Target],
    settings: Sequence[str],
    samples: Mapping[tuple[str, str], Samples],
    latency: LatencyWorkload | None,
    throughput: ThroughputWorkload | None,
) -> list[ModelSpeed]:
    """Every model at its own best thread setting."""

    def speed(label: str, threads: str) -> SettingSpeed:
        found = samples[label, threads]
        if found.failure is not None:  # figures of the rounds before would not be of as many rounds as the others'
            return SettingSpeed(threads, None, None, found.failure)
        return SettingSpeed(
            threads,
            latency_figures(found.first, found.full, latency) if latency else None,
            throughput_figures(found.elapsed, found.tokens, throughput) if throughput else None,
        )

    tried = {target.label: [speed(target.label, threads) for threads in settings] for target in targets}
    best = {label: min(speeds, key=SettingSpeed.seconds) for label, speeds in tried.items()}
    base = targets[0]
    rows = []
    for target in targets:
        mine, first = best[target.label], best[base.label]
        rows.append(
            ModelSpeed(
                model=target.label,
                format=target.format,
                nbytes=target.nbytes,
                latency=mine.latency,
                throughput=mine.throughput,
                ratios=ratios(
                    (target.nbytes, base.nbytes),
                    (mine.latency, first.latency) if mine.latency and first.latency else None,
                    (mine.throughput, first.throughput) if mine.throughput and first.throughput else None,
                ),
                answers=samples[target.label, mine.threads].answers,
                threads=mine.threads,
                settings=tried[target.label] if len(settings) > 1 else [],
                failure=mine.failure,
            )
        )
    return rows
