"""The models of a benchmark: opened cheaply, and refused where a workload does not suit them, before the first is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.bench.dummy_model import ENGINE_ARGUMENTS, PREFIX, is_dummy, parse_dummy
from sparsify.bench.workload import BenchOptions, LatencyWorkload, ThroughputWorkload, longest_request
from sparsify.errors import SparsifyError
from sparsify.files import read_json
from sparsify.formats.belonging import check_tensors
from sparsify.model.checkpoint import open_checkpoint

# vLLM's latency benchmark draws its prompt from the token ids below this.
LATENCY_VOCABULARY = 10_000


@dataclass(frozen=True)
class Target:
    """One model to measure."""

    label: str
    directory: Path
    format: str
    nbytes: int
    engine_args: Sequence[str] = ()  # of this model alone


def open_targets(
    models: Sequence[str | Path], labels: Sequence[str] | None = None, scratch: Path | None = None
) -> list[Target]:
    """Opens every model cheaply, so that a missing one is found before the first is measured.

    scratch: where to write the configs of models that consist of a shape.
    """
    if not models:
        raise SparsifyError("nothing to measure: give at least one model directory")
    if labels is not None and len(labels) != len(models):
        raise SparsifyError(f"{len(labels)} labels for {len(models)} models: give one for each")
    targets: list[Target] = []
    for i, spec in enumerate(models):
        label, text = "", str(spec)
        if "=" in text and not Path(text).exists():
            label, text = text.split("=", 1)
        label = labels[i] if labels else label or model_name(text)
        if any(label == other.label for other in targets):
            raise SparsifyError(f"two models are called {label}: name them, as in {label}-2={text}")
        if is_dummy(text):
            model = parse_dummy(text)
            assert scratch is not None, "a model that consists of its shape needs a place for its config.json"
            directory = model.write(scratch / str(i))
            targets.append(Target(label, directory, f"{model.format}, random", model.nbytes(), ENGINE_ARGUMENTS))
            continue
        checkpoint = open_checkpoint(text)
        check_tensors(checkpoint)  # vLLM loads the weights itself, and some versions of it miss the same
        quantization = checkpoint.config.get("quantization_config") or {}
        kind = str(quantization.get("format") or quantization.get("quant_method") or "dense")
        targets.append(Target(label, checkpoint.directory, kind, checkpoint.nbytes()))
    return targets


def model_name(spec: str | Path) -> str:
    """What people call a model: the name of its directory, or the spec itself."""
    return Path(spec).resolve().name if Path(spec).is_dir() else str(spec).removeprefix(PREFIX)


def check_fits(target: Target, latency: LatencyWorkload | None, throughput: ThroughputWorkload | None) -> None:
    """SparsifyError where a request is longer than the model reads, or its vocabulary too small for vLLM's prompts."""
    config = read_json(target.directory / "config.json")
    if not isinstance(config, dict):
        raise SparsifyError(f"{target.directory / 'config.json'} must hold a JSON object")
    text = config.get("text_config")
    config = {**config, **(text if isinstance(text, dict) else {})}
    limit, longest = config.get("max_position_embeddings"), longest_request(latency, throughput)
    if isinstance(limit, int) and longest + 32 > limit:
        raise SparsifyError(
            f"{target.label} reads at most {limit} tokens and a request of this workload takes {longest} and up to 32 "
            "of padding: use shorter --input-len or --output-len"
        )
    vocabulary = config.get("vocab_size")
    if latency and isinstance(vocabulary, int) and vocabulary < LATENCY_VOCABULARY:
        raise SparsifyError(
            f"{target.label} has {vocabulary} tokens, and vLLM's latency benchmark draws its prompts from the first "
            f"{LATENCY_VOCABULARY}: measure its throughput instead"
        )


def check_answers(target: Target, options: BenchOptions) -> None:
    """SparsifyError where a model without weights of its own is to answer prompts."""
    if options.prompts and target.engine_args:
        raise SparsifyError(f"{target.label} consists of its shape and cannot answer prompts: measure it without them")
