"""What sparsify adds to vLLM's /metrics: which back end serves which linears, their bytes, and how long loading took.

The linears are in vLLM's worker processes, /metrics is in its API server. vLLM calls the plugin's entry point in the server
before it starts a worker: there `share` names a folder in the environment, which the workers inherit. Each worker keeps
one file in it, and the server's collector reads them at every scrape. Several API servers (--api-server-count) share
prometheus_client's own folder of values instead, which reaches its gauges only, so workers set gauges there.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, Gauge
from prometheus_client.core import GaugeMetricFamily

from sparsify._version import __version__

FOLDER = "SPARSIFY_METRICS"
OF_SEVERAL_SERVERS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's; vLLM sets it
KIND = ("layer", "pattern", "bits", "backend")  # labels of the linears that are counted together
SKIPPED = "none"  # the back end of linears without weights
VLLMS = "vllm"  # the back end of those that are not compressed

DESCRIPTIONS = {
    "sparsify_info": "The version of sparsify that serves; always 1.",
    "sparsify_linears": "Linears of the model as vLLM merges them, by layer, form and back end.",
    "sparsify_linear_bytes": "Bytes of the weights of compressed linears as the back end holds them.",
    "sparsify_load_seconds": "From the first compressed linear made to the last one ready, reading the files included.",
    "sparsify_prepare_seconds": "Of loading, the time in which weights were checked and put into the back end's layout.",
}

Sample = tuple[str, dict[str, str], float]  # (metric, labels, value)

logger = logging.getLogger("vllm.sparsify")


@dataclass(frozen=True)
class Served:
    """One linear that serves. layer: the last part of its name, as qkv_proj; bits: 4, 8, or 16 and 32 for values."""

    layer: str
    pattern: str
    bits: int
    backend: str
    nbytes: int | None = None

    @property
    def kind(self) -> tuple[str, ...]:
        """Its values of the labels in KIND."""
        return (self.layer, self.pattern, str(self.bits), self.backend)


@dataclass
class Loading:
    """The linears of this process and the time they took. Keys are vLLM's objects, and go with them."""

    linears: WeakKeyDictionary[Any, Served] = field(default_factory=WeakKeyDictionary)
    labels: dict[str, str] = field(default_factory=lambda: {"engine": "0", "rank": "0"})
    began: float | None = None
    ended: float = 0.0
    preparing: float = 0.0

    def begin(self, parallel: Any) -> None:
        """A linear is made. parallel: vLLM's ParallelConfig, or None; it says which of the processes this is."""
        if parallel is not None:
            self.labels = {"engine": str(parallel.data_parallel_index), "rank": str(parallel.rank)}
        if self.began is None:
            self.began = time.monotonic()

    def add(self, key: Any, served: Served, seconds: float = 0.0) -> None:
        """A linear is ready. seconds: spent on its weights. One that is loaded again keeps the time of the first."""
        if key not in self.linears:
            self.ended = time.monotonic()
            self.preparing += seconds
        self.linears[key] = served
        try:
            publish(self.samples())
        except OSError as error:  # serving goes on without
            logger.debug("metrics of sparsify: %s", error)

    def samples(self) -> list[Sample]:
        """Everything as metrics."""
        linears = list(self.linears.values())
        counts = Counter(served.kind for served in linears)
        nbytes: Counter[tuple[str, ...]] = Counter()
        for served in linears:
            if served.nbytes is not None:
                nbytes[served.kind] += served.nbytes
        kinds = [("sparsify_linears", counts), ("sparsify_linear_bytes", nbytes)]
        found: list[Sample] = [("sparsify_info", {"version": __version__, **self.labels}, 1.0)]
        for name, values in kinds:
            found += [(name, dict(zip(KIND, kind, strict=True)) | self.labels, float(n)) for kind, n in values.items()]
        if self.began is not None and self.ended:
            found.append(("sparsify_load_seconds", self.labels, self.ended - self.began))
            found.append(("sparsify_prepare_seconds", self.labels, self.preparing))
        return found


LOADING = Loading()  # of this process


@functools.cache
def share() -> None:
    """Let this process's /metrics show what its workers publish. The first process makes the folder and removes it."""
    if FOLDER not in os.environ:
        folder = tempfile.mkdtemp(prefix="sparsify-metrics-")
        os.environ[FOLDER] = folder
        atexit.register(_remove, folder, os.getpid())
    REGISTRY.register(Collector())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def publish(samples: list[Sample]) -> None:
    """Make `samples` what the server says of this process. Does nothing in a process that no server started."""
    if OF_SEVERAL_SERVERS in os.environ:
        for name, labels, value in samples:
            _gauge(name, tuple(labels)).labels(**labels).set(value)
    elif folder := os.environ.get(FOLDER):
        file = Path(folder) / f"{os.getpid()}.json"
        aside = file.with_suffix(".new")
        aside.write_text(json.dumps(samples))
        os.replace(aside, file)  # the server never reads half a file


@functools.cache
def _gauge(name: str, labels: tuple[str, ...]) -> Gauge:
    # max: prometheus_client merges the processes' values; each series is of one process, whose number is no label then
    return Gauge(name, DESCRIPTIONS[name], labels, multiprocess_mode="max")


class Collector:
    """What prometheus_client asks at a scrape."""

    def describe(self) -> list[GaugeMetricFamily]:
        """No names in advance: workers may come later."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The samples of all processes, one family per metric."""
        samples = [sample for file in sorted(Path(os.environ[FOLDER]).glob("*.json")) for sample in _read(file)]
        for name, description in DESCRIPTIONS.items():
            family = GaugeMetricFamily(name, description)
            for sample, labels, value in samples:
                if sample == name:
                    family.add_sample(name, labels, value)
            if family.samples:
                yield family


def _read(file: Path) -> list[Sample]:
    try:
        return [(name, labels, value) for name, labels, value in json.loads(file.read_text())]
    except (OSError, ValueError):  # its process has just ended
        return []
