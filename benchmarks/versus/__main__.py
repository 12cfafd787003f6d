"""Compress and measure one model by several packages: `make versus`, or `python -m benchmarks.versus --help`.

What was finished stays: after an interruption, or with `--rounds` raised, the same command does what is missing, and tries
again what failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.versus.page import page
from benchmarks.versus.rows import ROWS
from benchmarks.versus.run import Run, only, quickly
from benchmarks.versus.settings import EMBEDDED, QUICK, ROOT, Settings
from sparsify.errors import SparsifyError
from sparsify.progress import say


def parser() -> argparse.ArgumentParser:
    """The options; those of the sizes are settings by the same name."""
    found = argparse.ArgumentParser(
        prog="make versus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Settings()
    found.add_argument("--model", default=usual.model, metavar="MODEL", help=f"the dense model (default {EMBEDDED})")
    found.add_argument("--text", default=usual.text, metavar="FILE", help="text to score, or self (default)")
    found.add_argument(
        "--calibration", default=usual.calibration, metavar="SOURCE", help="a text file, hub:ID, or self (default)"
    )
    found.add_argument(
        "--tasks", metavar="FOLDER", help="multiple-choice tasks, as `sparsify eval --tasks` takes them (none)"
    )
    found.add_argument("--gguf", metavar="FILE", help="the model as GGUF, for llama.cpp, where --model is none")
    numbers = {
        "limit": "items of each task", "samples": "rows of calibration", "length": "tokens of each", "chunks": "scored chunks",
        "sequence_length": "tokens of each", "group_size": "inputs per scale", "prompts": "sequences at once",
        "rounds": "of speed, over all rows",
    }  # fmt: skip
    for name, about in numbers.items():
        default = getattr(usual, name)
        told = "" if default is None else f" (default {default})"
        found.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=about + told)
    found.add_argument(
        "--timeout", type=float, metavar="S", help=f"seconds that a step may take (default {usual.timeout:g})"
    )
    found.add_argument("--quick", action="store_true", help="smallest sizes, to see whether every row runs")
    found.add_argument("--only", nargs="+", default=[], metavar="ROW", help=", ".join(row.name for row in ROWS))
    found.add_argument("--output", type=Path, default=Path("out/versus"), metavar="DIR", help="default out/versus")
    found.add_argument(
        "--publish",
        action="store_true",
        help="write docs/benchmarks/versus.md and its record in benchmarks/results too",
    )
    return found


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings of a command line; --quick is what it does not say itself."""
    given = {name: getattr(args, name) for name in ("model", "text", "calibration", "tasks", "gguf")}
    for name in ("text", "tasks", "gguf"):
        if given[name] not in (None, "self"):
            given[name] = str(Path(given[name]).resolve())
    if (path := Path(given["calibration"].removeprefix("file:"))).is_file():
        given["calibration"] = f"file:{path.resolve()}"
    if Path(given["model"]).exists():
        given["model"] = str(Path(given["model"]).resolve())
    sizes = ("limit", "samples", "length", "chunks", "sequence_length", "group_size", "prompts", "rounds", "timeout")
    asked = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    return quickly(Settings(**given), {**(QUICK if args.quick else {}), **asked})


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when all rows are complete, 1 when one is not, 2 for what cannot be begun."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it runs ends with it
    try:
        settings = settings_from(args)
        where, record = None, None
        if args.publish and (settings.quick or args.only or settings.model != EMBEDDED):
            say("docs/benchmarks/versus.md is of whole runs of the embedded model: this one writes into --output only")
        elif args.publish:
            where = ROOT / "docs" / "benchmarks" / "versus.md"
            record = ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-versus.json"
        result = Run(settings, args.output, only(args.only)).run(where, record)
    except SparsifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"stopped; the same command goes on where it was (everything finished is in {args.output})", file=sys.stderr
        )
        return 130
    Console().print(Markdown(page(result)))
    say(f"{args.output / 'versus.md'}" + (f", {where}, {record}" if where else ""))
    return 0 if result["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
