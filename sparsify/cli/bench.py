"""`sparsify bench` and its benchmarks of whole models in vLLM: `latency` and `throughput`."""

import argparse

from sparsify.cli import bench_kernels, bench_recipes, bench_serve
from sparsify.cli.bench_serve import EAGER_HELP, MODELS_HELP
from sparsify.cli.command import (
    ALLOWS_UNKNOWN,
    FAILED,
    IS_QUIET,
    SETS_ENGINE,
    SHOWS_JSON,
    TRUSTS_CODE,
    Commands,
    Outcome,
    add_command,
)
from sparsify.cli.serve import THREADS_HELP

# Defaults of the workloads, repeated here because importing sparsify.bench to print a help page would take seconds.
# A test holds them equal to those of sparsify.bench.
LATENCY = {"input_len": 128, "output_len": 64, "batch_size": 1, "iterations": 5, "warmup": 2}
THROUGHPUT = {"input_len": 128, "output_len": 64, "prompts": 32, "warmup": 4}
WORKLOAD_HELP = {
    "input_len": "prompt tokens per request",
    "output_len": "generated tokens per request",
    "batch_size": "requests that run together",
    "iterations": "measured repetitions",
    "warmup": "repetitions before measuring",
    "prompts": "requests handed over at once",
}


def bench(args: argparse.Namespace) -> Outcome:
    """Run `bench latency` and `bench throughput`."""
    from sparsify.bench import BenchOptions, LatencyWorkload, ThroughputWorkload, latency, table, throughput

    options = BenchOptions(
        repeats=args.repeats,
        eager=args.eager,
        engine_args=args.vllm_args,
        threads=args.threads,
        best_threads=args.best_threads,
        one_process=args.one_process,
        int8=args.int8,
        greedy=args.greedy,
        quiet=args.quiet,
    )
    if args.benchmark == "latency":
        workload = LatencyWorkload(**{name: getattr(args, name) for name in LATENCY})
        result = latency(args.directories, workload, options)
    else:
        load = ThroughputWorkload(**{name: getattr(args, name) for name in THROUGHPUT})
        result = throughput(args.directories, load, options)
    # without the first model there is nothing to compare the others with
    return Outcome(result.to_json(), [table(result)], 0 if result.compares else FAILED)


def add_bench(commands: Commands) -> None:
    """Register `bench` and its benchmarks."""
    benchmarks = commands.add_parser(
        "bench",
        help="measure latency, throughput or a server under load in vLLM, several models in one run; or single linears",
        description="latency, throughput and serve run vLLM's own benchmarks and compare with the first model; kernels measures "
        "one linear at a time, without vLLM's engine.",
    ).add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    add_in_vllm(benchmarks, "latency", LATENCY, "time of one batch of requests: first token, each further token")
    add_in_vllm(benchmarks, "throughput", THROUGHPUT, "tokens per second of many requests together")
    bench_serve.add_bench_serve(benchmarks)
    bench_kernels.add_bench_kernels(benchmarks)
    bench_kernels.add_bench_roofline(benchmarks)
    bench_recipes.add_bench_recipes(benchmarks)
    bench_recipes.add_bench_depth(benchmarks)


def add_in_vllm(benchmarks: Commands, name: str, workload: dict[str, int], about: str) -> None:
    """Register a benchmark of whole models. workload: its settings with their defaults, each an option of the command."""
    command = add_command(
        benchmarks, name, bench, about,
        SETS_ENGINE, IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=(
            f"sparsify bench {name} out/dense out/smollm2",
            f"sparsify bench {name} dense=out/dense sparse=out/smollm2 --repeats 3 -- --dtype bfloat16",
            f"sparsify bench {name} shape:llama-3.2-1b@dense shape:llama-3.2-1b@sparse24+head8 --best-threads",
        ),
    )  # fmt: skip
    command.usage = f"sparsify bench {name} [options] DIR [DIR ...] [-- ENGINE_ARGS]"
    command.add_argument("directories", metavar="DIR", nargs="+", help=MODELS_HELP)
    for setting, value in workload.items():
        option = "--" + setting.replace("_", "-")
        command.add_argument(
            option, type=int, default=value, metavar="N", help=f"{WORKLOAD_HELP[setting]} (default {value})"
        )
    command.add_argument("--repeats", type=int, default=1, metavar="N", help="rounds over all models (default 1)")
    command.add_argument("--eager", action="store_true", help=EAGER_HELP)
    command.add_argument(
        "--greedy", action="store_true", help="take the best token; vLLM's benchmarks draw one at temperature 1"
    )
    threads = command.add_mutually_exclusive_group()
    threads.add_argument("--threads", metavar="auto|all|LIST", help=THREADS_HELP)
    threads.add_argument(
        "--best-threads",
        action="store_true",
        help="measure every model with --threads auto and with all, and report each at its own best",
    )
