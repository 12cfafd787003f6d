"""What `sparsify kernels check` found: correctness and times, as JSON, as tables, and as times for the choice of back ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.bench.shapes import Linear
from sparsify.files import atomic_write, read_json
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import known_backends, measured_choice

BITS: dict[str, tuple[Literal[4, 16], ...]] = {"torch24": (16,), "triton": (4, 16)}  # timed; 4 of all others
DECODED = "decoded"  # the configuration of the CUDA back end that writes the weight out and multiplies densely


@dataclass
class Correctness:
    """One back end, in one configuration, over the sweep.

    worst: largest error as a share of what is allowed. rms: largest relative error of a whole product.
    """

    backend: str
    config: str = ""
    cases: int = 0
    worst: float = 0.0
    rms: float = 0.0
    failures: list[str] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class Row:
    """Microseconds of every baseline on one linear with M rows, and of the CUDA kernel in each of its configurations."""

    linear: str
    n: int
    k: int
    m: int
    microseconds: dict[str, float]
    nbytes: dict[str, int]
    configs: dict[str, float]
    ratios: dict[str, dict[str, float]]  # back end of ours -> peer -> times faster
    bandwidth_share: dict[str, float]


@dataclass
class Timed:
    """What was measured of one linear with one number of rows, by baseline: microseconds and bytes; configs as in Row."""

    microseconds: dict[str, float] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    configs: dict[str, float] = field(default_factory=dict)


@dataclass
class GpuReport:
    """One run."""

    gpu: dict[str, Any]
    correctness: list[Correctness] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    copy_bandwidth: float | None = None
    group_size: int = 64
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether something was compared, and all of it was right."""
        return bool(self.correctness) and not any(check.failures for check in self.correctness)

    def to_json(self) -> dict[str, Any]:
        return {"right": self.right, **asdict(self)}


def write(report: GpuReport, output: Path | None) -> None:
    """Write the report as JSON, where an output was asked for."""
    if output is not None:
        output.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


def label(backend: str, bits: int) -> str:
    """cuda, triton, triton 16-bit"""
    return backend if bits == 4 else f"{backend} {bits}-bit"


def make_rows(
    timed: Mapping[tuple[Linear, int], Timed],
    bandwidth: float | None,
) -> list[Row]:
    """Ratios and shares of what was timed."""
    rows = []
    for (linear, m), found in timed.items():
        times, nbytes = found.microseconds, found.nbytes
        peers = {name: t for name, t in times.items() if name not in known_backends()}
        mine = {name: t for name, t in times.items() if name in known_backends()}
        ratios = {name: {peer: p / t for peer, p in peers.items()} for name, t in mine.items()}
        shares = {name: nbytes[name] / (t * 1e-6) / bandwidth for name, t in times.items()} if bandwidth else {}
        rows.append(Row(linear.name, linear.n, linear.k, m, times, nbytes, found.configs, ratios, shares))
    return rows


def merge_times(report: GpuReport, file: Path) -> None:
    """Put the measured times into the file that `runtime/backends/measured_choice.py` reads, in place of older ones of the same
    product and beside all others."""
    names: dict[str, tuple[str, Literal[4, 16]]] = {
        label(name, bits): (name, bits) for name in known_backends() for bits in BITS.get(name, (4,))
    }
    everything = read_json(file) if file.exists() else {}
    kinds = everything.setdefault(report.gpu["name"], {})
    for row in report.rows:
        for shown, microseconds in row.microseconds.items():
            if shown in names:
                name, bits = names[shown]
                kind = kinds.setdefault(measured_choice.kind(ModuleScheme(bits, 64, "2:4", (row.n, row.k))), {})
                kind.setdefault(f"{row.n}x{row.k}", {}).setdefault(name, {})[str(row.m)] = microseconds
    atomic_write(file, json.dumps(everything, indent=1, sort_keys=True) + "\n")


def tables(report: GpuReport) -> list[Table | Text]:
    """The report for people."""
    shown: list[Table | Text] = []
    if gpu := report.gpu:
        shown.append(
            Text(
                f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')}, {gpu['multiprocessors']} multiprocessors, "
                f"L2 {gpu['l2_bytes'] / 2**20:.0f} MiB), torch {gpu['torch']}, CUDA {gpu['cuda']}"
            )
        )
    shown += [Text(note) for note in report.notes]
    if report.correctness:
        shown.append(correctness_table(report.correctness))
    if report.rows:
        shown.append(times_table(report))
    return shown


def correctness_table(checks: Sequence[Correctness]) -> Table:
    """One row per back end and configuration: what was compared, the largest errors, the first few failures."""
    view = Table(title="Compared with float64", title_justify="left")
    view.add_column("back end", no_wrap=True)
    view.add_column("configuration", no_wrap=True)
    for heading in ("products", "left out", "worst error / allowed", "relative error"):
        view.add_column(heading, justify="right")
    view.add_column("result")
    for check in checks:
        if check.failures:
            verdict = Text(f"WRONG in {len(check.failures)}: {'; '.join(check.failures[:3])}", style="bold red")
        else:
            verdict = Text("right" if check.cases else "nothing compared", style="green" if check.cases else "dim")
        view.add_row(
            check.backend, Text(check.config), str(check.cases), str(check.left_out or ""),
            f"{check.worst:.3f}", f"{check.rms:.2e}", verdict,
        )  # fmt: skip
    return view


def times_table(report: GpuReport) -> Table:
    """One row per linear and M: microseconds, ratios to the peers, share of the bandwidth, the best configuration."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.microseconds))
    mine = [name for name in names if name in known_backends()]
    peers = [name for name in names if name not in mine]
    bandwidth = f"{report.copy_bandwidth / 1e9:.0f} GB/s" if report.copy_bandwidth else "unknown"
    view = Table(
        title=escape(
            f"4-bit 2:4, groups of {report.group_size}, bfloat16 activations: microseconds, and times faster than"
        ),
        caption=escape(
            f"weights from memory; CUDA graphs; share: bytes of weights and activations per second of the measured copy "
            f"bandwidth ({bandwidth}); best: the CUDA kernel's fastest configuration, where it beats its choice by 3%"
        ),
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("linear, outputs x inputs", no_wrap=True)
    view.add_column("M", justify="right")
    for name in names:
        view.add_column(f"{name} us", justify="right")
    for name in mine:
        for peer in peers:
            view.add_column(f"{name} : {peer}", justify="right")
        view.add_column(f"{name} share", justify="right")
    view.add_column("best", no_wrap=True)
    last = ""
    for row in report.rows:
        shape = f"{row.linear} {row.n}x{row.k}"
        if last and shape != last:
            view.add_section()
        cells = [f"{row.microseconds[name]:.1f}" if name in row.microseconds else "-" for name in names]
        for name in mine:
            ratios = row.ratios.get(name, {})
            cells += [f"{ratios[peer]:.2f}x" if peer in ratios else "-" for peer in peers]
            cells.append(f"{100 * row.bandwidth_share[name]:.0f}%" if name in row.bandwidth_share else "-")
        view.add_row(shape if shape != last else "", str(row.m), *cells, Text(best_config(row)))
        last = shape
    return view


def best_config(row: Row) -> str:
    """The CUDA kernel's fastest configuration, where its own choice is more than 3% slower."""
    if not row.configs or "cuda" not in row.microseconds:
        return ""
    name = min(row.configs, key=lambda config: row.configs[config])
    gain = row.microseconds["cuda"] / row.configs[name]
    label = name if name == DECODED else str(list(row.configs).index(name))
    return f"{label}: {row.configs[name]:.1f} us" if gain > 1.03 else ""
