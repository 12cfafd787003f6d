"""Binding a recipe to a model: which linears there are, what each becomes, and what does not fit. Runs nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from sparsify.compiler.left_dense import none_held
from sparsify.compiler.merged import merged_with, merging_problem
from sparsify.compiler.plan import Plan, Planned, PlannedHead, floats_of_blocks
from sparsify.compiler.plan_experts import refuse_balancing, refuse_unlike, why_dense, why_not_compressed
from sparsify.compiler.plan_training import Shortened, plan_training
from sparsify.compiler.shorten import plan_depth
from sparsify.compiler.zeros import two_four_sources
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.foreign import DequantizedCheckpoint, open_dense, open_described_dense
from sparsify.formats.reader import CompressedCheckpoint, open_compressed
from sparsify.model.capture import fake_hidden
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import (
    ROUTER,
    ROUTES,
    BlockModel,
    find_blocks,
    meta_model,
    open_blocks,
    refuse_other_tensors,
    target_names,
)
from sparsify.model.experts import fused_experts, is_expert
from sparsify.model.linear_groups import skipped_by_shape
from sparsify.model.output_head import find_head
from sparsify.model.transposed import transposed_weights, unread_problem
from sparsify.recipe import Depth, LinearSettings, Recipe, override_problem, settings_of
from sparsify.recipe.llmcompressor.whole import SAVED
from sparsify.recipe.methods import KEEP, QUANTIZE, needs_of
from sparsify.solver.head_quantization import head_problem, head_scheme
from sparsify.solver.solve import Scheme

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def make_plan(
    recipe: Recipe, model: str, shortened: Shortened | None = None, served: bool = True, config_only: bool = False
) -> Plan:
    """Bind a recipe to a model. Raises RecipeError or CheckpointError when the two do not fit; runs nothing.

    shortened: what a depth pass left; the recipe is then what follows it
    served: the result is what is exported, and vLLM has to load it
    config_only: `model` is a config.json alone, or its directory (`open_described_dense`); such a plan cannot be run
    """
    if config_only and (recipe.whole or not recipe.compresses):
        raise RecipeError(
            "--config-only plans a recipe with prune or quantize: what this one does depends on the linears that the files "
            "hold compressed; plan it with them, without --config-only"
        )
    if recipe.whole:
        return _whole_plan(recipe, model)
    plan = _plan_linears(recipe, model, shortened if recipe.depth is None else None, served, config_only)
    plan.checkpoint.sidecar_files()  # a link out of the directory is better known now
    plan = keep_zeros(without_skipped(plan), whole=False)
    format = recipe.export.format
    stored = [name for name, planned in plan.linears.items() if planned.stored() is not None]
    unheld = plan.written_dense()
    if problem := none_held(format, unheld, stored, model) or get_format(format).together_problem(
        plan.stored_schemes(unheld)
    ):
        raise RecipeError(f"export.format: {problem}")
    if problem := unread_problem(sorted(transposed_weights(plan.model.model)), recipe.export.encoding):
        raise RecipeError(f"export.format: {problem}")
    if served and (problem := merging_problem(plan.linears, format)):
        raise RecipeError(problem)
    return plan if recipe.depth is None else replace(plan, depth=plan_depth(recipe.depth, plan.model))


def _whole_plan(recipe: Recipe, model: str) -> Plan:
    """The plan of a recipe that llm-compressor runs from end to end, which decides on each linear."""
    checkpoint = open_dense(model)
    opened = open_blocks(checkpoint)
    checkpoint.sidecar_files()
    return Plan(recipe, opened, {}, {}, DTYPES.get(recipe.export.dtype) or _storage_type(checkpoint))


def saved_plan(recipe: Recipe, directory: Path) -> Plan:
    """The plan of what is left of such a recipe: to write what llm-compressor saved in the export format.

    Raises CheckpointError where that cannot hold what llm-compressor left.
    """
    plan, format = _training_plan(recipe, str(directory), None), recipe.export.format
    if format == "dense":
        return plan
    opened = plan.checkpoint
    quantized = opened.quantization if isinstance(opened, DequantizedCheckpoint) else None
    if format == SAVED and quantized is not None:
        return plan
    problem = none_held(recipe.export.encoding, plan.written_dense(), plan.linears, "the model")
    if problem or not plan.linears or format == SAVED:
        raise CheckpointError(
            problem
            or f"llm-compressor left {quantized or 'a dense model'}, which {format} cannot hold; set export.format to "
            f"{SAVED if quantized is not None else 'dense'}"
        )
    return plan


def without_skipped(plan: Plan) -> Plan:
    """The plan without linears that a walk would skip for their shapes; CheckpointError where none is left."""
    if not plan.needs_data or plan.compressed is not None:
        return plan
    skipped = {name: why for name, why in skipped_by_shape(plan.model).items() if name in plan.schemes}
    linears = {
        name: replace(planned, scheme=None, asked=None, reason=skipped[name]) if name in skipped else planned
        for name, planned in plan.linears.items()
    }
    if plan.schemes and not plan.schemes.keys() - skipped.keys():
        raise CheckpointError(nothing_compressed(plan, skipped.values()))
    return replace(plan, linears=linears)


def nothing_compressed(plan: Plan, reasons: Iterable[str]) -> str:
    """The error of a run that could compress nothing."""
    return (
        f"none of the {len(plan.schemes)} linears of {plan.checkpoint.spec} that the recipe names can be compressed: "
        + ("; ".join(f"{why} ({count})" for why, count in Counter(reasons).most_common()))
    )


def keep_zeros(plan: Plan, whole: bool = True) -> Plan:
    """The plan in which linears that are 2:4 already keep their masks: existing zeros are never revived or chosen anew.

    whole: read the weights, as a run does before it begins; a plan looks at their first rows only
    Raises RecipeError for a linear that is not 2:4 although the recipe says `prune: {method: keep}`.
    """
    asked = {p.module: p for p in plan.linears.values() if p.asked is not None and p.reason is None}
    sources = {p.source for p in asked.values()}
    if plan.checkpoint.has_weights:
        found = two_four_sources(plan.checkpoint, sources, whole) if sources else set()
    else:  # no zeros are seen: the recipe is believed
        found = {p.source for p in asked.values() if p.asked is not None and p.asked.prune == KEEP}
    kept = {module for module, planned in asked.items() if planned.source in found}
    linears = dict(plan.linears)
    for module, planned in asked.items():
        scheme = planned.asked
        assert scheme is not None
        if module in kept:
            scheme = _kept(scheme, module, kept, plan)
        elif scheme.prune == KEEP:
            raise RecipeError(
                f"prune: {{method: keep}} keeps the zeros of linears that are 2:4 already, and {planned.source} of "
                f"{plan.checkpoint.spec} is not: some group of 4 inputs holds more than two non-zero weights; "
                "leave it out with an override or ignore, or prune it by another method"
            )
        linears[module] = replace(planned, scheme=scheme)
    return replace(plan, linears=linears)


def _stored_without_mask(module: str, kept: set[str], plan: Plan) -> bool:
    """Whether this linear is there and not stored as 2:4."""
    planned = plan.linears.get(module)
    return planned is not None and module not in kept and (planned.asked is None or planned.asked.prune is None)


def _kept(scheme: Scheme, module: str, kept: set[str], plan: Plan) -> Scheme:
    """What is asked of a linear that is 2:4 already, inside its mask."""
    needs = needs_of(KEEP, scheme.quantize)
    return replace(
        scheme,
        prune=KEEP,
        error_propagation=scheme.error_propagation if needs.data else 0.0,
        coordinate_descent=scheme.coordinate_descent if needs.sweep else 0,
        as_dense=scheme.prune is None and any(_stored_without_mask(other, kept, plan) for other in merged_with(module)),
    )


def _plan_linears(
    recipe: Recipe, model: str, shortened: Shortened | None, served: bool, config_only: bool = False
) -> Plan:
    """The plan without the depth pass: every linear of the model as it is."""
    if not recipe.compresses:
        return _training_plan(recipe, model, shortened)
    checkpoint = open_described_dense(model) if config_only else open_dense(model)
    store = DTYPES.get(recipe.export.dtype) or _storage_type(checkpoint)
    opened, linears, other = _open_linears(recipe, checkpoint, store, served and shortened is None)
    checkpoint = opened.checkpoint
    if shortened is None and (
        problem := override_problem(recipe, linears, model)
    ):  # a depth pass may remove what one names
        raise RecipeError(problem)
    refuse_unlike(recipe, linears)
    training = plan_training(recipe, checkpoint, shortened)
    plan = Plan(recipe, opened, linears, other, store, None, training)
    plan = replace(plan, head=_head(recipe, opened, store, calibrates=plan.needs_data))
    if not plan.schemes:
        reasons = sorted(set(plan.dense_modules().values()))
        raise RecipeError(f"the recipe changes no linear of {model}: {'; '.join(reasons) or 'it has none'}")
    refuse_balancing(recipe, plan)
    if plan.computes and not plan.needs_data:  # else `without_skipped` runs it so
        fake_hidden(opened)  # refuses a model that does not call its blocks one after another
    outside = {name for name in opened.source_names(None) if len(checkpoint.shape(name)) == 2}
    outside -= {plan.head.head.source} if plan.head is not None and not plan.head.head.tied else set()
    other |= {opened.sources[name][0].removesuffix(".weight"): "outside the decoder blocks" for name in sorted(outside)}
    return plan


def _open_linears(
    recipe: Recipe, checkpoint: Checkpoint, store: torch.dtype, whole: bool
) -> tuple[BlockModel, dict[str, Planned], dict[str, str]]:
    """The model of a checkpoint, its linears, and why other weights of its blocks stay as they are.

    Experts are taken apart where one of them is compressed. whole: this recipe makes what is exported of the whole model
    """
    why = why_not_compressed(recipe) if whole else "experts are compressed neither before nor after a depth pass"
    opened = open_blocks(checkpoint, separate=why is None)
    dense = why_dense(recipe, opened.checkpoint)
    linears, other = _linears_of(recipe, opened, store, dense)
    experts = [planned for name, planned in linears.items() if is_expert(name)]
    if experts and all(planned.scheme is None and planned.asked is None for planned in experts):
        why = experts[0].reason
        opened = open_blocks(checkpoint)
        linears, other = _linears_of(recipe, opened, store, dense)
    if why := why or opened.fused:
        fused = tuple(f"{path}." for path in fused_experts(opened.model))
        other |= {name: why for name in other if name.startswith(fused)}
    return opened, linears, other


def _linears_of(
    recipe: Recipe, opened: BlockModel, store: torch.dtype, dense: str | None
) -> tuple[dict[str, Planned], dict[str, str]]:
    """The linears of the blocks with what the recipe asks of them, and why other weights stay as they are.

    dense: why experts stay dense, None where they need not
    """
    linears: dict[str, Planned] = {}
    other: dict[str, str] = {}
    for index, block in enumerate(opened.blocks):
        for name, linear in opened.linears(index).items():
            module = f"{block}.{name}"
            shape = (linear.out_features, linear.in_features)
            source = opened.source_of(f"{module}.weight")
            if source is None:
                other[module] = "transformers assembles its weight from several tensors of the checkpoint"
                continue
            settings = settings_of(recipe, module)
            scheme = scheme_of(recipe, settings, store)
            reason = settings.dense if scheme is None else scheme.reason_dense(shape[1])
            if ROUTER.search(name):
                reason = ROUTES
            elif is_expert(module):
                reason = reason or dense
            asked = None if reason else scheme
            linears[module] = Planned(module, source, index, shape, asked, reason, asked=asked)
        for name in opened.other_parameters(index):
            other[f"{block}.{name}"] = _why_other(opened, f"{block}.{name}")
    return linears, other


def _why_other(opened: BlockModel, name: str) -> str:
    """Why a matrix that belongs to no plain linear stays as it is."""
    path = name.rpartition(".")[0]
    if ROUTER.search(path):
        return ROUTES
    if path.endswith("experts"):
        return (
            f"experts of the class {type(opened.model.get_submodule(path)).__name__} cannot be taken apart into linears"
        )
    return "not a plain linear"


def _training_plan(recipe: Recipe, model: str, shortened: Shortened | None) -> Plan:
    """The plan of a recipe without prune and quantize: the checkpoint is compressed already and is only trained.

    A dense one is served by depth alone; what trains it then trains all linears of its blocks, 16-bit as they are.
    """
    compressed = open_compressed(model) if recipe.export.format != SAVED else _as_saved(open_dense(model))
    checkpoint = compressed.checkpoint
    meta = meta_model(checkpoint, torch.float32)
    refuse_other_tensors(meta, checkpoint, compressed.dense_shapes())
    names = [*compressed.other_names(), *(f"{module}.weight" for module in compressed.modules)]
    opened = BlockModel(checkpoint, meta, find_blocks(meta), target_names(meta, names), torch.float32)
    depth = recipe.depth is not None or recipe.basis is not None or shortened is not None
    if depth and not compressed.modules:
        if recipe.basis is not None and recipe.export.format != "dense":
            raise RecipeError(
                f"basis alone leaves the linears of {model} dense: set export.format: dense, or add prune or quantize"
            )
        if recipe.depth is not None and not _may_be_dense(recipe.depth, recipe.export.format):
            raise RecipeError(
                f"nothing compresses the linears of {model}, so the result is dense: set export.format: dense, "
                "or add prune or quantize"
            )
        dense = _dense_linears(opened) if recipe.training else {}
        compressed = replace(compressed, modules=dense | _zero_linears(opened, recipe.export.format))
    linears = {}
    for module, scheme in compressed.modules.items():
        source = f"{module}.weight"
        target, same = opened.sources.get(source, (source, True))
        if (not same or is_expert(module)) and not recipe.whole:
            raise CheckpointError(
                f"{model} holds {module} compressed, which transformers puts together with others into one tensor, so it cannot "
                "be trained; start from the dense model"
            )
        if (block := opened.owner(target)) is not None:
            name = target.removesuffix(".weight") if same else module
            linears[name] = Planned(name, source, block, scheme.shape, None, None, scheme)
    if not linears and not depth and not recipe.whole:
        raise CheckpointError(
            f"{model} holds no compressed linear, and this recipe only trains; compress it first, for instance with "
            f"2of4, or write 2:4 zeros as such: sparsify export {model} --format sparse24"
        )
    outside = {name for name in compressed.other_names() if len(checkpoint.shape(name)) == 2}
    other = {
        name.removesuffix(".weight"): "outside the decoder blocks"
        if opened.owner(opened.sources[name][0]) is None
        else "dense"
        for name in sorted(outside)
        if name in opened.sources
    }
    store = DTYPES.get(recipe.export.dtype) or _storage_type(checkpoint)
    training = plan_training(recipe, checkpoint, shortened)
    return Plan(recipe, opened, linears, other, store, None, training, compressed)


def _as_saved(checkpoint: Checkpoint) -> CompressedCheckpoint:
    """A checkpoint of any scheme that stays as it is stored: its weights are not unpacked but where they are looked at."""
    quantized = checkpoint.modules if isinstance(checkpoint, DequantizedCheckpoint) else {}
    modules = {name: ModuleScheme(one.bits, one.group_size, "dense", one.shape) for name, one in quantized.items()}
    return CompressedCheckpoint(checkpoint, "dense", modules)


def _may_be_dense(depth: Depth, format: str) -> bool:
    """Whether a format can hold a model of which depth alone changes anything. In sparse24 the linears of removed sublayers
    are sparse linears without a single weight, which the runtime skips; there must be a chance of any."""
    halves = depth.method == "finercut" and depth.units == "sublayers"
    return format == "dense" or (format == "sparse24" and (halves or depth.replacement == "feed-forward"))


def _zero_linears(opened: BlockModel, format: str) -> dict[str, ModuleScheme]:
    """The linears of removed sublayers, by their names in the files, as modules of 2:4 values that are all zero."""
    if format != "sparse24":
        return {}
    return {
        module: replace(scheme, pattern="2:4")
        for module, scheme in _dense_linears(opened).items()
        if not opened.checkpoint.tensor(f"{module}.weight").any()
    }


def _dense_linears(opened: BlockModel) -> dict[str, ModuleScheme]:
    """The plain linears of a dense model's blocks as modules of 16 bits, by their names in the files."""
    found = {}
    for index, block in enumerate(opened.blocks):
        for name, linear in opened.linears(index).items():
            source = opened.source_of(f"{block}.{name}.weight")
            if source is not None and not ROUTER.search(name):
                shape = (linear.out_features, linear.in_features)
                found[source.removesuffix(".weight")] = ModuleScheme(16, shape[1], "dense", shape)
    return found


def _head(recipe: Recipe, opened: BlockModel, store: torch.dtype, calibrates: bool) -> PlannedHead | None:
    """What the recipe asks of the output head; RecipeError when this model's head cannot become it."""
    if recipe.export.head is None:
        return None
    head = find_head(opened.checkpoint, opened.model, opened.sources)
    planned = PlannedHead(head, head_scheme(recipe.export.head, store, calibrates))
    problem = head_problem(head.module, head.shape, planned.scheme)
    if problem or (problem := get_format(recipe.export.format).problem(planned.stored(), store)):
        raise RecipeError(f"export.head: {problem}")
    return planned


def _storage_type(checkpoint: Checkpoint) -> torch.dtype:
    """The 16-bit type of most numbers in the blocks; bfloat16 where there is none."""
    numbers: Counter[torch.dtype] = Counter()
    for info in floats_of_blocks(checkpoint):
        numbers[info.dtype] += math.prod(info.shape)
    return torch.float16 if numbers[torch.float16] > numbers[torch.bfloat16] else torch.bfloat16


def scheme_of(recipe: Recipe, settings: LinearSettings, store: torch.dtype) -> Scheme | None:
    """What is asked of one linear, as one scheme; None when it stays dense."""
    prune, quantize, solver = settings.prune, settings.quantize, recipe.solver
    if prune is None and quantize is None:
        return None
    needs = needs_of(prune.method if prune else None, quantize.method if quantize else None)
    return Scheme(
        prune=prune.method if prune else None,
        quantize=quantize.method if quantize else None,
        bits=quantize.bits if quantize else 16,
        group_size=0 if quantize is None or quantize.group_size == "channel" else quantize.group_size,
        damping=solver.damping,
        error_propagation=solver.error_propagation if needs.data else 0.0,
        activation_order=bool(quantize and quantize.activation_order and QUANTIZE[quantize.method].data),
        scale_search=bool(quantize is None or quantize.scale_search),
        symmetric=quantize is None or quantize.symmetric,
        coordinate_descent=solver.coordinate_descent if needs.sweep else 0,
        dtype=store,
    )
