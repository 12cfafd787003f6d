"""vLLM engines for tests: each a process of its own that answers all prompts once; comparisons that know rounding."""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [10, 90, 80, 70, 60, 50, 40, 30], list(range(3, 93))]
BFLOAT16_NOISE = 0.06  # in log-probabilities of these models: measured 0.03 at most
SCRIPT = Path(__file__).with_name("generate.py")
TIMEOUT = 900  # seconds for one engine, on a machine that is busy


@dataclass(frozen=True)
class Answers:
    """What one engine said. tokens: [prompt][step]; logprobs: [prompt][step] of the best few tokens; log: its output.

    together, alone: what it said to the mixed requests of `serve`, all in flight at once and one after another.
    adapted: what it said with the adapter of `serve`; reloaded: with the weights of each directory of `reload`.
    """

    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    log: str
    together: "Answers | None" = None
    alone: "Answers | None" = None
    adapted: "Answers | None" = None
    reloaded: "tuple[Answers, ...]" = ()


def serve(
    model: Path,
    scratch: Path,
    environment: dict[str, str] | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    mixed: Sequence[tuple[Sequence[int], int]] = (),
    adapter: Path | None = None,
    reload: Sequence[Path] = (),
    **engine: Any,
) -> Answers:
    """Start vLLM on `model`, answer the prompts greedily, stop. mixed: (prompt, new tokens) to answer in both ways.

    adapter: of LoRA, to answer with too; reload: checkpoints to read into the running engine and answer with, one by one
    """
    settings = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 128,
        "seed": 0,
        "skip_tokenizer_init": True,
    }
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # any machine, any number of ranks
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if "tensor_parallel_size" in engine else "0",
        "OMP_NUM_THREADS": "1" if "tensor_parallel_size" in engine else str(os.cpu_count() or 1),
        **(environment or {}),
    }
    result, log = scratch / "answers.json", scratch / "engine.log"
    job = {
        "prompts": [list(prompt) for prompt in prompts],
        "mixed": [[list(prompt), new_tokens] for prompt, new_tokens in mixed],
        "adapter": None if adapter is None else str(adapter), "reload": [str(directory) for directory in reload],
        "engine": {"model": str(model), **settings, **engine},
        "environment": variables, "folder": str(scratch), "log": str(log), "result": str(result),
    }  # fmt: skip
    result.unlink(missing_ok=True)
    status = _host().run(job)
    said = log.read_text(errors="replace")
    assert status == 0 and result.is_file(), f"vLLM failed with exit status {status}:\n{said[-30000:]}"
    found = json.loads(result.read_text())
    together, alone = (_answers(found[way], said) for way in ("together", "alone"))
    adapted = _answers(found["adapted"], said) if adapter is not None else None
    reloaded = tuple(_answers(told, said) for told in found["reloaded"])
    whole = _answers(found["answers"], said)
    return replace(whole, together=together, alone=alone, adapted=adapted, reloaded=reloaded)


class _Host:
    """The process that has vLLM imported and answers each job in a fork. It ends with this one, when its stdin is closed."""

    def __init__(self) -> None:
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={"GOMP_SPINCOUNT": "1000", **os.environ},  # threads that wait leave their core to other tests
        )  # fmt: skip

    def run(self, job: dict[str, Any]) -> int:
        """The exit status of the job; AssertionError where it takes too long or the host itself ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        if status := self.process.stdout.readline() if ready else "":
            return int(status)
        os.killpg(self.process.pid, signal.SIGKILL)
        _host.cache_clear()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace")[-3000:]
        raise AssertionError(f"vLLM {'ended' if ready else f'took more than {TIMEOUT} seconds'}:\n{said}")


@functools.cache
def _host() -> _Host:
    return _Host()


def _answers(told: Sequence[dict[str, Any]], log: str) -> Answers:
    steps = [[{int(t): p for t, p in step.items()} for step in answer["logprobs"]] for answer in told]
    return Answers([answer["tokens"] for answer in told], steps, log)


def assert_same(ours: Answers, theirs: Answers, noise: float = BFLOAT16_NOISE, tie: float | None = None) -> None:
    """Equal tokens, or a tie within `tie` at the first difference; and log-probabilities equal within `noise` until then."""
    tie = noise if tie is None else tie
    for a, b, of_a, of_b in zip(ours.tokens, theirs.tokens, ours.logprobs, theirs.logprobs, strict=True):
        assert len(a) == len(b)
        for chosen_a, chosen_b, p, q in zip(a, b, of_a, of_b, strict=True):
            shared = p.keys() & q.keys()
            assert len(shared) >= 2 and all(abs(p[token] - q[token]) <= noise for token in shared)
            if chosen_a != chosen_b:
                assert {chosen_a, chosen_b} <= shared and abs(p[chosen_a] - p[chosen_b]) <= tie
                break  # the texts part here


def distances(
    answers: Answers,
    model: Path,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    dtype: torch.dtype = torch.float32,
    adapter: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """From what transformers computes for `model` in `dtype`, fed with the same tokens, in log-probabilities:
    how far each one that was told lies from it, and how far each chosen token lies below the best."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if adapter is not None:
        reference.load_adapter(str(adapter))
    told, chosen = [], []
    for prompt, tokens, steps in zip(prompts, answers.tokens, answers.logprobs, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        for exact, token, found in zip(logits.log_softmax(1), tokens, steps, strict=True):
            told += [logprob - exact[other].item() for other, logprob in found.items()]
            chosen.append((exact.max() - exact[token]).item())
    return torch.tensor(told).abs(), torch.tensor(chosen)


def assert_follows(
    answers: Answers, model: Path, noise: float, dtype: torch.dtype = torch.float32, adapter: Path | None = None
) -> None:
    """The log-probabilities are those that transformers computes for `model` in `dtype`, fed with the same tokens."""
    told, chosen = distances(answers, model, dtype=dtype, adapter=adapter)
    assert told.max() <= noise and chosen.max() <= noise
