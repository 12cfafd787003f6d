"""What every command is made of: its outcome, its registration with the parser, and options that several commands share."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # what ArgumentParser.add_subparsers returns
else:
    Commands = argparse.Action

FAILED = 1  # exit status of a command that ran and did not succeed


@dataclass(frozen=True)
class Outcome:
    """What a command found: plain JSON values, the same for people (strings and rich tables), and the exit status."""

    data: dict[str, Any]
    shown: Sequence[Any]
    status: int = 0


Handler = Callable[[argparse.Namespace], Outcome]


def add_command(
    to: Commands, name: str, handler: Handler, about: str, *parents: argparse.ArgumentParser, shown: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Register a command.

    Args:
        to: the group of commands that it joins
        name: the word on the command line
        handler: runs the command on its parsed arguments
        about: one line of help; with a capital and a full stop it also heads the command's own help page
        parents: parsers with the options that it shares with others
        shown: examples at the end of its help page

    Returns: its parser, to add the options of its own to.
    """
    # --debug is accepted before and after the command; SUPPRESS keeps the second place from resetting the first.
    late = argparse.ArgumentParser(add_help=False)
    late.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    command = to.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=examples(*shown),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[*parents, late],
    )
    command.set_defaults(handler=handler)
    return command


def examples(*lines: str) -> str | None:
    """The examples of a help page, or None without any."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


def numbers(text: str) -> list[int]:
    """The integers of a list such as `1,8,32`; a ValueError for anything else, which argparse reports."""
    return [int(part) for part in text.split(",")]


# ------------------------------------------------------------------------------------------------------ shared options

SHOWS_JSON = argparse.ArgumentParser(add_help=False)
SHOWS_JSON.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")

IS_QUIET = argparse.ArgumentParser(add_help=False)
IS_QUIET.add_argument("--quiet", "-q", action="store_true", help="print the result, warnings and errors, no progress")

TRUSTS_CODE = argparse.ArgumentParser(add_help=False)
TRUSTS_CODE.add_argument(
    "--trust-remote-code",
    action="store_true",
    help="run Python code that comes with a model or its tokenizer (auto_map)",
)

ALLOWS_UNKNOWN = argparse.ArgumentParser(add_help=False)
ALLOWS_UNKNOWN.add_argument(
    "--allow-unknown-tensors",
    action="store_true",
    help="tensors that the model's class does not know are no error: they are carried over as they are, or left out",
)

TAKES_LIMITS = argparse.ArgumentParser(add_help=False)
TAKES_LIMITS.add_argument(
    "--memory",
    metavar="SIZE",
    help="what compressing may take of the memory, such as 16GB (default: nine tenths of what is free); the result is the same",
)
TAKES_LIMITS.add_argument("--gpu-memory", metavar="SIZE", help="the same on a GPU")
TAKES_LIMITS.add_argument(
    "--spill",
    action="store_true",
    help="keep hidden states of the calibration text in a file beside the output, whatever memory there is",
)

SETS_ENGINE = argparse.ArgumentParser(add_help=False)
SETS_ENGINE.add_argument(
    "--one-process",
    action="store_true",
    help="vLLM's scheduler and worker in one process, so that neither waits busily on a core that computes",
)
SETS_ENGINE.add_argument(
    "--int8", action="store_true",
    help="on a CPU, multiply compressed linears in int8 where several tokens are multiplied at once, as llama.cpp does always: "
    "faster, results about 1%% off (SPARSIFY_CPU_INT8)",
)  # fmt: skip

TAKES_TASKS = argparse.ArgumentParser(add_help=False)
TAKES_TASKS.add_argument(
    "--tasks",
    metavar="FOLDER",
    help="multiple-choice tasks: a folder of .jsonl files, or one file; zero-shot, scored by lm-evaluation-harness",
)
TAKES_TASKS.add_argument(
    "--limit", type=int, metavar="N", help="score the first N items of each task (default all of them)"
)

TAKES_PRESET = argparse.ArgumentParser(add_help=False)
TAKES_PRESET.add_argument(
    "--preset", metavar="NAME",
    help="a set of tasks of lm-evaluation-harness: openllm-v1 (with examples in the prompt) or zero-shot-7; from the Hub, or with "
    "--tasks FOLDER from TASK/SPLIT.parquet or .jsonl in it",
)  # fmt: skip
TAKES_PRESET.add_argument(
    "--backend", default="transformers", metavar="B",
    help="what computes tasks: transformers (float32, default), or vllm, as it serves the model; vllm scores no text",
)  # fmt: skip

TAKES_RECIPE = argparse.ArgumentParser(add_help=False)
TAKES_RECIPE.add_argument(
    "recipe", metavar="RECIPE", help="name of a built-in recipe (see `sparsify recipes`) or a YAML file"
)
TAKES_RECIPE.add_argument(
    "--model", "-m", metavar="M", help="directory, .gguf file, Hub id or embedded:NAME; overrides the recipe's model"
)
TAKES_RECIPE.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="A.B=C",
    help="change a setting of the recipe: calibration.samples=64, passes.prune.method=wanda; repeatable",
)
