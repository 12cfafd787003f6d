"""The stage before the passes that llm-compressor runs itself: modifiers that turn a dense model into another one.

llm-compressor's pins exclude ours, so it has an environment of its own (`make peers`). The models are handed over on disk: the
source as it is, what comes back in the work directory of the run, where a resumed run finds it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from sparsify.compiler import llmcompressor_stage
from sparsify.compiler.calibrate import CALIBRATION, calibration_rows
from sparsify.compiler.plan import Plan
from sparsify.errors import CheckpointError, MissingDependency
from sparsify.files import publish, write_json
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.permissions import trusts_remote_code
from sparsify.progress import say, stage
from sparsify.recipe.methods import TRANSFORMS

PYTHON = "SPARSIFY_LLMCOMPRESSOR_PYTHON"
DIRECTORY = "llm-compressor"  # in the work directory: the dense model that came back
SOURCES = Path(__file__).parents[2]  # where `make peers` leaves it
NOTE = "llm-compressor.json"  # beside it, written last: what it was made of


def peer_python(modifiers: list[str]) -> str:
    """The Python of llm-compressor's environment. Raises MissingDependency, which says how to make one.

    modifiers: those that need it."""
    named = os.environ.get(PYTHON)
    # not of the working directory: a program that happens to lie there is not to be run
    python = Path(named) if named else SOURCES / ".venv-peers" / "bin" / "python"
    if python.is_file() and os.access(python, os.X_OK):
        return str(python)
    where = f"{PYTHON} names {named}, which is no program" if named else "there is no .venv-peers"
    raise MissingDependency(
        f"{', '.join(modifiers)} run in llm-compressor itself, which has an environment of its own, and {where}: make it with "
        f"'make peers' in the sources of sparsify, or set {PYTHON} to the Python of one that has llmcompressor 0.14"
    )


def transformed(plan: Plan, writer: CheckpointWriter, resume: bool, quiet: bool) -> Checkpoint:
    """The dense model that `llm_compressor` of the recipe makes of the one of `plan`; made once for a run and its resumption."""
    modifiers = plan.recipe.llm_compressor or []
    names = [name for entry in modifiers for name in entry]
    directory = writer.work / DIRECTORY
    done = Checkpoint(plan.checkpoint.spec, directory)
    note = writer.work / NOTE
    if resume and note.exists():  # by the same recipe from the same model: the writer has compared them
        return done
    note.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    python = peer_python([name for name in names if name in TRANSFORMS])
    rows = None
    if any(TRANSFORMS.get(name) for name in names):
        calibration_rows(plan, writer, quiet)
        rows = writer.work / CALIBRATION
    aside = writer.work / f".{DIRECTORY}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with stage(f"{', '.join(names)} in llm-compressor", quiet):
        version = _run(python, plan.checkpoint.loadable_directory(), aside / "weights", modifiers, rows)
    _take_over(plan.checkpoint, aside / "weights")
    publish(aside / "weights", directory)
    shutil.rmtree(aside, ignore_errors=True)
    write_json(note, {"modifiers": modifiers, "llmcompressor": version})
    say(f"{', '.join(names)} ran in llm-compressor {version}", quiet)
    return done


def _run(python: str, source: Path, output: Path, modifiers: list[dict[str, Any]], rows: Path | None) -> str:
    """Run the stage; the version of llm-compressor that did. -I: neither this environment's packages nor the files beside the
    script are found."""
    job = output.with_suffix(".json")
    write_json(
        job,
        {
            "source": str(source.resolve()),
            "output": str(output.resolve()),
            "modifiers": modifiers,
            "rows": None if rows is None else str(rows.resolve()),
            "trust": trusts_remote_code(),
        },
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = output.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(
            [python, "-I", str(Path(llmcompressor_stage.__file__).resolve()), str(job.resolve())],
            stdout=subprocess.PIPE,
            stderr=file,
            cwd=output.parent,
            env=environment,
            text=True,
            check=False,
        )
    if ended.returncode:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        raise CheckpointError(
            f"llm-compressor failed ({python}): {lines[-1] if lines else f'it ended with {ended.returncode}'}; all that it said "
            f"is in {log}"
        )
    return str(json.loads(ended.stdout.strip().splitlines()[-1])["llmcompressor"])


def _take_over(source: Checkpoint, weights: Path) -> None:
    """Complete a directory of weights to a checkpoint like its source, and refuse weights that are not those of such a model."""
    made = Checkpoint(source.spec, weights)
    infos = made.infos
    new = set(infos) - set(source.infos)
    lost = set(source.infos) - set(infos)
    if lost or any(not name.endswith("lm_head.weight") for name in new):
        name = sorted(lost or new)[0]
        raise CheckpointError(
            f"{source.spec}: llm-compressor {'left out' if lost else 'added'} the tensor {name}, so what it made is no model of "
            "this kind; run these modifiers in llm-compressor and give sparsify the model that it writes"
        )
    for name, info in source.infos.items():
        if infos[name].shape != info.shape or infos[name].dtype != info.dtype:
            raise CheckpointError(f"{source.spec}: llm-compressor changed shape or type of {name}")
    for name in infos:
        if not torch.isfinite(made.tensor(name)).all():
            raise CheckpointError(f"{source.spec}: {name} holds NaN or Inf after llm-compressor's modifiers")
    config = source.config
    if new:  # a head that was tied to the embedding has weights of its own now
        config = {**config, "tie_word_embeddings": False}
    for name, sidecar in source.sidecar_files().items():
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sidecar, weights / name)
    write_json(weights / "config.json", config, allow_nan=True)
