"""What a checkpoint really holds, measured on its decoded weights and not read off its labels."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsify.formats.belonging import compare_with_config
from sparsify.formats.foreign import DequantizedCheckpoint
from sparsify.formats.reader import CompressedCheckpoint, natural, open_compressed
from sparsify.formats.scheme import finite, in_block
from sparsify.model.linear import is_two_four
from sparsify.progress import progress, quietly


@dataclass(frozen=True)
class TensorReport:
    """One compressed linear (all its tensors together) or one other tensor.

    sparsity: fraction of weights that are exactly zero; two_four: whether every 4 consecutive inputs hold at most two
    non-zero weights. Both are None for what is no matrix, and two_four for what lies outside of the blocks.
    bits: of a stored weight; floating: whether that is a floating number, where it has scales; symmetric: no zero points
    nbytes: on disk with scales and positions; dense_nbytes: the same tensor at 16 bits
    """

    name: str
    compressed: bool
    shape: tuple[int, ...]
    dtype: str
    bits: int
    group_size: int | None
    pattern: str | None
    sparsity: float | None
    two_four: bool | None
    nbytes: int
    dense_nbytes: int
    floating: bool = False
    symmetric: bool = True

    @property
    def kind(self) -> str:
        """The name without the number of the block, and with a star for that of an expert: `self_attn.q_proj`."""
        name = re.sub(r"\bexperts\.\d+\.", "experts.*.", self.name.removesuffix(".weight"))
        return re.sub(r"^(?:.*?\.)?\d+\.", "", name) if in_block(name) else name


@dataclass(frozen=True)
class Inspection:
    """Every tensor of a checkpoint; `totals` sums them up.

    not_compared: why nobody knows whether these are the tensors of the model that config.json describes; None where they are
    """

    source: str
    format: str
    tensors: tuple[TensorReport, ...]
    not_compared: str | None = None

    def outside(self) -> list[TensorReport]:
        """The compressed linears outside of the blocks."""
        return [t for t in self.tensors if t.compressed and not in_block(t.name)]

    def totals(self) -> dict[str, Any]:
        """Sizes and counts of the whole checkpoint. `sparsity` and `bits_per_weight` are of the linears in blocks.

        outside: the compressed linears outside of the blocks, such as an output head, each with its own figures.
        dense_nbytes counts an output head as a 16-bit matrix of its own, also where the dense model tied it.
        """
        linears = [t for t in self.tensors if in_block(t.name) and (t.compressed or t.two_four is not None)]
        weights = sum(_count(t) for t in linears)
        nbytes, dense = sum(t.nbytes for t in self.tensors), sum(t.dense_nbytes for t in self.tensors)
        return {
            "tensors": len(self.tensors),
            "parameters": sum(_count(t) for t in self.tensors),
            "linears": len(linears),
            "compressed_linears": sum(t.compressed for t in linears),
            "two_four_linears": sum(t.two_four is True for t in linears),
            "sparsity": sum((t.sparsity or 0) * _count(t) for t in linears) / weights if weights else 0.0,
            "bits_per_weight": sum(8 * t.nbytes for t in linears) / weights if weights else 0.0,
            "outside": {
                t.name: {"bits": t.bits, "bits_per_weight": 8 * t.nbytes / _count(t), "nbytes": t.nbytes}
                for t in self.outside()
            },
            "nbytes": nbytes,
            "dense_nbytes": dense,
            "ratio": dense / nbytes if nbytes else 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**asdict(t), "shape": list(t.shape)} for t in self.tensors]
        return {
            "source": self.source,
            "format": self.format,
            "not_compared": self.not_compared,
            "totals": self.totals(),
            "tensors": rows,
        }


@quietly
def inspect(source: str | Path, quiet: bool = False) -> Inspection:
    """Read every tensor of a checkpoint once, check it, and measure it. The tensors must be those of its config.json."""
    opened = open_compressed(source)
    not_compared = compare_with_config(opened)
    if isinstance(foreign := opened.checkpoint, DequantizedCheckpoint):
        return _inspect_foreign(foreign, quiet, not_compared)
    names = sorted([*opened.modules, *opened.other_names()], key=natural)
    reports = tuple(_report(opened, name) for name in progress(names, "Inspecting", quiet=quiet))
    return Inspection(opened.checkpoint.spec, opened.format, reports, not_compared)


def _inspect_foreign(opened: DequantizedCheckpoint, quiet: bool, not_compared: str | None) -> Inspection:
    """A checkpoint that is read by dequantizing: its weights are measured dense, its bytes are those on the disk."""
    names = sorted(opened.names(), key=natural)
    reports = tuple(_report_foreign(opened, name) for name in progress(names, "Inspecting", quiet=quiet))
    return Inspection(opened.spec, opened.quantization, reports, not_compared)


def _report_foreign(opened: DequantizedCheckpoint, name: str) -> TensorReport:
    module = name.removesuffix(".weight")
    tensor = opened.tensor(name)
    if module == name or module not in opened.modules:
        return _plain(name, tensor)
    stored = opened.modules[module]
    two_four = is_two_four(tensor)
    return TensorReport(
        module, True, stored.shape, _name(tensor.dtype), stored.bits, stored.group_size, "2:4" if two_four else "dense",
        _sparsity(tensor), two_four, opened.module_nbytes(module), tensor.numel() * 2, stored.floating,
    )  # fmt: skip


def _report(opened: CompressedCheckpoint, name: str) -> TensorReport:
    if name in opened.modules:
        linear = opened.linear(name)
        stored = linear.values if linear.codes is None else linear.dense(torch.float32)
        assert stored is not None
        bias = 0 if linear.bias is None else linear.bias.nbytes
        return TensorReport(
            name, True, linear.shape, _name(linear.dtype), linear.bits,
            None if linear.bits == 16 else linear.group_size, linear.pattern,
            _sparsity(stored), is_two_four(stored), opened.nbytes(name), stored.numel() * 2 + bias,
            symmetric=linear.symmetric,
        )  # fmt: skip
    return _plain(name, opened.tensor(name))


def _plain(name: str, tensor: Tensor) -> TensorReport:
    finite(name, tensor)
    measured = (
        tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    )  # torch counts no float8
    matrix = tensor.dim() == 2 and tensor.is_floating_point() and name.endswith(".weight")
    two_four = is_two_four(measured) if matrix and in_block(name.removesuffix(".weight")) else None
    return TensorReport(
        name, False, tuple(tensor.shape), _name(tensor.dtype), tensor.dtype.itemsize * 8, None, None,
        _sparsity(measured) if matrix else None, two_four, tensor.nbytes, tensor.nbytes,
    )  # fmt: skip


def _sparsity(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(report: TensorReport) -> int:
    return torch.Size(report.shape).numel()


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def render(inspection: Inspection) -> RenderableType:
    """A table with one row for each kind of module, one for all vectors (norms, biases), and a line of totals."""
    title = escape(f"{inspection.source} ({inspection.format})")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("module", overflow="fold")
    for column in ("count", "shape", "weights", "zeros", "2:4", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for same in _by_kind(inspection):
        first, total = same[0], sum(_count(t) for t in same)
        measured = [t for t in same if t.sparsity is not None]
        judged = [t for t in same if t.two_four is not None]
        table.add_row(
            Text(first.kind) if len(first.shape) > 1 else "vectors",
            str(len(same)),
            " x ".join(map(str, first.shape)) if len(first.shape) > 1 else "",
            _weights(first),
            f"{sum((t.sparsity or 0) * _count(t) for t in measured) / total:.1%}" if measured and total else "",
            f"{sum(t.two_four is True for t in judged)}/{len(judged)}" if judged else "",
            _size(sum(t.nbytes for t in same)),
        )
    totals = inspection.totals()
    summary = (
        f"{totals['compressed_linears']} of {totals['linears']} linears compressed, "
        f"{totals['two_four_linears']} are 2:4, sparsity {totals['sparsity']:.1%}, "
        f"{totals['bits_per_weight']:.2f} bits per weight; "
        f"{_size(totals['nbytes'])} on disk, {totals['ratio']:.2f} times smaller than at 16 bits"
    )
    heads = [
        f"{t.name}: {8 * t.nbytes / _count(t):.2f} bits per weight, {_size(t.nbytes)}, outside of the blocks"
        for t in inspection.outside()
    ]
    doubts = [f"not compared with config.json: {why}"] if (why := inspection.not_compared) else []
    return Group(table, Text("\n".join([summary, *heads, *doubts])))


def _weights(report: TensorReport) -> str:
    """How weights are stored: `int4 g64 2:4`, `int4 asym g64 2:4`, `float8 g128`, `bfloat16 2:4`, `bfloat16`."""
    stored = (
        report.dtype
        if report.group_size is None
        else f"{'float' if report.floating else 'int'}{report.bits} {'' if report.symmetric else 'asym '}g{report.group_size}"
    )
    return f"{stored} {report.pattern or ''}".strip()


def _by_kind(inspection: Inspection) -> Iterator[list[TensorReport]]:
    groups: dict[tuple[object, ...], list[TensorReport]] = {}
    for t in inspection.tensors:
        vector = len(t.shape) < 2
        how = (t.kind, t.compressed, t.shape, t.dtype, t.bits, t.group_size, t.pattern, t.symmetric)
        key = (vector, t.dtype) if vector else how
        groups.setdefault(key, []).append(t)
    yield from sorted(groups.values(), key=lambda same: len(same[0].shape) < 2)
