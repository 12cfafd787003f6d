"""One vLLM engine in a process of its own: reads a JSON job on stdin, writes tokens and log-probabilities to a file.

python generate.py RESULT < JOB     JOB = {"prompts": [[ids]], "engine": {keywords of vllm.LLM}}
"""

import json
import sys
from pathlib import Path

TOP = 5
NEW_TOKENS = 16

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    engine = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=TOP, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    result = [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": [{str(t): p.logprob for t, p in step.items()} for step in answer.outputs[0].logprobs],
        }
        for answer in answers
    ]
    Path(sys.argv[1]).write_text(json.dumps(result))
