"""Starts vLLM once per model and round, one process after another, and gathers what its benchmarks wrote."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsify.bench import vllm_cli
from sparsify.bench.dummy_model import ENGINE_ARGUMENTS, PREFIX, is_dummy, parse_dummy
from sparsify.bench.machine import (
    BIND,
    ONE_PROCESS,
    describe_machine,
    installed_versions,
    recorded_environment,
    serving_environment,
    thread_binding,
    thread_environment,
)
from sparsify.bench.result import (
    BenchResult,
    LatencyWorkload,
    ModelSpeed,
    SettingSpeed,
    ThroughputWorkload,
    latency_figures,
    ratios,
    throughput_figures,
)
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.failure import Failure, failure_of
from sparsify.files import read_json, write_json
from sparsify.model.checkpoint import open_checkpoint
from sparsify.native.build import build_ahead
from sparsify.progress import Task, progress_bar, silenced
from sparsify.runtime.backends.cpu import INT8_VARIABLE

TAIL_LINES = 12
CHAT_TOKENS = 256  # room for a short prompt in its chat template and the answer
# vLLM's latency benchmark draws its prompt from the token ids below this.
LATENCY_VOCABULARY = 10_000


@dataclass(frozen=True)
class BenchOptions:
    """How to run, the same for every model.

    repeats:     rounds; each round runs every model once, so that a slow spell of the machine hits them all (A B A B)
    eager:       skip torch.compile: starts faster, decodes slower
    engine_args: further arguments of vLLM's engine, such as ["--dtype", "bfloat16"]
    environment: variables that override the defaults and the shell's
    timeout:     seconds that one model may take in one round
    prompts:     users' turns that every model also answers, outside the timings
    threads:     "auto", "all" or a list of cores, as `thread_binding` takes it; None for what the environment says
    best_threads: measure every model with auto and with all, and report each at its own best
    one_process: scheduler and worker in one process, see `one_process_environment`
    int8:        compressed linears in int8 where a CPU multiplies several tokens at once (SPARSIFY_CPU_INT8)
    greedy:      take the best token; vLLM's benchmarks draw one at temperature 1
    """

    repeats: int = 1
    eager: bool = False
    engine_args: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 3600
    prompts: Sequence[str] = ()
    threads: str | None = None
    best_threads: bool = False
    one_process: bool = False
    int8: bool = False
    greedy: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Target:
    """One model to measure."""

    label: str
    directory: Path
    format: str
    nbytes: int
    engine_args: Sequence[str] = ()  # of this model alone


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


def require_vllm() -> None:
    """Raises MissingDependency with the way to install it."""
    if find_spec("vllm") is None:
        raise MissingDependency(
            "this command needs vLLM, which is not installed: pip install 'sparsify-24[cpu]' "
            "(on a machine with an NVIDIA GPU: pip install 'sparsify-24[cuda]')"
        )


def worker_command(job: Path) -> list[str]:
    """The process that measures one model. Tests replace this and nothing else."""
    return [sys.executable, "-m", "sparsify.bench.worker", str(job)]


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
    _check(latency, throughput, options)
    require_vllm()
    single = one_process_environment(options.engine_args) if options.one_process else {}
    environment = serving_environment({**single, **int8_environment(options.int8), **options.environment})
    settings = thread_settings(options, environment)
    engine = engine_arguments(latency, throughput, options)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparsify-shapes-") as scratch:
        targets = open_targets(models, labels, Path(scratch))
        for target in targets:
            _check_fits(target, latency, throughput)
            _check_speaks(target, options)
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
                            _measure_once(target, engine, latency, throughput, bound, options, gathered, bar)
                        except ModelFailed as error:
                            errors.append(error)
                            gathered.failure = failure_of(error, "vLLM")
                            if len(samples) > 1:
                                _say_that_it_failed(error, gathered.failure, options.quiet)
                        bar.advance()
    if all(gathered.failure for gathered in samples.values()):
        raise _none_ran(errors)
    if len(settings) == 1:
        environment = {**environment, **thread_environment(settings[0], environment)}
    else:
        del environment[BIND]  # it differs from row to row, where it is told
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


def _say_that_it_failed(error: ModelFailed, failure: Failure, quiet: bool) -> None:
    """Said at once, for the other models may take long."""
    Console(stderr=True, quiet=quiet, soft_wrap=True).print(
        f"{failure.reason} (log: {error.log})", style="yellow", markup=False, highlight=False
    )


def _none_ran(errors: Sequence[ModelFailed]) -> SparsifyError:
    """One failure as it is; of several the reasons of all, and the log of the first."""
    first, *others = errors
    reasons = [str(error).splitlines()[0] for error in others]
    return SparsifyError("\n".join([str(first), *(["none of the others ran either:"] if reasons else []), *reasons]))


def build_for(formats: Iterable[str]) -> None:
    """Build the kernels that checkpoints of these formats are served with on a CPU: here that is seen, in vLLM it is not."""
    if vllm_cli.installed_as() == vllm_cli.CPU_BUILD and any(name.startswith("sparse24") for name in formats):
        build_ahead(("cpu/sparse24", "cpu/sparse24_torch"))


def thread_settings(options: BenchOptions, environment: Mapping[str, str]) -> list[str]:
    """The values of VLLM_CPU_OMP_THREADS_BIND to measure every model with."""
    if options.threads and options.best_threads:
        raise SparsifyError("give --threads or --best-threads, not both")
    if options.best_threads:
        ranks = tensor_parallel_ranks(options.engine_args)
        return list(dict.fromkeys(thread_binding(choice, ranks) for choice in ("auto", "all")))
    if options.threads:
        return [thread_binding(options.threads, tensor_parallel_ranks(options.engine_args))]
    return [environment[BIND]]


def one_process_environment(engine_args: Sequence[str]) -> dict[str, str]:
    """What makes vLLM keep its scheduler and its worker in one process.

    Otherwise the scheduler waits for the worker in a busy loop, on a core that may be computing, and every step crosses
    from process to process and back. Several ranks need several processes.
    """
    if tensor_parallel_ranks(engine_args) > 1:
        raise SparsifyError("--one-process serves one rank: leave it away with --tensor-parallel-size")
    return {ONE_PROCESS: "0"}


def int8_environment(wanted: bool) -> dict[str, str]:
    """What lets the CPU back end multiply in int8; without it the shell decides."""
    return {INT8_VARIABLE: "1"} if wanted else {}


def tensor_parallel_ranks(engine_args: Sequence[str]) -> int:
    """What `--tensor-parallel-size` says, in any of the ways vLLM takes it."""
    names = ("--tensor-parallel-size", "--tensor_parallel_size", "-tp")
    joined = [part for argument in engine_args for part in argument.split("=", 1)]
    for name, value in zip(joined, joined[1:], strict=False):
        if name in names and value.isdigit():
            return max(1, int(value))
    return 1


def open_targets(
    models: Sequence[str | Path], labels: Sequence[str] | None = None, scratch: Path | None = None
) -> list[Target]:
    """Opens every model cheaply, so that a missing one is found before the first is measured.

    scratch: where to write the configs of models that consist of a shape.
    """
    if not models:
        raise SparsifyError("nothing to measure: give at least one model directory")
    if labels is not None and len(labels) != len(models):
        raise SparsifyError(f"{len(labels)} labels for {len(models)} models: give one for each")
    targets: list[Target] = []
    for i, spec in enumerate(models):
        label, text = "", str(spec)
        if "=" in text and not Path(text).exists():
            label, text = text.split("=", 1)
        label = labels[i] if labels else label or model_name(text)
        if any(label == other.label for other in targets):
            raise SparsifyError(f"two models are called {label}: name them, as in {label}-2={text}")
        if is_dummy(text):
            model = parse_dummy(text)
            assert scratch is not None, "a model that consists of its shape needs a place for its config.json"
            directory = model.write(scratch / str(i))
            targets.append(Target(label, directory, f"{model.format}, random", model.nbytes(), ENGINE_ARGUMENTS))
            continue
        checkpoint = open_checkpoint(text)
        quantization = checkpoint.config.get("quantization_config") or {}
        kind = str(quantization.get("format") or quantization.get("quant_method") or "dense")
        targets.append(Target(label, checkpoint.directory, kind, checkpoint.nbytes()))
    return targets


def model_name(spec: str | Path) -> str:
    """What people call a model: the name of its directory, or the spec itself."""
    return Path(spec).resolve().name if Path(spec).is_dir() else str(spec).removeprefix(PREFIX)


def engine_arguments(
    latency: LatencyWorkload | None, throughput: ThroughputWorkload | None, options: BenchOptions
) -> list[str]:
    """Arguments of the vLLM engine, without the model."""
    # Rounded up with room for a beginning-of-sequence token. The longest request decides the memory vLLM reserves.
    longest = _longest_request(latency, throughput) // 16 * 16 + 32
    if options.prompts:
        longest = max(longest, CHAT_TOKENS)
    arguments = ["--max-model-len", str(longest), "--no-enable-prefix-caching"]
    if options.eager:
        arguments.append("--enforce-eager")
    return [*arguments, *options.engine_args]


def benchmark_arguments(
    latency: LatencyWorkload | None, throughput: ThroughputWorkload | None
) -> list[tuple[str, list[str]]]:
    """What runs for every model: (name of vLLM's benchmark, its arguments). Latency runs twice: one token, and all."""
    runs = []
    if latency:
        for output_len in (1, latency.output_len):
            arguments = ["--input-len", latency.input_len, "--output-len", output_len]
            arguments += ["--batch-size", latency.batch_size, "--num-iters", latency.iterations]
            arguments += ["--num-iters-warmup", latency.warmup]
            runs.append(("latency", [str(a) for a in arguments]))
    if throughput:
        arguments = ["--dataset-name", "random", "--random-input-len", throughput.input_len]
        arguments += ["--random-output-len", throughput.output_len, "--num-prompts", throughput.prompts]
        arguments += ["--num-warmups", throughput.warmup]
        runs.append(("throughput", [str(a) for a in arguments]))
    return runs


def _longest_request(latency: LatencyWorkload | None, throughput: ThroughputWorkload | None) -> int:
    return max(work.input_len + work.output_len for work in (latency, throughput) if work)


def _check(latency: LatencyWorkload | None, throughput: ThroughputWorkload | None, options: BenchOptions) -> None:
    if latency is None and throughput is None:
        raise SparsifyError("nothing to measure: ask for latency or throughput")
    if latency and latency.output_len < 2:
        raise SparsifyError("latency needs an output length of at least 2, to tell the first token from the others")
    numbers: dict[str, int] = {"repeats": options.repeats}
    if latency:
        numbers |= {"batch size": latency.batch_size, "input length": latency.input_len}
        numbers |= {"iterations": latency.iterations}
    if throughput:
        numbers |= {"prompts": throughput.prompts, "output length": throughput.output_len}
        numbers |= {"input length": min(throughput.input_len, numbers.get("input length", throughput.input_len))}
    for name, value in numbers.items():
        if value < 1:
            raise SparsifyError(f"{name} is {value}; it must be at least 1")


def _check_fits(target: Target, latency: LatencyWorkload | None, throughput: ThroughputWorkload | None) -> None:
    config = read_json(target.directory / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    limit, longest = config.get("max_position_embeddings"), _longest_request(latency, throughput)
    if isinstance(limit, int) and longest + 32 > limit:
        raise SparsifyError(
            f"{target.label} reads at most {limit} tokens and a request of this workload takes {longest} and up to 32 "
            "of padding: use shorter --input-len or --output-len"
        )
    vocabulary = config.get("vocab_size")
    if latency and isinstance(vocabulary, int) and vocabulary < LATENCY_VOCABULARY:
        raise SparsifyError(
            f"{target.label} has {vocabulary} tokens, and vLLM's latency benchmark draws its prompts from the first "
            f"{LATENCY_VOCABULARY}: measure its throughput instead"
        )


def _check_speaks(target: Target, options: BenchOptions) -> None:
    if options.prompts and target.engine_args:
        raise SparsifyError(f"{target.label} consists of its shape and cannot answer prompts: measure it without them")


def _measure_once(
    target: Target,
    engine: Sequence[str],
    latency: LatencyWorkload | None,
    throughput: ThroughputWorkload | None,
    environment: Mapping[str, str],
    options: BenchOptions,
    samples: Samples,
    bar: Task,
) -> None:
    """One process: starts the engine, runs every benchmark, adds the times to `samples`. bar: says how far that is."""
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
        raise ModelFailed(failure(target.label, status, log), log)
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


# The engine process reports the cause first and everybody above it repeats that something failed.
CAUSE = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (\S.*)")
CONSEQUENCE = "Engine core initialization failed"


def failure(label: str, status: int | None, log: Path) -> str:
    """One clear sentence, the cause when the log shows one, and the end of the log."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if status is None:
        happened = "took longer than the time limit"
    elif status < 0:
        happened = f"was killed by signal {signal.Signals(-status).name}"
        happened += " (too little memory?)" if -status == signal.SIGKILL else ""
    elif status == 0:
        happened = "ended without writing its result"
    else:
        happened = f"failed with exit status {status}"
    causes = [match for match in map(CAUSE.search, lines) if match and CONSEQUENCE not in match[2]]
    cause = f": {causes[0][1]}: {causes[0][2]}" if causes else ""
    tail = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:]) or "  (empty)"
    return f"{label}: vLLM {happened}{cause}\nlast lines of its log ({log}):\n{tail}"


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


def serve(
    directory: str | Path,
    extra_args: Sequence[str] = (),
    threads: str | None = None,
    one_process: bool = False,
    int8: bool = False,
    replace: Callable[..., Any] = os.execvpe,
) -> None:
    """Becomes `vllm serve` on a model, with the environment the benchmarks use; does not return."""
    require_vllm()
    overrides = {BIND: thread_binding(threads, tensor_parallel_ranks(extra_args))} if threads else {}
    overrides |= one_process_environment(extra_args) if one_process else {}
    overrides |= int8_environment(int8)
    environment = serving_environment(overrides)
    environment |= thread_environment(environment[BIND], environment)
    checkpoint = open_checkpoint(directory)
    build_for([str((checkpoint.config.get("quantization_config") or {}).get("format"))])
    command = [sys.executable, "-m", "sparsify.bench.vllm_cli", "serve", str(checkpoint.directory), *extra_args]
    if not any(argument.split("=")[0] == "--served-model-name" for argument in extra_args):
        # A path of the server makes a poor name in every client; the directory's name is what people call the model.
        command += [
            "--served-model-name",
            Path(directory).resolve().name if Path(directory).is_dir() else str(directory),
        ]
    replace(command[0], command, environment)
