"""Which kernel and which tile the Triton back end takes for a product, by a rule or by measurements of this GPU.

The rule (`triton_config.heuristic`) needs nothing. `tune` times a list of candidates for the shapes it is given and keeps the fastest
in a file per GPU, versions of Triton and kernels under sparsify's cache; later processes read it. Nothing is ever
timed while a model serves unless SPARSIFY_TRITON_TUNE=1 asks for it, and never inside a captured CUDA graph.
"""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.files import atomic_write, cache_directory
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.triton_config import KINDS, Config, heuristic
from sparsify.runtime.backends.triton_launch import run

TUNE_VARIABLE = "SPARSIFY_TRITON_TUNE"
UNKNOWN_PROCESSORS = 108  # for the rule when no GPU is at hand (interpreter): an A100 has as many

logger = logging.getLogger(__name__)


def bucket(rows: int) -> int:
    """Numbers of rows that share a configuration: 1, up to 16, and then powers of two up to 2048."""
    return 1 if rows == 1 else min(2048, max(16, 1 << (rows - 1).bit_length()))


def choose_config(rows: int, scheme: ModuleScheme, device: torch.device) -> Config:
    """What `tune` found for this GPU and product, or the rule. rows: M, the tokens multiplied at once."""
    table = _table(device)
    found = table.get(_key(rows, scheme))
    if found is None and _tune_wanted() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        found = tune([(rows, scheme)], device)[rows, scheme]
    return found or heuristic(rows, scheme, _processors(device))


def candidates(rows: int, scheme: ModuleScheme, processors: int) -> list[Config]:
    """The configurations that `tune` times: the rule's own first, and its neighbours."""
    n, k = scheme.shape
    rule = heuristic(rows, scheme, processors)
    found = [rule]
    if rows <= 2:
        found += [Config("gemv", 1, block_n, block_k, 1, warps, 1) for block_n, block_k, warps in GEMV_TILES]
    if 1 < rows <= 2048:
        largest = min(128, max(16, 1 << (rows - 1).bit_length()))
        for block_m in {largest, max(16, largest // 2)}:
            for block_n, warps in ((32, 2), (64, 4), (128, 4), (128, 8)):
                tiles = -(-rows // block_m) * -(-n // block_n)
                full = max(1, processors // tiles)
                for splits in sorted({1, full, 2 * full, 4 * full}):
                    if splits == 1 or (rows <= 128 and k // splits >= 256):
                        found.append(Config("gemm", block_m, block_n, 128, splits, warps, 3))
    if rows >= 128:
        found += [Config("decode", 1, 32, 256, 1, 4, 1), Config("decode", 1, 64, 128, 1, 4, 1)]
    return list(dict.fromkeys(found))


GEMV_TILES = ((16, 1024, 4), (16, 2048, 8), (32, 512, 4), (32, 1024, 8), (64, 512, 8), (32, 2048, 16))


def tune(
    shapes: Iterable[tuple[int, ModuleScheme]],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[tuple[int, ModuleScheme], Config]:
    """Time the candidates for each (rows, scheme) on `device` with random weights, and keep the fastest on disk.

    measure: seconds, or any other number to be small, of one call; by default Triton's own benchmark, which empties the
    cache of the GPU between calls.
    """
    best = {}
    for rows, scheme in shapes:
        prepared, x, y = _random_product(rows, scheme, device, dtype)
        times = {}
        for config in candidates(rows, scheme, _processors(device)):
            call = functools.partial(run, config, x, prepared, None, scheme, y)
            try:
                times[config] = (measure or _benchmark)(call)
            except Exception as error:  # out of shared memory or registers on this GPU: not a candidate here
                logger.debug("triton: %s does not run here: %s", config, error)
        if not times:
            raise SparsifyError(f"no Triton configuration runs {rows} rows with {scheme} on {device}")
        best[rows, scheme] = min(times, key=lambda config: times[config])
    _store(device, {_key(rows, scheme): config for (rows, scheme), config in best.items()})
    return best


def _benchmark(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def _random_product(
    rows: int, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prepared weights of any bytes (every byte is a valid one to the kernels), x: [M, K] and y: [M, N]."""
    n, k = scheme.shape
    units, sparse = -(-k // 32), scheme.pattern == "2:4"
    words = (scheme.bits // 2 + 1) if sparse else scheme.bits
    shape = (-(-n // 32), units, words, 32)
    packed = torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device=device)
    scales = torch.ones(shape[0], k // scheme.group_size, 32, dtype=dtype, device=device)
    x = torch.randn(rows, k, dtype=dtype, device=device)
    return [packed, scales if scheme.bits < 16 else scales.new_empty(0)], x, x.new_empty(rows, n)


def _tune_wanted() -> bool:
    wanted = os.environ.get(TUNE_VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise SparsifyError(f"{TUNE_VARIABLE}={wanted}: expected 0 or 1")
    return wanted == "1"


def _key(rows: int, scheme: ModuleScheme) -> str:
    n, k = scheme.shape
    group = "channel" if scheme.group_size == k else str(scheme.group_size)
    return f"{scheme.pattern} {scheme.bits} bits, group {group}, {bucket(rows)} x {n} x {k}"


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return UNKNOWN_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def table_path(device: torch.device) -> Path:
    """Measurements of this GPU with this Triton and these kernels."""
    import triton

    kernels = Path(__file__).with_name("triton_kernels.py").read_bytes()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    short = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    version = f"{triton.__version__}-{torch.__version__}".replace("+", "-")
    return cache_directory() / "triton" / f"{short}-{version}-{hashlib.sha256(kernels).hexdigest()[:12]}.json"


@functools.cache
def _table(device: torch.device) -> dict[str, Config]:
    """What was measured on this GPU so far; empty when nothing was, or when the file is no table."""
    path = table_path(device)
    try:
        return {key: _config(entry) for key, entry in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        logger.warning("triton: %s cannot be used (%s); remove it and tune again", path, error)
        return {}


def _config(entry: dict[str, Any]) -> Config:
    """A configuration from JSON; ValueError when it is none."""
    config = Config(**entry)
    numbers = [getattr(config, field.name) for field in fields(Config) if field.name != "kind"]
    if config.kind not in KINDS or not all(isinstance(number, int) and 0 < number <= 4096 for number in numbers):
        raise ValueError(f"{entry} is no configuration")
    return config


def _store(device: torch.device, found: dict[str, Config]) -> None:
    """Add to the table in memory and on disk. Two processes that tune at once lose one another's entries, nothing else."""
    table = _table(device)
    table.update(found)
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({key: asdict(config) for key, config in sorted(table.items())}, indent=1) + "\n")
