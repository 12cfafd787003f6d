"""From one checkpoint format to another, block by block; codes are carried over, never quantized again.

An output head that is still dense can be quantized on the way.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.formats import get_format
from sparsify.formats.directory import (
    CheckpointWriter,
    CompressedCheckpoint,
    natural,
    open_compressed,
    partial_directory,
)
from sparsify.formats.scheme import FLOATS, in_block
from sparsify.model.linear import LinearWeights, is_two_four
from sparsify.model.output_head import OutputHead, find_head
from sparsify.progress import progress, quietly, stage
from sparsify.recipe import Head, head_format_problem
from sparsify.solver.head_quantization import SolvedHead, head_problem, head_scheme, solve_head
from sparsify.solver.solve import Scheme

CARRIED = ("README.md", "recipe.yaml", "metrics.json")
IDENTITY = "export"


@dataclass(frozen=True)
class RoundedHead:
    """An output head that an export quantized. dense_nbytes: of the weight it replaces, 0 when it was tied."""

    head: OutputHead
    solved: SolvedHead
    dense_nbytes: int


Describe = Callable[[dict[str, bytes], RoundedHead, CheckpointWriter], dict[str, bytes]]
"""Brings the carried files (model card, recipe, metrics) up to date with a head that was quantized, and what was written."""


@quietly
def export(
    source: str | Path,
    format: str,
    output: str | Path,
    quiet: bool = False,
    head: Head | None = None,
    describe: Describe | None = None,
    dense_head: bool = False,
    moment: Callable[[], Tensor] | None = None,
) -> Path:
    """Write `source` (a checkpoint of any known format, or any dense model) to the directory `output` in `format`.

    A dense source can become sparse24 only when every linear in its blocks is 2:4 already (16-bit values).
    head: quantize the output head on the way; it must not be compressed yet.
    describe: brings the files beside the weights up to date with that head.
    dense_head: multiply out what is compressed outside of the blocks, for software that wants a 16-bit head.
    moment: for a head that is solved, gives X'X / tokens of what it reads, [K, K]; called when nothing else stands in the way.
    """
    get_format(format)
    opened = open_compressed(source)
    linears = _linears(opened, format, output)
    asked = None if head is None else _asked(opened, format, head)
    work = partial_directory(Path(output))
    if (work / "writer.json").is_file() and read_json(work / "writer.json").get("identity") == IDENTITY:
        shutil.rmtree(work)  # an export that was killed: short enough to begin again
    writer = CheckpointWriter(output, format, opened.checkpoint, identity=IDENTITY)
    try:
        plain = {f"{module}.weight" for module in linears} if not opened.modules else set()
        rounded = None if asked is None else _write_head(writer, opened, *asked, moment)
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
            writer.write_part(part, chosen, {name: opened.tensor(name) for name in others})
        carried = {name: file.read_bytes() for name in CARRIED if (file := opened.directory / name).is_file()}
        if rounded is not None and describe is not None:
            carried = describe(carried, rounded, writer)
        with stage(f"writing {output}"):
            return writer.finish({}, carried)
    except BaseException:
        writer.discard()
        raise


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
    if problem := head_problem(found.module, found.shape, scheme):
        raise CheckpointError(f"{opened.checkpoint.spec}: {problem}")
    return found, scheme


def _write_head(
    writer: CheckpointWriter,
    opened: CompressedCheckpoint,
    head: OutputHead,
    scheme: Scheme,
    moment: Callable[[], Tensor] | None,
) -> RoundedHead:
    weight = opened.tensor(head.source)
    H = None if moment is None else moment()
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
