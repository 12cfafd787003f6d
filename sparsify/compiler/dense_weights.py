"""Export as the command line offers it: formats convert the bytes, and the files beside them stay true."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from sparsify.compiler.convert import RoundedHead
from sparsify.compiler.convert import export as convert
from sparsify.compiler.metrics import CARD, METRICS, RECIPE, json_text
from sparsify.compiler.model_card import head_note, model_card
from sparsify.compute import choose
from sparsify.data.calibration import calibration_tokens, check_sources
from sparsify.data.self_generated.generator import open_writer, writer_key
from sparsify.errors import CheckpointError, RecipeError
from sparsify.files import cache_directory
from sparsify.formats.directory import CheckpointWriter
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import head_input
from sparsify.model.sequential import TOKENS_PER_MICRO_BATCH
from sparsify.progress import progress, stage
from sparsify.recipe import Calibration, Head, dump_recipe, parse_recipe
from sparsify.solver.hessian import HessianAccumulator

DEFAULT_GROUP_SIZE = 64


def export(
    source: str | Path,
    format: str,
    output: str | Path,
    head_bits: Literal[4, 8, 16] | None = None,
    head_group_size: str | None = None,
    quiet: bool = False,
    calibration: str | None = None,
) -> Path:
    """Write `source` in `format`, with its output head quantized to `head_bits`, or with 16 multiplied out again.

    head_group_size: "32", "64" (default), "128" or "channel"
    calibration: self, file:PATH or hub:ID; the head is then solved by GPTQ on what it reads of 128 x 512 tokens, and
    rounded to nearest without
    """
    if calibration is not None and head_bits not in (4, 8):
        raise CheckpointError("--calibration is the text on which a head is quantized; add --head 4")
    if head_bits is None or head_bits == 16:
        if head_group_size is not None:
            raise CheckpointError("--head-group-size says how to quantize the head; add --head 8 or --head 4")
        return convert(source, format, output, quiet, dense_head=head_bits == 16)
    size = head_group_size or str(DEFAULT_GROUP_SIZE)
    try:
        group_size: Any = int(size) if size.isdecimal() else size
        method: Any = "gptq" if calibration else "rtn" if head_bits == 4 else None
        head = Head(bits=head_bits, group_size=group_size, method=method)
    except ValidationError:
        raise CheckpointError(
            f"--head {head_bits} --head-group-size {size}: bits must be 4 or 8, the group size 32, 64, 128 or channel"
        ) from None
    moment = None if calibration is None else partial(_read_by_head, source, _text(calibration), quiet)
    return convert(source, format, output, quiet, head, partial(_describe, head, format), moment=moment)


def _text(source: str) -> Calibration:
    try:
        calibration = Calibration(source=source)
    except ValidationError as error:
        raise CheckpointError(f"--calibration {source}: {error.errors()[0]['msg']}") from None
    check_sources(calibration)
    return calibration


def _read_by_head(source: str | Path, calibration: Calibration, quiet: bool) -> Tensor:
    """Second moment of what the output head reads, X'X / tokens: float32 [K, K], on the GPU where the model fits there.

    The model is loaded whole, as `transformers` loads it, and runs on the kernels that serve it.
    """
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        dtype = choose(measure=True).dtype
        with stage(f"loading {source}", quiet):
            model = open_writer(checkpoint.directory, dtype)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: transformers cannot load this model to run it on text ({str(error).splitlines()[0]}); "
            "export it to sparse24 first, and that with --head and --calibration"
        ) from error
    tokens = calibration_tokens(
        calibration,
        tokenizer,
        lambda: model,
        cache_dir=cache_directory() / "calibration",
        key=writer_key(checkpoint, dtype),
        quiet=quiet,
    )
    hessian = HessianAccumulator()
    rows = tokens.to(model.device).split(max(1, TOKENS_PER_MICRO_BATCH // tokens.shape[1]))
    for part in progress(rows, "Reading text", total=len(rows), quiet=quiet):
        hessian.add([head_input(model, part).flatten(0, 1)])
    return hessian.mean().H


def _describe(
    head: Head, format: str, files: dict[str, bytes], rounded: RoundedHead, writer: CheckpointWriter
) -> dict[str, bytes]:
    """Recipe, metrics and model card of a checkpoint whose head has just been quantized.

    The recipe now gives this very checkpoint, or one like it where the head was solved on other text; an evaluation that
    was measured before does not belong to it any more.
    Files that `apply` did not write are carried over as they are.
    """
    try:
        metrics: dict[str, Any] = json.loads(files[METRICS])
        recipe = parse_recipe(files[RECIPE].decode())
        asked = recipe.model_copy(update={"export": recipe.export.model_copy(update={"head": head, "format": format})})
        nbytes, schemes, sizes = writer.linear_bytes(), writer.linears(), metrics["sizes"]
        head_bytes = nbytes.pop(rounded.head.module)
        del schemes[rounded.head.module]
        weights = sum(scheme.shape[0] * scheme.shape[1] for scheme in schemes.values())
        metrics |= {
            "recipe": asked.model_dump(mode="json"),
            "format": format,
            "head": head_note(rounded.head, rounded.solved),
            "dense_modules": [e for e in metrics["dense_modules"] if e["module"] != rounded.head.module],
            "evaluation": None,
            "sizes": {
                **sizes,
                "compressed_bytes": sum(writer.tensor_bytes().values()),
                "outside_bytes": sizes["outside_bytes"] - rounded.dense_nbytes,
                "bits_per_weight": round(8 * sum(nbytes.values()) / max(weights, 1), 4),
                "head_bytes": head_bytes,
                "dense_head_bytes": rounded.dense_nbytes,
            },
        }
        card = model_card(metrics, asked)
    except (KeyError, TypeError, ValueError, RecipeError):
        return files
    changed = {METRICS: json_text(metrics), RECIPE: dump_recipe(asked), CARD: card}
    return {**files, **{name: text.encode() for name, text in changed.items()}}
