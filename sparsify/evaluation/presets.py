"""Sets of tasks that users quote: lm-evaluation-harness's definitions, examples in the prompt, and the files that they read.

`openllm-v1` is the Open LLM Leaderboard of 2023, `zero-shot-7` the seven tasks of Wanda (arXiv 2306.11695, section 4). Prompts,
scoring and drawing of examples are the harness's own; only the data may come from files instead of the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One task of a preset.

    definition: its YAML file below lm_eval/tasks; where it is a folder, those of all its subjects (MMLU)
    metric:     what counts, and the harness's filter where it is not `none`
    data:       dataset on the Hub, its subset, and of it the split that is scored and the one that examples are drawn from
    columns:    of the data that the prompts need
    """

    name: str
    definition: str
    fewshot: int
    metric: str
    data: tuple[str, str | None]
    scored: str
    examples: str
    columns: tuple[str, ...]
    filter: str = "none"

    @property
    def splits(self) -> list[str]:
        """What it reads."""
        return [self.scored, *([self.examples] if self.fewshot else [])]

    def hub_name(self, split: str) -> str:
        """`allenai/ai2_arc, ARC-Challenge, split test`"""
        name, subset = self.data
        return f"{name}{f', {subset}' if subset else ''}, split {split}"


ARC = ("question", "choices", "answerKey")
HELLASWAG = ("ctx_a", "ctx_b", "activity_label", "endings", "label")
WINOGRANDE = ("sentence", "option1", "option2", "answer")


def _arc(challenge: bool, fewshot: int, metric: str) -> Benchmark:
    name, subset = ("arc_challenge", "ARC-Challenge") if challenge else ("arc_easy", "ARC-Easy")
    return Benchmark(name, f"arc/{name}.yaml", fewshot, metric, ("allenai/ai2_arc", subset), "test", "train", ARC)


def _hellaswag(fewshot: int, metric: str) -> Benchmark:
    data = ("Rowan/hellaswag", None)
    return Benchmark("hellaswag", "hellaswag/hellaswag.yaml", fewshot, metric, data, "validation", "train", HELLASWAG)


def _winogrande(fewshot: int) -> Benchmark:
    data = ("allenai/winogrande", "winogrande_xl")
    return Benchmark("winogrande", "winogrande/default.yaml", fewshot, "acc", data, "validation", "train", WINOGRANDE)


PRESETS = {
    "openllm-v1": (
        _arc(True, 25, "acc_norm"),
        _hellaswag(10, "acc_norm"),
        Benchmark(
            "mmlu", "mmlu/default", 5, "acc", ("cais/mmlu", "all"), "test", "dev",
            ("question", "subject", "choices", "answer"),
        ),
        Benchmark(
            "truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", 0, "acc", ("truthfulqa/truthful_qa", "multiple_choice"),
            "validation", "validation", ("question", "mc2_targets"),
        ),
        _winogrande(5),
        Benchmark(
            "gsm8k", "gsm8k/gsm8k.yaml", 5, "exact_match", ("openai/gsm8k", "main"), "test", "train",
            ("question", "answer"), "strict-match",
        ),
    ),
    "zero-shot-7": (
        Benchmark(
            "boolq", "super_glue/boolq/default.yaml", 0, "acc", ("aps/super_glue", "boolq"), "validation", "train",
            ("question", "passage", "label"),
        ),
        Benchmark(
            "rte", "glue/rte/default.yaml", 0, "acc", ("nyu-mll/glue", "rte"), "validation", "train",
            ("sentence1", "sentence2", "label"),
        ),
        _hellaswag(0, "acc"),
        _winogrande(0),
        _arc(False, 0, "acc"),
        _arc(True, 0, "acc"),
        Benchmark(
            "openbookqa", "openbookqa/openbookqa.yaml", 0, "acc", ("allenai/openbookqa", "main"), "test", "train",
            ("question_stem", "choices", "answerKey"),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PresetTask:
    """A task of a preset with its data. parts: the definition and the splits of each subject, of which most tasks have one"""

    benchmark: Benchmark
    parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]
    limit: int | None
    chance: float

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def metric(self) -> str:
        return self.benchmark.metric

    @property
    def fewshot(self) -> int:
        return self.benchmark.fewshot

    @property
    def prompt(self) -> str:
        """The definition that has it."""
        return f"lm_eval/tasks/{self.benchmark.definition}"

    @property
    def size(self) -> int:
        return sum(len(data[self.benchmark.scored]) for _, data in self.parts)

    @property
    def count(self) -> int:
        return sum(self.taken(len(data[self.benchmark.scored])) for _, data in self.parts)

    @property
    def requests(self) -> int:
        """About how many answers a model scores, for a bar."""
        return self.count * (round(1 / self.chance) if self.chance else 1)

    def taken(self, items: int) -> int:
        """How many of the items of a subject are scored."""
        return items if self.limit is None else min(items, self.limit)
