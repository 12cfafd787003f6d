"""What a run measures, and where its files lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsify.files import PACKAGE
from sparsify.fingerprint import file_digest
from sparsify.model.checkpoint import gguf_file, open_checkpoint

ROOT = PACKAGE.parent
EMBEDDED = "embedded:smollm2-135m-instruct"
BITS = 4


@dataclass(frozen=True)
class Settings:
    """The same for every row.

    model:       as `sparsify apply` takes it
    text:        what perplexity and KL are measured on: a file, or `self` for text that the dense model writes
    calibration: `file:PATH`, `hub:ID` or `self`: rows of it are what every method calibrates on, and what ours trains on
    tasks:       a folder of multiple-choice tasks, or None
    limit:       items of each task
    gguf:        the model as a GGUF file, for llama.cpp; the embedded model is one
    samples, length: rows of calibration and tokens of each
    chunks, sequence_length: scored parts of the text and tokens of each, those of `sparsify eval` where None
    steps_tokens: tokens that the tuned recipe trains on, None for its own number
    input_len, output_len, prompts, iterations, warmup: the work of the measurements of speed
    rounds:      of speed, each over all rows, so that a slow spell of the machine hits all of them
    timeout:     seconds that one step of a row may take
    quick:       whether the sizes are those of QUICK
    """

    model: str = EMBEDDED
    text: str = "self"
    calibration: str = "self"
    tasks: str | None = None
    limit: int = 200
    gguf: str | None = None
    samples: int = 128
    length: int = 512
    group_size: int = 64
    chunks: int | None = None
    sequence_length: int | None = None
    steps_tokens: str | None = None
    input_len: int = 128
    output_len: int = 64
    prompts: int = 32
    iterations: int = 5
    warmup: int = 2
    rounds: int = 2
    timeout: float = 3600
    quick: bool = False

    def of_recipe(self) -> list[str]:
        """The calibration and the groups, as changes of a recipe of ours."""
        changes = {
            "calibration.source": self.calibration, "calibration.samples": self.samples,
            "calibration.sequence_length": self.length, "passes.quantize.group_size": self.group_size,
            "export.head.group_size": self.group_size,
        }  # fmt: skip
        return [f"{key}={value}" for key, value in changes.items()]

    def recorded(self) -> dict[str, Any]:
        """As run.json holds it: files by name and digest, so that it tells nothing of the machine's folders."""
        found = asdict(self)
        for name in ("text", "calibration", "tasks", "gguf"):
            given = found[name]
            path = None if given in (None, "self") else Path(str(given).removeprefix("file:"))
            if path is not None and path.exists():
                files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
                found[name] = {file.name: file_digest(file) for file in files}
        digest = None
        if (gguf := gguf_file(self.model)) is not None:
            digest = file_digest(gguf)
        elif Path(self.model).is_dir():
            digest = open_checkpoint(self.model).fingerprint()
        if Path(self.model).exists():
            found["model"] = Path(self.model).name
        found["model_digest"] = digest
        del found["timeout"], found["rounds"]  # more of either may be asked for later
        return found


QUICK = {
    "limit": 4, "samples": 4, "length": 256, "chunks": 2, "sequence_length": 256, "steps_tokens": "4k", "input_len": 16,
    "output_len": 8, "prompts": 4, "iterations": 2, "warmup": 1, "rounds": 1, "quick": True,
}  # fmt: skip
"""For `--quick`: whether every row runs at all. The figures mean nothing."""


@dataclass(frozen=True)
class Places:
    """The directory of a run.

    run.json        settings and the model's digest; a run that goes on must have the same
    prepared.json   what `prepare` found; beside it rows.safetensors, the calibration of all peers
    NAME/           a row: compress.json, score.json, speed-1.json, ... once that step has ended well, else STEP.failed.json;
                    STEP.log; model or model.gguf; row.json when nothing is left to do
    versus.json, versus.md  the result so far
    """

    output: Path

    @property
    def run(self) -> Path:
        return self.output / "run.json"

    @property
    def prepared(self) -> Path:
        return self.output / "prepared.json"

    @property
    def rows(self) -> Path:
        return self.output / "rows.safetensors"

    @property
    def dense_answers(self) -> Path:
        return self.output / "dense" / "answers.json"

    def folder(self, row: str) -> Path:
        return self.output / row

    def step(self, row: str, step: str) -> Path:
        return self.output / row / f"{step}.json"

    def failed(self, row: str, step: str) -> Path:
        return self.output / row / f"{step}.failed.json"
