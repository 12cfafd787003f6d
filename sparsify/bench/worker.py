"""Runs vLLM's own benchmarks for one model in this process: `python -m sparsify.bench.worker JOB.json`.

The job names the engine arguments and a list of benchmarks (`vllm.benchmarks.latency`, `.throughput`) with their
arguments, exactly those of `vllm bench`. Starting vLLM takes longer than measuring a small model, so all benchmarks of
the job share one engine: the first one starts it and the others are handed the same object. vLLM's benchmarks draw every
token at temperature 1; a job that asks for greedy decoding gets it, which they have no option for. Nothing else of vLLM
is touched, and nothing of sparsify is imported but what keeps vLLM to the level that SPARSIFY_CPU_LEVEL names: the plugin
reaches vLLM the way it does in production.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.bench.vllm_level import hold_vllm_down

hold_vllm_down()  # also in the processes that vLLM spawns, which import this file

ANSWER_TOKENS = 48


def share_engine(llm_class: Any) -> list[Any]:
    """Makes `LLM.from_engine_args` return the engine it built first; returns the list that will hold it."""
    build = llm_class.from_engine_args
    built: list[Any] = []

    def from_engine_args(engine_args: Any) -> Any:
        if not built:
            built.append(build(engine_args))
        return built[0]

    llm_class.from_engine_args = staticmethod(from_engine_args)
    return built


def decode_greedily(llm_class: Any) -> None:
    """Makes `LLM.generate` take the best token, whatever the `SamplingParams` of vLLM's benchmarks say."""
    generate = llm_class.generate

    def greedily(self: Any, prompts: Any, sampling_params: Any, *arguments: Any, **keywords: Any) -> Any:
        for asked in sampling_params if isinstance(sampling_params, Sequence) else [sampling_params]:
            asked.temperature = 0.0
        return generate(self, prompts, sampling_params, *arguments, **keywords)

    llm_class.generate = greedily


def answer(engine: Any, prompts: list[str]) -> list[str]:
    """What the model replies to each prompt as a user's turn, greedily."""
    from vllm import SamplingParams

    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    return [output.outputs[0].text for output in engine.chat(conversations, greedy, use_tqdm=False)]


def end_with_parent() -> None:
    """End this session, vLLM's processes with it, as soon as the process that started it is gone, killed for instance."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpid(), signal.SIGKILL)

    if os.getpgid(0) == os.getpid():  # a session of its own, as `run_logged` gives it
        threading.Thread(target=watch, name="parent", daemon=True).start()


def run_job(job: dict[str, Any]) -> None:
    """job: {"engine": [argument...], "runs": [{"benchmark": "latency"|"throughput", "arguments": [...]}...],
    "greedy": bool, "prompts": [...], "answers": file for the replies}"""
    import vllm
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    built = share_engine(vllm.LLM)
    if job.get("greedy"):
        decode_greedily(vllm.LLM)
    for run in job["runs"]:
        benchmark = importlib.import_module(f"vllm.benchmarks.{run['benchmark']}")
        parser = FlexibleArgumentParser()
        benchmark.add_cli_args(parser)
        benchmark.main(parser.parse_args([*job["engine"], *run["arguments"]]))
    if job.get("prompts"):
        Path(job["answers"]).write_text(json.dumps(answer(built[0], job["prompts"])))


# vLLM starts its engine in a spawned process that imports this file again: only the real call may run the job.
if __name__ == "__main__":
    end_with_parent()
    run_job(json.loads(Path(sys.argv[1]).read_text()))
