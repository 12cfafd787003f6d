"""Size and accuracy of one row's model, by our own evaluation: `python -m benchmarks.versus.score JOB.json`.

The job: settings, model (a directory or a .gguf file), dense (directory), answers (of the dense model to the tasks; written where
`model` is the dense one), result. Every model is opened by sparsify's readers and scored as float32 weights, those of other
packages and GGUF too, so that no two rows are measured by different code.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.versus.program import call
from benchmarks.versus.settings import Settings
from sparsify.evaluation import evaluate, load_model, load_tokenizer, read_tasks
from sparsify.evaluation.task_score import Answers, mean_score, task_score
from sparsify.files import read_json, write_json
from sparsify.formats.foreign import open_dense
from sparsify.formats.inspect import inspect
from sparsify.formats.scheme import in_block
from sparsify.model.checkpoint import open_checkpoint


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    settings, model, dense = Settings(**job["settings"]), Path(job["model"]), Path(job["dense"])
    found = stored(model, dense)
    scored = evaluate(
        model, dense, settings.text, sequence_length=settings.sequence_length, chunks=settings.chunks, quiet=True
    )
    text = scored.first
    assert text is not None
    found |= {"text": text.to_json(), "versions": scored.versions}
    if settings.tasks is not None:
        found |= tasks(settings, model, dense, Path(job["answers"]))
    write_json(job["result"], found)


def stored(model: Path, dense: Path) -> dict[str, Any]:
    """Bytes of the files of weights; of the linears inside of blocks, bits per weight and the share of groups of four consecutive
    inputs with two zeros or more."""
    opened, origin = open_dense(model), open_checkpoint(dense)
    linears = {
        name for name, info in origin.infos.items() if len(info.shape) == 2 and in_block(name.removesuffix(".weight"))
    }
    if model.suffix == ".gguf":
        facts = gguf_facts(model)
    else:
        files = open_checkpoint(model).weight_files()
        facts = {
            "file_bytes": sum(file.stat().st_size for file in files),
            "block_bits": inspect(model, quiet=True).totals()["bits_per_weight"],
        }
    sparse, groups = 0, 0
    for name in sorted(linears):
        zeros = (opened.tensor(name).unflatten(1, (-1, 4)) == 0).sum(-1)
        sparse, groups = sparse + int((zeros >= 2).sum()), groups + zeros.numel()
    return {**facts, "two_of_four": sparse / groups}


def gguf_facts(file: Path) -> dict[str, Any]:
    """The same bytes and bits of a GGUF file, and how many of those linears have which type."""
    from gguf import GGUFReader

    tensors = GGUFReader(file).tensors
    inside = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    kinds = Counter(tensor.tensor_type.name for tensor in inside)
    return {
        "file_bytes": file.stat().st_size,
        "block_bits": 8 * sum(int(t.n_bytes) for t in inside) / sum(int(t.n_elements) for t in inside),
        "types": dict(kinds.most_common()),
    }


def tasks(settings: Settings, model: Path, dense: Path, answers: Path) -> dict[str, Any]:
    """Accuracy on every task, with the tokenizer of the dense model, and paired with its answers where they are known."""
    from sparsify.evaluation.harness import HarnessModel, answers_of

    assert settings.tasks is not None
    files = read_tasks(settings.tasks, settings.limit)
    loaded = load_model(model)
    harness = HarnessModel(loaded.spec, loaded.model, load_tokenizer(dense))
    own = [answers_of(task, harness) for task in files]
    if model == dense:
        write_json(answers, {task.name: asdict(one) for task, one in zip(files, own, strict=True)})
    known: Mapping[str, Any] | None = read_json(answers) if answers.is_file() else None  # of all tasks, or not there
    theirs = None if known is None else [Answers(**known[task.name]) for task in files]
    scores = [task_score(*one) for one in zip(files, own, theirs or [None] * len(own), strict=True)]
    return {
        "tasks": {score.task: asdict(score) for score in scores},
        "tasks_mean": asdict(mean_score(scores, own, theirs)),
    }


if __name__ == "__main__":
    call(main)
