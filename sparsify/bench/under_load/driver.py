"""One measurement: `vllm bench serve` against a running server, and what its JSON says."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.bench.engine_process import ModelFailed, explain_failure, how_it_ended, run_logged
from sparsify.bench.serving import LOOPBACK
from sparsify.bench.under_load.server import SERVED, Server, vllm_command
from sparsify.bench.under_load.workload import UnderLoad, driver_arguments

# Per token or of the texts; what remains per request is kept.
LEFT_OUT = ("itls", "generated_texts", "errors", "queue_times")


def drive(
    server: Server,
    load: UnderLoad,
    rate: float,
    repeat: int,
    environment: Mapping[str, str],
    log: Path,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Drives a server at `rate` requests per second and returns the measurement: vLLM's JSON and what was seen of the server.

    ModelFailed where the server dies, the time limit passes, or any request fails: the latencies of those that a server
    answers are not those of its load. watch: called every second or more often.
    """
    server.peaks.clear()
    with tempfile.TemporaryDirectory(prefix="sparsify-bench-") as scratch:
        output = Path(scratch) / "result.json"
        command = driver_command(server, load, rate, repeat, output)

        def look() -> None:
            server.observe()
            watch()

        status = run_logged(vllm_command(command), without_proxy(environment), log, load.timeout, look)
        server.check()
        label = server.target.label
        if status is None:
            raise server.failure(
                f"took longer than the time limit of {load.timeout:g} s for {load.requests} requests at {told_rate(rate)}"
            )
        if status != 0 or not output.exists():
            what = how_it_ended(status) if status else "wrote no result"
            raise ModelFailed(explain_failure(f"{label}: vllm bench serve {what}", log), log)
        text = output.read_text(encoding="utf-8")
    try:
        result = json.loads(text)
        refuse_failures(server, result)
        return measurement(result, rate, repeat, server.peaks)
    except (KeyError, TypeError, ValueError) as error:
        what = f"wrote a result that is not as vLLM 0.32 writes it ({type(error).__name__}: {str(error)[:100]})"
        raise ModelFailed(explain_failure(f"{label}: vllm bench serve {what}", log), log) from error


def measurement(result: Mapping[str, Any], rate: float, repeat: int, peaks: Mapping[str, float]) -> dict[str, Any]:
    """What is kept of vLLM's JSON, without what it has per token, beside what was seen of the server meanwhile."""
    ended = completion_rate(result["start_times"], result["latencies"])
    return {
        "rate": None if math.isinf(rate) else rate,
        "repeat": repeat,
        "completion_rate": ended if ended is not None else result["request_throughput"],
        "server": dict(peaks),
        "vllm": {name: _as_json(value) for name, value in result.items() if name not in LEFT_OUT},
    }


def _as_json(value: Any) -> Any:
    """NaN and infinities as None: vLLM writes them, and JSON has none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def driver_command(server: Server, load: UnderLoad, rate: float, repeat: int, output: Path) -> list[str]:
    """The arguments of vLLM's command line, as they are run."""
    address = ["--backend", "openai", "--endpoint", "/v1/completions", "--host", LOOPBACK, "--port", str(server.port)]
    model = ["--model", SERVED, "--tokenizer", str(server.target.directory)]
    written = ["--save-result", "--save-detailed", "--disable-tqdm", "--result-dir", str(output.parent)]
    return [
        "bench", "serve", *address, *model, *driver_arguments(load, rate, repeat), *written,
        "--result-filename", output.name,
    ]  # fmt: skip


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which loopback is reached directly: vLLM's client asks the variables of proxies."""
    names = {name: ",".join(filter(None, [environment.get(name), LOOPBACK])) for name in ("no_proxy", "NO_PROXY")}
    return {**environment, **names}


def told_rate(rate: float) -> str:
    """A rate for a sentence."""
    return "all at once" if math.isinf(rate) else f"{rate:.4g} per second"


def refuse_failures(server: Server, result: Mapping[str, Any]) -> None:
    """ModelFailed where a request was not answered, with vLLM's words for the first of them."""
    asked, answered = result["num_prompts"], result["completed"]
    failed = result.get("failed", 0)
    if not failed and answered:
        return
    errors = [
        line.strip() for error in result.get("errors") or [] for line in str(error).splitlines()[-1:] if line.strip()
    ]
    cause = f": {errors[0][:300]}" if errors else ""
    raise server.failure(f"refused or dropped {failed or asked} of {asked} requests{cause}")


def completion_rate(starts: Sequence[float], latencies: Sequence[float]) -> float | None:
    """Requests that end per second, from the first end to the last; None where that is no time.

    A run of few requests ends with the answers that are still to come when the last request was sent, so that requests
    divided by the whole time (vLLM's request_throughput) lie below the rate of any server. Here a server that keeps up
    has the rate at which requests arrived, and one that does not has its own.
    starts, latencies: of every request, in seconds, as vLLM's `--save-detailed` writes them.
    """
    ends = [start + latency for start, latency in zip(starts, latencies, strict=True)]
    window = max(ends) - min(ends) if ends else 0.0
    return (len(ends) - 1) / window if window > 0 else None
