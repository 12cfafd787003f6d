"""Faults at every call of the operating system, and kills, in small runs of apply, export, tune, distill and lora, of `bench
recipes`, and of two processes as torchrun starts them.

    python benchmarks/faults.py --output out/faults.json                        every call: some hours
    python benchmarks/faults.py --commands export --kinds rename fsync
    python benchmarks/faults.py --minutes 10                                    of each command, calls drawn at random

Each call of a run on a file fails once (EIO), every write is once the one from which the disk is full, and the process is
killed at each rename, and at random moments. A run ends with one sentence and leaves nothing half-written under a final name,
and the one that goes on ends with the bytes of an undisturbed one; see tests/helpers/faults.py. `bench` and `ranks` are killed at
random moments only: the first with all that it has started, of the second one process, which ends the other with a sentence.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsify.bench.machine import describe_machine, installed_versions
from tests.helpers.faults import KINDS, RECIPES, Command, Fault, Server, commands, contents, exported, trial
from tests.helpers.ranks import command as in_one_rank
from tests.helpers.ranks import in_ranks

ROOT = Path(__file__).resolve().parent.parent
LARGE = 2048  # bytes from which an allocation counts as one that may fail
ALLOCATIONS = 100  # of them that fail, evenly spaced
YEAR = 365 * 86400  # seconds
RANKED = {  # recipes of the runs of two processes, each of which takes half of a batch
    "walk-ranks": RECIPES["tune"].replace("batch_size: 1", "batch_size: 2"),
    "distill-ranks": RECIPES["distill"].replace("batch_size: 1", "batch_size: 2").replace("tokens: 48", "tokens: 96"),
}
OTHERS = {"bench": 0.2, "ranks": 0.5}  # kills at random moments, as a share of those of the other commands

Tried = tuple[str, str | None]  # what was done, what was wrong


def faults(kinds: list[str], counted: dict[str, int], step: int) -> Iterator[Fault]:
    """Every `step`th call of each kind, failing, on a disk that is full from there on, or killed at."""
    for kind in kinds:
        if kind == "clock":
            yield from (Fault(kind, at, jump=jump) for at in (1, 10, 100) for jump in (-YEAR, YEAR))
            continue
        error = errno.ENOMEM if kind == "allocate" else errno.EIO
        steps = max(step, counted[kind] // ALLOCATIONS) if kind == "allocate" else step
        for at in range(1, counted[kind] + 1, steps):
            yield Fault(kind, at, error)
            if kind == "write":
                yield Fault(kind, at, errno.ENOSPC, lasting=True)
            if kind in ("rename", "mkdir"):
                yield Fault(kind, at, killing=True)


def name_of(fault: Fault) -> str:
    """What the record counts it as."""
    if fault.kind == "clock":
        return "clock jumps"
    return f"killed at {fault.kind}" if fault.killing else f"{fault.kind} {errno.errorcode[fault.error]}"


def of_command(
    name: str, server: Server, command: Command, asked: argparse.Namespace
) -> tuple[dict[str, int], list[Callable[[], Tried]]]:
    """The calls that an undisturbed run makes, by kind, and the trials of it."""
    ran = server.run(command.argv, large=LARGE)
    assert ran.status == 0, ran.error
    expected = contents(command.output)
    shutil.rmtree(command.output)

    def with_fault(fault: Fault) -> Callable[[], Tried]:
        return lambda: (name_of(fault), trial(server, command, expected, fault, large=LARGE))

    def killed_after(seconds: float) -> Callable[[], Tried]:
        return lambda: ("killed at random", trial(server, command, expected, None, kill_after=seconds))

    chance = random.Random(name)
    trials = [with_fault(fault) for fault in faults(asked.kinds, ran.counted, asked.step)]
    return ran.counted, trials + [killed_after(chance.uniform(0.01, 1.1 * ran.seconds)) for _ in range(asked.kills)]


# --------------------------------------------------------------------------------------------- processes of their own


def of_bench(source: Path, folder: Path, kills: int) -> list[Callable[[], Tried]]:
    """`bench recipes`, killed with the processes that it has started, and run again."""
    recipe = folder / "bench.yaml"
    recipe.write_text(
        "version: 1\npasses:\n  - prune: {method: magnitude}\n  - quantize: {method: rtn, bits: 4, group_size: 32}\n"
    )
    (text := folder / "score.txt").write_text("abc def " * 100)
    output = folder / "bench"
    argv = [
        sys.executable, "-m", "sparsify", "bench", "recipes", f"a={recipe}", f"b={recipe},ignore=[lm_head]", "--quiet",
        "--model", str(source), "--text", str(text), "--sequence-length", "16", "--chunks", "4", "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPARSIFY_NATIVE": "0", "HF_HUB_OFFLINE": "1"}
    environment["SPARSIFY_CACHE"] = str(folder / "cache")

    def run(seconds: float | None = None) -> int:
        process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return -signal.SIGKILL
        assert process.returncode == 0, error.decode(errors="replace")
        return 0

    def made() -> dict[str, Any]:
        """Every file but those that hold times, and of the figures those of accuracy."""
        found: dict[str, Any] = {name: data for name, data in contents(output).items() if name != "recipes.json"}
        rows = json.loads((output / "recipes.json").read_text())["recipes"]
        found["recipes.json"] = [(row["label"], row["evaluation"]) for row in rows]
        return found

    began = time.monotonic()
    run()
    seconds, expected = time.monotonic() - began, made()
    shutil.rmtree(output)

    def one(after: float) -> Tried:
        try:
            run(after)
            for file in output.rglob("*.json"):  # under final names nothing is half written
                json.loads(file.read_text())
            run()
            return "killed at random", None if made() == expected else f"killed after {after:.1f} s: other bytes"
        except (AssertionError, ValueError) as error:
            return "killed at random", f"killed after {after:.1f} s: {str(error)[-900:]}"
        finally:
            shutil.rmtree(output, ignore_errors=True)

    chance = random.Random("bench")
    return [partial(one, chance.uniform(0.1, seconds)) for _ in range(kills)]


def of_ranks(name: str, source: Path, text: Path, folder: Path, kills: int) -> list[Callable[[], Tried]]:
    """Two processes, one of which is killed; the other says so and ends, and both go on from there."""
    recipe, output = folder / f"recipe-of-{name}.yaml", folder / name
    recipe.write_text(RANKED[name].format(text=text))
    argv = ["apply", str(recipe), "--model", str(source), "--output", str(output), "--quiet"]

    def run(*more: str, kill: tuple[int, float] | None = None) -> tuple[list[int | None], list[str]]:
        ended = in_ranks(folder, in_one_rank, [*argv, *more], kill=kill)
        return ended.codes, ended.said

    codes, said = run()  # the server of forks has to load everything
    assert codes == [0, 0], said
    shutil.rmtree(output)
    began = time.monotonic()
    codes, said = run()
    assert codes == [0, 0], said
    seconds, expected = time.monotonic() - began, contents(output)
    shutil.rmtree(output)

    def one(rank: int, after: float) -> Tried:
        what, how = f"one of two killed at random ({name})", f"process {rank} killed after {after:.2f} s"
        try:
            codes, said = run(kill=(rank, after))
            other, sentence = codes[1 - rank], said[1 - rank]
            if output.exists() and contents(output) != expected:
                return what, f"{how}: half an output under its final name"
            unmet = other == -signal.SIGKILL and not sentence  # it waited for the other to come
            if (other not in (0, 1) and not unmet) or (
                other == 1 and (sentence.count("error: ") != 1 or "Traceback" in sentence)
            ):
                return what, f"{how}: the other ends with {other}: {sentence[-900:]}"
            if codes != [0, 0]:
                codes, said = run("--resume")
            if (
                output.exists()
                and codes == [1, 1]
                and any("is there already" in text or "exists" in text for text in said)  # the other may only lose it
            ):
                codes = [0, 0]
            if codes != [0, 0] or contents(output) != expected:
                return what, f"{how}: the second run ends with {codes}, or other bytes: {said}"
            return what, None
        finally:
            for left in folder.glob(f"{output.name}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    chance = random.Random(name)
    return [partial(one, chance.randrange(2), chance.uniform(0.01, seconds)) for _ in range(kills)]


# -------------------------------------------------------------------------------------------------------------- record


def go_through(name: str, trials: list[Callable[[], Tried]], minutes: float | None) -> tuple[Counter[str], list[str]]:
    """Try all, or in an order drawn at random as many as the time allows."""
    tried, wrong = Counter[str](), list[str]()
    if minutes is not None:
        random.Random(name).shuffle(trials)
    until = time.monotonic() + 60 * (minutes or 0)
    for run in trials:
        if minutes is not None and time.monotonic() > until:
            break
        what, problem = run()
        tried[what] += 1
        if problem:
            wrong.append(f"{name}: {problem}")
            print(wrong[-1], flush=True)
    return tried, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["export", *RECIPES, *OTHERS]
    parser.add_argument("--commands", nargs="*", default=names, choices=names)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], choices=KINDS)
    parser.add_argument("--step", type=int, default=1, help="take every Nth call only")
    parser.add_argument("--kills", type=int, default=20, help="of each command at random moments")
    parser.add_argument("--minutes", type=float, help="of each command; calls are then drawn at random")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]]),
        "machine": describe_machine(), "versions": installed_versions(), "commands": {}, "wrong": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        folder.mkdir()
        server, made = Server(folder), commands(folder)
        source = folder / "source"
        if "export" in asked.commands:
            made["export"] = exported(server, made["apply"], folder)
        for name in asked.commands:
            counted: dict[str, int] = {}
            if name == "bench":
                trials = of_bench(source, Path(place), max(1, round(OTHERS[name] * asked.kills)))
            elif name == "ranks":
                kills = max(1, round(OTHERS[name] * asked.kills))
                text = folder / "text.txt"
                trials = [one for kind in RANKED for one in of_ranks(kind, source, text, Path(place), kills)]
            else:
                counted, trials = of_command(name, server, made[name], asked)
            print(f"{name}: {counted}, {len(trials)} trials", flush=True)
            tried, wrong = go_through(name, trials, asked.minutes)
            record["commands"][name] = {
                "calls": counted, "trials": len(trials), "tried": tried.total(), "survived": tried.total() - len(wrong),
                "by_kind": dict(tried),
            }  # fmt: skip
            record["wrong"] += wrong
            print(f"{name}: {dict(tried)}, {len(wrong)} wrong", flush=True)
            if asked.output:
                asked.output.write_text(json.dumps(record, indent=1) + "\n")
        server.close()
    if record["wrong"]:
        sys.exit(f"{len(record['wrong'])} of {sum(one['tried'] for one in record['commands'].values())} trials")


if __name__ == "__main__":
    main()
