"""Faults at every call of the operating system, and kills, in small runs of apply, export, tune, distill and lora.

    python benchmarks/faults.py --output out/faults.json                        every call: an hour
    python benchmarks/faults.py --commands export --kinds rename fsync

Each call of a run on a file fails once (EIO), every write is once the one from which the disk is full, and the process is
killed at each rename, and at random moments. A run ends with one sentence and leaves nothing half-written under a final name,
and the one that goes on ends with the bytes of an undisturbed one; see tests/helpers/faults.py.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers.faults import KINDS, RECIPES, Fault, Server, commands, contents, exported, trial

LARGE = 2048  # bytes from which an allocation counts as one that may fail
ALLOCATIONS = 100  # of them that fail, evenly spaced
YEAR = 365 * 86400  # seconds


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="*", default=["export", *RECIPES])
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], choices=KINDS)
    parser.add_argument("--step", type=int, default=1, help="take every Nth call only")
    parser.add_argument("--kills", type=int, default=20, help="of each command at random moments")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    record: dict[str, dict[str, int]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        folder.mkdir()
        server, made = Server(folder), commands(folder)
        made["export"] = exported(server, made["apply"], folder)
        for name in asked.commands:
            command, tried = made[name], Counter[str]()
            ran = server.run(command.argv, large=LARGE)
            assert ran.status == 0, ran.error
            expected = contents(command.output)
            shutil.rmtree(command.output)
            print(f"{name}: {ran.counted}, {ran.seconds:.1f} s", flush=True)
            for fault in faults(asked.kinds, ran.counted, asked.step):
                problem = trial(server, command, expected, fault, large=LARGE)
                tried["killed" if fault.killing else f"{fault.kind} {errno.errorcode[fault.error]}"] += 1
                if problem:
                    wrong.append(f"{name}: {problem}")
                    print(wrong[-1], flush=True)
            chance = random.Random(name)
            for _ in range(asked.kills):
                problem = trial(server, command, expected, None, kill_after=chance.uniform(0.01, 1.1 * ran.seconds))
                tried["killed at random"] += 1
                if problem:
                    wrong.append(f"{name}: {problem}")
                    print(wrong[-1], flush=True)
            record[name] = dict(tried)
            print(f"{name}: {dict(tried)}", flush=True)
        server.close()
    if asked.output:
        asked.output.write_text(json.dumps({"tried": record, "wrong": wrong}, indent=2) + "\n")
    sys.exit(f"{len(wrong)} of {sum(sum(t.values()) for t in record.values())} trials" if wrong else 0)


if __name__ == "__main__":
    main()
