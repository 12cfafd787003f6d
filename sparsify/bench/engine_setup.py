"""How vLLM is set up on this machine: that it is installed, its kernels built, its threads and processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from sparsify.bench import vllm_cli
from sparsify.bench.machine import BIND, ONE_PROCESS, serving_environment, thread_binding
from sparsify.bench.workload import BenchOptions
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.model.checkpoint import open_checkpoint
from sparsify.native.build import build_ahead
from sparsify.runtime.backends.cpu import INT8_VARIABLE
from sparsify.runtime.vllm_versions import CPU_BUILD, installed_as, installed_version, version_problem


def require_vllm() -> None:
    """Raises MissingDependency with the way to install it, also where a version is installed that the plugin does not run in."""
    install = "pip install 'sparsify-24[cpu]' (on a machine with an NVIDIA GPU: pip install 'sparsify-24[cuda]')"
    if find_spec("vllm") is None:
        raise MissingDependency(f"this command needs vLLM, which is not installed: {install}")
    if problem := version_problem(installed_version()):
        raise MissingDependency(f"{problem}; {install}")


def build_for(formats: Iterable[str]) -> None:
    """Build the CPU kernels that checkpoints of these formats need: here the progress is shown, inside vLLM it is not."""
    if installed_as() == CPU_BUILD and any(name.startswith("sparse24") for name in formats):
        build_ahead(("cpu/sparse24", "cpu/sparse24_torch"))


def prepare_engine(models: Iterable[str | Path]) -> None:
    """Make this process one in which vLLM starts as `sparsify serve` starts it: its environment, and the models' kernels built."""
    require_vllm()
    build_for([str((open_checkpoint(one).config.get("quantization_config") or {}).get("format")) for one in models])
    os.environ.update(serving_environment())
    vllm_cli.answer_for_the_cpu_build()


def thread_settings(options: BenchOptions, environment: Mapping[str, str]) -> list[str]:
    """The values of VLLM_CPU_OMP_THREADS_BIND to measure every model with."""
    if options.threads and options.best_threads:
        raise SparsifyError("give --threads or --best-threads, not both")
    if options.best_threads:
        ranks = tensor_parallel_ranks(options.engine_args)
        return list(dict.fromkeys(thread_binding(choice, ranks) for choice in ("auto", "all")))
    if options.threads:
        return [thread_binding(options.threads, tensor_parallel_ranks(options.engine_args))]
    return [environment[BIND]]


def one_process_environment(engine_args: Sequence[str]) -> dict[str, str]:
    """What makes vLLM keep its scheduler and its worker in one process.

    Otherwise the scheduler waits for the worker in a busy loop, on a core that may be computing, and every step crosses
    from process to process and back. Several ranks need several processes.
    """
    if tensor_parallel_ranks(engine_args) > 1:
        raise SparsifyError("--one-process serves one rank: leave it away with --tensor-parallel-size")
    return {ONE_PROCESS: "0"}


def int8_environment(wanted: bool) -> dict[str, str]:
    """What lets the CPU back end multiply in int8; without it the shell decides."""
    return {INT8_VARIABLE: "1"} if wanted else {}


def tensor_parallel_ranks(engine_args: Sequence[str]) -> int:
    """What `--tensor-parallel-size` says, in any spelling that vLLM takes."""
    names = ("--tensor-parallel-size", "--tensor_parallel_size", "-tp")
    joined = [part for argument in engine_args for part in argument.split("=", 1)]
    for name, value in zip(joined, joined[1:], strict=False):
        if name in names and value.isdigit():
            return max(1, int(value))
    return 1
