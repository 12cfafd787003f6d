"""`sparsify kernels check`: are the kernels right, and on a GPU how fast?

Three parts: every back end that serves is compared with float64 (`gpu_correctness`), then everything is timed
(`gpu_timing`), then reported (`gpu_report`). Without a GPU the emulator executes the CUDA kernel, and nothing is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.cuda_graphs import copy_bandwidth
from sparsify.bench.gpu_correctness import (
    STRICT,
    check_backend,
    check_emulated,
    check_streams_and_graphs,
)
from sparsify.bench.gpu_report import GpuReport, Timed, make_rows, merge_times, write
from sparsify.bench.gpu_timing import (
    LINEARS,
    QUICK_LINEARS,
    QUICK_ROWS,
    ROWS,
    CheckOptions,
    out_of_memory_noted,
    time_linear,
)
from sparsify.bench.shapes import Linear, parse_shape
from sparsify.errors import SparsifyError
from sparsify.failure import first_line
from sparsify.native.emulator import Sparse24
from sparsify.progress import describe, progress_bar
from sparsify.runtime.backends import BACKENDS, Backend, known_backends

ON_CPU = ("cpu", "reference")
CHECK_SHARE = 0.25  # of the time limit, for the correctness of one back end


def check_here(
    gpu: bool,
    linears: Sequence[str] = (),
    rows: Sequence[int] = (),
    group_size: int = 64,
    quick: bool = False,
    seconds: float = 180.0,
    only: Sequence[str] = (),
    output: str | None = None,
    times: str | None = None,
) -> GpuReport:
    """`sparsify kernels check`: the kernels of the GPU or of the CPU. linears: texts `NxK`; times: see `merge_times`."""
    if unknown := [name for name in only if name not in known_backends()]:
        raise SparsifyError(f"unknown back end {unknown[0]!r}; known back ends: {', '.join(known_backends())}")
    if any(m < 1 for m in rows):
        raise SparsifyError("--rows takes positive numbers of tokens, as in --rows 1,8,32")
    options = CheckOptions(
        linears=[parse_shape(text) for text in linears] or (QUICK_LINEARS if quick else LINEARS),
        rows=rows or (QUICK_ROWS if quick else ROWS),
        group_size=group_size,
        quick=quick,
        seconds=seconds,
        only=only,
    )
    file = Path(output) if output else None
    with progress_bar("checking kernels", None):
        if not gpu:
            return check_cpu(options, file)
        if not torch.cuda.is_available():
            return without_gpu(options, file)
        report = check_gpu(options, file)
    if times:
        merge_times(report, Path(times))
    return report


def check_cpu(options: CheckOptions, output: Path | None = None) -> GpuReport:
    """Compare the back ends of the processor with float64. `sparsify bench kernels` measures them."""
    started = time.monotonic()
    report = GpuReport({}, group_size=options.group_size)
    device = torch.device("cpu")
    with torch.inference_mode():
        for backend in BACKENDS:
            if backend.name not in ON_CPU or (options.only and backend.name not in options.only):
                continue
            if reason := backend.reason_unavailable():
                report.notes.append(f"{backend.name}: {reason}")
            else:
                report.correctness += check_backend(backend, device, started + options.seconds, options.quick)
    report.seconds = time.monotonic() - started
    write(report, output)
    return report


def without_gpu(options: CheckOptions, output: Path | None = None) -> GpuReport:
    """What can be checked without a GPU: whether the CUDA kernel is right where the emulator executes it."""
    started = time.monotonic()
    report = GpuReport({}, group_size=options.group_size)
    report.notes.append("torch sees no GPU here: nothing was run on one")
    try:
        kernel = Sparse24()
    except SparsifyError as error:
        report.notes.append(f"emulator: {error}")
    else:
        report.notes.append("the CUDA kernel is executed by the emulator (kernels/emulator), which checks every access")
        report.correctness += check_emulated(kernel, started + options.seconds, options.quick)
    report.seconds = time.monotonic() - started
    write(report, output)
    return report


def check_gpu(options: CheckOptions | None = None, output: Path | None = None) -> GpuReport:
    """Check and measure on the current GPU. output: a JSON file, written after every part, so that nothing is lost."""
    options = options or CheckOptions()
    started = time.monotonic()
    device = current_gpu()
    report = GpuReport(describe_gpu(device), group_size=options.group_size)

    def save() -> None:
        report.seconds = time.monotonic() - started
        write(report, output)

    with torch.inference_mode():
        serving = serving_here(options.only, report)
        save()
        for backend in serving:
            until = time.monotonic() + options.seconds * CHECK_SHARE
            report.correctness += check_backend(backend, device, until, options.quick)
            report.correctness.append(check_streams_and_graphs(backend, device))
            save()
        try:
            report.copy_bandwidth = copy_bandwidth(device)
        except RuntimeError as error:  # after an illegal access nothing runs any more
            report.notes.append(f"nothing could be timed after this: {first_line(error)}")
            save()
            return report
        deadline = started + options.seconds
        # a back end that tunes itself comes last, alone: its tuning may use up what is left of the time
        first = [backend for backend in serving if backend.name in STRICT]
        rest = [backend for backend in serving if backend.name not in STRICT]
        timed: dict[tuple[Linear, int], Timed] = {}
        for group, peers in ((first, True), (rest, False)):
            for linear in options.linears:
                describe(f"timing {linear.label}")
                with out_of_memory_noted(report, linear):
                    time_linear(timed, linear, group, peers, options, device, deadline, report)
            report.rows = make_rows(timed, report.copy_bandwidth)
            save()
    save()
    return report


def serving_here(only: Sequence[str], report: GpuReport) -> list[Backend]:
    """The back ends that run on this GPU, of those named in `only`, if any are. The report notes why others do not."""
    serving = []
    for backend in BACKENDS:
        if backend.name in ON_CPU or (only and backend.name not in only):
            continue
        begin = time.monotonic()
        if reason := backend.reason_unavailable():
            report.notes.append(f"{backend.name}: {reason}")
            continue
        report.notes.append(f"{backend.name}: ready after {time.monotonic() - begin:.1f} s")
        serving.append(backend)
    return serving


def current_gpu() -> torch.device:
    """The GPU that torch uses in this thread."""
    return torch.device("cuda", torch.cuda.current_device())


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
