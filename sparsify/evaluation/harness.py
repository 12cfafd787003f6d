"""Multiple-choice tasks through lm-evaluation-harness: its task, its prompts, its scoring, around a model in memory.

This is what its `evaluate` does for tasks without examples in the prompt, without its own bars and its cache of requests.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from sparsify.data.fitting import refuse_beyond, vocabulary_of
from sparsify.errors import CheckpointError, MissingDependency, NumericalError, SparsifyError
from sparsify.evaluation.task_files import TaskFile
from sparsify.evaluation.task_score import Answers

try:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependency(
        f"tasks are scored by lm-evaluation-harness, which cannot be imported ({error}): pip install 'sparsify-24[eval]'"
    ) from error

BATCH = 8  # sequences in one forward pass, which are sorted by length

Pair = tuple[tuple[str, str], list[int], list[int]]  # prompt and answer as text, their tokens


class Watch:
    """What the harness calls with every log-likelihood as soon as it is known, in place of its cache.

    advance: called after every answer that was scored
    """

    def __init__(self, name: str, advance: Callable[[], None]) -> None:
        self.name, self.advance = name, advance

    def add_partial(self, attr: str, req: tuple[str, str], res: tuple[float, bool]) -> None:
        if not math.isfinite(res[0]):
            raise NumericalError(
                f"{self.name} gives NaN or infinite logits on the tasks: its weights are damaged or overflow; "
                "check them with `sparsify inspect`"
            )
        self.advance()


class HarnessModel(HFLM):
    """A model in memory and its tokenizer, as lm-evaluation-harness calls them. advance: that of `Watch`"""

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, advance: Callable[[], None] = lambda: None) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"{name}: its tokenizer has no token for the beginning or the end of a text, of which lm-evaluation-harness "
                "needs one; give eos_token in tokenizer_config.json"
            )
        with quiet_harness():
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=BATCH)
        self.name = name
        self.task: TaskFile | None = None
        self.truncated = 0
        self.set_cache_hook(Watch(name, advance))

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        self.truncated = self._check(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _check(self, requests: list[Pair]) -> int:
        """Refuse tokens and lengths that cannot be scored. Returns how many items lose their beginning."""
        assert self.task is not None
        vocabulary = vocabulary_of(self.config)
        answers = (
            line for line, item in zip(self.task.lines, self.task.items, strict=True) for _ in item[self.task.form[1]]
        )
        cut = set()
        for line, ((_, answer), before, after) in zip(answers, requests, strict=True):
            place = f"{self.task.path}, line {line}:"
            refuse_beyond(before + after, vocabulary, self.tokenizer, f"{place} the item")
            if not after:
                raise SparsifyError(f"{place} the answer {answer!r} has no tokens of its own after its question")
            if len(after) > self.max_length:
                raise SparsifyError(
                    f"{place} an answer has {len(after)} tokens, and {self.name} has positions for {self.max_length}"
                )
            if len(before) + len(after) > self.max_length + 1:
                cut.add(line)
        return len(cut)


def answers_of(task: TaskFile, model: HarnessModel) -> Answers:
    """Score every answer to every item of a task, and choose."""
    with quiet_harness():
        data = {"test": Dataset.from_list(task.items)}
        harness = ConfigurableTask(config={**task.definition(), "custom_dataset": lambda **_: data})
        items = list(harness.test_docs())
        requests = [
            harness.construct_requests(doc=item, ctx=harness.fewshot_context(item, 0), metadata=(task.name, number, 1))
            for number, item in enumerate(items)
        ]
        model.task = task
        found = iter(model.loglikelihood([one for item in requests for one in item], disable_tqdm=True))
        answers = Answers([], [], [])
        for item, asked in zip(items, requests, strict=True):
            scores = [next(found) for _ in asked]
            metrics = harness.process_results(item, scores)
            lengths = [len(text) for text in item[task.form[1]]]
            answers.chosen.append(int(np.argmax(np.array([score for score, _ in scores]) / lengths)))
            answers.right.append(float(metrics["acc_norm"]))
            answers.right_in_sum.append(float(metrics["acc"]))
    return Answers(answers.chosen, answers.right, answers.right_in_sum, model.truncated)


def requests_of(tasks: list[TaskFile]) -> int:
    """How many answers a model scores: the steps of a bar."""
    return sum(len(item[task.form[1]]) for task in tasks for item in task.items)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness and tokenizers log only errors: what they say of lengths is checked here, and the model is given on purpose."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
