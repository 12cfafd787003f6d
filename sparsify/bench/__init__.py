"""Latency and throughput of several models in one run, measured by vLLM's own benchmark code.

A figure is a ratio to the first model of the same run on the same machine; see `BenchResult`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsify.bench.engine_setup import prepare_engine, require_vllm
from sparsify.bench.result import BenchResult, ModelSpeed, table
from sparsify.bench.run import measure
from sparsify.bench.serving import serve
from sparsify.bench.workload import BenchOptions, LatencyWorkload, ThroughputWorkload

__all__ = [
    "BenchOptions", "BenchResult", "LatencyWorkload", "ModelSpeed", "ThroughputWorkload", "latency", "measure",
    "prepare_engine", "require_vllm", "serve", "table", "throughput",
]  # fmt: skip


def latency(
    models: Sequence[str | Path],
    workload: LatencyWorkload | None = None,
    options: BenchOptions | None = None,
    labels: Sequence[str] | None = None,
) -> BenchResult:
    """How long one request takes: first token, each further token."""
    return measure(models, latency=workload or LatencyWorkload(), options=options, labels=labels)


def throughput(
    models: Sequence[str | Path],
    workload: ThroughputWorkload | None = None,
    options: BenchOptions | None = None,
    labels: Sequence[str] | None = None,
) -> BenchResult:
    """How many tokens per second many requests get together."""
    return measure(models, throughput=workload or ThroughputWorkload(), options=options, labels=labels)
