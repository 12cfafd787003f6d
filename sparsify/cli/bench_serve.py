"""`sparsify bench serve`: servers under load."""

import argparse

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

MODELS_HELP = (
    "checkpoint directories; NAME=DIR names one; shape:NAME@FORMAT measures the speed of a model that is not there "
    "(NAME: smollm2-135m, llama-3.2-1b, llama-3.1-8b; FORMAT: dense, sparse24, pack-quantized; then +bits8, +group128, "
    "+head8 for an 8-bit output head, +layers4, +tied, +untied)"
)
EAGER_HELP = "without torch.compile: starts faster, runs slower"


def bench_serve(args: argparse.Namespace) -> Outcome:
    """Run `bench serve`."""
    from sparsify.bench.under_load import (
        UnderLoad,
        measure_under_load,
        parse_dataset,
        parse_goodput,
        parse_steps,
        tables,
    )

    load = UnderLoad(
        steps=parse_steps(args.load, args.rates),
        dataset=parse_dataset(args.dataset),
        requests=args.requests,
        warmup=args.warmup,
        repeats=args.repeats,
        goodput=parse_goodput(args.goodput),
        timeout=args.timeout,
        startup=args.startup,
        eager=args.eager,
        engine_args=args.vllm_args,
        threads=args.threads,
        one_process=args.one_process,
        int8=args.int8,
        quiet=args.quiet,
    )
    result = measure_under_load(args.directories, args.output, load, args.resume)
    drawn = f"sparsify report {args.output}     draws it"
    return Outcome(result, [*tables(result), drawn], 0 if result["complete"] else FAILED)


def add_bench_serve(benchmarks: Commands) -> None:
    """Register `bench serve`."""
    command = add_command(
        benchmarks, "serve", bench_serve, "latency and throughput of servers under load, at several rates of requests",
        SETS_ENGINE, IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=(
            "sparsify bench serve out/dense out/smollm2 --output out/serve",
            "sparsify bench serve dense=out/dense out/smollm2 --load 0.5,0.9,inf --goodput ttft:500 tpot:100 --output out/serve",
            "sparsify bench serve out/dense out/smollm2 --rates 1,2,4 --dataset file:requests.jsonl --output out/serve --resume",
            "sparsify report out/serve     draws latency against the rate",
        ),
    )  # fmt: skip
    command.usage = "sparsify bench serve [options] DIR [DIR ...] [-- VLLM_ARGS]"
    command.description = (
        "Start each model's vLLM server in turn on loopback and drive it with vLLM's own `vllm bench serve` at every rate: time to "
        "the first token (TTFT), per further token (TPOT), between tokens (ITL) and of whole requests, throughput, goodput, use of "
        "the KV cache, and what starting took. A rate that a server does not keep up with is marked saturated."
    )
    command.add_argument("directories", metavar="DIR", nargs="+", help=MODELS_HELP)
    command.add_argument(
        "--output", "-o", default="out/serve", metavar="RUN",
        help="directory for the measurements; must not exist, but with --resume (default out/serve)",
    )  # fmt: skip
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run with the same models and settings; it may ask for more --repeats",
    )
    rates = command.add_mutually_exclusive_group()
    rates.add_argument(
        "--load", metavar="LIST",
        help="rates as shares of the capacity, which is what the first model reaches when all requests come at once; inf is that "
        "itself (default 0.25,0.5,0.75,0.9,inf)",
    )  # fmt: skip
    rates.add_argument("--rates", metavar="LIST", help="rates in requests per second, such as 1,2,4 or inf")
    command.add_argument(
        "--dataset", default="random:128/64", metavar="D",
        help="random:INPUT/OUTPUT (tokens; default random:128/64), sharegpt:FILE (its JSON), or file:FILE (.jsonl with prompt and "
        "output_tokens on each line)",
    )  # fmt: skip
    command.add_argument(
        "--requests", type=int, default=100, metavar="N", help="requests of each measurement (default 100)"
    )
    command.add_argument("--warmup", type=int, default=4, metavar="N", help="requests before each of them (default 4)")
    command.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="rounds over all models, with other requests each (default 3)",
    )
    command.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="count requests per second within these limits in milliseconds, of ttft, tpot and e2el: ttft:500 tpot:100",
    )  # fmt: skip
    command.add_argument(
        "--timeout", type=float, default=3600, metavar="S",
        help="seconds that a server may take to start, and then each measurement (default 3600)",
    )  # fmt: skip
    command.add_argument(
        "--startup", type=int, default=0, metavar="N",
        help="measure N cold starts (empty caches) and N warm ones of every model too, by `vllm bench startup` (default none)",
    )  # fmt: skip
    command.add_argument("--eager", action="store_true", help=EAGER_HELP)
    command.add_argument("--threads", metavar="auto|all|LIST", help=THREADS_HELP)
