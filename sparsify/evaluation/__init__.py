"""How good a compressed model still is: perplexity, divergence from the dense model, agreement with it, accuracy on tasks.

The protocol behind every figure: the whole text is tokenised at once, cut into consecutive chunks, and the first
`chunks` of them are scored in float32; perplexity is exp(mean next-token negative log-likelihood). Tasks are scored by
lm-evaluation-harness around the same models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from sparsify._version import __version__
from sparsify.errors import SparsifyError
from sparsify.evaluation.load import LoadedModel, format_name, load_model, load_tokenizer, load_vocabulary, pick_device
from sparsify.evaluation.result import EvaluationResult, TextScore, tables
from sparsify.evaluation.score import Score, chunked, score_logits, score_models
from sparsify.evaluation.task_files import TaskFile, harness_command, read_tasks, write_task_files
from sparsify.evaluation.task_score import Answers, TaskScore, mean_score, task_score
from sparsify.evaluation.text import SELF, Text, Texts, file_chunks, self_chunks, texts_of
from sparsify.failure import Failure, failure_of
from sparsify.formats.foreign import described
from sparsify.model.checkpoint import open_checkpoint
from sparsify.progress import Task, progress, progress_bar, quietly, stage

__all__ = [
    "EvaluationResult", "LoadedModel", "Score", "TaskScore", "TextScore", "check_inputs", "chunked", "evaluate", "evaluate_all",
    "format_name", "harness_command", "load_model", "load_tokenizer", "pick_device", "read_tasks", "score_logits",
    "score_models", "tables", "write_task_files",
]  # fmt: skip

Loaded = LoadedModel | Exception  # a model, or why it cannot be loaded
TaskScores = tuple[dict[str, TaskScore], TaskScore | None]  # by the name of the task, and the mean over tasks


def evaluate(
    model: str | Path,
    dense: str | Path | None = None,
    text: Texts = None,
    sequence_length: int | None = None,
    chunks: int | None = None,
    *,
    tasks: str | Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Scores one model; see `evaluate_all`."""
    results = evaluate_all(
        [model], dense, text, sequence_length, chunks,
        tasks=tasks, limit=limit, device=device, cache_dir=cache_dir, quiet=quiet,
    )  # fmt: skip
    return results[0]


@quietly
def evaluate_all(
    models: Sequence[str | Path],
    dense: str | Path | None = None,
    text: Texts = None,
    sequence_length: int | None = None,
    chunks: int | None = None,
    *,
    tasks: str | Path | None = None,
    limit: int | None = None,
    labels: Sequence[str] | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> list[EvaluationResult]:
    """Scores several compressed models against one dense model; every model is loaded once, the dense one scored once.

    text:   a plain text file (`PATH` or `file:PATH`), `self` for text that the dense model samples from itself, or several of
            these; None is `self`, or no text where there are tasks
    sequence_length, chunks: 1024 and 48 on a file, 512 and 16 on sampled text, unless given
    tasks:  a file or a folder of multiple-choice tasks; limit: the first so many items of each
    labels: names for the results instead of the specs
    cache_dir: where sampled text is kept for the next time
    A model that cannot be loaded or scored beside others that can has a result that says why; alone it is an error.
    """
    if not models:
        raise SparsifyError("nothing to evaluate: give at least one model directory")
    # The cheap things that can be wrong come first: tasks, texts and tokenizer, then the weights.
    files = _read_tasks(tasks, limit)
    texts = texts_of(SELF if text is None and not files else text, sequence_length, chunks)
    if (not texts and not files) or (dense is None and any(one.path is None for one in texts)):
        raise SparsifyError("no text to score: give --text FILE, or --dense MODEL whose own samples are the text")
    rows = _read_texts(texts, models[0] if dense is None else dense)
    checkpoints = [open_checkpoint(spec) for spec in models]
    reference = None if dense is None else load_model(dense, device)
    loaded = _load_all(models, reference, device)

    rows |= {one.name: _sampled(one, reference, cache_dir, quiet) for one in texts if one.path is None}

    started = time.perf_counter()
    names = labels or [str(spec) for spec in models]
    by_text = {}
    for one in texts:
        title = "evaluate" if len(texts) == 1 else f"evaluate {one.name}"
        by_text[one.name] = _text_scores(one, rows[one.name], names, loaded, reference, title)
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
                dense_nbytes=None if reference is None else reference.nbytes,
                seconds=seconds,
                versions=_versions(with_tasks=bool(files)),
            )
        )
    return results


def check_inputs(
    model: str | Path,
    text: Texts = None,
    sequence_length: int | None = None,
    chunks: int | None = None,
    tasks: str | Path | None = None,
    limit: int | None = None,
) -> None:
    """Raise the error that scoring texts with this model's tokenizer, or tasks, would end with, without loading the model."""
    _read_tasks(tasks, limit)
    _read_texts(texts_of(text, sequence_length, chunks), model)


def _read_tasks(tasks: str | Path | None, limit: int | None) -> list[TaskFile]:
    """The tasks, checked, with what scores them at hand."""
    if tasks is None:
        if limit is not None:
            raise SparsifyError("--limit is the number of items of each task; give --tasks FOLDER with it")
        return []
    files = read_tasks(tasks, limit)
    with stage("loading lm-evaluation-harness"):
        import sparsify.evaluation.harness  # noqa: F401
    return files


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
    scores, dense = score_models(
        [(m.spec, m.model) for m in ready],
        ids,
        None if reference is None else (reference.spec, reference.model),
        lambda rows: progress(rows, description=title, total=len(ids)),
    )
    scored = iter(scores)
    found: list[TextScore] = []
    for name, item in zip(names, loaded, strict=True):
        score = item if isinstance(item, Exception) else next(scored)
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
                failure=_failure(name, score) if isinstance(score, Exception) else None,
            )
        )
    return found


def _task_scores(
    tasks: list[TaskFile], loaded: Sequence[Loaded], reference: LoadedModel | None
) -> list[TaskScores | Exception]:
    """Every model on all tasks, in the order of `loaded`: its scores by task and their mean, or why there are none."""
    if not tasks:
        return [({}, None) for _ in loaded]
    from sparsify.evaluation.harness import requests_of

    ready = [item for item in loaded if isinstance(item, LoadedModel) and item is not reference]
    runs = len(ready) + (reference is not None)
    with progress_bar("tasks", runs * requests_of(tasks)) as bar:
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
                bar.advance(before + requests_of(tasks) - bar.done)
                continue
            found.append(_compared(tasks, answers, dense))
    if all(isinstance(item, Exception) for item in found):
        raise next(item for item in found if isinstance(item, Exception))
    return found


def _compared(tasks: list[TaskFile], answers: Sequence[Answers], dense: Sequence[Answers] | None) -> TaskScores:
    """The scores of one model from its answers and the dense model's."""
    its: Sequence[Answers | None] = dense or [None] * len(tasks)
    scores = {
        task.name: task_score(task, mine, one) for task, mine, one in zip(tasks, answers, its, strict=True)
    }
    return scores, mean_score(list(scores.values()), answers, dense)


def _answers(tasks: list[TaskFile], item: LoadedModel, bar: Task) -> list[Answers]:
    """What one model answers to every task."""
    from sparsify.evaluation.harness import HarnessModel, answers_of

    model = HarnessModel(item.spec, item.model, load_tokenizer(item.spec), bar.advance)
    answers = []
    for task in tasks:
        bar.describe(f"tasks: {item.spec}, {task.name}")
        answers.append(answers_of(task, model))
    return answers


def _load_all(specs: Sequence[str | Path], reference: LoadedModel | None, device: str | None) -> list[Loaded]:
    """Every model, or the error of one that cannot be loaded; raises when none of them can."""
    loaded: list[Loaded] = []
    for spec in specs:
        try:
            loaded.append(_load(spec, reference, device))
        except Exception as error:
            loaded.append(error)
    if all(isinstance(item, Exception) for item in loaded):
        raise next(item for item in loaded if isinstance(item, Exception))
    return loaded


def _load(spec: str | Path, reference: LoadedModel | None, device: str | None) -> LoadedModel:
    """Loads a model, or takes the dense one when it is the same."""
    if reference is not None and open_checkpoint(spec).directory.resolve() == reference.directory.resolve():
        return reference
    return load_model(spec, device)


def _failure(name: str, error: Exception) -> Failure:
    failure = failure_of(error, "transformers")
    return failure if name in failure.reason else Failure(failure.short, f"{name}: {failure.reason}")


def _versions(with_tasks: bool) -> dict[str, str]:
    names = ("torch", "transformers", *(("lm_eval",) if with_tasks else ()))
    return {"sparsify": __version__, **{name: version(name) for name in names}}
