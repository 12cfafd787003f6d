"""`sparsify demo`: compress, serve and compare a small embedded model."""

import argparse

from sparsify.cli.command import FAILED, IS_QUIET, SHOWS_JSON, Commands, Outcome, add_command


def demo(args: argparse.Namespace) -> Outcome:
    """Run `demo`."""
    from sparsify.demo import run_demo

    result = run_demo(args.output, quiet=args.quiet)
    return Outcome(result.to_json(), [result.table()], 0 if result.speed.compares else FAILED)


def add_demo(commands: Commands) -> None:
    """Register `demo`."""
    command = add_command(
        commands, "demo", demo, "compile, serve and compare a small embedded model",
        IS_QUIET, SHOWS_JSON,
        shown=("sparsify demo --output out/demo",),
    )  # fmt: skip
    command.add_argument(
        "--output", "-o", default="out/demo", metavar="DIR", help="directory to write (default out/demo)"
    )
