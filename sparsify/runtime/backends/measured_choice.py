"""Which back end is fastest for a linear on this GPU, from times that `sparsify kernels check --gpu` measured.

The times are in `gpu_times.json` beside this file; to measure a GPU and add it:

    sparsify kernels check --gpu --times sparsify/runtime/backends/gpu_times.json

    {"NVIDIA H100 80GB HBM3": {"2:4 4-bit": {"6144x4096": {"cuda": {"1": 8.1, "16": 9.0}, "triton": {"1": 9.9, "16": 9.5}}}}}

GPU by the name that torch gives it, kind of linear, outputs x inputs, back end, rows (M): microseconds. A linear is held
once, in one back end's layout, so one is chosen for all numbers of rows: the one that is fastest on average for the rows
of decoding, which is what a server does most.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sparsify.formats import ModuleScheme

TIMES = Path(__file__).with_name("gpu_times.json")
DECODING_ROWS = 64
FARTHEST = math.log(4)  # a measured shape stands for those of up to four times its outputs or inputs, or a quarter

Times = Mapping[str, Mapping[str, Mapping[str, float]]]  # NxK -> back end -> rows -> microseconds


def fastest(names: Sequence[str], scheme: ModuleScheme, device: torch.device) -> str | None:
    """The back end among `names` with the smallest measured times on this GPU, None where too little is measured."""
    return fastest_of(_measured().get(_gpu_name(device), {}).get(kind(scheme), {}), names, scheme.shape)


def fastest_of(times: Times, names: Sequence[str], shape: tuple[int, int]) -> str | None:
    """Decides by the measured shape that is nearest to `shape`, over the rows for which all its back ends were measured.

    None when fewer than two of `names` were measured there, or when the first of them was not: the order of back ends
    then decides.
    """
    nearest = min(times, key=lambda text: _distance(_shape(text), shape), default=None)
    if nearest is None or _distance(_shape(nearest), shape) > FARTHEST:
        return None
    measured = {name: times[nearest][name] for name in names if name in times[nearest]}
    rows = set.intersection(*(set(by_rows) for by_rows in measured.values())) if measured else set()
    decoding = [m for m in rows if int(m) <= DECODING_ROWS]
    if len(measured) < 2 or names[0] not in measured or not decoding:
        return None
    return min(measured, key=lambda name: sum(math.log(measured[name][m]) for m in decoding))


def kind(scheme: ModuleScheme) -> str:
    """2:4 4-bit"""
    return f"{scheme.pattern} {scheme.bits}-bit"


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return max(abs(math.log(x / y)) for x, y in zip(a, b, strict=True))


@functools.cache
def _measured() -> Mapping[str, Mapping[str, Times]]:
    return json.loads(TIMES.read_text(encoding="utf-8"))


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
