"""Run a plan: walk the blocks, write each when it is finished, and let the output appear when all is done."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sparsify import __version__
from sparsify.compiler.arithmetic import Arithmetic, announced, begin, computed, summing
from sparsify.compiler.model_card import head_in_words, head_note, model_card, shown_perplexity, training_in_words
from sparsify.compiler.plan import Plan, PlannedHead, make_plan
from sparsify.compiler.plan_training import Shortened
from sparsify.compiler.run_training import ADAPTER, train_stage
from sparsify.compiler.shorten import describe_note, shorten
from sparsify.data.calibration import calibration_tokens
from sparsify.data.self_generated.generator import open_writer, writer_key
from sparsify.distributed import (
    device,
    is_main,
    join,
    main_first,
    processes,
    rank,
    wait_for_all,
)
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.files import atomic_write, cache_directory, read_json, write_json
from sparsify.formats.directory import CheckpointWriter, CompressedCheckpoint, partial_directory
from sparsify.formats.tensor_file import LazyTensor, write_tensors
from sparsify.model.checkpoint import read_header
from sparsify.model.linear import LinearWeights
from sparsify.model.sequential import BlockVisit, GroupVisit, Walk
from sparsify.native.build import build_ahead
from sparsify.progress import Task, progress, progress_bar, quietly, stage
from sparsify.recipe import Distill, Recipe, dump_recipe
from sparsify.solver.head_quantization import SolvedHead, solve_head
from sparsify.solver.hessian import HessianAccumulator
from sparsify.solver.solve import Scheme, solve_layer
from sparsify.training.block_tuning import BlockTuning, Sample, tune_block

METRICS = "metrics.json"
RECORD = "run.json"
CARD = "README.md"
RECIPE = "recipe.yaml"
OUTER = "outside"
DEPTH_NOTE = "depth.json"
BEFORE_DEPTH, SHORTENED = "before-depth", "depth"  # directories: the model compressed, and what is left of its layers
CALIBRATION = "calibration.safetensors"
KERNELS = ("cpu/gram", "cpu/column_sweep", "cpu/coordinate_descent")  # what compressing on data computes with

Evaluate = Callable[[Path], dict[str, Any]]
"""Measures a finished directory; what it returns goes into metrics.json and the model card."""


@dataclass(frozen=True)
class Applied:
    """A finished run. metrics: what metrics.json holds; record: what run.json holds."""

    output: Path
    metrics: dict[str, Any]
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"output": str(self.output), **self.metrics, "run": self.record}

    def table(self) -> Table:
        """The summary a person reads at the end."""
        sizes, layers = self.metrics["sizes"], self.metrics["layers"]
        table = Table(title=f"{self.output}", show_header=False)
        table.add_row("linears compressed", f"{len(layers)} in {self.metrics['blocks']} blocks")
        if depth := self.metrics.get("depth"):
            table.add_row("depth", describe_note(depth))
        ratio = sizes["dense_bytes"] / sizes["compressed_bytes"]
        table.add_row(
            "size",
            f"{sizes['dense_bytes'] / 1e6:.0f} MB -> {sizes['compressed_bytes'] / 1e6:.0f} MB ({ratio:.2f} times smaller)",
        )
        table.add_row("bits per linear weight", f"{sizes['bits_per_weight']:.2f}")
        if head := self.metrics["head"]:
            table.add_row("output head", head_in_words(head, sizes["head_bytes"]))
        errors = [layer["relative_error"] for layer in layers if layer["relative_error"] is not None]
        if errors:
            worst = max(layers, key=lambda layer: layer["relative_error"] or 0)
            table.add_row("output error, mean", f"{sum(errors) / len(errors):.4f}")
            table.add_row("output error, worst", f"{worst['relative_error']:.4f} at {worst['module']}")
        for reason, count in _counted(entry["reason"] for entry in self.metrics["dense_modules"]).items():
            table.add_row("left dense", f"{count}: {reason}")
        for training in self.metrics["training"]:
            table.add_row(training["kind"], training_in_words(training))
        if evaluation := self.metrics.get("evaluation"):
            table.add_row("perplexity", shown_perplexity(evaluation["perplexity"]))
        return table


@quietly
def apply(
    recipe: Recipe,
    model: str,
    output: str | Path,
    resume: bool = False,
    quiet: bool = False,
    evaluate: Evaluate | None = None,
    spill: bool = False,
) -> Applied:
    """Compress `model` by `recipe` into the directory `output`.

    resume:   go on with an interrupted run; the result has the same bytes (run.json, which holds times, excepted)
    evaluate: measures the finished directory
    spill:    keep the calibration activations in a file instead of in memory
    Started by torchrun in several processes, they share the samples and the work; one of them writes.
    Raises SparsifyError for anything a user can mend. Nothing appears under `output` before it is complete.
    """
    start = time.perf_counter()
    join()
    quiet = quiet or not is_main()
    output = Path(output)
    if recipe.model != model:
        recipe = recipe.model_copy(update={"model": model})
    with main_first():
        arithmetic = begin(partial_directory(output), resume or not is_main())  # the main process has kept it by then
        with arithmetic.in_force(), stage(f"reading {model}"):
            plan = make_plan(recipe, model)
        identity = dump_recipe(resumable(recipe))
        writer = CheckpointWriter(output, recipe.export.format, plan.checkpoint, resume=resume, identity=identity)
        finished = writer.parts()
        if is_main():
            arithmetic = _kept(arithmetic, plan, writer, identity, resume)
    wait_for_all()  # nobody writes a part before everybody knows which ones were there
    with announced(arithmetic, plan, quiet).in_force():
        return _run(start, plan, writer, finished, resume, quiet, evaluate, spill)


def _kept(arithmetic: Arithmetic, plan: Plan, writer: CheckpointWriter, identity: str, resume: bool) -> Arithmetic:
    """Write into the work directory what the run computes in, complete, once nothing of another run is left there."""
    if plan.depth is not None:
        _same_run(writer.work, identity, resume)
    if not resume:
        (writer.work / CALIBRATION).unlink(missing_ok=True)  # of a run that was killed before its first part
    if plan.needs_data:
        arithmetic = arithmetic.for_statistics()
    arithmetic.keep(writer.work)
    return arithmetic


def _run(
    start: float,
    plan: Plan,
    writer: CheckpointWriter,
    finished: set[str],
    resume: bool,
    quiet: bool,
    evaluate: Evaluate | None,
    spill: bool,
) -> Applied:
    """What `apply` does once everything is checked. start: when it began; finished: names of the parts that were there."""
    output, recipe = writer.output, plan.recipe
    notes = _Notes(writer.work / "notes")
    before = _Before(plan)
    if plan.depth is not None:
        plan, before = _shortened(plan, writer, resume, quiet, spill)
        writer.source = plan.checkpoint
    if plan.needs_data and plan.compressed is None:
        _walk(plan, writer, finished, notes, quiet, spill)
    if is_main():
        if plan.compressed is not None:
            _carry(plan, plan.compressed, writer, finished, notes, before.errors)
        elif not plan.needs_data:
            _stream(plan, writer, finished, notes, quiet)
        if OUTER not in writer.parts():
            with stage("embeddings and output head"):
                _outer(plan, writer, notes, None if plan.head is None else _solve_head(plan, plan.head))
    wait_for_all()
    trained = time.perf_counter()
    _train(plan, writer, notes, quiet)
    trained = time.perf_counter() - trained
    if not is_main():
        wait_for_all()
        return Applied(output, read_json(output / METRICS), read_json(output / RECORD))
    metrics = _metrics(plan, notes, writer, before)
    record = {
        "sparsify": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compute": computed(before.plan) if before.plan.computes else None,
        "processes": processes(),
        "seconds": round(time.perf_counter() - start, 1),
        "training_seconds": round(trained, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "resumed_after_blocks": len(finished - {OUTER}),
        "command": sys.argv,
    }
    files = {
        RECIPE: dump_recipe(recipe),
        METRICS: json_text(metrics),
        RECORD: json_text(record),
        CARD: model_card(metrics, recipe),
    }
    adapter = sorted((writer.work / ADAPTER).glob("*"))
    with stage(f"writing {output}"):
        writer.finish(extra_files={**files, **{f"{ADAPTER}/{file.name}": file.read_bytes() for file in adapter}})
    if evaluate is not None:
        metrics["evaluation"] = {key: value for key, value in evaluate(output).items() if key != "seconds"}
        atomic_write(output / METRICS, json_text(metrics))
        atomic_write(output / CARD, model_card(metrics, recipe))
    wait_for_all()
    return Applied(output, metrics, record)


@dataclass(frozen=True)
class _Before:
    """What a run did before its last plan was made.

    plan:   of the whole recipe and the whole model
    depth:  what metrics.json says of the depth pass
    errors: output errors of linears that were compressed before it, by their new names
    head:   what metrics.json says of the output head, when that was quantized before it
    """

    plan: Plan
    depth: dict[str, Any] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    head: dict[str, Any] | None = None


def _shortened(plan: Plan, writer: CheckpointWriter, resume: bool, quiet: bool, spill: bool) -> tuple[Plan, _Before]:
    """Run the recipe up to its depth pass and that pass; give the plan of the rest, on the shortened model.

    Both results lie in the work directory; a resumed run finds them finished.
    """
    depth = plan.recipe.depth
    assert depth is not None
    model = plan.checkpoint.spec
    before, after = plan.recipe.around_depth()
    compressed, short = writer.work / BEFORE_DEPTH, writer.work / SHORTENED
    with main_first():
        tokens = _tokens(plan, writer, quiet) if depth.needs_data or plan.needs_data else None
    errors: dict[str, float] = {}
    head: dict[str, Any] | None = None
    spec = model
    if before is not None:
        spec = str(compressed)
        if not compressed.exists():
            own = before.model_copy(update={"export": before.export.model_copy(update={"format": "sparse24"})})
            apply(own, model, compressed, resume=resume, quiet=quiet, spill=spill)
        metrics = read_json(compressed / METRICS)
        errors = {layer["module"]: layer["relative_error"] for layer in metrics["layers"]}
        head = metrics["head"]
    with main_first():
        if not (writer.work / DEPTH_NOTE).exists():  # written last: the directory was compared with the old model
            shutil.rmtree(short, ignore_errors=True)
            seed = plan.recipe.calibration.seed
            write_json(writer.work / DEPTH_NOTE, shorten(depth, spec, tokens, short, seed, quiet))
    note = read_json(writer.work / DEPTH_NOTE)
    taught = [
        step.model_copy(update={"teacher": model})
        if isinstance(step, Distill) and step.needs_teacher and step.teacher is None
        else step
        for step in after.passes
    ]
    whole = Shortened(note["layers_before"], tuple(note["teacher_blocks"]))
    rest = make_plan(after.model_copy(update={"passes": taught}), str(short), whole)
    return rest, _Before(plan, note, _renamed(plan, rest, note["layers"], errors), head)


def _same_run(work: Path, identity: str, resume: bool) -> None:
    """Refuse what another run left of its depth pass."""
    file = work / "depth-recipe.yaml"
    made = [work / BEFORE_DEPTH, partial_directory(work / BEFORE_DEPTH), work / SHORTENED]
    if any(directory.exists() for directory in made) and file.exists():
        if not resume:
            raise CheckpointError(
                f"{work} holds the beginning of an interrupted run; continue it with --resume, or remove that directory"
            )
        if file.read_text() != identity:
            raise CheckpointError(
                f"{work} was begun with another recipe; resume with the same one, or remove that directory"
            )
    atomic_write(file, identity)


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


def _walk(plan: Plan, writer: CheckpointWriter, finished: set[str], notes: _Notes, quiet: bool, spill: bool) -> None:
    """Compress on calibration data, block by block, one forward pass in all; then the head, where that needs data."""
    blocks = plan.model.blocks
    head = plan.head if plan.head is not None and plan.head.scheme.needs_data and OUTER not in finished else None
    if head is None and all(_part(index) in finished for index in range(len(blocks))):
        return
    with main_first():
        tokens = _my_rows(_tokens(plan, writer, quiet))
    folder = writer.work / f"activations-{rank()}"
    if spill:
        folder.mkdir(exist_ok=True)
    build_ahead(KERNELS)
    with stage("calibration text through the embeddings"):
        walk = Walk(plan.model, tokens, plan.needs_twin, folder if spill else None, device())
    with summing(), progress_bar("compressing", len(blocks) + (head is not None), quiet=quiet) as bar:
        for index, block in enumerate(blocks):
            if _part(index) in finished:
                bar.describe(f"resuming through {block}")
                linears, tensors = writer.read_part(_part(index))
                walk.replay(index, _by_module(plan, linears), _parameters(plan, index, tensors))
                bar.advance()
                continue
            rewriting = _Rewriting(plan, bar)
            tuning = _Tuning(plan, bar) if plan.recipe.tune is not None else None
            with _naming(block):
                result = walk.visit(index, lambda name: name in plan.schemes, rewriting, tuning)
            if is_main():
                notes.write(index, _layer_notes(index, result.linears, rewriting.errors), result.skipped, tuning)
                writer.write_part(_part(index), *_block_tensors(plan, index, result.linears, result.others))
            bar.describe(block)
            bar.advance()
        if head is not None:
            bar.describe(head.head.module)
            solved = _solve_head(plan, head, HessianAccumulator().add(walk.head_inputs()).mean().H)
            if is_main():
                _outer(plan, writer, notes, solved)
            bar.advance()


def _my_rows(tokens: Tensor) -> Tensor:
    """Of several processes each takes every nth row. tokens: [samples, sequence]."""
    if tokens.shape[0] < processes():
        raise SparsifyError(
            f"{tokens.shape[0]} calibration samples cannot be shared by {processes()} processes; "
            "raise calibration.samples or start fewer"
        )
    return tokens[rank() :: processes()]


def _carry(
    plan: Plan,
    compressed: CompressedCheckpoint,
    writer: CheckpointWriter,
    finished: set[str],
    notes: _Notes,
    errors: dict[str, float],
) -> None:
    """Take over a checkpoint that is compressed already, block by block, as the walk would have left it.

    errors: of linears that this recipe compressed, by name
    """
    owners = {name: plan.model.owner(target) for name, (target, _) in plan.model.sources.items()}
    for index in progress([*range(len(plan.model.blocks)), None], "taking over"):
        part = OUTER if index is None else _part(index)
        if part in finished:
            continue
        mine = {name for name, owner in owners.items() if owner == index}
        linears = {m: _in_store(plan, compressed.linear(m)) for m in compressed.modules if f"{m}.weight" in mine}
        biases = {f"{module}.bias" for module, linear in linears.items() if linear.bias is not None}
        plain = [name for name in compressed.other_names() if name in mine and name not in biases]
        if index is not None:
            notes.write(index, _layer_notes(index, _by_module(plan, linears), errors), {})
        writer.write_part(part, linears, {name: _stored(plan, compressed.tensor(name)) for name in plain})


def _train(plan: Plan, writer: CheckpointWriter, notes: _Notes, quiet: bool) -> None:
    """The training passes, each on what the one before left. Notes of the layers follow the weights."""
    for number, planned in enumerate(plan.training, 1):
        if writer.stage >= number:
            continue

        def conclude(summary: dict[str, Any], linears: dict[str, LinearWeights], number: int = number) -> None:
            trained = _by_module(plan, linears)
            for index in range(len(plan.model.blocks)):
                note = notes.read(index)
                errors = {layer["module"]: layer["relative_error"] for layer in note["layers"]}
                mine = {layer["module"]: trained[layer["module"]] for layer in note["layers"]}
                notes.write_layers(index, _layer_notes(index, mine, errors))
            notes.write_training(number, summary)

        train_stage(number, planned, plan.checkpoint, plan.recipe.calibration, writer, conclude, quiet)


def resumable(recipe: Recipe) -> Recipe:
    """The recipe without what may differ when an interrupted run is continued: a diverged training goes on at a lower rate."""

    def fixed(step: Any) -> Any:
        if step not in recipe.training:
            return step
        fields = type(step).model_fields
        free = ("learning_rate", "scale_learning_rate", "norm_learning_rate", "save_every", "tensorboard")
        return step.model_copy(update={name: fields[name].default for name in free if name in fields})

    return recipe.model_copy(update={"passes": [fixed(step) for step in recipe.passes]})


def _stream(plan: Plan, writer: CheckpointWriter, finished: set[str], notes: _Notes, quiet: bool) -> None:
    """Compress without data: each weight is read, rewritten and stored; the model never runs."""
    with progress_bar("compressing", len(plan.model.blocks), quiet=quiet) as bar:
        for index in range(len(plan.model.blocks)):
            if _part(index) not in finished:
                new: dict[str, LinearWeights] = {}
                for name, scheme in plan.schemes.items():
                    planned = plan.linears[name]
                    if planned.block == index:
                        new |= solve_layer({name: plan.checkpoint.tensor(planned.source)}, scheme, None)[0]
                notes.write(index, _layer_notes(index, new, {}), {})
                writer.write_part(_part(index), *_block_tensors(plan, index, new))
            bar.describe(plan.model.blocks[index])
            bar.advance()


def _solve_head(plan: Plan, planned: PlannedHead, H: Tensor | None = None) -> SolvedHead:
    """The output head as the recipe asks for it. H: as `solve_head` takes it."""
    return solve_head(planned.head.module, plan.checkpoint.tensor(planned.head.source), planned.scheme, H)


def _outer(plan: Plan, writer: CheckpointWriter, notes: _Notes, solved: SolvedHead | None) -> None:
    """What lies outside of the blocks, as it was, and the output head where it is quantized."""
    names = plan.model.source_names(None)
    linears: dict[str, LinearWeights] = {}
    if plan.head is not None and solved is not None:
        head = plan.head.head
        linears[head.module] = solved.linear
        notes.write_head(head_note(head, solved))
        names = [name for name in names if head.tied or name != head.source]
    writer.write_part(OUTER, linears, {name: _stored(plan, plan.checkpoint.tensor(name)) for name in names})


class _Rewriting:
    """What the walk calls at every group: accumulate the statistics, solve, remember the errors."""

    def __init__(self, plan: Plan, bar: Task):
        self.plan = plan
        self.bar = bar
        self.errors: dict[str, float] = {}

    def __call__(self, visit: GroupVisit) -> dict[str, LinearWeights]:
        self.bar.describe(f"{visit.names[0]}{' ...' if len(visit.names) > 1 else ''}")
        statistics = HessianAccumulator().add(visit.inputs, visit.dense_inputs).mean()
        new: dict[str, LinearWeights] = {}
        for scheme, weights in self._by_scheme(visit).items():
            part, errors = solve_layer(weights, scheme, statistics, together=True)
            new |= part
            self.errors |= errors
        return new

    def _by_scheme(self, visit: GroupVisit) -> dict[Scheme, dict[str, Tensor]]:
        """Linears of one group may differ in what the recipe asks of them."""
        parts: dict[Scheme, dict[str, Tensor]] = {}
        for name, linear in zip(visit.names, visit.linears, strict=True):
            parts.setdefault(self.plan.schemes[name], {})[name] = linear.weight
        return parts


class _Tuning:
    """What the walk calls when the linears of a block are compressed: train the block, remember what that gained."""

    def __init__(self, plan: Plan, bar: Task):
        self.plan = plan
        self.bar = bar
        self.note: dict[str, Any] | None = None

    def __call__(self, visit: BlockVisit) -> tuple[dict[str, LinearWeights], dict[str, Tensor]]:
        block = self.plan.model.blocks[visit.block]
        prefix = block + "."
        tune = self.plan.recipe.tune
        assert tune is not None
        settings = BlockTuning(
            epochs=tune.epochs, learning_rate=tune.learning_rate, scale_rate=tune.scale_learning_rate,
            norm_rate=tune.norm_learning_rate, batch=tune.batch_size, holdout=tune.holdout,
            seconds=tune.seconds_per_block, seed=self.plan.recipe.calibration.seed,
        )  # fmt: skip
        samples = [Sample(*parts) for parts in zip(visit.entering, visit.wanted, visit.calls, strict=True)]
        inside = {name.removeprefix(prefix): linear for name, linear in visit.linears.items()}
        tuned = tune_block(
            visit.module, inside, samples, settings,
            lambda step, steps: self.bar.describe(f"{block}: tuning, step {step} of {steps}"),
        )  # fmt: skip
        self.note = {"before": tuned.before, "after": tuned.after, "steps": tuned.steps}
        others = {prefix + name: tensor.to(self.plan.store) for name, tensor in tuned.others.items()}
        kept = {name: tensor for name, tensor in others.items() if self.plan.model.source_of(name) is not None}
        return {prefix + name: linear for name, linear in tuned.linears.items()}, kept


@contextmanager
def _naming(block: str) -> Iterator[None]:
    """Say in which block a run failed when the error does not."""
    try:
        yield
    except SparsifyError as error:
        if block in str(error):
            raise
        raise type(error)(f"{block}: {error}") from None


class _Notes:
    """What metrics.json will say of each finished block, kept beside the parts so that a resumed run has it too."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(
        self, index: int, layers: list[dict[str, Any]], skipped: dict[str, str], tuning: _Tuning | None = None
    ) -> None:
        note = {"layers": layers, "skipped": skipped, "tuning": tuning.note if tuning is not None else None}
        write_json(self.directory / f"{_part(index)}.json", note)

    def write_layers(self, index: int, layers: list[dict[str, Any]]) -> None:
        """What became of the layers of a finished block afterwards."""
        write_json(self.directory / f"{_part(index)}.json", {**self.read(index), "layers": layers})

    def read(self, index: int) -> dict[str, Any]:
        return read_json(self.directory / f"{_part(index)}.json")

    def write_head(self, note: dict[str, Any]) -> None:
        write_json(self.directory / f"{OUTER}.json", note)

    def write_training(self, number: int, note: dict[str, Any]) -> None:
        write_json(self.directory / f"training-{number}.json", note)

    def read_training(self, number: int) -> dict[str, Any]:
        return read_json(self.directory / f"training-{number}.json")

    def read_head(self) -> dict[str, Any]:
        return read_json(self.directory / f"{OUTER}.json")


def _part(index: int) -> str:
    return f"block-{index:04d}"


def _tokens(plan: Plan, writer: CheckpointWriter, quiet: bool) -> Tensor:
    """The calibration tokens [samples, sequence]; a resumed run uses those of the first one, whatever became of their source."""
    file = writer.work / CALIBRATION
    if file.exists():
        read_header(file)
        from safetensors.torch import load_file

        return load_file(file)["tokens"]
    from transformers import AutoTokenizer

    directory, dtype = plan.checkpoint.directory, plan.compute.dtype
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = calibration_tokens(
        plan.recipe.calibration,
        tokenizer,
        lambda: open_writer(directory, dtype),
        cache_dir=cache_directory() / "calibration",
        key=writer_key(plan.checkpoint, dtype),
        quiet=quiet,
    )
    aside = file.with_suffix(".partial")
    write_tensors(aside, {"tokens": LazyTensor.of(tokens)}, {})
    aside.replace(file)
    return tokens


def _stored(plan: Plan, tensor: Tensor) -> Tensor:
    return tensor.to(plan.store) if tensor.is_floating_point() else tensor


def _in_store(plan: Plan, linear: LinearWeights) -> LinearWeights:
    """A linear that is only trained is stored like any other tensor; what is compressed already stays to the bit."""
    if linear.bits < 16 or linear.pattern != "dense":
        return linear
    assert linear.values is not None
    bias = None if linear.bias is None else _stored(plan, linear.bias)
    return replace(linear, values=_stored(plan, linear.values), bias=bias)


def _exported(plan: Plan, module: str) -> str:
    """The name of a linear in the checkpoint, which is not always its name in transformers."""
    return plan.linears[module].source.removesuffix(".weight")


def _by_module(plan: Plan, stored: dict[str, LinearWeights]) -> dict[str, LinearWeights]:
    modules = {_exported(plan, module): module for module in plan.linears}
    return {modules[name]: linear for name, linear in stored.items()}


def _block_tensors(
    plan: Plan, index: int, new: dict[str, LinearWeights], others: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, LinearWeights], dict[str, Tensor]]:
    """A finished block under its names in the checkpoint: compressed linears, and every other tensor as it was unless
    `others` has it, by its name in the model."""
    linears = {_exported(plan, module): linear for module, linear in new.items()}
    replaced = {plan.linears[module].source for module in new}
    changed = {plan.model.source_of(name): tensor for name, tensor in (others or {}).items()}
    names = [name for name in plan.model.source_names(index) if name not in replaced]
    tensors = {name: changed[name] if name in changed else plan.checkpoint.tensor(name) for name in names}
    return linears, {name: _stored(plan, tensor) for name, tensor in tensors.items()}


def _parameters(plan: Plan, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a finished block that are parameters of the model as they are, by their names there."""
    named = {source: target for source, (target, same) in plan.model.sources.items() if same}
    parameters = {f"{plan.model.blocks[index]}.{name}" for name, _ in plan.model.block(index).named_parameters()}
    return {named[name]: tensor for name, tensor in tensors.items() if named.get(name) in parameters}


def _layer_notes(block: int, linears: dict[str, LinearWeights], errors: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "module": module,
            "block": block,
            "shape": list(linear.shape),
            "bits": linear.bits,
            "pattern": linear.pattern,
            "group_size": linear.group_size,
            "sparsity": _sparsity(linear),
            "relative_error": errors.get(module),
        }
        for module, linear in linears.items()
        if linear.bits < 16 or linear.pattern != "dense"  # such a one is trained, but not compressed
    ]


def _sparsity(linear: LinearWeights) -> float:
    stored = linear.values if linear.codes is None else linear.codes
    assert stored is not None
    return round(float((stored == 0).float().mean()), 6)


def _metrics(plan: Plan, notes: _Notes, writer: CheckpointWriter, before: _Before) -> dict[str, Any]:
    found = [notes.read(index) for index in range(len(plan.model.blocks))]
    dense = plan.dense_modules()
    for note in found:
        dense |= note["skipped"]
    dense |= writer.dense_modules()
    whole = before.plan
    head = before.head if plan.head is None else notes.read_head()
    by_module = writer.linear_bytes()
    layers = [layer for note in found for layer in note["layers"]]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    linear_bytes = sum(by_module[_exported(plan, layer["module"])] for layer in layers)
    own = [plan.head.head.source] if plan.head is not None and not plan.head.head.tied else []
    dense_head_bytes = sum(plan.checkpoint.info(name).nbytes for name in own)
    dense_bytes = plan.dense_bytes()
    outside = dense_bytes - sum(plan.dense_linear_bytes(layer["module"]) for layer in layers) - dense_head_bytes
    if before.head is not None:
        dense_head_bytes = 0 if before.head["tied"] else 2 * before.head["shape"][0] * before.head["shape"][1]
        outside -= 2 * before.head["shape"][0] * before.head["shape"][1]
    calibration = plan.recipe.calibration
    return {
        "version": 1,
        "base_model": whole.checkpoint.spec,
        "recipe": whole.recipe.model_dump(mode="json"),
        "format": plan.recipe.export.format,
        "blocks": len(plan.model.blocks),
        "depth": before.depth,
        "calibration": {
            **calibration.model_dump(mode="json"),
            "tokens": calibration.samples * calibration.sequence_length if _reads_text(plan, whole) else 0,
            "computed_in": whole.compute.name if _reads_text(plan, whole) else None,
        },
        "layers": layers,
        "tuning": [note["tuning"] for note in found] if plan.recipe.tune is not None else None,
        "head": head,
        "dense_modules": [{"module": module, "reason": reason} for module, reason in dense.items()],
        "sizes": {
            "dense_bytes": whole.dense_bytes(),
            "compressed_bytes": sum(writer.tensor_bytes().values()),
            "outside_bytes": outside,
            "bits_per_weight": round(8 * linear_bytes / weights, 4) if weights else 16.0,
            "head_bytes": 0 if head is None else by_module[head["module"]],
            "dense_head_bytes": dense_head_bytes,
        },
        "training": [notes.read_training(number) for number in range(1, len(plan.training) + 1)],
        "evaluation": None,
    }


def _reads_text(plan: Plan, whole: Plan) -> bool:
    depth = whole.recipe.depth
    return plan.needs_data or (depth is not None and (depth.needs_data or whole.needs_data))


def _counted(reasons: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def json_text(value: Any) -> str:
    """What a JSON file of an output directory holds."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
