"""vLLM engines, each in a process of its own: reads jobs from stdin, a line of JSON each, and answers with an exit status.

python generate.py < JOBS     JOB = {"prompts": [[ids]], "engine": {keywords of vllm.LLM},
                                     "mixed": [[[ids], new tokens]...],
                                     "adapter": directory or null, "reload": [directories],
                                     "environment": of its process, "folder": to run in, "log": file, "result": file}

result = {"answers": to the prompts, "adapted": the same with the adapter, "reloaded": the same after each of `reload` has
          been read into the running engine, "together": to the mixed requests while they come in,
          "alone": one after another}

Importing vLLM takes 20 seconds of a core, which is more than a tiny model takes. So that is done once, and each job is
answered by a fork, which has made nothing yet: no engine, no threads.
"""

import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

from sparsify.bench.vllm_level import hold_vllm_down

hold_vllm_down()  # also in the processes that vLLM spawns, which import this file

TOP = 5
NEW_TOKENS = 16


def told(answer: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of one finished request."""
    [output] = answer.outputs
    return {
        "tokens": list(output.token_ids),
        "logprobs": [{str(t): p.logprob for t, p in step.items()} for step in output.logprobs],
    }


def arriving(engine: Any, requests: list[tuple[Any, Any]]) -> list[Any]:
    """Answers requests that come in while others are being answered: so prompts and new tokens share batches."""
    core, finished, waiting = engine.llm_engine, {}, deque(enumerate(requests))
    while waiting or core.has_unfinished_requests():
        # eight at once, then one, two or three in every step until all are there
        for _ in range(8 if not finished and len(waiting) == len(requests) else 1 + len(waiting) % 3):
            if waiting:
                number, (prompt, sampling) = waiting.popleft()
                core.add_request(str(number), prompt, sampling)
        for answer in core.step():
            if answer.finished:
                # the engine appends letters of its own to the names of requests
                finished[int(answer.request_id.partition("-")[0])] = answer
    return [finished[number] for number in range(len(requests))]


def answer(job: dict[str, Any]) -> None:
    """What one process does: start the engine, tell its tokens, stop."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    def greedy(new_tokens: int) -> Any:
        return SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=TOP, ignore_eos=True, detokenize=False)

    engine = LLM(**job["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    result = {"answers": [told(a) for a in engine.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False)]}
    if job["adapter"]:
        adapter = LoRARequest("adapter", 1, job["adapter"])
        adapted = engine.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False, lora_request=adapter)
        result["adapted"] = [told(a) for a in adapted]
    result["reloaded"] = []
    for directory in job["reload"]:
        engine.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        engine.reset_prefix_cache()  # it holds what the old weights made
        result["reloaded"].append([told(a) for a in engine.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False)])
    mixed = [({"prompt_token_ids": ids}, greedy(new_tokens)) for ids, new_tokens in job["mixed"]]
    engine.reset_prefix_cache()
    result["together"] = [told(answer) for answer in arriving(engine, mixed)]
    alone = []
    for prompt, sampling in mixed:
        engine.reset_prefix_cache()  # what was computed for others must not be what is compared
        alone += engine.generate([prompt], sampling, use_tqdm=False)
    result["alone"] = [told(answer) for answer in alone]
    Path(job["result"]).write_text(json.dumps(result))


def become(job: dict[str, Any]) -> None:
    """Makes this process look as if it had been started for the job."""
    os.environ.clear()
    os.environ.update(job["environment"])
    hold_vllm_down()  # its variables went with the others
    os.chdir(job["folder"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for given, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(given, number)
    import torch

    if (threads := int(os.environ["OMP_NUM_THREADS"])) != torch.get_num_threads():  # it was read with torch
        torch.set_num_threads(threads)


def main() -> None:
    """A fork per job, one after another."""
    statuses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no status
    from vllm import LLM, SamplingParams  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            become(job)
            return answer(job)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=statuses, flush=True)


# vLLM's processes are spawned and import this file again: only the real call may read jobs.
if __name__ == "__main__":
    main()
