"""Cold and warm starts of a model's engine, by vLLM's own `vllm bench startup`.

Cold: with caches of torch.compile and vLLM that are empty. Warm: after a start of the same model. vLLM measures both in processes of
their own, without a server in front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsify.bench.engine_process import ModelFailed, explain_failure, how_it_ended, run_logged
from sparsify.bench.targets import Target
from sparsify.bench.under_load.result import STARTS
from sparsify.bench.under_load.server import vllm_command
from sparsify.bench.under_load.workload import UnderLoad, server_arguments
from sparsify.errors import MissingDependency

# How vLLM's JSON calls the seconds of every start, in the order of STARTS.
THEIRS = ("cold_startup_times", "cold_compilation_times", "warm_startup_times", "warm_compilation_times")


def require_startup() -> None:
    """MissingDependency where the installed vLLM has no such benchmark."""
    found = find_spec("vllm")
    if found is None or found.origin is None or not (Path(found.origin).parent / "benchmarks" / "startup.py").is_file():
        raise MissingDependency("this vLLM has no `vllm bench startup`: leave out --startup, or install vLLM 0.32")


def startup_arguments(target: Target, load: UnderLoad) -> list[str]:
    """Of `vllm bench startup`, without the model: the engine's as for the server, and how often."""
    count = str(load.startup)
    return [*target.engine_args, *server_arguments(load), "--num-iters-cold", count, "--num-iters-warm", count]


def measure_startup(target: Target, load: UnderLoad, environment: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Seconds of every start, by the names of STARTS. ModelFailed where vLLM does not get to its result."""
    result = log.with_suffix(".vllm.json")
    result.unlink(missing_ok=True)
    arguments = ["--model", str(target.directory), *startup_arguments(target, load), "--output-json", str(result)]
    status = run_logged(
        vllm_command(["bench", "startup", *arguments]), environment, log, load.timeout * (2 * load.startup + 1)
    )
    told = f"{target.label}: vllm bench startup"
    if status != 0 or not result.is_file():
        raise ModelFailed(explain_failure(f"{told} {how_it_ended(status)}", log), log)
    try:
        said = json.loads(result.read_text(encoding="utf-8"))
        found = {
            ours: [float(seconds) for seconds in said[theirs]] for ours, theirs in zip(STARTS, THEIRS, strict=True)
        }
    except (KeyError, TypeError, ValueError) as error:
        what = f"{told} wrote a result that is not as vLLM 0.32 writes it ({type(error).__name__}: {error})"
        raise ModelFailed(explain_failure(what, log), log) from None
    return {**found, "vllm": said}
