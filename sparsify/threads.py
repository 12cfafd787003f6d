"""How many threads compute, and how they wait for each other: decided before torch is imported, which reads it once.

Threads of an OpenMP region meet at its end. GNU's runtime, which torch brings along, lets those that are early spin for
milliseconds, so with another program on one of the cores the threads hold the very core that the last one of them waits
for. Here they spin for a fraction of a millisecond, longer than the serial part between two kernels, and then sleep: not to
spin at all costs a sleep and a wake-up at every kernel (docs/kernel-log.md).

Only the commands call `prepare`; a program that imports sparsify keeps its environment. What the user has set wins.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

COUNT = "OMP_NUM_THREADS"
COUNTS = (COUNT, "MKL_NUM_THREADS")  # either of them decides how many threads torch starts
POLICY = "OMP_WAIT_POLICY"
SPIN = {
    "GOMP_SPINCOUNT": "10000",  # GNU's runtime: turns of an empty loop, 12 to 50 ns each, by default 300000
    "KMP_BLOCKTIME": "1",  # Intel's and LLVM's: milliseconds, by default 200
}
ROOT = Path("/")

_ours: dict[str, str] = {}  # what `prepare` has set in this process


@dataclass(frozen=True)
class Threads:
    """How many threads compute, on which logical CPUs (one for each core), and why so many.

    limited: whether a control group grants fewer cores than there are
    """

    cpus: tuple[int, ...]
    reason: str
    limited: bool = False

    @property
    def count(self) -> int:
        return len(self.cpus)


def prepare(
    also: Mapping[str, str] | None = None, environment: MutableMapping[str, str] | None = None
) -> dict[str, str]:
    """Set the number of threads and how they wait, unless the user has. Returns what was set.

    also: further variables that libraries read when they are imported. Does nothing once torch is: its OpenMP runtime has
    read the environment by then.
    """
    variables = os.environ if environment is None else environment
    if "torch" in sys.modules:
        return {}
    chosen = defaults(variables) | {name: value for name, value in (also or {}).items() if name not in variables}
    variables.update(chosen)
    _ours.update(chosen)
    return chosen


def defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `prepare` adds to an environment."""
    chosen = {} if any(environment.get(name) for name in COUNTS) else {COUNT: str(threads().count)}
    return chosen | waiting(environment)


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep threads from spinning for long, where the user has not set how they wait."""
    if any(name in environment for name in (POLICY, *SPIN)):
        return {}
    return dict(SPIN)


def chosen_here() -> dict[str, str]:
    """What `prepare` has set in this process."""
    return dict(_ours)


def users_environment() -> dict[str, str]:
    """The environment without what `prepare` has set: for programs that choose their own number of threads, as vLLM does."""
    return {name: value for name, value in os.environ.items() if _ours.get(name) != value}


# ------------------------------------------------------------------------------------------------------------- cores


def threads(cpus: Iterable[int] | None = None, root: Path = ROOT) -> Threads:
    """One thread for each core that this process may use: logical CPUs of one core share its arithmetic.

    cpus: the logical CPUs to choose from, by default those that the process may run on; root: of the file system
    """
    usable = sorted(cpus if cpus is not None else usable_cpus())
    cores = one_per_core(usable, root)
    quota = cpu_quota(root)
    if quota is not None and math.ceil(quota) < len(cores):
        reason = f"the control group grants {quota:g} of {len(cores)} cores"
        return Threads(tuple(cores[: math.ceil(quota)]), reason, limited=True)
    if len(cores) < len(usable):
        return Threads(tuple(cores), f"{len(usable)} logical CPUs on {len(cores)} cores")
    return Threads(tuple(cores), f"{len(cores)} core{'s' if len(cores) > 1 else ''}")


def usable_cores() -> int:
    """Logical CPUs that this process can keep busy: containers are often given fewer than the machine has."""
    count = len(usable_cpus())
    quota = cpu_quota()
    return count if quota is None else min(count, math.ceil(quota))


def usable_cpus() -> list[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def one_per_core(cpus: Iterable[int], root: Path = ROOT) -> list[int]:
    """The first of the logical CPUs on each core; all of them where the system does not tell."""
    found: dict[str, int] = {}
    for cpu in cpus:
        file = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        found.setdefault(_read(file) or f"cpu {cpu}", cpu)
    return list(found.values())


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the control groups of this process grant it, None without a limit. 1.5: one and a half.

    root: of the file system. Control groups of either version count, and those that hold ours.
    """
    return min((limit for folder in _control_groups(root) if (limit := _limit(folder)) is not None), default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """The directories of the CPU controller for this process, from its own group up to the top one.

    In a container the path in /proc may be that on the host, of which only the top directory is mounted.
    """
    mounts = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = [mounts, mounts / "unified"] if not controllers else [mounts / controllers, mounts / "cpu"]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in names:
            group = mount / path.strip("/")
            yield group
            while group != mount:
                group = group.parent
                yield group


def _limit(group: Path) -> float | None:
    """CPUs that one control group grants: cpu.max holds `QUOTA PERIOD` in microseconds, or `max PERIOD`."""
    v2 = (_read(group / "cpu.max") or "").split()
    v1 = [_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = v2 if len(v2) == 2 else v1
    if not quota.isdigit() or not period.isdigit() or not int(quota) or not int(period):
        return None  # `max`, -1, or no such file
    return int(quota) / int(period)


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
