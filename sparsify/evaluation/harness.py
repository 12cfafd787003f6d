"""Tasks through lm-evaluation-harness: its tasks, its prompts, its scoring, around our models, without its own bars."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sparsify.data.fitting import refuse_beyond, vocabulary_of
from sparsify.errors import CheckpointError, MissingDependency, NumericalError, SparsifyError
from sparsify.evaluation.presets import Benchmark, PresetTask
from sparsify.evaluation.shared_prompts import Request, SharedPrompts
from sparsify.evaluation.task_files import TaskFile
from sparsify.evaluation.task_score import Answers

try:
    import lm_eval
    import lm_eval.api.task as harness_task
    from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
except ImportError as error:
    raise MissingDependency(
        f"tasks are scored by lm-evaluation-harness, which cannot be imported ({error}): pip install 'sparsify-24[eval]'"
    ) from error

BATCH = 8  # sequences in one forward pass, which are sorted by length
FEWSHOT_SEED = 1234  # from which lm_eval draws examples, unless it is told otherwise
DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"


class Watch:
    """What the harness calls with every answer as soon as it is known, in place of its cache.

    advance: called after every answer that was scored
    """

    def __init__(self, name: str, advance: Callable[[], None]) -> None:
        self.name, self.advance = name, advance

    def add_partial(self, attr: str, req: Any, res: tuple[float, bool] | str) -> None:
        if not isinstance(res, str) and not math.isfinite(res[0]):
            raise NumericalError(
                f"{self.name} gives NaN or infinite logits on the tasks: its weights are damaged or overflow; "
                "check them with `sparsify inspect`"
            )
        self.advance()


class Checked:
    """What our models add to one of lm-evaluation-harness: it checks what it is asked, and shows no bars of its own.

    name:      what the model is called in errors
    places:    where each answer that is asked next comes from, for errors
    room:      tokens of a prompt and its answer beyond the model's positions that still fit
    truncated: of the last task, items that lost their beginning
    """

    name: str
    config: Any  # this and the next three come from the harness's model
    tokenizer: Any
    max_length: int
    max_gen_toks: int
    places: Sequence[str] = ()
    room = 1
    truncated = 0

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **options: Any) -> Any:
        self.truncated = self._check(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)  # type: ignore[misc]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        limit = self.max_length - self.max_gen_toks
        if limit <= 0:
            raise SparsifyError(
                f"{self.name} has positions for {self.max_length} tokens, and the task asks for answers of up to "
                f"{self.max_gen_toks}: it cannot be scored with this model"
            )
        prompts = {one.args[0] for one in requests}
        self.truncated = sum(len(self.tokenizer(prompt)["input_ids"]) > limit for prompt in prompts)
        return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]

    def _check(self, requests: list[Request]) -> int:
        """Refuse tokens and lengths that cannot be scored. Returns how many items lose their beginning."""
        vocabulary, tokenizer = vocabulary_of(self.config), self.tokenizer
        positions = self.max_length
        cut = set()
        for number, ((prompt, answer), before, after) in enumerate(requests):
            place = self.places[number] if self.places else f"the prompt that ends in {prompt[-60:]!r}:"
            refuse_beyond(before + after, vocabulary, tokenizer, f"{place} the item")
            if not after:
                raise SparsifyError(f"{place} the answer {answer!r} has no tokens of its own after its question")
            if len(after) > positions:
                raise SparsifyError(
                    f"{place} an answer has {len(after)} tokens, and {self.name} has positions for {positions}"
                )
            if len(before) + len(after) > positions + self.room:
                cut.add(self.places[number] if self.places else prompt)
        return len(cut)


class HarnessModel(Checked, SharedPrompts, HFLM):
    """A model in memory and its tokenizer, as lm-evaluation-harness calls them. advance: that of `Watch`"""

    def __init__(self, name: str, model: nn.Module, tokenizer: Any, advance: Callable[[], None] = lambda: None) -> None:
        require_ends(name, tokenizer)
        with quiet_harness():
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=BATCH)
        self.name = name
        self.set_cache_hook(Watch(name, advance))


def require_ends(name: str, tokenizer: Any) -> None:
    """CheckpointError where a tokenizer has no token to begin an empty prompt with."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{name}: its tokenizer has no token for the beginning or the end of a text, of which lm-evaluation-harness "
            "needs one; give eos_token in tokenizer_config.json"
        )


def answers_of(task: TaskFile | PresetTask, model: Any) -> Answers:
    """Score every answer to every item of a task, and choose. model: a `Checked` one"""
    with quiet_harness():
        return preset_answers(task, model) if isinstance(task, PresetTask) else file_answers(task, model)


def file_answers(task: TaskFile, model: Any) -> Answers:
    """Of a task of one's own: what the harness's `evaluate` does where the prompt holds no examples."""
    data = {"test": Dataset.from_list(task.items)}
    harness = ConfigurableTask(config={**task.definition(), "custom_dataset": lambda **_: data})
    items = list(harness.test_docs())
    requests = [
        harness.construct_requests(doc=item, ctx=harness.fewshot_context(item, 0), metadata=(task.name, number, 1))
        for number, item in enumerate(items)
    ]
    model.places = [
        f"{task.path}, line {line}:"
        for line, item in zip(task.lines, task.items, strict=True)
        for _ in item[task.form[1]]
    ]
    found = iter(model.loglikelihood([one for item in requests for one in item], disable_tqdm=True))
    answers = Answers([], [], [])
    for item, asked in zip(items, requests, strict=True):
        scores = [next(found) for _ in asked]
        metrics = harness.process_results(item, scores)
        answers.chosen.append(likeliest([score for score, _ in scores], item[task.form[1]]))
        answers.right.append(float(metrics["acc_norm"]))
        answers.right_in_sum.append(float(metrics["acc"]))
    return replace(answers, truncated=model.truncated)


def preset_answers(task: PresetTask, model: Any) -> Answers:
    """Of a task of the harness's own: its `evaluate`, on the data that the task holds."""
    subjects = {}
    for definition, data in task.parts:
        one = ConfigurableTask(config={**definition, "custom_dataset": partial(_given, data)})
        one.set_config("num_fewshot", task.fewshot)
        one.set_fewshot_seed(FEWSHOT_SEED)
        subjects[one.task_name] = one
    model.places = ()
    found = lm_eval.evaluate(model, {"tasks": subjects, "groups": {}, "group_map": {}}, task.limit, bootstrap_iters=0)
    answers = Answers([], [], [])
    for name, one in subjects.items():
        items = [item for item in found["samples"][name] if item["filter"] == task.benchmark.filter]
        for item in sorted(items, key=lambda item: item["doc_id"]):
            given = item["filtered_resps"]
            if one.OUTPUT_TYPE == "generate_until":
                answers.chosen.append(str(given[0]))
            else:
                lengths = one.doc_to_choice(item["doc"]) if task.metric == "acc_norm" else None
                answers.chosen.append(likeliest([score for score, _ in given], lengths))
            answers.right.append(float(item[task.metric]))
            answers.right_in_sum.append(float(item.get("acc", item[task.metric])))
    return replace(answers, truncated=model.truncated)


def likeliest(scores: Sequence[float], answers: Sequence[str] | None) -> int:
    """The number of the answer of greatest log-likelihood, per character where the answers are given."""
    return int(np.argmax(np.array(scores) / [len(answer) for answer in answers] if answers else scores))


def definition_of(task: Benchmark, file: str) -> dict[str, Any]:
    """The configuration of a task of the harness, that reads no other split than it needs. file: below lm_eval/tasks"""
    definition = load_yaml(DEFINITIONS / file)
    kept = {"training_split", "validation_split", "test_split", "fewshot_split"} & definition.keys()
    absent = {name: None for name in kept if definition[name] not in task.splits}
    return {**definition, **absent}


def subjects_of(task: Benchmark) -> dict[str, str]:
    """The definition of every subject of a task, by the subject's name in the data."""
    files = sorted((DEFINITIONS / task.definition).glob(f"{task.name}_*.yaml"))
    named = {load_yaml(file, recursive=False).get("dataset_name"): file for file in files}
    return {str(name): str(file.relative_to(DEFINITIONS)) for name, file in named.items() if name}


def _given(data: dict[str, Any], **_: Any) -> dict[str, Any]:
    return data


def _without_bar(items: Iterable[Any], *_: Any, **__: Any) -> Iterable[Any]:
    return items


@contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness and tokenizers log only errors: what they say of lengths is checked here, and the model is given on purpose.

    The harness and `datasets` show no bars.
    """
    logs = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    shown, bar = is_progress_bar_enabled(), harness_task.tqdm
    disable_progress_bars()
    harness_task.tqdm = _without_bar
    try:
        yield
    finally:
        harness_task.tqdm = bar
        if shown:
            enable_progress_bars()
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
