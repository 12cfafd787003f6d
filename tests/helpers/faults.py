"""Commands of sparsify in processes in which a call of the operating system fails, at every place where there is one.

A server imports everything once and forks a process for every trial, so that a trial takes no longer than the tiny run that it
is. `faults.c`, preloaded, counts the calls on files below one folder and lets the one asked for fail, or kills the process there.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("create", "open", "read", "write", "fsync", "rename", "mkdir", "unlink", "allocate", "clock")
SECONDS = 300  # that a trial may take
TIMES = ("run.json", "SHA256SUMS")  # files that differ between runs: seconds, and the digest of the other
SENTENCE = re.compile(r"^(error|interrupted)", re.MULTILINE)


CALIBRATED = """
version: 1
calibration: {{source: "file:{text}", samples: 2, sequence_length: 16}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
TRAINING = "tokens: 48, sequence_length: 16, batch_size: 1, save_every: 1, precision: float32"
RECIPES = {
    "apply": CALIBRATED,
    "tune": CALIBRATED + "  - tune: {{epochs: 1, batch_size: 1, holdout: 0.5}}\n",
    "distill": CALIBRATED + f"  - distill: {{{{{TRAINING}, teacher_logits: cached, loss: {{{{squarehead: 0}}}}}}}}\n",
    "lora": CALIBRATED + f"  - lora: {{{{{TRAINING}, rank: 2, export: adapter}}}}\n",
}


class State(ctypes.Structure):
    """`struct state` of faults.c."""

    _fields_ = [
        ("folder", ctypes.c_char * 4096), ("counted", ctypes.c_long * len(KINDS)), ("kind", ctypes.c_long),
        ("at", ctypes.c_long), ("error", ctypes.c_long), ("lasting", ctypes.c_long), ("killing", ctypes.c_long),
        ("large", ctypes.c_long), ("jump", ctypes.c_long), ("struck", ctypes.c_long),
    ]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """The call that fails: the one with the number `at` of its kind, and with `lasting` all that follow.

    error: errno; killing: the process is killed there instead; jump: seconds by which the clock is another from there on
    """

    kind: str
    at: int
    error: int = errno.EIO
    lasting: bool = False
    killing: bool = False
    jump: int = 0

    def __str__(self) -> str:
        how = "killed" if self.killing else f"clock by {self.jump} s" if self.jump else errno.errorcode[self.error]
        return f"{self.kind} {self.at}: {how}{' and all after it' if self.lasting else ''}"


def build(folder: Path) -> Path:
    """Compile the library that is preloaded."""
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


class Server:
    """Runs commands in forks of one process that has imported what they need. folder: calls on files below it count."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).resolve().parents[2]
        environment = {
            **os.environ, "LD_PRELOAD": str(build(folder.parent)), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
            "SPARSIFY_CACHE": str(folder / "cache"), "SPARSIFY_NATIVE": "0", "SPARSIFY_COMPUTE": "float32",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(folder / "cache"),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.faults", str(folder)], cwd=root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._answer() == {"ready": True}

    def run(self, argv: Sequence[str | Path], fault: Fault | None = None, large: int = 0, kill_after: float = 0) -> Ran:
        """Run a command. large: bytes from which an allocation counts; kill_after: seconds after which it is killed."""
        assert self.process.stdin is not None
        asked = {"argv": [*map(str, argv)], "fault": fault and asdict(fault), "large": large, "kill_after": kill_after}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Ran(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Ran:
    """status: as of a shell, negative for a signal; counted: calls by kind; struck: how often the fault happened."""

    status: int
    error: str
    counted: dict[str, int]
    struck: int
    seconds: float


@dataclass(frozen=True)
class Command:
    """A command that writes `output`. again: what goes on with it when it was interrupted."""

    name: str
    argv: tuple[str | Path, ...]
    again: tuple[str | Path, ...]
    output: Path


def commands(folder: Path) -> dict[str, Command]:
    """The small runs by name. folder: where everything lies that they read and write."""
    import torch

    from tests.helpers.tiny import save_tiny, tiny_text

    source = save_tiny(folder / "source", dtype=torch.bfloat16, num_hidden_layers=2)
    text = tiny_text(folder / "text.txt", 400)
    output = folder / "out" / "model"
    output.parent.mkdir()
    made = {}
    for name, recipe in RECIPES.items():
        file = folder / f"{name}.yaml"
        file.write_text(recipe.format(text=text))
        argv = ("apply", file, "--model", source, "--output", output, "--quiet")
        made[name] = Command(name, argv, (*argv, "--resume"), output)
    return made


def exported(server: Server, command: Command, folder: Path) -> Command:
    """The export of what a command writes."""
    ran = server.run(command.argv)
    assert ran.status == 0, ran.error
    source = command.output.rename(folder / "compressed")
    argv = ("export", source, "--format", "dense", "--output", command.output, "--quiet")
    return Command("export", argv, argv, command.output)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of an output but those that differ between runs."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in TIMES)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def trial(server: Server, command: Command, expected: dict[str, bytes], fault: Fault | None, **how: Any) -> str | None:
    """Run a command with a fault and then, where it did not end well, without one. Returns what is wrong, None for nothing.

    It may succeed; else it ends with one sentence and leaves no half output, and the second run ends with the same bytes.
    """
    ran = server.run(command.argv, fault, **how)
    try:
        if problem := _ending(ran, command, expected):
            return f"{fault}: {problem}"
        if ran.status != 0 and not command.output.exists():
            ran = server.run(command.again)
            if ran.status:
                return f"{fault}: the second run ends with {ran.status}: {ran.error.strip()[-600:]}"
        elif ran.status != 0:
            server.run(command.again)  # removes what was left behind
        if contents(command.output) != expected:
            return f"{fault}: the second run ends with other bytes"
        if ran.status == 0 and "could not be removed" in ran.error:
            return None  # it has said so
        left = [path.name for path in command.output.parent.iterdir() if path != command.output]
        return f"{fault}: left behind: {left}" if left else None
    finally:
        shutil.rmtree(command.output.parent)
        command.output.parent.mkdir()


def _ending(ran: Ran, command: Command, expected: dict[str, bytes]) -> str | None:
    """What is wrong with how a run has ended."""
    if command.output.exists() and contents(command.output) != expected:
        return f"half an output under its final name (status {ran.status})"
    if ran.status == 0:
        return None if command.output.exists() else "status 0 without an output"
    if ran.status == -signal.SIGKILL:
        return None
    if ran.status < 0:
        return f"ended by signal {-ran.status}"
    if "Traceback" in ran.error or "bug in sparsify" in ran.error or len(SENTENCE.findall(ran.error)) != 1:
        return f"no sentence: {ran.error.strip()[-900:]}"
    return None


# ----------------------------------------------------------------------------------------------- in the server's process


def serve(folder: str) -> None:
    """Answer requests from stdin, a line of JSON each."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import sparsify.api
    import sparsify.cli
    import sparsify.compiler.apply
    import sparsify.compiler.convert
    import sparsify.evaluation
    import sparsify.training.lora
    import sparsify.training.trainer  # noqa: F401

    answers, sys.stdout = sys.stdout, sys.stderr
    shared = mmap.mmap(-1, ctypes.sizeof(State))
    state = State.from_buffer(shared)
    state.kind = -1
    ctypes.CDLL(None).faults_use(ctypes.byref(state))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_forked(state, folder, json.loads(line))), file=answers, flush=True)


def _forked(state: State, folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    fault = asked["fault"]
    ctypes.memset(ctypes.byref(state), 0, ctypes.sizeof(State))
    state.kind = KINDS.index(fault["kind"]) if fault else -1
    for name in ("at", "error", "lasting", "killing", "jump"):
        setattr(state, name, int(fault[name]) if fault else 0)
    state.large = asked["large"]
    started = time.monotonic()
    said = Path(folder).parent / "said"
    child = os.fork()
    if child == 0:
        _be(state, folder, asked["argv"], said)
    limit = asked["kill_after"] or SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - started > limit:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    state.folder = b""
    status = os.waitstatus_to_exitcode(ended[1])
    counted = dict(zip(KINDS, state.counted, strict=True))
    return {
        "status": status, "error": said.read_text(errors="replace"), "counted": counted, "struck": state.struck,
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def _be(state: State, folder: str, argv: list[str], said: Path) -> None:
    """The command, in the forked process."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    os.dup2(file, 1)
    os.setpgid(0, 0)
    from sparsify.cli import main

    sys.stdout = sys.stderr
    state.folder = folder.encode() + b"/"
    status = 70
    try:
        status = main(argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    state.folder = b""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
