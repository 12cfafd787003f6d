"""From one checkpoint format to another, block by block; codes are carried over, never quantized again.

An output head that is still dense can be quantized on the way.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from sparsify.compiler.left_dense import none_held, some_not_held
from sparsify.compiler.metrics import ADAPTER, CARD, METRICS, RECIPE, json_text
from sparsify.compiler.model_card import head_note, model_card
from sparsify.compiler.plan_experts import experts_problem
from sparsify.compute import choose
from sparsify.data.calibration import calibration_tokens, check_sources
from sparsify.data.fitting import vocabulary_of
from sparsify.data.self_generated.generator import open_writer, writer_key
from sparsify.errors import CheckpointError, RecipeError
from sparsify.files import cache_directory, read_json
from sparsify.formats import ModuleScheme, get_format, written_formats
from sparsify.formats.belonging import compare_with_config
from sparsify.formats.reader import CompressedCheckpoint, natural, open_compressed
from sparsify.formats.scheme import FLOATS, finite, in_block
from sparsify.formats.writer import CheckpointWriter, partial_directory
from sparsify.lock import only_run
from sparsify.model.capture import head_input
from sparsify.model.linear import LinearWeights, is_two_four
from sparsify.model.output_head import OutputHead, find_head
from sparsify.model.pretrained import load_tokenizer
from sparsify.model.sequential import rows_of_micro_batch
from sparsify.model.sidecars import inside
from sparsify.model.transposed import unread_problem
from sparsify.progress import progress, quietly, say, stage
from sparsify.recipe import Calibration, Head, dump_recipe, head_format_problem, parse_recipe
from sparsify.solver.head_quantization import SolvedHead, head_problem, head_scheme, solve_head
from sparsify.solver.hessian import HessianAccumulator
from sparsify.solver.solve import Scheme

DEFAULT_GROUP_SIZE = 64
CARRIED = (CARD, RECIPE, METRICS)
IDENTITY = "export of "


@dataclass(frozen=True)
class RoundedHead:
    """An output head that an export quantized. dense_nbytes: of the weight it replaces, 0 when it was tied."""

    head: OutputHead
    solved: SolvedHead
    dense_nbytes: int


@dataclass(frozen=True)
class Exported:
    """A finished export. dense_modules: linears that the format could not hold and that were written dense, and why."""

    output: Path
    format: str
    dense_modules: dict[str, str]


def export(source: str | Path, format: str, output: str | Path, *settings: Any, **named: Any) -> Path:
    """As `exported`; returns the directory."""
    return exported(source, format, output, *settings, **named).output


def exported(
    source: str | Path,
    format: str,
    output: str | Path,
    head_bits: Literal[4, 8, 16] | None = None,
    head_group_size: str | None = None,
    quiet: bool = False,
    calibration: str | None = None,
) -> Exported:
    """Write `source` in `format`, with its output head quantized to `head_bits`, or with 16 dequantized.

    head_group_size: "32", "64" (default), "128" or "channel"
    calibration: self, file:PATH or hub:ID; the head is then solved by GPTQ on what it reads of 128 x 512 tokens, and
    rounded to nearest without
    """
    if calibration is not None and head_bits not in (4, 8):
        raise CheckpointError("--calibration is the text on which a head is quantized; add --head 4")
    if head_bits is None or head_bits == 16:
        if head_group_size is not None:
            raise CheckpointError("--head-group-size says how to quantize the head; add --head 8 or --head 4")
        return convert(source, format, output, dense_head=head_bits == 16, quiet=quiet)
    size = head_group_size or str(DEFAULT_GROUP_SIZE)
    try:
        group_size: Any = int(size) if size.isdecimal() else size
        method: Any = "gptq" if calibration else "rtn" if head_bits == 4 else None
        head = Head(bits=head_bits, group_size=group_size, method=method)
    except ValueError:  # of pydantic, or a number of too many digits
        raise CheckpointError(
            f"--head {head_bits} --head-group-size {size[:100]}: bits must be 4 or 8, the group size 32, 64, 128 or channel"
        ) from None
    return convert(source, format, output, head, None if calibration is None else _text(calibration), quiet=quiet)


def _text(source: str) -> Calibration:
    try:
        calibration = Calibration(source=source)
    except ValidationError as error:
        raise CheckpointError(f"--calibration {source}: {error.errors()[0]['msg']}") from None
    check_sources(calibration)
    return calibration


@quietly
def convert(
    source: str | Path,
    format: str,
    output: str | Path,
    head: Head | None = None,
    calibration: Calibration | None = None,
    *,
    dense_head: bool = False,
    quiet: bool = False,
) -> Exported:
    """Write `source` (a checkpoint of any known format, or any dense model) to the directory `output` in `format`.

    A dense source can become sparse24 only when every linear in its blocks is 2:4 already (16-bit values).
    head: quantize the output head on the way; it must not be compressed yet.
    calibration: text on which the head is solved by GPTQ; without it the head is rounded to nearest.
    dense_head: dequantize what is compressed outside of the blocks, for software that wants a 16-bit head.
    """
    if not get_format(format).written:
        raise CheckpointError(
            f"sparsify reads {format} and does not write it; it writes {', '.join(written_formats())}"
        )
    with only_run(output):
        opened = open_compressed(source)
        compare_with_config(opened)
        linears = _linears(opened, format, output)
        unheld = _not_held(opened, format, linears)
        for said in some_not_held(format, unheld):
            say(said, quiet)
        transposed = opened.checkpoint.stored_transposed([f"{module}.weight" for module in sorted(linears)])
        if problem := experts_problem(opened, format, linears) or unread_problem(transposed, format):
            raise CheckpointError(problem)
        beside = _beside(opened.directory)
        asked = None if head is None else _asked(opened, format, head)
        held = {m: s for m, s in opened.modules.items() if m not in unheld and not (dense_head and not in_block(m))}
        if asked is not None:
            held[asked[0].module] = _stored_head(*asked)
        if problem := get_format(format).together_problem(held):
            raise CheckpointError(f"{opened.checkpoint.spec}: {problem}")
        work = partial_directory(Path(output))
        begun = (work / "writer.json").is_file() and not Path(output).exists()
        identity = f"{IDENTITY}{opened.directory.resolve()}"
        if begun:
            _remove_begun(work, format, identity)
        writer = CheckpointWriter(output, format, opened.checkpoint, identity=identity)
        try:
            plain = {f"{module}.weight" for module in linears} if not opened.modules else set()
            rounded = None if asked is None else _write_head(writer, opened, *asked, source, calibration, quiet)
            if rounded is not None and not rounded.head.tied:
                plain |= {rounded.head.source}
            if dense_head:
                for module in [module for module in opened.modules if not in_block(module)]:
                    linears.discard(module)
                    linear = opened.linear(module)
                    writer.write_part(f"head.{module}", {}, _tensors(module, get_format("dense").encode(linear)))
            parts = _parts([*linears, *(name for name in opened.other_names() if name not in plain)])
            for part, names in progress(parts.items(), f"Exporting to {format}", total=len(parts), quiet=quiet):
                chosen = {name: _linear(opened, name) for name in names if name in linears}
                biases = {f"{module}.bias" for module, linear in chosen.items() if linear.bias is not None}
                others = [name for name in names if name not in linears and name not in biases]
                writer.write_part(part, chosen, {name: finite(name, opened.tensor(name)) for name in others})
            carried = {name: file.read_bytes() for name, file in beside.items()}
            if rounded is not None and head is not None:
                carried = _with_head(head, format, carried, rounded, writer)
            dense = writer.dense_modules()
            with stage(f"writing {output}"):
                return Exported(writer.finish({}, carried), format, dense)
        except BaseException:
            writer.discard()
            raise


def _remove_begun(work: Path, format: str, identity: str) -> None:
    """Remove what is left of the same export, which is short enough to begin again; CheckpointError for another export."""
    record = read_json(work / "writer.json")
    found = record.get("identity") if isinstance(record, dict) else None
    if not isinstance(found, str) or not found.startswith(IDENTITY):
        return  # of a run that compresses, which the writer refuses
    if (record.get("format"), found) != (format, identity):
        raise CheckpointError(
            f"{work} is of an interrupted export of another model or to another format; remove it, or choose another output"
        )
    shutil.rmtree(work)


def _beside(directory: Path) -> dict[str, Path]:
    """What `apply` wrote beside the weights and still belongs to them: its papers, and the adapter of the lora pass."""
    names = [*CARRIED, *(f"{ADAPTER}/{file.name}" for file in sorted((directory / ADAPTER).glob("*")))]
    return {name: inside(directory, name) for name in names if (directory / name).is_file()}


def _asked(opened: CompressedCheckpoint, format: str, head: Head) -> tuple[OutputHead, Scheme]:
    """The head of `opened` and what it is to become; CheckpointError when it cannot."""
    if problem := head_format_problem(format):
        raise CheckpointError(problem)
    outside = [module for module in opened.modules if not in_block(module)]
    if outside:
        raise CheckpointError(
            f"{opened.checkpoint.spec}: {outside[0]} is compressed already ({opened.modules[outside[0]].bits} bits); "
            "leave the head out of this export, or start from a checkpoint whose head is dense"
        )
    found = find_head(opened.checkpoint)
    store = opened.checkpoint.dtype(found.source)
    scheme = head_scheme(head, store if store in FLOATS else torch.bfloat16)
    stored = _stored_head(found, scheme)
    problem = head_problem(found.module, found.shape, scheme) or get_format(format).problem(stored, scheme.dtype)
    if problem:
        raise CheckpointError(f"{opened.checkpoint.spec}: {problem}")
    return found, scheme


def _stored_head(head: OutputHead, scheme: Scheme) -> ModuleScheme:
    return ModuleScheme(scheme.bits, scheme.group_size or head.shape[1], "dense", head.shape, scheme.symmetric)


def _write_head(
    writer: CheckpointWriter,
    opened: CompressedCheckpoint,
    head: OutputHead,
    scheme: Scheme,
    source: str | Path,
    calibration: Calibration | None,
    quiet: bool,
) -> RoundedHead:
    weight = opened.tensor(head.source)
    H = None if calibration is None else _read_by_head(source, calibration, quiet)
    with stage(f"quantizing {head.module}"):
        solved = solve_head(head.module, weight, scheme, H)
    writer.write_part(f"head.{head.module}", {head.module: solved.linear}, {})
    return RoundedHead(head, solved, 0 if head.tied else weight.nbytes)


def _tensors(module: str, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{suffix}": tensor for suffix, tensor in encoded.items()}


def _linears(opened: CompressedCheckpoint, format: str, output: str | Path) -> set[str]:
    """The modules to write as compressed linears; CheckpointError when `format` needs what the source has not."""
    spec = opened.checkpoint.spec
    if format == "dense":
        return set(opened.modules)
    if opened.modules:
        bare = [module for module, scheme in opened.modules.items() if scheme.bits == 16]
        if bare and format != "sparse24":
            raise CheckpointError(
                f"{spec} has no codes for {len(bare)} linears (first: {bare[0]}), which {format} needs; "
                "export it to dense, or apply a recipe that quantizes, such as 2of4-w4a16"
            )
        return set(opened.modules)
    if format != "sparse24":
        raise CheckpointError(
            f"{spec} is dense and has no codes, which {format} needs; make them with: "
            f"sparsify apply w4a16 --model {spec} --set export.format={format} --output {output}"
        )
    return _two_four_linears(opened, output)


def _not_held(opened: CompressedCheckpoint, format: str, linears: set[str]) -> dict[str, str]:
    """The linears that `format` cannot hold, and why; CheckpointError when it can hold none of those in the blocks.

    Reads weights only where a number of theirs decides.
    """
    target, reasons = get_format(format), {}
    for module in sorted(linears, key=natural):
        if module in opened.modules:
            scheme, dtype = opened.modules[module], opened.dtype(module)
        else:
            shape = opened.checkpoint.shape(f"{module}.weight")
            scheme = ModuleScheme(16, shape[1], "2:4", (shape[0], shape[1]))
            dtype = opened.checkpoint.dtype(f"{module}.weight")
        if not get_format(opened.format).records_pattern:
            scheme = replace(scheme, pattern="2:4")  # it may be so, which only its codes tell
        problem = target.problem(scheme, dtype)
        if problem is None and target.depends_on_numbers:
            problem = target.supports(_linear(opened, module))
        if problem:
            reasons[module] = problem
    inside = [module for module in linears if in_block(module)] or linears
    if problem := none_held(format, reasons, inside, opened.checkpoint.spec):
        raise CheckpointError(problem)
    return reasons


def _two_four_linears(opened: CompressedCheckpoint, output: str | Path) -> set[str]:
    checkpoint, spec = opened.checkpoint, opened.checkpoint.spec
    names = [name for name in opened.other_names() if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
    modules = [module for name in names if in_block(module := name.removesuffix(".weight"))]
    for module in modules:
        if (dtype := checkpoint.dtype(f"{module}.weight")) not in FLOATS:
            raise CheckpointError(
                f"{spec}: {module} is {str(dtype).removeprefix('torch.')}, sparse24 holds bfloat16 or float16; "
                "save the model in one of these first"
            )
    full = [module for module in modules if not is_two_four(opened.tensor(f"{module}.weight"))]
    if full or not modules:
        found = "has no linears"
        if full:
            found = f"{len(full)} of its {len(modules)} linears are not 2:4 (first: {full[0]})"
        raise CheckpointError(
            f"{spec} is dense and {found}; sparse24 needs sparsity: "
            f"sparsify apply 2of4-w4a16 --model {spec} --output {output}"
        )
    return set(modules)


def _linear(opened: CompressedCheckpoint, module: str) -> LinearWeights:
    """A compressed linear, or a dense 2:4 one as 16-bit values."""
    if module in opened.modules:
        return opened.linear(module)
    weight = opened.tensor(f"{module}.weight")
    bias = opened.tensor(f"{module}.bias") if f"{module}.bias" in opened.checkpoint else None
    return LinearWeights(16, "2:4", weight.shape[1], values=weight, bias=bias)


def _parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Modules and tensors by decoder block; what is outside of the blocks makes a part each, to save memory."""
    parts: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        parts.setdefault(block.group() if block else f"outside.{name}", []).append(name)
    return parts


def _read_by_head(source: str | Path, calibration: Calibration, quiet: bool) -> Tensor:
    """Second moment of what the output head reads, X'X / tokens: float32 [K, K], on the GPU where the model fits there.

    The model is loaded whole, as `transformers` loads it, and runs on the kernels that serve it.
    """
    checkpoint = open_compressed(source).checkpoint
    try:
        tokenizer = load_tokenizer(checkpoint.directory, str(source))
        dtype = choose(measure=True).dtype
        with stage(f"loading {source}", quiet):
            model = open_writer(checkpoint.loadable_directory(), dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: transformers cannot load this model to run it on text ({str(error).splitlines()[0]}); "
            "export it to sparse24 first, and that with --head and --calibration"
        ) from error
    tokens = calibration_tokens(
        calibration,
        tokenizer,
        lambda: model,
        cache_dir=cache_directory() / "calibration",
        key=lambda: writer_key(checkpoint, dtype),
        quiet=quiet,
        vocabulary=vocabulary_of(model.config),
    )
    hessian = HessianAccumulator()
    rows = tokens.to(model.device).split(rows_of_micro_batch(tokens.shape[1]))
    for part in progress(rows, "Reading text", total=len(rows), quiet=quiet):
        hessian.add(head_input(model, part).flatten(0, 1))
    return hessian.mean().H


def _with_head(
    head: Head, format: str, files: dict[str, bytes], rounded: RoundedHead, writer: CheckpointWriter
) -> dict[str, bytes]:
    """Recipe, metrics and model card of a checkpoint whose head has just been quantized.

    The recipe now gives this very checkpoint, or one like it where the head was solved on other text; an evaluation that
    was measured before does not belong to it any more.
    Files that `apply` did not write are carried over as they are.
    """
    try:
        metrics: dict[str, Any] = json.loads(files[METRICS])
        recipe = parse_recipe(files[RECIPE].decode())
        asked = recipe.model_copy(update={"export": recipe.export.model_copy(update={"head": head, "format": format})})
        nbytes, schemes, sizes = writer.linear_bytes(), writer.linears(), metrics["sizes"]
        head_bytes = nbytes.pop(rounded.head.module)
        del schemes[rounded.head.module]
        weights = sum(scheme.shape[0] * scheme.shape[1] for scheme in schemes.values())
        metrics |= {
            "recipe": asked.model_dump(mode="json"),
            "format": format,
            "head": head_note(rounded.head, rounded.solved),
            "dense_modules": [e for e in metrics["dense_modules"] if e["module"] != rounded.head.module],
            "evaluation": None,
            "sizes": {
                **sizes,
                "compressed_bytes": sum(writer.tensor_bytes().values()),
                "outside_bytes": sizes["outside_bytes"] - rounded.dense_nbytes,
                "bits_per_weight": round(8 * sum(nbytes.values()) / max(weights, 1), 4),
                "head_bytes": head_bytes,
                "dense_head_bytes": rounded.dense_nbytes,
            },
        }
        card = model_card(metrics, asked)
    except (KeyError, TypeError, ValueError, RecipeError):
        return files
    changed = {METRICS: json_text(metrics), RECIPE: dump_recipe(asked), CARD: card}
    return {**files, **{name: text.encode() for name, text in changed.items()}}
