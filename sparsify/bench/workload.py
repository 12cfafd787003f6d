"""What is measured in vLLM, and the command-line arguments of its engine and its benchmarks for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsify.errors import SparsifyError
from sparsify.model.permissions import trusts_remote_code

CHAT_TOKENS = 256  # room for a short prompt in its chat template and the answer


@dataclass(frozen=True)
class LatencyWorkload:
    """`vllm bench latency`: one batch at a time, `iterations` times."""

    input_len: int = 128
    output_len: int = 64
    batch_size: int = 1
    iterations: int = 5
    warmup: int = 2


@dataclass(frozen=True)
class ThroughputWorkload:
    """`vllm bench throughput`: all prompts at once, vLLM schedules them."""

    input_len: int = 128
    output_len: int = 64
    prompts: int = 32
    warmup: int = 4


@dataclass(frozen=True)
class BenchOptions:
    """How to run, the same for every model.

    repeats:     rounds; each round runs every model once, so that a slow spell of the machine hits them all (A B A B)
    eager:       skip torch.compile: starts faster, decodes slower
    engine_args: further arguments of vLLM's engine, such as ["--dtype", "bfloat16"]
    environment: variables that override the defaults and the shell's
    timeout:     seconds that one model may take in one round
    prompts:     users' turns that every model also answers, outside the timings
    threads:     "auto", "all" or a list of cores, as `thread_binding` takes it; None for what the environment sets
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


def engine_arguments(
    latency: LatencyWorkload | None, throughput: ThroughputWorkload | None, options: BenchOptions
) -> list[str]:
    """Arguments of the vLLM engine, without the model."""
    # Rounded up with room for a beginning-of-sequence token. The longest request decides the memory vLLM reserves.
    longest = longest_request(latency, throughput) // 16 * 16 + 32
    if options.prompts:
        longest = max(longest, CHAT_TOKENS)
    return ["--max-model-len", str(longest), *engine_options(options)]


def engine_options(options: BenchOptions) -> list[str]:
    """Those of them that do not depend on the requests. What one request has computed does not serve another."""
    arguments = ["--no-enable-prefix-caching"]
    if options.eager:
        arguments.append("--enforce-eager")
    if trusts_remote_code():
        arguments.append("--trust-remote-code")
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


def longest_request(latency: LatencyWorkload | None, throughput: ThroughputWorkload | None) -> int:
    """Tokens of the longest request, prompt and answer."""
    return max(work.input_len + work.output_len for work in (latency, throughput) if work)


def check_workload(
    latency: LatencyWorkload | None, throughput: ThroughputWorkload | None, options: BenchOptions
) -> None:
    """SparsifyError for what cannot be measured."""
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
