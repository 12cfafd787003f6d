"""What llm-compressor runs itself: modifiers that turn a dense model into another one before the passes, and whole recipes.

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
from sparsify.compiler.metrics import LLMCOMPRESSOR as NOTE
from sparsify.compiler.plan import Plan
from sparsify.errors import CheckpointError, MissingDependency
from sparsify.files import publish, read_json, write_json
from sparsify.formats.foreign import DequantizedCheckpoint, open_dense
from sparsify.formats.scheme import in_block
from sparsify.formats.writer import CheckpointWriter
from sparsify.manifest import damage, keep_json, seal
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.finite import all_finite
from sparsify.model.permissions import trusts_remote_code
from sparsify.progress import say, stage
from sparsify.recipe.llmcompressor.whole import REMOVED, SAVED, names_of, needs_older
from sparsify.recipe.methods import TRANSFORMS

PYTHON = "SPARSIFY_LLMCOMPRESSOR_PYTHON"
DIRECTORY = "llm-compressor"  # in the work directory: the model that came back
OLDER = (0, 14)  # the first version without `actorder: group`
SOURCES = Path(__file__).parents[2]  # where `make peers` leaves it


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
    """The model that `llm_compressor` of the recipe makes of the one of `plan`; made once for a run and its resumption. It is
    dense, or, of a whole recipe, as llm-compressor saves it.
    """
    modifiers = plan.recipe.llm_compressor or []
    names = names_of(modifiers)
    directory = writer.work / DIRECTORY
    done = Checkpoint(plan.checkpoint.spec, directory)
    note = writer.work / NOTE
    if resume and note.exists() and (problem := damage(directory)):
        say(f"{problem}; llm-compressor runs again", quiet)
        note.unlink()
    if resume and note.exists():  # by the same recipe from the same model: the writer has compared them
        return done
    note.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    python = peer_python(names if plan.recipe.whole else [name for name in names if name in TRANSFORMS])
    if needs_older(modifiers):
        _refuse_newer(python)
    rows = None
    if plan.reads_text and (plan.recipe.whole or any(TRANSFORMS.get(name) for name in names)):
        calibration_rows(plan, writer, quiet)
        rows = writer.work / CALIBRATION
    aside = writer.work / f".{DIRECTORY}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with stage(f"{', '.join(names)} in llm-compressor", quiet):
        version = _run(python, plan, aside / "weights", rows)
    found = _take_over_saved(plan.checkpoint, aside / "weights") if plan.recipe.whole else {}
    if not plan.recipe.whole:
        _take_over(plan.checkpoint, aside / "weights")
    seal(aside / "weights")
    publish(aside / "weights", directory)
    shutil.rmtree(aside, ignore_errors=True)
    keep_json(note, {"modifiers": modifiers, "llmcompressor": version, **found})
    say(f"{', '.join(names)} ran in llm-compressor {version}", quiet)
    return done


def _refuse_newer(python: str) -> None:
    """MissingDependency where the llm-compressor of an environment has no `actorder: group` any more."""
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    ended = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    found = ended.stdout.strip() or "no llmcompressor"
    if ended.returncode or tuple(int(part) for part in found.split(".")[:2]) >= OLDER:
        raise MissingDependency(
            f"{REMOVED} is what llm-compressor up to 0.13 does, and {python} has {found}: set {PYTHON} to the Python of an "
            "environment with llmcompressor 0.13, or write actorder: static"
        )


def _run(python: str, plan: Plan, output: Path, rows: Path | None) -> str:
    """Run the stage; the version of llm-compressor that did. -I: neither this environment's packages nor the files beside the
    script are found."""
    job = output.with_suffix(".json")
    recipe = plan.recipe
    packed = recipe.whole and recipe.export.format not in (
        "dense",
        SAVED,
    )  # scales of 16 bits, as our formats hold them
    write_json(
        job,
        {
            "source": str(plan.checkpoint.loadable_directory().resolve()),
            "output": str(output.resolve()),
            "modifiers": recipe.llm_compressor,
            "whole": recipe.whole,
            "dtype": str(plan.store).removeprefix("torch.") if packed else "auto",
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
    new = _new_tensors(source, made)
    for name, info in source.infos.items():
        if made.dtype(name) != info.dtype:
            raise CheckpointError(f"{source.spec}: llm-compressor changed the type of {name}")
    for name in made.infos:
        _finite(source, name, made.tensor(name))
    _complete(source, weights, new)


def _take_over_saved(source: Checkpoint, weights: Path) -> dict[str, Any]:
    """Complete what llm-compressor saved to a checkpoint like its source, with the quantization that it describes. Returns what
    metrics.json says of it: how weights are stored, and the share of zeros among those of the blocks.

    Raises CheckpointError for weights that are not those of such a model, and where nothing has changed.
    """
    described = read_json(weights / "config.json").get("quantization_config")
    for file in weights.iterdir():
        if file.is_file() and not file.name.startswith(
            "model"
        ):  # its own recipe.yaml, configs: those of the source come along
            file.unlink()
    _complete(source, weights, set(), described)
    made = open_dense(weights)
    if new := _new_tensors(source, made):
        _complete(source, weights, new, described)
    quantized = made.modules if isinstance(made, DequantizedCheckpoint) else {}
    changed, zeros, count = bool(quantized), 0, 0
    for name in made.infos:
        tensor = made.tensor(name)
        _finite(source, name, tensor)
        if name in source.infos and not changed:
            changed = not torch.equal(tensor, source.tensor(name))
        if in_block(name) and tensor.dim() == 2:
            zeros, count = zeros + int((tensor == 0).sum()), count + tensor.numel()
    if not changed:
        raise CheckpointError(
            f"{source.spec}: llm-compressor changed no weight; its modifiers name no linear of this model"
        )
    stored = made.quantization if isinstance(made, DequantizedCheckpoint) else "dense"
    return {"stored": stored, "zeros": round(zeros / max(count, 1), 6)}


def _new_tensors(source: Checkpoint, made: Checkpoint) -> set[str]:
    """The tensors that the source has not: an output head that is not tied to the embedding any more. CheckpointError where any
    other is new, and where one is lost or has another shape."""
    new, lost = set(made.infos) - set(source.infos), set(source.infos) - set(made.infos)
    if lost or any(not name.endswith("lm_head.weight") for name in new):
        name = sorted(lost or new)[0]
        raise CheckpointError(
            f"{source.spec}: llm-compressor {'left out' if lost else 'added'} the tensor {name}, so what it made is no model of "
            "this kind; run these modifiers in llm-compressor and give sparsify the model that it writes"
        )
    for name, info in source.infos.items():
        if made.shape(name) != info.shape:
            raise CheckpointError(f"{source.spec}: llm-compressor changed the shape of {name}")
    return new


def _finite(source: Checkpoint, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not all_finite(tensor):
        raise CheckpointError(f"{source.spec}: {name} holds NaN or Inf after llm-compressor's modifiers")


def _complete(source: Checkpoint, weights: Path, new: set[str], quantization: Any = None) -> None:
    """Put the config of the source and its other files beside weights. new: heads that were tied to the embedding before."""
    config = dict(source.config)
    if new:
        config["tie_word_embeddings"] = False
    if quantization is not None:
        config["quantization_config"] = quantization
    for name, sidecar in source.sidecar_files().items():
        (weights / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sidecar, weights / name)
    write_json(weights / "config.json", config, allow_nan=True)
