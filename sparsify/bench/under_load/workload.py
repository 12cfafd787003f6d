"""What a server is asked under load: which requests, at which rates, how often; and vLLM's arguments for that."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.bench.targets import Target, check_fits
from sparsify.bench.workload import BenchOptions, ThroughputWorkload, engine_arguments, engine_options
from sparsify.errors import SparsifyError
from sparsify.files import kind_problem, read_json
from sparsify.fingerprint import file_digest
from sparsify.model.permissions import trusts_remote_code

LOADS = "0.25,0.5,0.75,0.9,inf"
RANDOM = re.compile(r"random:(\d{1,6})/(\d{1,6})")
GOODPUT = ("ttft", "tpot", "e2el")  # what vLLM's --goodput knows, in milliseconds
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Dataset:
    """The requests. kind: random, sharegpt or file; path: of a file; input_len, output_len: tokens of random requests."""

    kind: str
    path: Path | None = None
    input_len: int = 0
    output_len: int = 0

    def arguments(self) -> list[str]:
        """What `vllm bench serve` takes for it."""
        if self.kind == "random":
            lengths = ["--random-input-len", str(self.input_len), "--random-output-len", str(self.output_len)]
            return ["--dataset-name", "random", *lengths]
        if self.kind == "sharegpt":
            return ["--dataset-name", "sharegpt", "--dataset-path", str(self.path)]
        written = ["--dataset-name", "custom", "--dataset-path", str(self.path)]
        return [*written, "--custom-output-len", "-1", "--skip-chat-template"]

    def described(self) -> str:
        """As it was given, of a path the last part."""
        if self.path is not None:
            return f"{self.kind}:{self.path.name}"
        return f"random:{self.input_len}/{self.output_len}"

    def digest(self) -> str | None:
        """Of the file, to see that it is still the same; None without one."""
        return None if self.path is None else file_digest(self.path)


@dataclass(frozen=True)
class Step:
    """One rate. load: a share of the capacity; rate: requests per second. Both are infinite where all requests come at once,
    and one of them is None."""

    load: float | None = None
    rate: float | None = None

    @property
    def at_once(self) -> bool:
        """Whether no request waits for its time: what comes out is the capacity."""
        return math.inf in (self.load, self.rate)

    @property
    def name(self) -> str:
        """Of its files: `load-0.25`, `rate-2` or `inf`."""
        if self.at_once:
            return "inf"
        return f"load-{self.load:g}" if self.load is not None else f"rate-{self.rate:g}"

    def requests_per_second(self, capacity: float | None) -> float:
        """The rate that is asked. capacity: requests per second, which a share needs."""
        if self.at_once:
            return math.inf
        if self.rate is not None:
            return self.rate
        assert self.load is not None and capacity is not None, "a share is of a capacity that was measured"
        return self.load * capacity


@dataclass(frozen=True)
class UnderLoad:
    """How to measure servers under load, the same for every model.

    steps:       the rates, all requests at once first
    dataset:     the requests; they are the same for every model and rate, and others in every repeat
    requests:    of one measurement; warmup: requests before it, which do not count
    repeats:     rounds; each starts every model's server once (A B A B), so that a slow spell of the machine hits them all
    goodput:     limits of what counts as a good request, in milliseconds, by ttft, tpot and e2el
    timeout:     seconds that a server may take to start, and then each measurement
    startup:     cold and as many warm starts of every model's engine, by `vllm bench startup`; 0 for none
    eager, engine_args, threads, one_process, int8: as in `BenchOptions`
    """

    steps: Sequence[Step] = ()
    dataset: Dataset = Dataset("random", None, 128, 64)
    requests: int = 100
    warmup: int = 4
    repeats: int = 3
    goodput: Mapping[str, float] = field(default_factory=dict)
    timeout: float = 3600
    startup: int = 0
    eager: bool = False
    engine_args: Sequence[str] = ()
    threads: str | None = None
    one_process: bool = False
    int8: bool = False
    quiet: bool = False

    @property
    def needs_capacity(self) -> bool:
        """Whether some rate is a share of the capacity."""
        return any(step.load is not None and not step.at_once for step in self.steps)


def parse_steps(loads: str | None, rates: str | None) -> list[Step]:
    """The rates of `--load` or `--rates`, all requests at once first. SparsifyError for what is no positive number."""
    if loads is not None and rates is not None:
        raise SparsifyError("give --load (shares of the capacity) or --rates (requests per second), not both")
    option, text = ("--rates", rates) if rates is not None else ("--load", loads if loads is not None else LOADS)
    steps = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise SparsifyError(f"{option} {part[:40]!r} is no positive number; write numbers such as 0.5, or inf")
        steps.append(Step(rate=value) if rates is not None else Step(load=value))
    if twice := next((step for step in steps if [other.name for other in steps].count(step.name) > 1), None):
        raise SparsifyError(f"{option} names {twice.name} twice; name each rate once")
    return sorted(steps, key=lambda step: not step.at_once)  # stable: the others stay in their order


def parse_dataset(text: str) -> Dataset:
    """`random:INPUT/OUTPUT`, `sharegpt:FILE` or `file:FILE`. SparsifyError says what is wrong with it."""
    kind, _, rest = text.partition(":")
    if kind == "random":
        found = RANDOM.fullmatch(text)
        if found is None or not int(found[1]) or int(found[2]) < 2:
            raise SparsifyError(
                f"--dataset {text[:60]!r}: write random:INPUT/OUTPUT in tokens, as in random:128/64, with at least 2 of output"
            )
        return Dataset("random", None, int(found[1]), int(found[2]))
    if kind not in ("sharegpt", "file") or not rest:
        raise SparsifyError(f"--dataset {text[:60]!r} is unknown; give random:128/64, sharegpt:FILE or file:FILE")
    path = Path(rest)
    if problem := kind_problem(path):
        raise SparsifyError(f"{path} {problem}")
    if not path.is_file():
        raise SparsifyError(f"{path} does not exist; --dataset {kind}: takes a file")
    if kind == "sharegpt":
        _check_sharegpt(path)
    else:
        _check_requests(path)
    return Dataset(kind, path.resolve())


def _check_sharegpt(path: Path) -> None:
    """SparsifyError where a file is not as ShareGPT's: a list of {"conversations": [{"value": ...}, ...]}."""
    entries = read_json(path)
    if not isinstance(entries, list) or not any(_has_two_turns(entry) for entry in entries):
        raise SparsifyError(
            f'{path} is no ShareGPT file: a JSON list of {{"conversations": [{{"from": ..., "value": ...}}, ...]}} with at '
            "least two turns is wanted"
        )


def _has_two_turns(entry: Any) -> bool:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    return isinstance(turns, list) and len(turns) >= 2 and all(isinstance(t, dict) and "value" in t for t in turns[:2])


def _check_requests(path: Path) -> None:
    """SparsifyError where a line is no {"prompt": text, "output_tokens": number}."""
    if path.suffix != ".jsonl":
        raise SparsifyError(
            f"{path}: --dataset file: takes a .jsonl file, with a prompt and output_tokens on each line"
        )
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        tokens = entry.get("output_tokens") if isinstance(entry, dict) else None
        if not (isinstance(tokens, int) and tokens >= 2 and isinstance(entry.get("prompt"), str) and entry["prompt"]):
            raise SparsifyError(
                f'{path}, line {number}: {{"prompt": text, "output_tokens": number}} is wanted, with at least 2 tokens of output'
            )
    if not lines:
        raise SparsifyError(f"{path} holds no request")


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:500 tpot:100` -> milliseconds by name. SparsifyError for another name or no positive number."""
    found: dict[str, float] = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        try:
            milliseconds = float(limit)
        except ValueError:
            milliseconds = math.nan
        if name not in GOODPUT or name in found or not 0 < milliseconds < math.inf:
            raise SparsifyError(
                f"--goodput {pair[:40]!r}: write NAME:MILLISECONDS, each name once: {', '.join(GOODPUT)} (as in ttft:500 tpot:100)"
            )
        found[name] = milliseconds
    return found


def check_load(load: UnderLoad) -> None:
    """SparsifyError for what cannot be measured."""
    if not load.steps:
        raise SparsifyError("nothing to measure: give at least one rate")
    for name, value, least in (
        ("--requests", load.requests, 2),
        ("--repeats", load.repeats, 1),
        ("--warmup", load.warmup, 0),
        ("--startup", load.startup, 0),
    ):
        if value < least:
            raise SparsifyError(f"{name} is {value}; it must be at least {least}")
    if not load.timeout > 0:
        raise SparsifyError(f"--timeout is {load.timeout:g}; it must be more than 0 seconds")


def check_target(target: Target, load: UnderLoad) -> None:
    """SparsifyError where a random request is longer than the model reads. Other requests are left to the server to judge."""
    if load.dataset.kind == "random":
        check_fits(target, None, _random_workload(load))


def _random_workload(load: UnderLoad) -> ThroughputWorkload:
    return ThroughputWorkload(load.dataset.input_len, load.dataset.output_len, load.requests)


def server_arguments(load: UnderLoad) -> list[str]:
    """Arguments of `vllm serve`, without the model and its address.

    No prefix is cached: each rate sends the same requests again, and their prompts would be there already.
    """
    options = BenchOptions(eager=load.eager, engine_args=load.engine_args)
    if load.dataset.kind == "random":
        return engine_arguments(None, _random_workload(load), options)
    return engine_options(options)


def driver_arguments(load: UnderLoad, rate: float, repeat: int) -> list[str]:
    """Arguments of `vllm bench serve`, without the server, the tokenizer and the file for the result.

    Every answer has the full number of tokens, whatever the model would say: the work is the same for all models.
    """
    arguments = [*load.dataset.arguments(), "--num-prompts", str(load.requests), "--num-warmups", str(load.warmup)]
    arguments += ["--request-rate", f"{rate:.6g}", "--seed", str(repeat), "--temperature", "0", "--ignore-eos"]
    arguments += ["--percentile-metrics", "ttft,tpot,itl,e2el"]
    arguments += ["--metric-percentiles", ",".join(map(str, PERCENTILES))]
    if load.goodput:
        arguments += ["--goodput", *(f"{name}:{limit:g}" for name, limit in load.goodput.items())]
    if trusts_remote_code():
        arguments.append("--trust-remote-code")
    return arguments
