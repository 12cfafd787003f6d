"""A selection held against the model that it really gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.compiler.apply import apply
from sparsify.compiler.metrics import METRICS, RECIPE
from sparsify.errors import CheckpointError
from sparsify.evaluation import load_model, score_models
from sparsify.files import as_written, read_json
from sparsify.formats.writer import partial_directory
from sparsify.model.checkpoint import open_checkpoint
from sparsify.progress import progress
from sparsify.recipe import Recipe, dump_recipe
from sparsify.recipe.schema import Depth, Distill, Finetune, Lora, Tune


@dataclass(frozen=True)
class Verified:
    """A compressed model on the held-out text. kl: KL(dense || model), nats per token; bits: of the linears that chose."""

    kl: float
    perplexity: float
    dense_perplexity: float
    bits: float
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def one_shot(recipe: Recipe) -> Recipe:
    """The recipe without the passes that train, of which no prediction knows."""
    kept = [step for step in recipe.passes if not isinstance(step, Depth | Tune | Distill | Finetune | Lora)]
    return recipe.model_copy(update={"passes": kept})


def verify(
    recipe: Recipe, model: str, directory: Path, held_out: Tensor, linears: Collection[str], weights: int, quiet: bool
) -> Verified:
    """Compress `model` by the one-shot part of a recipe into `directory`, where that was not done yet, and measure it.

    held_out: int64 [samples, T]; linears: names in the checkpoint over which bits are averaged; weights: how many they have
    """
    asked = one_shot(recipe).model_copy(update={"model": model})
    if not directory.exists():
        started = partial_directory(directory).exists()
        apply(asked, model, directory, resume=started, quiet=quiet)
    elif (directory / RECIPE).read_text(encoding="utf-8") != dump_recipe(asked):
        raise CheckpointError(f"{directory} was made by another recipe; remove it")
    dense, compressed = load_model(model), load_model(directory)
    scores, reference = score_models(
        [(str(directory), compressed.model)],
        held_out,
        (model, dense.model),
        lambda rows: progress(rows, description="measuring", total=len(held_out), quiet=quiet),
    )
    score = scores[0]
    if isinstance(score, Exception):
        raise score
    assert reference is not None
    with as_written(directory / METRICS):
        nbytes = int(read_json(directory / METRICS)["sizes"]["compressed_bytes"])
    bits = 8 * linear_bytes(directory, linears) / weights
    return Verified(score.mean_kl, score.perplexity, reference.perplexity, bits, nbytes)


def linear_bytes(directory: Path, linears: Collection[str]) -> int:
    """Bytes of these linears in a checkpoint, without their biases."""
    checkpoint, wanted = open_checkpoint(directory), set(linears)
    return sum(
        checkpoint.info(name).nbytes
        for name in checkpoint.names()
        if name.rpartition(".")[0] in wanted and not name.endswith(".bias")
    )
