"""One run of a plan, and the steps of it that need no calibration text: taking over, rounding, what lies outside the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsify.compiler.checkpoint_names import (
    OUTSIDE,
    block_tensors,
    by_module,
    exported_name,
    in_store,
    part_name,
    stored,
)
from sparsify.compiler.metrics import Before, Notes, layer_notes, saved_notes
from sparsify.compiler.model_card import head_note
from sparsify.compiler.plan import Plan, PlannedHead
from sparsify.compiler.planning import nothing_compressed
from sparsify.compiler.run_training import train_stage
from sparsify.errors import CheckpointError
from sparsify.formats.foreign import DequantizedCheckpoint
from sparsify.formats.reader import CompressedCheckpoint
from sparsify.formats.writer import CheckpointWriter
from sparsify.memory import Peak
from sparsify.model.linear import LinearWeights
from sparsify.phases import phase
from sparsify.progress import progress, progress_bar
from sparsify.recipe.llmcompressor.whole import SAVED
from sparsify.solver.head_quantization import SolvedHead, solve_head
from sparsify.solver.solve import solve_layer


@dataclass(frozen=True)
class Run:
    """A plan that is being carried out.

    plan:     what is to be done, on the shortened model where a depth pass came first
    writer:   of the output directory; notes: of what becomes of each block
    finished: parts that an interrupted run had written before
    before:   what a depth pass left behind
    peak:     samples of the memory that this process takes
    """

    plan: Plan
    writer: CheckpointWriter
    notes: Notes
    finished: frozenset[str]
    before: Before
    quiet: bool = False
    peak: Peak = field(default_factory=Peak)

    def refuse_nothing_done(self) -> None:
        """CheckpointError, and no output, when not one linear of the blocks could become what the recipe asks of it."""
        plan = self.plan
        found = [self.notes.read(index) for index in range(len(plan.model.blocks))]
        unpacked = self.writer.dense_modules()
        done = [layer["module"] for note in found for layer in note["layers"]]
        if any(exported_name(plan, module) not in unpacked for module in done):
            return
        reasons = [why for note in found for module, why in note["skipped"].items() if module in plan.schemes]
        reasons += unpacked.values()
        self.writer.discard()
        raise CheckpointError(nothing_compressed(plan, reasons))

    def take_over(self, compressed: CompressedCheckpoint) -> None:
        """Take over a checkpoint that is compressed already, block by block, as compressing it would have left it."""
        plan = self.plan
        if plan.recipe.export.format == SAVED:
            return self._take_over_saved(compressed)
        owners = {name: plan.model.owner(target) for name, (target, _) in plan.model.sources.items()}
        for index in progress([*range(len(plan.model.blocks)), None], "taking over"):
            part = OUTSIDE if index is None else part_name(index)
            if part in self.finished:
                continue
            mine = {name for name, owner in owners.items() if owner == index}
            linears = {m: in_store(plan, m, compressed.linear(m)) for m in compressed.modules if f"{m}.weight" in mine}
            biases = {f"{module}.bias" for module, linear in linears.items() if linear.bias is not None}
            plain = [name for name in compressed.other_names() if name in mine and name not in biases]
            if index is not None:
                self.notes.write(index, layer_notes(index, by_module(plan, linears), self.before.errors), {})
            tensors = {name: stored(plan, name, compressed.tensor(name)) for name in plain}
            if index is None:
                tensors |= {name: compressed.tensor(name) for name in plan.carried() if name not in biases}
            self.writer.write_part(part, linears, tensors)

    def _take_over_saved(self, compressed: CompressedCheckpoint) -> None:
        """Take over every tensor as llm-compressor saved it."""
        plan, opened = self.plan, compressed.checkpoint
        assert isinstance(opened, DequantizedCheckpoint)
        owners = {name: plan.model.owner(target) for name, (target, _) in plan.model.sources.items()}
        parts: dict[int | None, list[str]] = {index: [] for index in [*range(len(plan.model.blocks)), None]}
        for name in opened.stored.names():
            weight = f"{name.rpartition('.')[0]}.weight"
            parts[owners.get(name if name in owners else weight)].append(name)
        for index, names in progress(parts.items(), "taking over", total=len(parts)):
            part = OUTSIDE if index is None else part_name(index)
            if part not in self.finished:
                if index is not None:
                    self.notes.write(index, saved_notes(plan, index), {})
                self.writer.write_part(part, {}, {name: opened.stored.tensor(name) for name in names})

    def train(self) -> None:
        """The training passes, each on what the one before left. Notes of the layers follow the weights."""
        plan, notes = self.plan, self.notes
        for number, planned in enumerate(plan.training, 1):
            if self.writer.stage >= number:
                continue

            def conclude(summary: dict[str, Any], linears: dict[str, LinearWeights], number: int = number) -> None:
                trained = by_module(plan, linears)
                for index in range(len(plan.model.blocks)):
                    note = notes.read(index)
                    errors = {layer["module"]: layer["relative_error"] for layer in note["layers"]}
                    mine = {layer["module"]: trained[layer["module"]] for layer in note["layers"]}
                    notes.write_layers(index, layer_notes(index, mine, errors))
                notes.write_training(number, summary)

            with phase(planned.settings.kind, whole=True):
                train_stage(
                    number, planned, plan.checkpoint, plan.recipe.calibration, self.writer, conclude, self.quiet
                )

    def compress_without_data(self) -> None:
        """Each weight is read, rewritten and stored; the model never runs."""
        plan = self.plan
        with progress_bar("compressing", len(plan.model.blocks), quiet=self.quiet) as bar:
            for index in range(len(plan.model.blocks)):
                if part_name(index) not in self.finished:
                    new: dict[str, LinearWeights] = {}
                    for name, scheme in plan.schemes.items():
                        planned = plan.linears[name]
                        if planned.block == index:
                            new |= solve_layer({name: plan.checkpoint.tensor(planned.source)}, scheme, None)[0]
                    self.notes.write(index, layer_notes(index, new, {}), {})
                    self.writer.write_part(part_name(index), *block_tensors(plan, index, new))
                bar.describe(plan.model.blocks[index])
                bar.advance()

    def solve_head(self, planned: PlannedHead, H: Tensor | None = None) -> SolvedHead:
        """The output head as the recipe asks for it. H: as `head_quantization.solve_head` takes it."""
        weight = self.plan.checkpoint.tensor(planned.head.source)
        return solve_head(planned.head.module, weight, planned.scheme, H)

    def write_outside(self, solved: SolvedHead | None) -> None:
        """What lies outside of the blocks, as it was, and the output head where it is quantized."""
        plan = self.plan
        names = plan.model.source_names(None)
        linears: dict[str, LinearWeights] = {}
        if plan.head is not None and solved is not None:
            head = plan.head.head
            linears[head.module] = solved.linear
            self.notes.write_head(head_note(head, solved))
            names = [name for name in names if head.tied or name != head.source]
        tensors = {name: stored(plan, name, plan.checkpoint.tensor(name)) for name in names}
        tensors |= {name: plan.checkpoint.tensor(name) for name in plan.carried()}
        self.writer.write_part(OUTSIDE, linears, tensors)
