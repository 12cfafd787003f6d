"""The commands. Each one parses its arguments, calls one function of the package and prints what it returned.

`parser` builds the command line; each command registers its options beside its handler: `compress` (apply, plan,
recipes), `checkpoint` (inspect, verify, export, eval, report), `push`, `bench`, `bench_kernels`, `bench_recipes`, `serve`, `kernels`,
`doctor`, `demo`. This module runs a command and turns whatever ends it into an exit status and one sentence.

Nothing heavy is imported before a command runs, so that `sparsify --help` is instant. While a command runs, whatever
libraries print on stdout goes to stderr: stdout carries the result alone, with `--json` exactly one JSON object.
"""

import argparse
import errno
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsify import memory
from sparsify.cli.command import FAILED, Outcome
from sparsify.cli.parser import parse
from sparsify.distributed import Terminated, hear_the_end, is_main, processes, rank, speaks_first
from sparsify.errors import SparsifyError
from sparsify.model.permissions import allowing_unknown, trusting
from sparsify.progress import on_terminal, patiently, printable, silenced
from sparsify.threads import prepare

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

COMPRESSING = ("apply", "search")  # commands that allocate the same pieces block after block
INTERRUPTED = 130  # exit status, as shells have it: 128 + SIGINT
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # bars of libraries, where none can be drawn
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = re.compile(r"can't allocate memory|[Oo]ut of memory|std::bad_alloc|Cannot allocate memory")
# How safetensors and tokenizers, and torch where it maps a file, pass on a number of the operating system
PASSED_ON = re.compile(r"\(os error (\d+)\)|unable to (?:mmap|open|stat|resize)\b.* file <.*>.*\((\d+)\)", re.DOTALL)
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|TCPStore")  # of torch.distributed
# torch.save, and a stream of C++, of a file that it could not write
TORCH_WRITER = ("PytorchStreamWriter failed", "inline_container.cc", "iostream error")
PIPE_WIDTH = 160  # columns of a table that is not printed on a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Usage errors exit with 2 on the way."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    quiet = getattr(args, "quiet", False)
    # before a handler imports the libraries that read these once
    prepare(NO_BARS if (quiet or not on_terminal()) and args.command != "serve" else None)
    if args.command in COMPRESSING:
        memory.keep_freed()
    hear_the_end()
    try:
        with (
            trusting(getattr(args, "trust_remote_code", False)),
            allowing_unknown(getattr(args, "allow_unknown_tensors", False)),
            only_results_on_stdout(args.command != "serve"),
            silenced(quiet),
            patiently("loading libraries"),
        ):
            outcome = args.handler(args)
        if is_main():  # of several processes that torchrun started, one prints
            show(outcome, getattr(args, "json", False))
        return outcome.status
    except (KeyboardInterrupt, Terminated, Exception) as error:
        if args.debug or os.environ.get("SPARSIFY_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        status, sentence = explain(error, args, argv)
        if sentence and speaks_first():
            print(printable(sentence), file=sys.stderr, flush=True)
        return status


@contextmanager
def only_results_on_stdout(active: bool = True) -> Iterator[None]:
    """Sends to stderr what libraries, native code and child processes write to stdout."""
    if not active:
        yield
        return
    sys.stdout.flush()
    python_stdout, real_stdout = sys.stdout, os.dup(1)
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield
    finally:
        sys.stdout = python_stdout
        os.dup2(real_stdout, 1)
        os.close(real_stdout)


def show(outcome: Outcome, as_json: bool) -> None:
    """Print the result on stdout."""
    if as_json:
        print(json.dumps(outcome.data, indent=2, allow_nan=False))
    elif outcome.shown:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, soft_wrap=not sys.stdout.isatty())
        for part in outcome.shown:
            console.print(_Harmless(part), markup=False, highlight=False)
    sys.stdout.flush()


class _Harmless:
    """Something for rich to draw in which names of tensors and files cannot control the terminal."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["Segment"]:
        from rich.segment import Segment

        part = console.render_str(self.part, markup=False, highlight=False) if isinstance(self.part, str) else self.part
        for segment in console.render(part, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def explain(error: BaseException, args: argparse.Namespace, argv: Sequence[str]) -> tuple[int, str]:
    """The exit status and the one sentence for an error that ended a command."""
    again = ""
    if args.command in ("apply", "search"):
        command = [*argv] if "--resume" in argv else [*argv, "--resume"]
        again = f"; finished blocks are kept, go on with: {shlex.join(['sparsify', *command])}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted{again}"
    if isinstance(error, BrokenPipeError):  # the reader of our stdout has gone, as in `sparsify inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED, ""
    if isinstance(error, SparsifyError):
        who = f"process {rank()}: " if rank() and not str(error).startswith("process ") else ""
        return FAILED, f"error: {who}{error}"
    if isinstance(error, Terminated):
        return (
            FAILED,
            f"error: another process of this run has ended, or this one was ended from outside (SIGTERM){again}",
        )
    if processes() > 1 and LOST.search(str(error)):
        return FAILED, f"error: another process of this run has ended, and this one cannot go on alone{again}"
    number = system_error(error)
    if number in FULL:
        return (
            FAILED,
            f"error: no space left on the disk{at_file(error)}: free some{again or ' and run the command again'}",
        )
    if number == errno.ENOMEM:
        less = f"use fewer or shorter calibration samples, or a lower --memory{again}"
        return FAILED, f"error: out of memory: {less if again else 'end other programs, or take a larger machine'}"
    if number in (errno.EACCES, errno.EPERM):
        return FAILED, f"error: permission denied{at_file(error)}: choose another place or change its rights"
    if number is not None:
        return FAILED, f"error: {os.strerror(number)}{at_file(error)}{again if number == errno.EIO else ''}"
    if isinstance(error, RecursionError):
        return FAILED, "error: something in the input is nested too deeply to be read; --debug shows where"
    kind, message = type(error).__name__, " ".join(str(error).split())
    hint = "this is a bug in sparsify or in what it calls; run again with --debug for the traceback"
    return FAILED, f"error: {kind}: {message or 'no message'} ({hint})"


def system_error(error: BaseException) -> int | None:
    """The number of the error of the operating system that is behind an error, also where a library made another one of it."""
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if (told := PASSED_ON.search(str(error))) is not None:
        return int(told[1] or told[2])
    if "No space left on device" in str(error):
        return errno.ENOSPC
    return errno.EIO if any(words in str(error) for words in TORCH_WRITER) else None


def at_file(error: BaseException) -> str:
    """The file that an error names, in brackets behind a space, or nothing."""
    mapped = re.search(r"file <(.+?)>", str(error))
    name = getattr(error, "filename", None) or (mapped and mapped[1])
    return f" ({name})" if name else ""
