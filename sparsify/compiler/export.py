"""Export as the command line offers it: formats convert the bytes, and the files beside them stay true."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from sparsify.compiler.card import head_note, model_card
from sparsify.compiler.run import CARD, METRICS, RECIPE, json_text
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats.directory import CheckpointWriter
from sparsify.formats.export import RoundedHead
from sparsify.formats.export import export as convert
from sparsify.recipe import Head, dump_recipe, parse_recipe

DEFAULT_GROUP_SIZE = 64


def export(
    source: str | Path,
    format: str,
    output: str | Path,
    head_bits: Literal[4, 8, 16] | None = None,
    head_group_size: str | None = None,
    quiet: bool = False,
) -> Path:
    """Write `source` in `format`, with its output head quantized to `head_bits`, or with 16 multiplied out again.

    head_group_size: "32", "64" (default), "128" or "channel"
    A head is rounded to nearest, since there is no text to calibrate on: for 4 bits a recipe's GPTQ is far better.
    """
    if head_bits is None or head_bits == 16:
        if head_group_size is not None:
            raise CheckpointError("--head-group-size says how to quantize the head; add --head 8 or --head 4")
        return convert(source, format, output, quiet, dense_head=head_bits == 16)
    size = head_group_size or str(DEFAULT_GROUP_SIZE)
    try:
        group_size: Any = int(size) if size.isdecimal() else size
        head = Head(bits=head_bits, group_size=group_size, method="rtn" if head_bits == 4 else None)
    except ValidationError:
        raise CheckpointError(
            f"--head {head_bits} --head-group-size {size}: bits must be 4 or 8, the group size 32, 64, 128 or channel"
        ) from None
    return convert(source, format, output, quiet, head, partial(_describe, head, format))


def _describe(
    head: Head, format: str, files: dict[str, bytes], rounded: RoundedHead, writer: CheckpointWriter
) -> dict[str, bytes]:
    """Recipe, metrics and model card of a checkpoint whose head has just been quantized.

    The recipe now gives this very checkpoint; an evaluation that was measured before does not belong to it any more.
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
            "head": head_note(rounded.head, rounded.scheme, rounded.error),
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
