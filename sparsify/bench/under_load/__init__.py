"""Servers under load: requests that arrive at a rate, as users send them, instead of a batch or all at once."""

from __future__ import annotations

from sparsify.bench.under_load.result import tables
from sparsify.bench.under_load.run import measure_under_load
from sparsify.bench.under_load.workload import Dataset, Step, UnderLoad, parse_dataset, parse_goodput, parse_steps

__all__ = [
    "Dataset",
    "Step",
    "UnderLoad",
    "measure_under_load",
    "parse_dataset",
    "parse_goodput",
    "parse_steps",
    "tables",
]
