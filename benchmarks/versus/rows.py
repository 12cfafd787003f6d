"""The rows of the table: who compresses, with which command, and what runs the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.versus.settings import BITS, ROOT, Places, Settings
from sparsify.bench.missing import PeerMissing
from sparsify.files import write_json

PEERS = Path(__file__).parent / "peers"
ENVIRONMENTS = "SPARSIFY_PEERS"  # a folder that has .venv-peers and the others, if not the root of the sources
LLAMACPP = (".venv-llamacpp", "llamacpp_speed")
RESULT = "result.json"  # what a program says of its work, beside its output


@dataclass(frozen=True)
class Work:
    """What a command is made from. aside: an empty folder, where `artifact` and RESULT are to appear."""

    settings: Settings
    places: Places
    prepared: Mapping[str, Any]
    aside: Path
    artifact: Path


@dataclass(frozen=True)
class Row:
    """name: of its folder. compress: the command that makes it, None for what is there already.
    artifact: a directory, or a .gguf file. minutes: of compressing the embedded model at the defaults on two cores."""

    name: str
    title: str
    compress: Callable[[Work], list[str]] | None
    artifact: str = "model"
    minutes: float = 0.0

    @property
    def in_llama_cpp(self) -> bool:
        return self.artifact.endswith(".gguf")

    @property
    def engine(self) -> str:
        """What serves it."""
        return "llama.cpp" if self.in_llama_cpp else "vLLM"

    def model(self, places: Places, prepared: Mapping[str, Any]) -> Path:
        """What is scored and served."""
        return Path(prepared["dense"]) if self.compress is None else places.folder(self.name) / self.artifact


def peer_python(environment: str) -> str:
    """The Python of an environment beside .venv; PeerMissing where it is not there."""
    python = Path(os.environ.get(ENVIRONMENTS, ROOT)) / environment / "bin" / "python"
    if not python.is_file():
        raise PeerMissing(
            "not installed", f"there is no {environment}; `make versus-peers` makes it and says why it cannot"
        )
    return str(python)


def peer_program(environment: str, program: str, job: Path) -> list[str]:
    """The command that runs a program of `peers` on a job. -I: what lies beside the program, or in PYTHONPATH, is not found."""
    return [peer_python(environment), "-I", str(PEERS / f"{program}.py"), str(job)]


def _peer(environment: str, program: str, job: Mapping[str, Any], work: Work) -> list[str]:
    place = work.aside / "job.json"
    write_json(place, {**job, "output": str(work.artifact), "result": str(work.aside / RESULT)})
    return peer_program(environment, program, place)


def _gptq(environment: str, program: str, **options: Any) -> Callable[[Work], list[str]]:
    def command(work: Work) -> list[str]:
        job = {
            "model": work.prepared["dense"], "rows": str(work.places.rows), "bits": BITS,
            "group_size": work.settings.group_size, "dtype": work.prepared["compute"], **options,
        }  # fmt: skip
        return _peer(environment, program, job, work)

    return command


def _gguf(kind: str) -> Callable[[Work], list[str]]:
    def command(work: Work) -> list[str]:
        if (source := work.prepared["gguf"]) is None:
            raise PeerMissing(
                "no GGUF file",
                f"llama.cpp starts from a GGUF file, and {work.settings.model} is none: convert it with llama.cpp's "
                "convert_hf_to_gguf.py and give it as --gguf FILE",
            )
        if work.prepared["gguf_type"] == f"MOSTLY_{kind}":
            files = [source, str(work.artifact), str(work.aside / RESULT)]
            return [sys.executable, "-m", "benchmarks.versus.copied", *files]
        job = {"gguf": source, "type": kind, "threads": work.prepared["threads"]}
        return _peer(".venv-llamacpp", "llamacpp_quantize", job, work)

    return command


def _ours(recipe: str, trains: bool = False) -> Callable[[Work], list[str]]:
    def command(work: Work) -> list[str]:
        settings = work.settings
        changes = settings.of_recipe()
        if trains and settings.steps_tokens:
            changes.append(f"passes.distill.tokens={settings.steps_tokens}")
        sets = [part for change in changes for part in ("--set", change)]
        command = [sys.executable, "-m", "sparsify", "apply", recipe, "--model", settings.model]
        return [*command, "--output", str(work.artifact), *sets]

    return command


ROWS = (
    Row("dense", "dense", None),
    Row(
        "llmcompressor-sparsegpt-gptq", "llm-compressor, SparseGPT then GPTQ",
        _gptq(".venv-peers", "llmcompressor_gptq", prune=True), minutes=12,
    ),
    Row("llmcompressor-gptq", "llm-compressor, GPTQ", _gptq(".venv-peers", "llmcompressor_gptq", prune=False), minutes=8),
    Row("gptqmodel", "GPTQModel, GPTQ", _gptq(".venv-gptqmodel", "gptqmodel_gptq"), minutes=8),
    Row("llamacpp-q4_1", "llama.cpp, Q4_1", _gguf("Q4_1"), "model.gguf", minutes=0.2),
    Row("llamacpp-q4_k_m", "llama.cpp, Q4_K_M", _gguf("Q4_K_M"), "model.gguf", minutes=0.5),
    Row("2of4-w4a16", "sparsify, `2of4-w4a16`", _ours("2of4-w4a16"), minutes=5),
    Row("2of4-w4a16-tuned", "sparsify, `2of4-w4a16-tuned`", _ours("2of4-w4a16-tuned", trains=True), minutes=14),
)  # fmt: skip
