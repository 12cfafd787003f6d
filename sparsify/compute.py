"""The type in which matrix products of models are computed on this machine: bfloat16 where it is fast, else float32.

A processor without instructions for bfloat16 (AVX512-BF16, AMX-BF16, Arm's BF16) multiplies it up to eighty times slower
than float32. The instruction sets decide; a measurement of a few milliseconds, made once per machine and kept in the cache
directory, confirms that PyTorch uses them (`ONEDNN_MAX_CPU_ISA`, say, may keep it from that) and overrules them where it
does not. GPUs compute in bfloat16. A model that is stored in float32 or float16 is computed in float32 everywhere.

SPARSIFY_COMPUTE=float32 or bfloat16 forces the type, and SPARSIFY_CPU_LEVEL below avx512bf16 means float32, as on the older
processor that it stands for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsify.distributed import device
from sparsify.errors import SparsifyError
from sparsify.files import cache_directory, write_json
from sparsify.processor import FORCE as LEVEL
from sparsify.processor import LEVELS, cpu_flags, cpu_name, forced_level

FORCE = "SPARSIFY_COMPUTE"
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # flags of /proc/cpuinfo: two of x86, one of Arm
# What makes PyTorch and the libraries in it compute as an older processor would.
FORCING = (
    LEVEL,
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
)
MARGIN = 1.5  # how many times faster the other type must be measured before the instruction sets are overruled
SHAPE = (128, 512, 512)  # tokens, inputs and outputs of the measured linear
ROUNDS = 3


@dataclass(frozen=True)
class Rates:
    """Operations per second of one core in matrix products; a multiply-add counts two."""

    bfloat16: float
    float32: float

    def of(self, dtype: torch.dtype) -> float:
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32


@dataclass(frozen=True)
class Choice:
    """A type to compute in, and the reason in words.

    tiles: attention in bfloat16 is computed by tiles (`model.attention`), as suits a CPU that multiplies that type fast
    """

    dtype: torch.dtype
    why: str
    tiles: bool = False

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> str:
        """`computes in float32: this processor multiplies bfloat16 at 3 GFLOP/s per core, float32 at 80`"""
        return f"computes in {self.name}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.name, "why": self.why, "tiles": self.tiles}


_in_force: list[Choice] = []


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Whatever computes with a model meanwhile does so in this type: a run keeps the one that it was begun in."""
    _in_force.append(choice)
    try:
        yield
    finally:
        _in_force.pop()


def choose(measure: bool = False) -> Choice:
    """The type to compute in: that of the run that is going on, else what suits this machine.

    measure: time both types where that was not done yet on this machine; it takes milliseconds
    Raises SparsifyError for an unknown value of SPARSIFY_COMPUTE or SPARSIFY_CPU_LEVEL.
    """
    return _in_force[-1] if _in_force else for_this_machine(measure)


def for_this_machine(measure: bool = False) -> Choice:
    """As `choose`, whatever run is going on. The rates are measured even where something forces the type: `plan` shows them."""
    suited = _for_processor(rates(measure)) if device() == "cpu" else Choice(torch.bfloat16, "on a GPU")
    forced = asked()
    return suited if forced is None else replace(suited, dtype=forced, why=f"{FORCE} asks for it")


def _for_processor(measured: Rates | None) -> Choice:
    """What suits the processor, whatever SPARSIFY_COMPUTE asks for. measured: by `rates`."""
    level = forced_level()
    if level is not None and LEVELS.index(level) < LEVELS.index("avx512bf16"):
        return Choice(torch.float32, f"{LEVEL}={level} stands for a processor that multiplies bfloat16 slowly")
    found = judge(instructions(), measured)
    return replace(found, tiles=found.dtype == torch.bfloat16)


def judge(found: Collection[str], measured: Rates | None) -> Choice:
    """The type for a processor with the bfloat16 instructions `found`, as far as it was measured."""
    expected, other = ("bfloat16", "float32") if found else ("float32", "bfloat16")
    if measured is None:
        has = f"has {' and '.join(found)}" if found else "has no instructions for bfloat16"
        return Choice(TYPES[expected], f"this processor {has}")
    overruled = getattr(measured, other) > MARGIN * getattr(measured, expected)
    speeds = (
        f"this processor multiplies bfloat16 at {measured.bfloat16 / 1e9:.0f} GFLOP/s per core, "
        f"float32 at {measured.float32 / 1e9:.0f}"
    )
    return Choice(TYPES[other if overruled else expected], speeds)


def asked() -> torch.dtype | None:
    """The type that SPARSIFY_COMPUTE names; None for `auto` or nothing. SparsifyError for any other value."""
    forced = os.environ.get(FORCE, "")
    if forced in ("", "auto"):
        return None
    if forced not in TYPES:
        raise SparsifyError(f"{FORCE}={forced} is unknown; choose {', '.join(TYPES)} or auto")
    return TYPES[forced]


def for_model(stored: Collection[torch.dtype], measure: bool = False) -> Choice:
    """The type to compute a model in whose tensors are stored in these types."""
    if torch.bfloat16 not in stored:
        return Choice(torch.float32, "the checkpoint holds no bfloat16")
    return choose(measure)


def for_precision(precision: str) -> torch.dtype:
    """The type that a recipe's `precision` means: `auto` is that of the run, or of this machine."""
    return choose().dtype if precision == "auto" else TYPES[precision]


def instructions() -> list[str]:
    """The bfloat16 instructions that the operating system lists for this processor."""
    flags = cpu_flags()
    return [name for name in INSTRUCTIONS if name in flags]


# ------------------------------------------------------------------------------------------------------------- rates

_known: dict[str, Rates] = {}


def rates(measure: bool = False) -> Rates | None:
    """How fast one core multiplies; None where nobody measured it yet, unless `measure` is set.

    Kept in the cache directory under the processor's name, the version of torch and the variables that force a level.
    One thread is measured, by its own processor time, so other programs on the machine change little.
    """
    key = json.dumps(
        {"version": 1, "cpu": cpu_name(), "torch": torch.__version__, **{v: os.environ.get(v) for v in FORCING}},
        sort_keys=True,
    )
    file = cache_directory() / "compute" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if key not in _known:
        found = _read(file)
        if found is None and not measure:
            return None
        _known[key] = found or _measured()
    if measure and not file.exists():
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a measurement per process
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**asdict(_known[key]), "key": json.loads(key)})
    return _known[key]


def _read(file: Path) -> Rates | None:
    try:
        found = json.loads(file.read_text())
        kept = Rates(float(found["bfloat16"]), float(found["float32"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, or damaged: it is measured again
    return kept if min(kept.bfloat16, kept.float32) > 0 else None


@torch.no_grad()
def _measured() -> Rates:
    """Time a linear of both types in turn on one thread, by the time that the thread itself ran."""
    tokens, inputs, outputs = SHAPE
    threads = torch.get_num_threads()
    least = dict.fromkeys(TYPES, float("inf"))
    torch.set_num_threads(1)
    try:
        made = {
            name: (torch.ones(tokens, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype))
            for name, dtype in TYPES.items()
        }
        for attempt in range(ROUNDS + 1):
            for name, (x, weight) in made.items():
                start = time.thread_time()
                torch.nn.functional.linear(x, weight)
                if attempt:  # the first call prepares the kernel
                    least[name] = min(least[name], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    operations = 2 * tokens * inputs * outputs
    return Rates(**{name: operations / max(seconds, 1e-9) for name, seconds in least.items()})
