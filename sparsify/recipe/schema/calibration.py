"""The text that a model is calibrated on: where it comes from and how much of it is read."""

from typing import Any, Literal

from pydantic import Field, model_validator

from sparsify.recipe.schema.base import Model, Share, Source, refuse
from sparsify.recipe.sources import SELF, same_text, shares


class SelfText(Model):
    """How the model writes its own calibration text. The defaults are for every kind of use; nothing needs to be set."""

    chat: Share | None = Field(
        default=None,
        description="share of rows that are conversations with both sides written by the model, the others are plain "
        "documents; null: a quarter where the tokenizer has a chat template, else none",
    )
    openings: Share = Field(
        default=0.5,
        description="share of plain documents that begin with given words (English, many kinds and subjects)",
    )
    corpora: Share = Field(
        default=0.25,
        description="share of the plain rows that are rewritten as research corpora hold text (Penn Treebank, WikiText): "
        "punctuation apart, rare words <unk>",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=2,
        allow_inf_nan=False,
        description="of the hottest rows; 1 is the model's own distribution",
    )
    coolest: float = Field(
        default=0.8,
        gt=0,
        le=2,
        allow_inf_nan=False,
        description="temperature of the coolest rows; the rows lie evenly between the two, and each keeps its own",
    )
    first_temperature: float = Field(
        default=1.5,
        gt=0,
        le=5,
        allow_inf_nan=False,
        description="of the first token of a document or a question, falling to that of the row: varies the subjects",
    )
    first_tokens: int = Field(
        default=10, ge=0, description="tokens within which it falls; 0: the temperature of the row throughout"
    )
    candidates: float = Field(
        default=1.125,
        ge=1,
        le=10,
        allow_inf_nan=False,
        description="rows written per row kept: rows that repeat themselves, and then those that the model finds least "
        "likely, are dropped; 1 keeps all",
    )

    @model_validator(mode="after")
    def _check(self) -> "SelfText":
        if self.coolest > self.temperature:
            raise refuse(f"coolest is {self.coolest}, above temperature, {self.temperature}; lower it", "coolest")
        return self


class WeightedSource(Model):
    """One text of a mixture."""

    source: Source = Field(description="as calibration.source")
    weight: float = Field(gt=0, allow_inf_nan=False, description="share of the rows, relative to the other weights")


def refuse_mixture(names: list[str], rows: list[int], total: int) -> None:
    """Refuse a source that stands twice in `sources`, or whose weight is too small for a single row of `total`."""
    for index, name in enumerate(names):
        if any(name == other or same_text(name, other) for other in names[:index]):
            raise refuse(
                f"source '{name}' is here a second time; give it once, with the sum of the weights",
                "sources",
                index,
                "source",
            )
    for index, count in enumerate(rows):
        if not count:
            raise refuse(
                f"source '{names[index]}' has so little weight that it gets none of the {total} samples; "
                f"raise its weight or the samples, or remove it",
                "sources",
                index,
                "weight",
            )


DRAWN = 4  # times as many rows are read where some are chosen


class Calibration(Model):
    """The text whose activations steer pruning and quantization."""

    source: Source | None = Field(
        default=SELF,
        description="self (the model samples its own text), file:PATH (txt, jsonl, parquet) or hub:ID[:CONFIG[:SPLIT]]",
    )
    sources: list[WeightedSource] | None = Field(
        default=None, min_length=1, description="instead of source: several texts, rows in proportion to their weights"
    )
    samples: int = Field(default=128, ge=1, description="rows of text; cost grows in proportion")
    sequence_length: int = Field(default=512, ge=2, description="tokens per row")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of whatever is drawn at random")
    experts: Literal["balanced"] | None = Field(
        default=None,
        description="of mixtures; balanced: four times as many rows are read, and those are taken that even out how many tokens "
        "each expert is given by the dense model; null: the rows as they come",
    )
    self: SelfText | None = Field(default=None, description="how the model writes, where a source is self")

    @model_validator(mode="before")
    @classmethod
    def _sources_replace_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sources") is not None and "source" not in data:
            return {**data, "source": None}
        return data

    @model_validator(mode="after")
    def _check(self) -> "Calibration":
        if self.source is None and self.sources is None:
            raise refuse(
                "calibration needs a source: self, file:PATH or hub:ID, or a list of sources with weights", "source"
            )
        if self.source is not None and self.sources is not None:
            raise refuse("calibration has both source and sources; keep one (source: null removes it)", "sources")
        names = [source for source, _ in self.mixture]
        refuse_mixture(names, self.rows, self.samples)
        if self.self is not None and SELF not in names:
            raise refuse("self has no effect: the model writes no text here since no source is self; remove it", "self")
        return self

    @property
    def drawn(self) -> "Calibration":
        """The rows that are read, among which those to calibrate on are chosen."""
        return self if self.experts is None else self.model_copy(update={"samples": DRAWN * self.samples})

    @property
    def mixture(self) -> list[tuple[str, float]]:
        """(source, weight) of every source; the weights sum to 1."""
        if self.sources is None:
            return [(self.source or SELF, 1.0)]
        total = sum(entry.weight for entry in self.sources)
        return [(entry.source, entry.weight / total) for entry in self.sources]

    @property
    def rows(self) -> list[int]:
        """How many of the samples each source gives, in the order of `mixture`."""
        return shares(self.samples, [weight for _, weight in self.mixture])
