"""`sparsify bench recipes` and `sparsify bench depth`: several recipes applied to one model, side by side."""

import argparse
from dataclasses import asdict
from pathlib import Path

from sparsify.cli.command import (
    ALLOWS_UNKNOWN,
    IS_QUIET,
    SHOWS_JSON,
    TAKES_TASKS,
    TRUSTS_CODE,
    Commands,
    Outcome,
    add_command,
)

# Default of `bench depth`, repeated here because importing sparsify.bench to print a help page would take seconds.
# A test holds it equal to that of sparsify.bench.
DEPTH_DROPS = ("10%", "20%", "30%", "50%")


def bench_recipes(args: argparse.Namespace) -> Outcome:
    """Run `bench recipes`."""
    from sparsify.bench.recipes import compare_recipes, record, tables

    results = compare_recipes(
        args.recipes,
        args.model,
        args.text,
        Path(args.output),
        args.set,
        args.sequence_length,
        args.chunks,
        args.quiet,
        args.tasks,
        args.limit,
    )
    return Outcome(record(results), tables(results))


def add_bench_recipes(benchmarks: Commands) -> None:
    """Register `bench recipes`."""
    command = add_command(
        benchmarks, "recipes", bench_recipes, "apply several recipes to one model; accuracy, time and memory of each",
        IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN, TAKES_TASKS,
        shown=(
            "sparsify bench recipes 2of4 w4a16 2of4-w4a16 --model embedded:smollm2-135m-instruct --output out/recipes",
            "sparsify bench recipes 2of4-w4a16 plain=2of4-w4a16,solver.error_propagation=0 "
            "--model DIR --text test.txt --set calibration.source=file:train.txt --output out/recipes",
            "sparsify bench recipes 2of4-w4a16 2of4-w4a16-tuned --model DIR --text test.txt --text self --tasks tasks "
            "--limit 200 --output out/recipes",
        ),
    )  # fmt: skip
    command.add_argument(
        "recipes",
        metavar="RECIPE",
        nargs="+",
        help="file or built-in recipe; NAME=RECIPE,KEY=VALUE,... gives one a name and changes of its own",
    )
    command.add_argument("--model", metavar="MODEL", help="the dense model, unless the recipes name it")
    command.add_argument(
        "--output", "-o", required=True, metavar="DIR", help="directory for the results, which are kept"
    )
    command.add_argument(
        "--text", action="append", metavar="FILE",
        help="text to score, or self; repeatable (default self, or none with --tasks)",
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change of every recipe that has such a setting"
    )
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens per scored chunk")
    command.add_argument("--chunks", type=int, metavar="N", help="chunks scored")


def bench_depth(args: argparse.Namespace) -> Outcome:
    """Run `bench depth`."""
    from sparsify.bench.depth import DepthOptions, compare_depth, table

    options = DepthOptions(
        drops=args.drop,
        methods=args.methods,
        heal=None if args.heal == "none" else args.heal,
        speed=args.speed,
        overrides=args.set,
        sequence_length=args.sequence_length,
        chunks=args.chunks,
        quiet=args.quiet,
    )
    rows, speed = compare_depth(args.model, args.text or ["self"], Path(args.output), options)
    data = {"rows": [row.to_json() for row in rows], "speed": None if speed is None else asdict(speed)}
    return Outcome(data, [table(rows, speed)])


def add_bench_depth(benchmarks: Commands) -> None:
    """Register `bench depth`."""
    command = add_command(
        benchmarks, "depth", bench_depth, "depth methods at several shares of the layers, before and after healing",
        IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=(
            "sparsify bench depth --model embedded:smollm2-135m-instruct --text test.txt --output out/depth "
            "--set calibration.source=file:train.txt",
            "sparsify bench depth --model DIR --drop 20% --methods angular finercut --heal none --speed --output out/depth",
        ),
    )  # fmt: skip
    command.add_argument("--model", metavar="MODEL", required=True, help="the dense model")
    command.add_argument(
        "--output",
        "-o",
        required=True,
        metavar="DIR",
        help="directory for the recipes and their results, which are kept",
    )
    command.add_argument(
        "--text", action="append", metavar="FILE", help="text to score, or self; repeatable (default self)"
    )
    command.add_argument(
        "--drop",
        nargs="+",
        default=list(DEPTH_DROPS),
        metavar="SHARE",
        help="shares of the layers (10%% 20%% 30%% 50%%)",
    )
    command.add_argument(
        "--methods", nargs="+", default=["deepest", "angular", "streamline", "finercut"], metavar="METHOD",
        help="deepest, angular, streamline, finercut (in pairs), finercut-free (default the first four)",
    )  # fmt: skip
    command.add_argument(
        "--heal", default="500k", metavar="TOKENS", help="tokens that adapters learn from, or none (default 500k)"
    )
    command.add_argument(
        "--speed",
        action="store_true",
        help="decode in vLLM with the dense model and the last method's result at every share",
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change of every recipe that has such a setting"
    )
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens per scored chunk")
    command.add_argument("--chunks", type=int, metavar="N", help="chunks scored")
