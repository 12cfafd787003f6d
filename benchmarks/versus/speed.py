"""One round of speed of one model in vLLM: `python -m benchmarks.versus.speed JOB.json`.

The job: model (directory), input_len, output_len, prompts, iterations, warmup, timeout, result, which gets the raw seconds by the
names that `peers/llamacpp_speed.py` has.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.versus.program import call
from sparsify.bench import BenchOptions, LatencyWorkload, ThroughputWorkload
from sparsify.bench.run import measure
from sparsify.files import write_json


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    latency = LatencyWorkload(job["input_len"], job["output_len"], 1, job["iterations"], job["warmup"])
    throughput = ThroughputWorkload(job["input_len"], job["output_len"], job["prompts"])
    options = BenchOptions(threads="all", greedy=True, timeout=job["timeout"], quiet=True)
    found = measure([job["model"]], latency, throughput, options)
    row = found.models[0]
    assert row.latency is not None and row.throughput is not None
    write_json(
        job["result"],
        {
            "first_token_seconds": row.latency.first_token_seconds,
            "request_seconds": row.latency.request_seconds,
            "elapsed_seconds": row.throughput.elapsed_seconds,
            "versions": found.versions,
            "environment": found.environment,
            "commands": found.commands,
        },
    )


if __name__ == "__main__":
    call(main)
