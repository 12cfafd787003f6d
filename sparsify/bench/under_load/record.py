"""The directory of a run: its settings, one JSON file for each measurement, logs, and the result of them all.

run.json            settings, machine and versions; a run that is continued must have the same
capacity.json       what the shares of --load are shares of
serve.json          the result so far, as `sparsify report` draws it
1-NAME/             of the first model, and so on
  inf-1.json        all requests at once, first round; load-0.25-1.json a quarter of the capacity; beside it the driver's log
  server-1.json     what starting its server took in the first round; beside it the server's log
  startup.json      cold and warm starts, where they were asked for; beside it the log
  failure.json      why the model's row ended, until the run is continued
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify._version import __version__
from sparsify.bench.dummy_model import is_dummy
from sparsify.bench.machine import describe_machine, installed_versions, recorded_environment
from sparsify.bench.targets import Target
from sparsify.bench.under_load.result import STARTS, add_ratios, point, servers, spread
from sparsify.bench.under_load.workload import Step, UnderLoad, server_arguments
from sparsify.errors import CheckpointError
from sparsify.files import as_written, read_json, write_json
from sparsify.fingerprint import combined, file_digests

RUN, CAPACITY, RESULT, FAILURE = "run.json", "capacity.json", "serve.json", "failure.json"
# What a run that is continued must have in common with what was measured, and how an error calls it.
SAME = {
    "sparsify": "version of sparsify",
    "models": "list of models",
    "settings": "set of requests or rates",
    "server_arguments": "set of arguments of the server",
    "versions": "set of versions of packages",
    "machine": "machine",
    "environment": "environment",
}


def settings(
    specs: Sequence[str | Path], targets: Sequence[Target], load: UnderLoad, environment: Mapping[str, str]
) -> dict[str, Any]:
    """What decides the figures, as run.json holds it. Models are known by their bytes, those of a shape by its name."""
    models = []
    for spec, target in zip(specs, targets, strict=True):
        text = str(spec).rpartition("=")[2]
        digest = text if is_dummy(text) else _digest(target.directory)
        models.append({"model": target.label, "format": target.format, "nbytes": target.nbytes, "digest": digest})
    return {
        "sparsify": __version__,
        "models": models,
        "settings": {
            "dataset": load.dataset.described(),
            "dataset_digest": load.dataset.digest(),
            "rates": [step.name for step in load.steps],
            "requests": load.requests,
            "warmup": load.warmup,
            "goodput": dict(load.goodput),
        },
        "server_arguments": server_arguments(load),
        "versions": installed_versions(),
        "machine": describe_machine(),
        "environment": recorded_environment(environment),
    }


def _digest(directory: Path) -> str:
    return combined(file_digests({file.name: file for file in sorted(directory.iterdir()) if file.is_file()}))


class Record:
    """The directory of a run. Every file appears under its name when it is whole."""

    def __init__(self, directory: Path, targets: Sequence[Target]) -> None:
        self.directory = directory
        self.folders = {
            target.label: directory / f"{number}-{re.sub(r'[^A-Za-z0-9.@+-]', '_', target.label)[:80]}"
            for number, target in enumerate(targets, 1)
        }

    def begin(self, run: Mapping[str, Any], resume: bool) -> None:
        """Makes the directory, or compares `run` with what was measured before. CheckpointError where that is another run."""
        file = self.directory / RUN
        if not resume:
            if self.directory.exists() and any(self.directory.iterdir()):
                hint = "--resume continues the run in it, or" if file.is_file() else ""
                raise CheckpointError(
                    f"{self.directory} exists already; {hint} choose another --output".replace("  ", " ")
                )
        elif file.is_file():
            before = read_json(file)
            with as_written(file):
                changed = [told for key, told in SAME.items() if before[key] != run[key]]
            if changed:
                raise CheckpointError(
                    f"{self.directory} was measured with another {changed[0]}; continue with the same one, or measure into "
                    "another --output"
                )
        elif self.directory.exists() and any(self.directory.iterdir()):
            raise CheckpointError(
                f"{self.directory} holds no {RUN}, so no run can be continued there; choose another --output"
            )
        for folder in self.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FAILURE).unlink(missing_ok=True)  # it is tried again
        write_json(file, run)

    def measurement(self, label: str, step: Step, repeat: int) -> Path:
        """The file of one measurement. Its log has the same name."""
        return self.folders[label] / f"{step.name}-{repeat}.json"

    def server(self, label: str, repeat: int) -> Path:
        """The file of one start of a server. Its log has the same name."""
        return self.folders[label] / f"server-{repeat}.json"

    def startup(self, label: str) -> Path:
        """The file of the cold and warm starts of a model. Its log has the same name."""
        return self.folders[label] / "startup.json"

    def capacity(self) -> dict[str, Any] | None:
        """{"model", "requests_per_second"}, once it was measured."""
        file = self.directory / CAPACITY
        return read_json(file) if file.is_file() else None

    def write_result(self, load: UnderLoad, targets: Sequence[Target], commands: Sequence[str]) -> dict[str, Any]:
        """Everything that was measured so far, also as serve.json."""
        run = read_json(self.directory / RUN)
        result = {
            "benchmark": "serve",
            **run,
            "goodput": dict(load.goodput),
            "repeats": load.repeats,
            "capacity": self.capacity(),
            "commands": list(commands),
            "models": [self._row(target, load) for target in targets],
        }
        add_ratios(result["models"])
        result["complete"] = all(self._complete(row, load) for row in result["models"])
        if load.startup:
            result["complete"] &= all(self.startup(target.label).is_file() for target in targets)
        write_json(self.directory / RESULT, result)
        return result

    def _row(self, target: Target, load: UnderLoad) -> dict[str, Any]:
        folder = self.folders[target.label]
        points = []
        for step in load.steps:
            files = [self.measurement(target.label, step, repeat) for repeat in range(1, load.repeats + 1)]
            if measured := [read_json(file) for file in files if file.is_file()]:
                with as_written(files[0]):
                    points.append(point(None if step.at_once else step.load, measured))
        starts = [self.server(target.label, repeat) for repeat in range(1, load.repeats + 1)]
        failure = folder / FAILURE
        return {
            "model": target.label,
            "format": target.format,
            "nbytes": target.nbytes,
            "server": servers([read_json(file) for file in starts if file.is_file()]) | self._starts(target.label),
            "points": points,
            "failure": read_json(failure) if failure.is_file() else None,
        }

    def _starts(self, label: str) -> dict[str, Any]:
        """What `startup` measured, as `servers` gives it; empty without."""
        file = self.startup(label)
        if not file.is_file():
            return {}
        found = read_json(file)
        with as_written(file):
            return {name: spread(found[name]) for name in STARTS}

    @staticmethod
    def _complete(row: Mapping[str, Any], load: UnderLoad) -> bool:
        points = row["points"]
        return len(points) == len(load.steps) and all(found["repeats"] == load.repeats for found in points)
