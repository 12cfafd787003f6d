"""A plan as a table for people: what becomes of each kind of linear, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.compiler.estimate import Estimate, bits_per_weight, time_in_words, training_in_words
from sparsify.compiler.memory import in_words
from sparsify.compiler.plan_described import described_in_words
from sparsify.compiler.plan_experts import experts_in_words
from sparsify.formats.foreign import source_in_words
from sparsify.recipe.llmcompressor.whole import REMOVED, SAVED, leaves_zeros, names_of, needs_older
from sparsify.recipe.sources import sources_in_words
from sparsify.units import size

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan

EXPERT = re.compile(r"\bexperts\.\d+\.")
MANY_CARRIED = 6  # kinds of unknown tensors that a table names


def plan_table(plan: Plan) -> Table:
    """One row per kind of linear and one for the output head, costs below."""
    if plan.recipe.whole:
        return _whole_table(plan)
    cost = plan.cost
    ratio = cost.dense_bytes / max(cost.output_bytes, 1)
    table = Table(title=escape(f"{plan.checkpoint.spec}: {len(plan.model.blocks)} blocks"), caption_justify="left")
    for column in ("linear", "shape", "blocks", "becomes"):
        table.add_column(column, justify="right" if column in ("shape", "blocks") else "left")
    kinds: dict[tuple[str, tuple[int, int], str], tuple[int, set[int]]] = {}
    unheld = plan.written_dense()
    for name, planned in plan.linears.items():
        inside = name.removeprefix(plan.model.blocks[planned.block] + ".")
        what = planned.describe() + (f"; written dense: {unheld[name]}" if name in unheld else "")
        inside = EXPERT.sub(r"experts.*.", inside)
        count, blocks = kinds.get((inside, planned.shape, what), (0, set()))
        kinds[inside, planned.shape, what] = (count + 1, blocks | {planned.block})
    for (inside, shape, what), (count, blocks) in kinds.items():
        each = f" x {count / len(blocks):g} experts" if count > len(blocks) else ""
        table.add_row(Text(inside), f"{shape[0]} x {shape[1]}", f"{len(blocks)}{each}", Text(what))
    if plan.head is not None:
        n, k = plan.head.head.shape
        table.add_row(Text(plan.head.head.module), f"{n} x {k}", "", plan.head.describe())
    calibration = plan.recipe.calibration.model_dump()
    how = (
        f"calibration on {sources_in_words(calibration)}\none walk over the blocks"
        + (" beside the dense model" if plan.needs_dense_reference else "")
        if plan.needs_data
        else "no walk: data-free"
    )
    if plan.compressed is not None:
        how = "no linear is compressed" if plan.is_dense else "compressed already, masks stay as they are"
    if plan.recipe.basis is not None:
        how = f"first {plan.recipe.basis.describe()}\n{how}"
    if plan.depth is not None:
        how = f"{plan.depth.describe()}\n{how}" if plan.depth_first else f"{how}\nthen {plan.depth.describe()}"
    if plan.recipe.llm_compressor:
        text = f", on {sources_in_words(calibration)}" if plan.reads_text else ""
        how = f"first, in llm-compressor{text}: {', '.join(names_of(plan.recipe.llm_compressor))}\n{how}"
    table.caption = escape(
        f"{how}; {cost.dense_bytes / 1e6:.0f} MB become {cost.output_bytes / 1e6:.0f} MB ({ratio:.2f} times smaller), "
        f"the linears {bits_per_weight(plan):.3g} bits per weight\n"
        f"memory about {cost.memory_bytes / 1e9:.1f} GB"
        + (f", {time_in_words(cost.operations, plan.compute.dtype)}" if cost.operations else "")
        + _memory_in_words(cost)
        + (f"\n{plan.compute.describe()}" if plan.computes else "")
        + (f"\nthe source is {source_in_words(source)}" if (source := plan.source_json()) else "")
        + (f"\n{carried_in_words(carried)}" if (carried := plan.carried_json()) else "")
        + (f"\nstays wider than 16 bits: {kinds_in_words(wide)}" if (wide := plan.kept_wide()) else "")
        + (
            f"\nleft behind, as an adapter or what looks like a credential: {', '.join(behind)}"
            if (behind := plan.left_behind())
            else ""
        )
        + "".join(f"\n{said}" for said in (*described_in_words(plan), *experts_in_words(plan)))
        + "".join(
            f"\nthen {training_in_words(plan, planned)}" + "".join(f"\n{line}" for line in found.describe())
            for planned, found in zip(plan.training, cost.training, strict=True)
        )
        + "".join(f"\n{said}" for said in plan.repeats)
    )
    return table


def _whole_table(plan: Plan) -> Table:
    """Of a recipe that llm-compressor runs: which linears it changes, and how, is for llm-compressor to say."""
    entries, format = plan.recipe.llm_compressor or [], plan.recipe.export.format
    table = Table(title=escape(f"{plan.checkpoint.spec}: {len(plan.model.blocks)} blocks"), caption_justify="left")
    table.add_column("in llm-compressor, in this order")
    for name in names_of(entries):
        table.add_row(name)
    said = ["llm-compressor runs all of this recipe, in an environment of its own"]
    said += [f"calibration on {sources_in_words(plan.recipe.calibration.model_dump())}"] if plan.reads_text else []
    said += [f"{REMOVED} needs llm-compressor 0.13: 0.14 has it no more"] if needs_older(entries) else []
    said += ["its zeros have no pattern: no kernel makes them smaller or faster"] if leaves_zeros(entries) else []
    said += [f"written as {format}, as llm-compressor saves it" if format == SAVED else f"written as {format}"]
    said += [f"the source is {source_in_words(source)}"] if (source := plan.source_json()) else []
    table.caption = escape("\n".join(said))
    return table


def _memory_in_words(cost: Estimate) -> str:
    """Lines on the memory of a walk by item, where hidden states lie, what is on the disk, and what does not fit."""
    walk = cost.memory
    if walk is None:
        return ""
    lines = [f"memory of the walk {size(walk.peak)}: {in_words(walk.host)}"]
    lines += [f"of the GPU {size(sum(walk.gpu.values()))}: {in_words(walk.gpu)}"] if walk.gpu else []
    lines += [f"{walk.describe()}; disk: {in_words(walk.disk)}"]
    lines += [f"does not fit: {problem}"] if (problem := walk.problem()) else []
    if walk.budget is not None and cost.writing_bytes > walk.budget:
        lines.append(
            f"does not fit: the whole model writes the calibration text, {size(cost.writing_bytes)} of memory; "
            "with --set calibration.source=file:TEXT it is read instead"
        )
    return "".join(f"\n{line}" for line in lines)


def carried_in_words(carried: Mapping[str, Any]) -> str:
    """`carried over as they are: 11 tensors (2.1 MB) unknown to LlamaForCausalLM: model.layers.2.*`"""
    kinds = [re.sub(r"^((?:.*?\.)?\d+\.).*", r"\1*", name) for name in carried["tensors"]]
    size = f"({carried['bytes'] / 1e6:.1f} MB) {carried['reason']}"
    return f"carried over as stored: {_counted(kinds, size)}"


def kinds_in_words(names: Sequence[str]) -> str:
    """`12 tensors: model.layers.*.mlp.gate.e_score_correction_bias`"""
    return _counted([re.sub(r"\.\d+(?=\.)", ".*", name) for name in names])


def _counted(kinds: Sequence[str], more: str = "") -> str:
    """How many tensors, and what kinds of them there are."""
    different = [*dict.fromkeys(kinds)]
    shown = ", ".join(different[:MANY_CARRIED]) + (", ..." if len(different) > MANY_CARRIED else "")
    return f"{len(kinds)} tensor{'s' if len(kinds) > 1 else ''}{' ' * bool(more)}{more}: {shown}"
