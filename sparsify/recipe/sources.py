"""The little language of calibration sources: `self`, `file:PATH`, `hub:ID[:CONFIG[:SPLIT]]`."""

import filecmp
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsify.files import expanded, path_problem
from sparsify.recipe.wording import shortened

SELF = "self"


@dataclass(frozen=True)
class Source:
    """A parsed source. `path` is set for files, `dataset`, `config` and `split` for hub data sets."""

    kind: Literal["self", "file", "hub"]
    path: Path | None = None
    dataset: str = ""
    config: str | None = None
    split: str = "train"


def source_problem(text: str) -> str | None:
    """What is wrong with a source and how to write it, or None when it is fine."""
    forms = "self, file:PATH or hub:ID[:CONFIG[:SPLIT]]"
    if text == SELF:
        return None
    shown = shortened(text)
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in ("file", "hub"):
        if path_problem(text) is None and expanded(text).is_file():
            return f"source '{shown}' is a file: write file:{shown}"
        return f"source '{shown}' is not one of {forms}"
    if scheme == "file" and (problem := path_problem(rest)):
        return f"source '{shown}' {problem}"
    if not rest:
        return f"source '{shown}' names nothing after the colon; write {forms}"
    if scheme == "hub":
        parts = rest.split(":")
        if len(parts) > 3 or not parts[0] or (len(parts) == 3 and not parts[2]):
            return f"source '{shown}' should read hub:ID[:CONFIG[:SPLIT]], for instance hub:allenai/c4:en:train"
    return None


def parse_source(text: str) -> Source:
    """Split a source that `source_problem` accepted."""
    if text == SELF:
        return Source("self")
    scheme, _, rest = text.partition(":")
    if scheme == "file":
        return Source("file", path=expanded(rest))
    dataset, config, split = (rest.split(":") + ["", ""])[:3]
    return Source("hub", dataset=dataset, config=config or None, split=split or "train")


def same_text(calibration: str, evaluation: str) -> bool:
    """Whether two sources are one file, under one name, through a link, or as a copy."""
    if not (calibration.startswith("file:") and evaluation.startswith("file:")):
        return False
    one, other = parse_source(calibration).path, parse_source(evaluation).path
    assert one is not None and other is not None
    if one.resolve() == other.resolve():
        return True
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` whole rows in proportion to `weights`, by largest remainders: exact in sum, none off by one or more. Of equal
    remainders the earlier wins."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    left = total - sum(counts)
    for index in sorted(range(len(weights)), key=lambda index: counts[index] - exact[index])[:left]:
        counts[index] += 1
    return counts


def sources_in_words(calibration: Mapping[str, Any]) -> str:
    """`self`, or `50% self + 50% file:PATH`: what a recipe or metrics.json says under `calibration`."""
    entries = calibration.get("sources")
    if not entries:
        return str(calibration.get("source") or SELF)
    total = math.fsum(entry["weight"] for entry in entries)
    return " + ".join(f"{100 * entry['weight'] / total:.3g}% {entry['source']}" for entry in entries)
