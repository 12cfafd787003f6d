"""`sparsify serve`: vLLM's server on a model, in the environment in which the benchmarks measure it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsify.bench.engine_setup import (
    build_for,
    int8_environment,
    one_process_environment,
    require_vllm,
    tensor_parallel_ranks,
)
from sparsify.bench.machine import BIND, serving_environment, thread_binding, thread_environment
from sparsify.formats.belonging import check_tensors
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.permissions import trusts_remote_code


def serve(
    directory: str | Path,
    extra_args: Sequence[str] = (),
    threads: str | None = None,
    one_process: bool = False,
    int8: bool = False,
    replace: Callable[..., Any] = os.execvpe,
) -> None:
    """Replaces this process by `vllm serve` on a model, with the environment the benchmarks use; does not return."""
    require_vllm()
    overrides = {BIND: thread_binding(threads, tensor_parallel_ranks(extra_args))} if threads else {}
    overrides |= one_process_environment(extra_args) if one_process else {}
    overrides |= int8_environment(int8)
    environment = serving_environment(overrides)
    environment |= thread_environment(environment[BIND], environment)
    checkpoint = open_checkpoint(directory)
    check_tensors(checkpoint)
    build_for([str((checkpoint.config.get("quantization_config") or {}).get("format"))])
    command = [sys.executable, "-m", "sparsify.bench.vllm_cli", "serve", str(checkpoint.directory), *extra_args]
    if trusts_remote_code():
        command.append("--trust-remote-code")
    if not any(argument.split("=")[0] == "--served-model-name" for argument in extra_args):
        # A path of the server makes a poor name in every client; the directory's name is what people call the model.
        command += [
            "--served-model-name",
            Path(directory).resolve().name if Path(directory).is_dir() else str(directory),
        ]
    replace(command[0], command, environment)
