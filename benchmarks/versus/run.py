"""Runs what is missing of every row, one process at a time, and keeps each result under its name once it is whole."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.versus.page import write_page
from benchmarks.versus.rows import LLAMACPP, RESULT, ROWS, Row, Work, peer_program
from benchmarks.versus.settings import ROOT, Places, Settings
from sparsify._version import __version__
from sparsify.bench.engine_process import explain_failure, how_it_ended, last_lines, run_logged
from sparsify.bench.machine import describe_machine
from sparsify.bench.missing import PeerMissing
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.failure import failure_of
from sparsify.files import publish, read_json, write_json
from sparsify.lock import only_run
from sparsify.progress import say
from sparsify.threads import users_environment
from sparsify.units import span

SUPERVISE = Path(__file__).with_name("supervise.py")
# Minutes for the embedded model at the defaults on two quiet cores; scaled by parameters, tokens and items.
PREPARE_MINUTES, TEXT_MINUTES, TASK_MINUTES, SPEED_MINUTES = 2.0, 4.0, 4.0, 1.5
USUAL_PARAMETERS = 134_515_008
ERROR = "error: "  # how a line of a log begins in which sparsify says what is wrong
KEPT_LINES = 8  # of a log, in the record of a failure


def program(name: str, job: Path) -> list[str]:
    """The command of a program of this folder that runs in our own environment. Tests replace this."""
    return [sys.executable, "-m", f"benchmarks.versus.{name}", str(job)]


class StepFailed(SparsifyError):
    """A step of a row ended without its result. short: a few words for a cell; tail: the last lines of its log."""

    def __init__(self, short: str, reason: str, tail: Sequence[str]) -> None:
        super().__init__(reason)
        self.short, self.tail = short, list(tail)


class Run:
    """A run in its directory, that may have been begun before."""

    def __init__(self, settings: Settings, output: Path, rows: Sequence[Row] = ROWS) -> None:
        self.settings, self.places, self.rows = settings, Places(output.resolve()), rows
        self.environment = {**users_environment(), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [self.environment.get("PYTHONPATH", "")])]
        )
        self.prepared: dict[str, Any] = {}

    def run(self, page: Path | None = None, record: Path | None = None) -> dict[str, Any]:
        """Everything that is missing; returns the result, which also stands in versus.json and versus.md of the directory, and
        where `page` and `record` say once all rows were tried."""
        with only_run(self.places.output):
            self.begin()
            self.prepare()
            say(self.estimate())
            for row in self.rows:
                if row.compress is None or self.step(row, "compress", self.compress):
                    self.step(row, "score", self.score)
                self.write()
            for number in range(1, self.settings.rounds + 1):
                for row in self.rows:
                    if any(self.places.failed(row.name, f"speed-{earlier}").is_file() for earlier in range(1, number)):
                        continue  # it would fail again
                    if row.compress is None or self.places.step(row.name, "compress").is_file():
                        self.step(row, f"speed-{number}", self.speed)
                    self.write()
            result = self.write()
            for row in result["rows"]:
                write_json(self.places.step(row["row"], "row"), row)
            self.write(page, record)
            return result

    def begin(self) -> None:
        """Make the directory, or refuse one of another run."""
        now = json.loads(json.dumps({"sparsify": __version__, "settings": self.settings.recorded()}))
        file = self.places.run
        if file.is_file():
            before = read_json(file)
            differing = [key for key in now["settings"] if before.get("settings", {}).get(key) != now["settings"][key]]
            if differing or before.get("sparsify") != now["sparsify"]:
                what = ", ".join(differing) or "version of sparsify"
                raise CheckpointError(
                    f"{self.places.output} was begun with another {what}; go on with the same, or give another --output"
                )
        elif self.places.output.exists() and any(self.places.output.iterdir()):
            raise CheckpointError(
                f"{self.places.output} is no directory of a run ({file.name} is missing); give another --output"
            )
        self.places.output.mkdir(parents=True, exist_ok=True)
        write_json(file, now)

    def prepare(self) -> None:
        """What all rows need. Without it none of them can run, so its failure ends the run."""
        if self.places.prepared.is_file() and self.places.rows.is_file():
            self.prepared = read_json(self.places.prepared)
            if self.prepared["machine"] != describe_machine():
                raise CheckpointError(
                    f"{self.places.output} was begun on another machine, whose times do not compare; give another --output"
                )
            return
        aside = self.aside(self.places.output / ".prepare")
        job = {"settings": asdict(self.settings), "rows": str(self.places.rows), "result": str(aside / RESULT)}
        write_json(aside / "job.json", job)
        command = program("prepare", aside / "job.json")
        say("preparing: the dense model, the calibration rows, our kernels")
        self.execute("the preparation", "it", command, aside, self.places.output / "prepare.log")
        publish(aside / RESULT, self.places.prepared)
        shutil.rmtree(aside)
        self.prepared = read_json(self.places.prepared)

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, row: Row, name: str, work: Callable[[Row, Path, Path], dict[str, Any]]) -> bool:
        """Do a step, unless it has been done; whether its result is there. One that failed before is tried again."""
        done, failed = self.places.step(row.name, name), self.places.failed(row.name, name)
        if done.is_file():
            return True
        self.places.folder(row.name).mkdir(exist_ok=True)
        failed.unlink(missing_ok=True)
        aside, log = self.aside(self.places.folder(row.name) / f".{name}"), self.places.folder(row.name) / f"{name}.log"
        say(f"{row.title}: {name}")
        try:
            found = work(row, aside, log)
        except (PeerMissing, StepFailed) as error:
            short = error.why if isinstance(error, PeerMissing) else error.short
            tail = [] if isinstance(error, PeerMissing) else error.tail
            reason = self.shown((str(error).splitlines() or [short])[0])
            write_json(
                failed, {"step": name, "short": short, "reason": reason, "log": [self.shown(line) for line in tail]}
            )
            say(f"{row.title}: {name}: {reason}")
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        write_json(done, {**found, "date": time.strftime("%Y-%m-%d %H:%M:%S")})
        return True

    def compress(self, row: Row, aside: Path, log: Path) -> dict[str, Any]:
        assert row.compress is not None
        made, final = aside / row.artifact, self.places.folder(row.name) / row.artifact
        command = row.compress(Work(self.settings, self.places, self.prepared, aside, made))
        found = self.execute(row.title, row.title.split(",")[0], command, aside, log)
        if not made.exists():
            raise StepFailed("no result", f"{row.title}: ended without writing {row.artifact}", self.tail(log))
        if final.is_dir():
            shutil.rmtree(final)
        publish(made, final)
        return found

    def score(self, row: Row, aside: Path, log: Path) -> dict[str, Any]:
        job = {
            "settings": asdict(self.settings), "model": str(row.model(self.places, self.prepared)),
            "dense": self.prepared["dense"], "answers": str(self.places.dense_answers), "result": str(aside / RESULT),
        }  # fmt: skip
        write_json(aside / "job.json", job)
        command = program("score", aside / "job.json")
        return self.execute(row.title, "sparsify eval", command, aside, log)

    def speed(self, row: Row, aside: Path, log: Path) -> dict[str, Any]:
        model = row.model(self.places, self.prepared)
        names = ("input_len", "output_len", "prompts", "iterations", "warmup", "timeout")
        job = {name: getattr(self.settings, name) for name in names}
        job |= {"model": str(model), "threads": self.prepared["threads"], "result": str(aside / RESULT)}
        write_json(aside / "job.json", job)
        command = (
            peer_program(*LLAMACPP, aside / "job.json") if row.in_llama_cpp else program("speed", aside / "job.json")
        )
        return self.execute(row.title, row.engine, command, aside, log)

    def execute(self, title: str, who: str, command: Sequence[str], aside: Path, log: Path) -> dict[str, Any]:
        """Run a command under the supervisor; what it took, and what it wrote to RESULT. StepFailed where it did not end well.

        title: of the row, for a sentence; who: what failed then, for a cell
        """
        cost = aside / "cost.json"
        supervised = [sys.executable, str(SUPERVISE), str(cost), *command]
        status = run_logged(supervised, self.environment, log, self.settings.timeout)
        if status != 0 or not cost.is_file():
            told = [line.removeprefix(ERROR) for line in last_lines(log, None) if line.startswith(ERROR)]
            sentence = f"{title}: {how_it_ended(status)}"
            sentence = f"{sentence}: {told[-1]}" if told else explain_failure(sentence, log).splitlines()[0]
            raise StepFailed(failure_of(sentence, who).short, sentence, self.tail(log))
        said = aside / RESULT
        return {
            "command": self.shown(shlex.join(command)),
            **read_json(cost),
            **(read_json(said) if said.is_file() else {}),
        }

    def tail(self, log: Path) -> list[str]:
        return last_lines(log, KEPT_LINES) if log.is_file() else []

    @staticmethod
    def aside(folder: Path) -> Path:
        """An empty folder for what a step writes; what a killed run left there is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def shown(self, text: str) -> str:
        """A command or a line of a log without the folders of this machine."""
        for folder, name in ((self.places.output, "OUT"), (ROOT, ".")):
            text = text.replace(f"{folder}/", f"{name}/")
        return re.sub(r"(?<![\w.])(?:/[\w.@+-]+)+/(?=[\w.@+-])", "", text)

    # ----------------------------------------------------------------------------------------------------- result

    def estimate(self) -> str:
        """What is left to do, in words, with a rough time for each row."""
        settings, scale = self.settings, self.prepared["parameters"] / USUAL_PARAMETERS
        usual = Settings()
        calibration = scale * self.prepared["shape"][0] * self.prepared["shape"][1] / (usual.samples * usual.length)
        text = TEXT_MINUTES * scale * (settings.chunks or 48) * (settings.sequence_length or 1024) / (48 * 1024)
        tasks = TASK_MINUTES * scale * settings.limit / usual.limit if settings.tasks else 0.0
        lines, total = [], 0.0
        for row in self.rows:
            steps = {"compress": row.minutes * calibration} if row.compress else {}
            steps |= {"score": text + tasks}
            steps |= {f"speed-{number}": SPEED_MINUTES * scale for number in range(1, settings.rounds + 1)}
            left = {name: minutes for name, minutes in steps.items() if not self.places.step(row.name, name).is_file()}
            total += sum(left.values())
            described = f"about {span(60 * sum(left.values()))} ({', '.join(left)})" if left else "done"
            lines.append(f"  {row.title}: {described}")
        return "\n".join([f"estimate, on two quiet cores: {span(60 * total)}", *lines])

    def write(self, page: Path | None = None, record: Path | None = None) -> dict[str, Any]:
        """The result so far, to versus.json and versus.md, and to `page` and `record`."""
        rows = [self.gathered(row) for row in self.rows]
        result = {
            **read_json(self.places.run),
            "prepared": {k: v for k, v in self.prepared.items() if k not in ("dense", "gguf")},
            "complete": all(row["complete"] for row in rows),
            "rows": rows,
        }
        named = None if record is None else record.name
        for target in filter(None, (self.places.output / "versus.json", record)):
            write_json(target, result)
        for target in filter(None, (self.places.output / "versus.md", page)):
            write_page(target, result, named)
        return result

    def gathered(self, row: Row) -> dict[str, Any]:
        """All that is known of one row."""

        def known(name: str) -> Mapping[str, Any] | None:
            file = self.places.step(row.name, name)
            return read_json(file) if file.is_file() else None

        rounds = [known(f"speed-{number}") for number in range(1, self.settings.rounds + 1)]
        failures = [read_json(file) for file in sorted(self.places.folder(row.name).glob("*.failed.json"))]
        steps = [*([known("compress")] if row.compress else []), known("score"), *rounds]
        return {
            "row": row.name,
            "title": row.title,
            "engine": row.engine,
            "machine": self.prepared.get("machine"),
            "compress": known("compress"),
            "score": known("score"),
            "speed": [found for found in rounds if found],
            "failures": failures,
            "complete": all(steps),
        }


def only(names: Sequence[str]) -> list[Row]:
    """The rows of these names, in the order of ROWS; all without names. SparsifyError for one that is unknown."""
    known = [row.name for row in ROWS]
    if unknown := [name for name in names if name not in known]:
        raise SparsifyError(f"{unknown[0]} is no row; there are {', '.join(known)}")
    return [row for row in ROWS if not names or row.name in names]


def quickly(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with others in their place."""
    return replace(settings, **values)
