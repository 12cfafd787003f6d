"""Compressing on calibration text: the tokens, the walk through the blocks, and what it calls at every group of linears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.compiler.arithmetic import summing
from sparsify.compiler.balance import chosen_rows, routed
from sparsify.compiler.checkpoint_names import OUTSIDE, block_parameters, block_tensors, by_module, part_name
from sparsify.compiler.memory import refuse_too_small, walk_memory
from sparsify.compiler.metrics import layer_notes
from sparsify.compiler.plan import Plan
from sparsify.compiler.run import Run
from sparsify.data.calibration import calibration_tokens
from sparsify.data.fitting import context_of, refuse_beyond
from sparsify.data.given import read_tokens, token_file
from sparsify.data.self_generated.generator import open_writer, writer_key
from sparsify.distributed import device, is_main, main_first, processes, rank
from sparsify.errors import CalibrationError, SparsifyError
from sparsify.files import cache_directory, in_memory
from sparsify.formats.tensor_file import LazyTensor, write_tensors
from sparsify.formats.writer import CheckpointWriter
from sparsify.manifest import keep
from sparsify.model.checkpoint import read_header
from sparsify.model.linear import LinearWeights
from sparsify.model.pretrained import tokenizer_for_text
from sparsify.model.sequential import BlockVisit, GroupVisit, Walk
from sparsify.native.build import build_ahead
from sparsify.phases import phase
from sparsify.progress import Task, progress_bar, say, stage
from sparsify.recipe import Calibration
from sparsify.solver.hessian import Statistics, accumulated
from sparsify.solver.shrinkage import expert_statistics
from sparsify.solver.solve import Scheme, solve_layer
from sparsify.training.block_tuning import BlockTuning, Sample, tune_block

CALIBRATION = "calibration.safetensors"
# what compressing on data computes with
KERNELS = ("cpu/gram", "cpu/alps", "cpu/column_sweep", "cpu/coordinate_descent", "cpu/softmax")


def calibration_rows(plan: Plan, writer: CheckpointWriter, quiet: bool) -> Tensor:
    """`kept_rows` in the work directory of a run that writes a checkpoint."""
    return kept_rows(plan, writer.work, quiet)


def kept_rows(plan: Plan, work: Path, quiet: bool) -> Tensor:
    """The calibration tokens [samples, sequence]; a resumed run uses those of the first one, whatever became of their source."""
    file = work / CALIBRATION
    if file.exists():
        read_header(file)
        from safetensors.torch import load_file

        return load_file(file)["tokens"]
    if (given := token_file(plan.recipe.calibration)) is not None:
        settings = plan.recipe.calibration.drawn
        tokens = read_tokens(given, settings.samples, settings.sequence_length)
        refuse_beyond(tokens, _embedding_rows(plan), None, str(given))
    else:
        tokens = text_rows(plan, plan.recipe.calibration.drawn, quiet)
    if plan.recipe.calibration.experts is not None:
        tokens = _balanced(plan, tokens, work, quiet)
    aside = file.with_suffix(".partial")
    keep(aside, file, write_tensors(aside, {"tokens": LazyTensor.of(tokens)}, {}))
    return tokens


def _balanced(plan: Plan, tokens: Tensor, work: Path, quiet: bool) -> Tensor:
    """Those of more rows that even out the tokens per expert; as many go through the dense model at once as are taken."""
    samples, memory = plan.recipe.calibration.samples, walk_memory(plan, plan.limits)
    spill = spill_directory(work) if memory.spills else None
    with stage(f"routing {len(tokens)} rows through the dense model, of which {samples} are taken", quiet):
        parts = [routed(plan.model, part, memory.place, memory.room, spill) for part in tokens.split(samples)]
    return tokens[chosen_rows(torch.cat(parts), samples)]


def _embedding_rows(plan: Plan) -> int:
    embedding: Any = plan.model.model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.num_embeddings)


def text_rows(plan: Plan, calibration: Calibration, quiet: bool) -> Tensor:
    """Rows of a text for the model of a plan, int64 [samples, sequence]; CalibrationError without a tokenizer."""
    dtype = plan.compute.dtype
    tokenizer = tokenizer_for_text(plan.checkpoint.directory, plan.checkpoint.spec)
    with phase("calibration text", whole=True):
        return calibration_tokens(
            calibration,
            tokenizer,
            lambda: open_writer(plan.checkpoint.loadable_directory(), dtype),
            cache_dir=cache_directory() / "calibration",
            key=lambda: writer_key(plan.checkpoint, dtype),
            quiet=quiet,
            vocabulary=_embedding_rows(plan),
        )


def compress_on_data(run: Run) -> None:
    """Compress on calibration data, block by block, one forward pass in all; then the head, where that needs data."""
    plan, writer, finished = run.plan, run.writer, run.finished
    blocks = plan.model.blocks
    head = plan.head if plan.head is not None and plan.head.scheme.needs_data and OUTSIDE not in finished else None
    if head is None and all(part_name(index) in finished for index in range(len(blocks))):
        return
    with main_first():
        tokens = own_rows(calibration_rows(plan, writer, run.quiet))
    memory = walk_memory(plan, plan.limits)
    if (problem := refuse_too_small(memory, plan.limits)) is not None:
        say(f"{problem}; going on all the same", run.quiet)
    elif memory.spills or memory.room is not None:
        say(memory.describe(), run.quiet)
    folder = spill_directory(writer.work) if memory.spills else None
    build_ahead(KERNELS)
    fitting = partial(_within_positions, plan, tokens.shape[1])
    with stage("calibration text through the embeddings"), fitting():
        walk = Walk(
            plan.model, tokens, plan.needs_dense_reference, folder, device(),
            place=memory.place, room=memory.room, keeps_outside=False, dense_outputs=True,
        )  # fmt: skip
    with summing(), progress_bar("compressing", len(blocks) + (head is not None), quiet=run.quiet) as bar:
        for index, block in enumerate(blocks):
            if part_name(index) in finished:
                bar.describe(f"resuming through {block}")
                linears, tensors = writer.read_part(part_name(index))
                tuned = block_parameters(plan, index, tensors) if plan.recipe.tune is not None else {}
                walk.replay(index, by_module(plan, linears), tuned)  # else as they were, not as they are stored
                bar.advance()
                continue
            rewriting = _Rewriting(plan, bar)
            tuning = _Tuning(plan, bar) if plan.recipe.tune is not None else None
            with _naming(block), fitting():
                result = walk.visit(index, lambda name: name in plan.schemes, rewriting, tuning)
            if is_main():
                gained = tuning.note if tuning is not None else None
                layers = layer_notes(index, result.linears, rewriting.errors, rewriting.experts)
                run.notes.write(index, layers, result.skipped, gained)
                writer.write_part(part_name(index), *block_tensors(plan, index, result.linears, result.others))
            bar.describe(block)
            bar.advance()
        if head is not None:
            bar.describe(head.head.module)
            solved = run.solve_head(head, accumulated((x, None) for x in walk.head_inputs()).H)
            if is_main():
                run.write_outside(solved)
            bar.advance()


def spill_directory(work: Path) -> Path:
    """Where this process keeps its hidden states. SparsifyError where that would be memory again."""
    folder = work / f"activations-{rank()}"
    if in_memory(work):
        raise SparsifyError(
            f"{folder} lies in memory (tmpfs), so that keeping hidden states there saves none; put --output on a disk, or "
            "leave --spill out and raise --memory"
        )
    folder.mkdir(exist_ok=True)
    return folder


def own_rows(tokens: Tensor) -> Tensor:
    """Of several processes each takes every nth row. tokens: [samples, sequence]."""
    if tokens.shape[0] < processes():
        raise SparsifyError(
            f"{tokens.shape[0]} calibration samples cannot be shared by {processes()} processes; "
            "raise calibration.samples or start fewer"
        )
    return tokens[rank() :: processes()]


class _Rewriting:
    """What the walk calls at every group: accumulate the statistics, solve, remember the errors."""

    def __init__(self, plan: Plan, bar: Task):
        self.plan = plan
        self.bar = bar
        self.errors: dict[str, float] = {}
        self.experts: dict[str, dict[str, Any]] = {}

    def __call__(self, visit: GroupVisit) -> dict[str, LinearWeights]:
        self.bar.describe(f"{visit.names[0]}{' ...' if len(visit.names) > 1 else ''}")
        statistics = self._statistics(visit)
        new: dict[str, LinearWeights] = {}
        for scheme, weights in self._by_scheme(visit).items():
            part, errors = solve_layer(weights, scheme, statistics, together=True)
            new |= part
            self.errors |= errors
        return new

    def _statistics(self, visit: GroupVisit) -> Statistics:
        """What the tokens say; of an expert with its number of tokens, which is noted."""
        if visit.layer is None:
            return accumulated(visit.batches, visit.outputs)
        found = expert_statistics(visit.batches, visit.layer)
        note = {"tokens": found.tokens, "shrinkage": round(found.shrinkage, 4)}
        self.experts |= dict.fromkeys(visit.names, note)
        return found.statistics

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
        sources = {prefix + name: self.plan.model.source_of(prefix + name) for name in tuned.others}
        kept = {
            prefix + name: tensor.to(self.plan.stored_dtype(source))
            for name, tensor in tuned.others.items()
            if (source := sources[prefix + name]) is not None
        }
        return {prefix + name: linear for name, linear in tuned.linears.items()}, kept


@contextmanager
def _within_positions(plan: Plan, length: int) -> Iterator[None]:
    """Say that a sequence is longer than the model's table of positions where that ends a run; rotary positions have none."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        limit = context_of(plan.model.model.config)
        if limit is None or length <= limit:
            raise
        raise CalibrationError(
            f"{plan.checkpoint.spec} has positions for {limit} tokens, and calibration.sequence_length is {length}; "
            f"set it to {limit} or less"
        ) from error


@contextmanager
def _naming(block: str) -> Iterator[None]:
    """Say in which block a run failed when the error does not."""
    try:
        yield
    except SparsifyError as error:
        if block in str(error):
            raise
        raise type(error)(f"{block}: {error}") from None
