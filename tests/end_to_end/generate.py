"""One vLLM engine in a process of its own: reads a JSON job on stdin, writes tokens and log-probabilities to a file.

python generate.py RESULT < JOB     JOB = {"prompts": [[ids]], "engine": {keywords of vllm.LLM},
                                           "mixed": [[[ids], new tokens]...]}

RESULT = {"answers": to the prompts, "together": to the mixed requests while they come in, "alone": one after another}
"""

import json
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


if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    def greedy(new_tokens: int) -> Any:
        return SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=TOP, ignore_eos=True, detokenize=False)

    job = json.load(sys.stdin)
    engine = LLM(**job["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    result = {"answers": [told(a) for a in engine.generate(prompts, greedy(NEW_TOKENS), use_tqdm=False)]}
    mixed = [({"prompt_token_ids": ids}, greedy(new_tokens)) for ids, new_tokens in job["mixed"]]
    engine.reset_prefix_cache()
    result["together"] = [told(answer) for answer in arriving(engine, mixed)]
    alone = []
    for prompt, sampling in mixed:
        engine.reset_prefix_cache()  # what was computed for others must not be what is compared
        alone += engine.generate([prompt], sampling, use_tqdm=False)
    result["alone"] = [told(answer) for answer in alone]
    Path(sys.argv[1]).write_text(json.dumps(result))
