"""Run a plan: walk the blocks, write each when it is finished, and let the output appear when all is done."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch

from sparsify import phases
from sparsify._version import __version__
from sparsify.compiler.arithmetic import Arithmetic, announced, begin, computed
from sparsify.compiler.calibrate import CALIBRATION, calibration_rows, compress_on_data, own_rows
from sparsify.compiler.checkpoint_names import OUTSIDE, refuse_unstorable
from sparsify.compiler.left_dense import some_not_held
from sparsify.compiler.llmcompressor import transformed
from sparsify.compiler.memory import FREE, Limits, refuse_too_small, walk_memory
from sparsify.compiler.metrics import (
    ADAPTER,
    CARD,
    LLMCOMPRESSOR,
    METRICS,
    RECIPE,
    RECORD,
    TRAINING_LOG,
    Before,
    Notes,
    json_text,
    metrics_of,
)
from sparsify.compiler.model_card import model_card
from sparsify.compiler.plan import Plan
from sparsify.compiler.plan_experts import experts_in_words
from sparsify.compiler.plan_training import Shortened
from sparsify.compiler.planning import keep_zeros, make_plan, saved_plan
from sparsify.compiler.rebase import rebase
from sparsify.compiler.run import Run
from sparsify.compiler.run_phases import phases_of
from sparsify.compiler.shorten import shorten
from sparsify.compiler.training_text import HELD_OUT, ROWS, read_ahead
from sparsify.distributed import is_main, join, main_first, of_main, processes, refuse_different, wait_for_all
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.files import as_written, read_json
from sparsify.formats.writer import RECORD as WRITER
from sparsify.formats.writer import CheckpointWriter, is_published, partial_directory
from sparsify.lock import only_run
from sparsify.manifest import damage, keep_json
from sparsify.memory import Peak, gpu_peaks, peak_anonymous
from sparsify.native.tensor_memory import reusable_tensor_memory
from sparsify.progress import quietly, say, stage
from sparsify.recipe import Distill, Recipe, dump_recipe
from sparsify.training.log import whole_log
from sparsify.training.tracking import refuse_missing

DEPTH_NOTE, BASIS_NOTE = "depth.json", "basis.json"
BEFORE_DEPTH, SHORTENED = "before-depth", "depth"  # directories: the model compressed, and what is left of its layers
REBASED = "basis"  # the model in another basis

Evaluate = Callable[[Path], dict[str, Any]]
"""Measures a finished directory; what it returns goes into metrics.json and the model card."""


@dataclass(frozen=True)
class Applied:
    """A finished run. metrics: what metrics.json holds; record: what run.json holds."""

    output: Path
    metrics: dict[str, Any]
    record: dict[str, Any]


@quietly
def apply(
    recipe: Recipe,
    model: str,
    output: str | Path,
    resume: bool = False,
    quiet: bool = False,
    evaluate: Evaluate | None = None,
    limits: Limits = FREE,
    served: bool = True,
    called: str | None = None,
) -> Applied:
    """Compress `model` by `recipe` into the directory `output`.

    resume:   go on with an interrupted run; the result has the same bytes (run.json, which holds times, excepted)
    evaluate: measures the finished directory
    limits:   of the memory that the walk takes; they change no byte of the result
    served:   False for a step of a longer run, whose result no engine loads
    called:   what the files beside the weights call the model, where `model` is only where it lies
    Started by torchrun in several processes, they share the samples and the work; one of them writes.
    Raises SparsifyError for anything a user can mend. Nothing appears under `output` before it is complete.
    """
    join()
    with only_run(Path(output)), peak_anonymous() as peak, phases.measured():
        if resume and processes() == 1 and (done := _published(recipe, Path(output))) is not None:
            return done
        carry_out = partial(_carry_out, evaluate=evaluate, called=called)
        return _apply(recipe, model, Path(output), resume, quiet or not is_main(), carry_out, limits, served, peak)


def _apply(
    recipe: Recipe,
    model: str,
    output: Path,
    resume: bool,
    quiet: bool,
    carry_out: Callable[[Run, float], Applied],
    limits: Limits,
    served: bool,
    peak: Peak,
) -> Applied:
    """As `apply`. carry_out: does what is left when everything is checked; peak: of the memory of this process."""
    start = time.perf_counter()
    if recipe.model != model:
        recipe = recipe.model_copy(update={"model": model})
    refuse_different(_versions(), {"recipe": dump_recipe(resumable(recipe))})
    arithmetic = of_main(partial(begin, partial_directory(output), resume))
    with main_first(), arithmetic.in_force(), stage(f"reading {model}"):
        plan = keep_zeros(make_plan(recipe, model, served=served))
        for training in recipe.training:
            refuse_missing(training)
        refuse_unstorable(plan)
        if plan.needs_data and plan.compressed is None:
            refuse_too_small(walk_memory(plan, limits), limits)
        _say_left_dense(plan, quiet)
        inputs = plan.input_digests(output)
    refuse_different({}, {f"file {name} of the model": digest for name, digest in inputs.items()})
    with main_first():
        refuse_other_run(partial_directory(output), resume or not is_main())
        identity = dump_recipe(resumable(recipe))
        writer = CheckpointWriter(output, recipe.export.encoding, plan.checkpoint, resume, identity, inputs)
        finished = writer.parts()
    # nobody writes a part before everybody knows which ones were there
    arithmetic = of_main(partial(_kept, arithmetic, plan, writer, resume))
    with announced(arithmetic, plan, quiet).in_force(), reusable_tensor_memory():
        before = Before(plan)
        with main_first():
            _read_ahead(plan, writer, quiet)
        if recipe.llm_compressor:
            with main_first():
                made = transformed(plan, writer, resume or not is_main(), quiet).directory
            plan = saved_plan(recipe, made) if recipe.whole else keep_zeros(make_plan(recipe, str(made), served=served))
            if recipe.whole:
                _say_left_dense(plan, quiet)
            writer.source = plan.checkpoint
        if plan.depth is not None:
            plan, before = shortened(plan, writer, resume, quiet, limits)
            writer.source = plan.checkpoint
        if plan.recipe.basis is not None:
            plan, before = rebased(plan, before, writer, quiet)
            writer.source = plan.checkpoint
        notes = Notes(writer.work / "notes")
        plan = replace(plan, limits=limits)
        return carry_out(Run(plan, writer, notes, frozenset(finished), before, quiet, peak), start)


def _versions() -> dict[str, str]:
    """What the result depends on beside recipe and model."""
    packages = {name: package_version(name) for name in ("torch", "transformers")}
    return {"sparsify": __version__, "Python": ".".join(map(str, sys.version_info[:2])), **packages}


def _say_left_dense(plan: Plan, quiet: bool) -> None:
    for said in (*some_not_held(plan.recipe.export.format, plan.written_dense()), *experts_in_words(plan)):
        say(said, quiet)


def _kept(arithmetic: Arithmetic, plan: Plan, writer: CheckpointWriter, resume: bool) -> Arithmetic:
    """Write into the work directory what the run computes in, complete, once nothing of another run is left there."""
    if not resume:
        for stale in (
            writer.work / CALIBRATION,
            *(f for name in (ROWS, HELD_OUT) for f in writer.work.glob(f"training-*/{name}")),
        ):
            stale.unlink(missing_ok=True)  # of a run that was killed before its first part
    if plan.needs_data:
        arithmetic = arithmetic.for_statistics()
    arithmetic.keep(writer.work)
    return arithmetic


def _read_ahead(plan: Plan, writer: CheckpointWriter, quiet: bool) -> None:
    """Read the texts of the training passes that are left, before anything is computed."""
    for number, planned in enumerate(plan.training, 1):
        if writer.stage < number:
            # the passes are numbered anew behind a depth pass
            kept_in = writer.work / f"training-{number}" if plan.depth is None else None
            read_ahead(planned, plan.checkpoint, plan.recipe.calibration, kept_in, quiet)


def _carry_out(run: Run, start: float, evaluate: Evaluate | None, called: str | None) -> Applied:
    """What `apply` does once everything is checked. start: when it began."""
    plan, writer, output, recipe = run.plan, run.writer, run.writer.output, run.before.plan.recipe
    if plan.needs_data and plan.compressed is None:
        compress_on_data(run)
    if is_main():
        if plan.compressed is not None:
            run.take_over(plan.compressed)
        elif not plan.needs_data:
            run.compress_without_data()
        if plan.compressed is None:
            run.refuse_nothing_done()
        if OUTSIDE not in writer.parts():
            with stage("embeddings and output head"):
                run.write_outside(None if plan.head is None else run.solve_head(plan.head))
    wait_for_all()
    trained = time.perf_counter()
    run.train()
    trained = time.perf_counter() - trained
    if not is_main():
        wait_for_all()
        return Applied(output, read_json(output / METRICS), read_json(output / RECORD))
    metrics = metrics_of(plan, run.notes, writer, run.before)
    record = _record(run, time.perf_counter() - start, trained)
    texts = {
        RECIPE: dump_recipe(recipe),
        METRICS: json_text(metrics),
        RECORD: json_text(record),
        CARD: model_card(metrics, recipe),
    }
    writer.refuse_changed(run.before.plan.input_digests(output, whole=False))
    adapter = sorted((writer.work / ADAPTER).glob("*"))

    def measure(directory: Path) -> dict[str, str]:
        """metrics.json and the model card with what `evaluate` finds."""
        assert evaluate is not None
        try:
            found = evaluate(directory)
        except SparsifyError as error:
            hint = "the compressed model is kept: go on with --resume, and without an evaluation with --set evaluation=null"
            raise type(error)(f"{error}; {hint}") from error
        found = _replaced(found, str(directory), str(output))
        metrics["evaluation"] = {key: value for key, value in found.items() if key != "seconds"}
        return named({METRICS: json_text(metrics), CARD: model_card(metrics, recipe)})

    def named(texts: dict[str, str]) -> dict[str, str]:
        return {name: text.replace(recipe.model or "", called) for name, text in texts.items()} if called else texts

    with stage(f"writing {output}"):
        files: dict[str, str | bytes] = {**named(texts)}
        files |= {TRAINING_LOG: log} if (log := whole_log(writer.work)) else {}
        files |= {f"{ADAPTER}/{file.name}": file.read_bytes() for file in adapter}
        writer.finish(plan.saved_config(), files, None if evaluate is None else measure)
    wait_for_all()
    return Applied(output, metrics, record)


def _published(recipe: Recipe, output: Path) -> Applied | None:
    """The finished run that was ended when its output had appeared, before its work directory was gone; None for others."""
    work = partial_directory(output)
    if not is_published(output) or read_json(work / WRITER).get("identity") != dump_recipe(resumable(recipe)):
        return None
    say(f"{output} was complete already")
    shutil.rmtree(work, ignore_errors=True)
    return Applied(output, read_json(output / METRICS), read_json(output / RECORD))


def _replaced(value: Any, old: str, new: str) -> Any:
    """JSON values in which a text stands for another."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, Mapping):
        return {_replaced(key, old, new): _replaced(inner, old, new) for key, inner in value.items()}
    return [_replaced(inner, old, new) for inner in value] if isinstance(value, list | tuple) else value


def _record(run: Run, seconds: float, training_seconds: float) -> dict[str, Any]:
    """What run.json says: versions, machine and times, none of which the model depends on."""
    plan, whole = run.plan, run.before.plan
    return {
        "sparsify": __version__,
        "llmcompressor": read_json(note)["llmcompressor"]
        if (note := run.writer.work / LLMCOMPRESSOR).exists()
        else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compute": computed(whole) if whole.computes else None,
        "source": whole.checkpoint.fingerprint(),
        "processes": processes(),
        "seconds": round(seconds, 1),
        "training_seconds": round(training_seconds, 1),
        "phases": phases_of(plan, resumed=bool(run.finished)),
        "peak_anonymous_bytes": run.peak.sample(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **gpu_peaks(),
        "resumed_after_blocks": len(run.finished - {OUTSIDE}),
        "command": sys.argv,
    }


def _discard_damaged(directory: Path, writer: CheckpointWriter, note: str | None = None) -> None:
    """Remove a finished directory of the run that is not what was written, with the note on it, so that both are made again."""
    if directory.exists() and (problem := damage(directory)):
        say(f"{problem}; {directory} is made again")
        if note is not None:
            (writer.work / note).unlink(missing_ok=True)
        _discard(directory)


def _discard(directory: Path) -> None:
    """Remove a directory inside of a work directory, and what a killed run has left of writing it."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.rmtree(partial_directory(directory), ignore_errors=True)


def shortened(plan: Plan, writer: CheckpointWriter, resume: bool, quiet: bool, limits: Limits) -> tuple[Plan, Before]:
    """Run the recipe up to its depth pass and that pass; give the plan of the rest, on the shortened model.

    Both results lie in the work directory; a resumed run finds them finished.
    """
    depth = plan.recipe.depth
    assert depth is not None
    model = plan.checkpoint.spec
    before, after = plan.recipe.around_depth()
    compressed, short = writer.work / BEFORE_DEPTH, writer.work / SHORTENED
    with main_first():
        tokens = calibration_rows(plan, writer, quiet) if depth.needs_data or plan.needs_data else None
    errors: dict[str, float] = {}
    kept: dict[str, float] = {}
    head: dict[str, Any] | None = None
    spec = model
    if before is not None:
        spec = str(compressed)
        if is_main():
            _discard_damaged(compressed, writer)
        wait_for_all()
        if not compressed.exists():
            own = before.model_copy(update={"export": before.export.model_copy(update={"format": "sparse24"})})
            apply(own, model, compressed, resume=resume, quiet=quiet, limits=limits, served=False)
        with as_written(compressed / METRICS):
            metrics = read_json(compressed / METRICS)
            errors = {layer["module"]: layer["relative_error"] for layer in metrics["layers"]}
            head = metrics["head"]
            kept = dict.fromkeys(metrics["kept_zeros"], 0.0)
    with main_first():
        if is_main():
            _discard_damaged(short, writer, DEPTH_NOTE)
        if not (writer.work / DEPTH_NOTE).exists():  # written last: the directory was compared with the old model
            _discard(short)
            seed = plan.recipe.calibration.seed
            with phases.phase("depth", whole=True):
                keep_json(writer.work / DEPTH_NOTE, shorten(depth, spec, tokens, short, seed, quiet))
    with as_written(writer.work / DEPTH_NOTE):
        note = {**read_json(writer.work / DEPTH_NOTE)}
        whole = Shortened(note["layers_before"], tuple(note["teacher_blocks"]))
    passes_left = [
        step.model_copy(update={"teacher": model})
        if isinstance(step, Distill) and step.needs_teacher and step.teacher is None
        else step
        for step in after.passes
    ]
    rest = keep_zeros(make_plan(after.model_copy(update={"passes": passes_left}), str(short), whole))
    zeros = tuple(_renamed(plan, rest, note["layers"], kept))
    return rest, Before(plan, note, _renamed(plan, rest, note["layers"], errors), head, zeros)


def rebased(plan: Plan, before: Before, writer: CheckpointWriter, quiet: bool) -> tuple[Plan, Before]:
    """Run the basis pass; give the plan of the rest, on the rewritten model, which a resumed run finds finished."""
    recipe = plan.recipe
    assert recipe.basis is not None
    model, directory, file = plan.checkpoint.spec, writer.work / REBASED, writer.work / BASIS_NOTE
    with main_first():
        tokens = own_rows(calibration_rows(plan, writer, quiet))
        if is_main():
            _discard_damaged(directory, writer, BASIS_NOTE)
    if not file.exists():  # written last
        if is_main():
            _discard(directory)
        with phases.phase("basis", whole=True):
            note = rebase(recipe.basis, plan, tokens, directory, quiet)
        if is_main():
            keep_json(file, note)
    wait_for_all()
    layers = len(plan.model.blocks)
    whole = Shortened(layers, tuple(range(layers)))
    rest = keep_zeros(make_plan(recipe.after_basis(), str(directory), whole))
    with as_written(file):
        return rest, replace(before, basis={**read_json(file), "model": model})


def refuse_other_run(work: Path, resume: bool) -> None:
    """Refuse what another run left of its depth pass; the writer compares the runs when this one goes on with it."""
    made = [work / BEFORE_DEPTH, partial_directory(work / BEFORE_DEPTH), work / SHORTENED, work / REBASED]
    if not resume and any(directory.exists() for directory in made):
        raise CheckpointError(
            f"{work} holds the beginning of an interrupted run; continue it with --resume, or remove that directory"
        )


def _renamed(
    plan: Plan, rest: Plan, layers: Sequence[Sequence[int | None]], errors: dict[str, float]
) -> dict[str, float]:
    """Errors of linears by their names in the shortened model: each half of a new layer comes from an old one."""
    found = {}
    for number, sources in enumerate(layers):
        for old in {source for source in sources if source is not None}:
            for name in rest.linears:
                prefix = rest.model.blocks[number] + "."
                was = plan.model.blocks[old] + "." + name.removeprefix(prefix)
                if name.startswith(prefix) and was in errors and len(set(sources)) == 1:
                    found[name] = errors[was]
    return found


def resumable(recipe: Recipe) -> Recipe:
    """The recipe without what may differ when an interrupted run is continued: a diverged training goes on at a lower rate,
    a model that was moved is the same model, and what measures the result does not change it."""

    def fixed(step: Any) -> Any:
        if step not in recipe.training:
            return step
        fields = type(step).model_fields
        rates = ("learning_rate", "scale_learning_rate", "norm_learning_rate")
        free = (*rates, "save_every", "tensorboard", "wandb", "offload", "optimizer")
        return step.model_copy(update={name: fields[name].default for name in free if name in fields})

    # the model is compared by its files, wherever they lie
    return recipe.model_copy(
        update={"model": None, "evaluation": None, "passes": [fixed(step) for step in recipe.passes]}
    )
