"""What is written, and how it is measured."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sparsify.recipe.llmcompressor.whole import SAVED
from sparsify.recipe.schema.base import Model, refuse


def head_format_problem(format: str) -> str | None:
    """Why `format` cannot hold a quantized output head, or None."""
    if format == "dense":
        return "dense stores 16-bit weights, so a quantized head would lose accuracy and save nothing; leave head out"
    return None


class Head(Model):
    """The output head (lm_head) as a quantized linear without zeros.

    A model that ties it to its embedding gets a head of its own; the embedding stays as it is.
    """

    bits: Literal[4, 8] = Field(description="bits per weight; 8 is nearly lossless")
    method: Literal["gptq", "rtn"] | None = Field(
        default=None,
        description="gptq (solved on the calibration text) or rtn (round to nearest, no data); "
        "default gptq for 4 bits where the recipe calibrates, else rtn",
    )
    group_size: Literal[32, 64, 128, "channel"] = Field(
        description="consecutive inputs that share a scale, channel = the whole row; must divide the hidden size"
    )
    symmetric: bool = Field(default=True, description="false: each scale has a zero point beside it")


class Export(Model):
    """What is written."""

    format: Literal["sparse24", "dense", "pack-quantized", "gptq", "compressed-tensors"] = Field(
        default="sparse24",
        description="sparse24 (smallest, needs the sparsify plugin), pack-quantized (stock vLLM and "
        "transformers, stores the zeros), gptq (AutoGPTQ and GPTQModel, stores the zeros), dense "
        "(runs everywhere, no smaller) or compressed-tensors (what llm_compressor saved, as it is)",
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of scales and of what stays dense; auto keeps the model's. "
        "What a 16-bit model stores in float32, or its class keeps so, stays float32",
    )
    head: Head | None = Field(
        default=None, description="quantize the output head as well; without it the head stays 16-bit"
    )

    @property
    def encoding(self) -> str:
        """The format that linears are packed in; that of plain tensors for what llm-compressor saved."""
        return "dense" if self.format == SAVED else self.format

    @model_validator(mode="after")
    def _check(self) -> "Export":
        if self.head is not None and (problem := head_format_problem(self.format)):
            raise refuse(problem, "head")
        return self


class Evaluation(Model):
    """How the result is measured after it is written."""

    text: str | None = Field(default=None, description="file:PATH of a text that was not used for calibration")
    sequence_length: int = Field(default=1024, ge=2, description="tokens per scored chunk")
    chunks: int = Field(default=48, ge=1, description="chunks scored, from the start of the text")
    tasks: str | None = Field(
        default=None, description="file:PATH of multiple-choice tasks: a folder of .jsonl files, or one file"
    )
    limit: int | None = Field(default=None, ge=1, description="items scored of each task, from its start; default all")

    @field_validator("text", "tasks")
    @classmethod
    def _is_file(cls, value: str | None, field: ValidationInfo) -> str | None:
        if value is not None and (not value.startswith("file:") or not value[5:]):
            raise refuse(f"evaluation {field.field_name} must be file:PATH, not '{value}'")
        return value

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        if self.text is None and self.tasks is None:
            raise refuse("evaluation measures nothing; give it a text or tasks")
        if self.limit is not None and self.tasks is None:
            raise refuse("limit has no effect without tasks; remove it", "limit")
        return self
