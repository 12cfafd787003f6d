"""A forced level is what vLLM sees, in a process of its own and in those that it spawns."""

import os
import subprocess
import sys

import pytest

from sparsify.bench.machine import serving_environment
from sparsify.bench.vllm_level import QUESTIONS
from sparsify.processor import FORCE, other_variables

ASK = """
import os, sys, torch
for name in {names}:
    setattr(torch.cpu, name, lambda: True)
import sparsify.bench.worker
print(*(int(getattr(torch.cpu, name)()) for name in {names}))
print(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
"""


def answers(level: str | None) -> list[int]:
    return [int(answer) for answer in seen(level)[0].split()]


def seen(level: str | None) -> tuple[str, str]:
    """What a process that imports vLLM's worker is told, and where torch.compile keeps its kernels there."""
    environment = {k: v for k, v in os.environ.items() if k != FORCE}
    environment |= {} if level is None else {FORCE: level}
    script = ASK.format(names=list(QUESTIONS))
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    told, _, cache = run.stdout.partition("\n")
    return told, cache.strip()


def test_compiled_kernels_of_a_level_are_not_used_at_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor finds a kernel by its graph, whatever the level: one made for AVX-512 gave wrong indices at AVX2."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/of/the/user")
    assert seen("avx2")[1] == "/somewhere/of/the/user"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_me")  # as torch leaves it behind
    assert seen("avx2")[1].endswith("avx2")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    caches = [seen(level)[1] for level in (None, "avx2", "avx512")]
    assert len(set(caches)) == 3 and caches[0] == "" and caches[1].endswith("avx2")


def test_vllm_sees_the_forced_level() -> None:
    """AVX-512, its bfloat16, VNNI, AMX, AMX for float16: as far as the level goes, and all of it without one."""
    assert answers(None) == [1, 1, 1, 1, 1]
    assert answers("avx2") == [0, 0, 0, 0, 0]
    assert answers("avx512") == [1, 0, 0, 0, 0]
    assert answers("avx512bf16") == [1, 1, 1, 0, 0]
    assert answers("amx") == [1, 1, 1, 1, 1]


def test_libraries_of_served_models_keep_to_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in other_variables("avx2"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(FORCE, "avx2")
    assert other_variables("avx2").items() <= serving_environment().items()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert serving_environment()["ATEN_CPU_CAPABILITY"] == "default", "what the shell sets wins"
    monkeypatch.delenv(FORCE)
    assert "ONEDNN_MAX_CPU_ISA" not in serving_environment()
