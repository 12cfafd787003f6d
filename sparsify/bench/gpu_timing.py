"""How fast are the GPU kernels? Every back end and its peers on one linear, timed by replaying CUDA graphs.

A product is timed over as many copies of the weights as exceed the second-level cache twice, so that weights come from
memory, as they do in a model. Baselines take turns, so that a slow spell of the machine hits them all; a time is the
median.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from sparsify.bench import baselines
from sparsify.bench.baselines import Baseline
from sparsify.bench.cuda_graphs import captured, replay_seconds, seconds_of_one
from sparsify.bench.gpu_correctness import activations, cuda_configs, forced_config
from sparsify.bench.gpu_report import BITS, GpuReport, Timed, label
from sparsify.bench.marlin import marlin_linear
from sparsify.bench.missing import PeerMissing
from sparsify.bench.shapes import Linear
from sparsify.failure import first_line
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import Backend

LINEARS = (
    Linear("8B qkv", 6144, 4096),
    Linear("8B o", 4096, 4096),
    Linear("8B gate_up", 28672, 4096),
    Linear("8B down", 4096, 14336),
    Linear("70B down", 8192, 28672),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
QUICK_LINEARS, QUICK_ROWS = LINEARS[1:4], (1, 16, 64, 512)
ROUNDS = 3
REPLAY_SECONDS = 0.006  # of one turn
GRAPH_SECONDS, GRAPH_CALLS = 0.004, 8  # of one graph, at most; and calls in one, if they fit
SLOW_SECONDS = 0.02  # a call that takes longer is timed alone


@dataclass(frozen=True)
class CheckOptions:
    """What to check. seconds: what is not measured by then is left out, with a note."""

    linears: Sequence[Linear] = LINEARS
    rows: Sequence[int] = ROWS
    group_size: int = 64
    quick: bool = False
    seconds: float = 180.0
    only: Sequence[str] = ()  # back ends; all that serve when empty


def time_linear(
    timed: dict[tuple[Linear, int], Timed],
    linear: Linear,
    backends: Sequence[Backend],
    peers: bool,
    options: CheckOptions,
    device: torch.device,
    deadline: float,
    report: GpuReport,
) -> None:
    """Add the times of some baselines on one linear to `timed`.

    peers: torch's dense linear and vLLM's Marlin too. deadline: on the monotonic clock; what comes after it is left out,
    with a note in the report.
    """
    lined_up = line_up(linear, backends, peers, options.group_size, device, report)
    for m in options.rows:
        x = activations(m, linear.k, linear.n, torch.bfloat16, device, False, False)[0]
        found = timed.setdefault((linear, m), Timed())
        graphs = []
        for baseline in lined_up:
            if time.monotonic() > deadline:
                note = f"out of time ({options.seconds:.0f} s): some {baseline.name} was left out; give --seconds more"
                if note not in report.notes:
                    report.notes.append(note)
                continue
            if baseline.name == "cuda":
                for name, index in cuda_configs().items():
                    with forced_config(index):
                        microseconds = time_calls([(baseline, x)], device, report, rounds=1)
                    if microseconds:
                        found.configs[name] = microseconds["cuda"]
            graphs.append((baseline, x))
            found.nbytes[baseline.name] = baseline.nbytes + (m * linear.k + m * linear.n) * 2
        found.microseconds.update(time_calls(graphs, device, report))


def line_up(
    linear: Linear, backends: Sequence[Backend], peers: bool, group_size: int, device: torch.device, report: GpuReport
) -> list[Baseline]:
    """The baselines that can be had for a linear; the report notes why others cannot."""
    n, k, cache = linear.n, linear.k, report.gpu["l2_bytes"]
    makers: list[Callable[[], Baseline]] = [
        partial(ours, backend, linear, bits, group_size, cache, device)
        for backend in backends
        for bits in BITS.get(backend.name, (4,))
    ]
    if peers:
        dense_bytes, marlin_bytes = 2 * n * k, n * k // 2
        makers.append(partial(baselines.torch_linear, n, k, copies_of(dense_bytes, cache), device=device))
        makers.append(partial(marlin_linear, n, k, group_size, copies_of(marlin_bytes, cache), device))
    made = []
    for make in makers:
        try:
            made.append(make())
        except PeerMissing as error:
            if str(error) not in report.notes:
                report.notes.append(str(error))
    return made


def ours(
    backend: Backend, linear: Linear, bits: Literal[4, 16], group_size: int, cache: int, device: torch.device
) -> Baseline:
    """The op with one back end, in bfloat16; PeerMissing where it does not serve this linear."""
    scheme = ModuleScheme(bits, linear.k if bits == 16 else group_size, "2:4", (linear.n, linear.k))
    if reason := backend.supports(scheme, device, torch.bfloat16):
        raise PeerMissing("not served", f"{backend.name}: {reason}")
    copies = copies_of(baselines.scheme_bytes(scheme), cache)
    made = baselines.ours(scheme, torch.bfloat16, copies, device=device, backend=backend)
    return replace(made, name=label(backend.name, bits))


def copies_of(nbytes: int, cache: int) -> int:
    """How many copies of the weights are cycled through: twice the cache, and at least two."""
    return max(2, min(64, -(-2 * cache // nbytes) + 1))


def time_calls(
    baselines: Sequence[tuple[Baseline, Tensor]], device: torch.device, report: GpuReport, rounds: int = ROUNDS
) -> dict[str, float]:
    """Microseconds per call by baseline: the median over the replays of all turns."""
    graphs = {}
    turns: dict[str, list[float]] = {}
    for baseline, x in baselines:
        try:
            alone = seconds_of_one(baseline.calls[0], x, device)
            if alone > SLOW_SECONDS:  # a graph saves nothing here
                turns[baseline.name] = [alone]
                continue
            # once over all copies, unless that takes long: then activations fill the cache and fewer copies do
            most = max(GRAPH_CALLS, len(baseline.calls))
            count = max(2, min(most, math.ceil(GRAPH_SECONDS / alone)))
            calls = [baseline.calls[i % len(baseline.calls)] for i in range(count)]
            graph = captured(partial(run_all, calls, x), device)
            one = replay_seconds(graph, 1, device)[0]
        except Exception as error:  # one that fails must not end the others
            report.notes.append(f"{baseline.name} with M {x.shape[0]}: {first_line(error)}")
            continue
        graphs[baseline.name] = (graph, count, max(3, min(100, int(REPLAY_SECONDS / max(one, 1e-7)))))
        turns[baseline.name] = []
    for _ in range(rounds):
        for name, (graph, count, replays) in graphs.items():
            turns[name] += [seconds / count for seconds in replay_seconds(graph, replays, device)]
    return {name: round(median(found) * 1e6, 3) for name, found in turns.items()}


def run_all(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    """One product after the other."""
    for call in calls:
        call(x)


@contextmanager
def out_of_memory_noted(report: GpuReport, linear: Linear) -> Iterator[None]:
    """A GPU with little memory measures what fits."""
    try:
        yield
    except torch.OutOfMemoryError:
        report.notes.append(f"{linear.label}: out of GPU memory, left out")
    torch.cuda.empty_cache()
