"""The model card: what a checkpoint is, what it was made from and how, with the metadata the Hub reads."""

from __future__ import annotations

from typing import Any

import yaml

from sparsify.compiler.plan_training import short
from sparsify.formats import ModuleScheme
from sparsify.formats.foreign import source_in_words
from sparsify.model.experts import is_expert
from sparsify.model.output_head import OutputHead
from sparsify.recipe import Recipe, dump_recipe
from sparsify.recipe.sources import sources_in_words
from sparsify.solver.head_quantization import SolvedHead

HUB_IDS = {"embedded:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
USAGE = {
    "sparse24": "vLLM serves it with the sparsify plugin (`pip install sparsify-24`), transformers after `import sparsify`.",
    "pack-quantized": "It runs in stock vLLM and transformers; the zeros are stored, so it is no faster than dense 4-bit.",
    "gptq": "AutoGPTQ and GPTQModel load it; the zeros are stored, so it is no faster than dense 4-bit.",
    "compressed-tensors": "The weights are as llm-compressor saved them: what loads those loads this, by way of compressed-tensors.",
    "dense": "It runs everywhere; the zeros are stored, so it is no smaller than the original.",
}


def model_card(metrics: dict[str, Any], recipe: Recipe) -> str:
    """README.md of a checkpoint directory, from what metrics.json holds."""
    base = metrics["base_model"]
    hub_id = HUB_IDS.get(base, base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None)
    metadata: dict[str, Any] = {
        "library_name": "sparsify",
        "pipeline_tag": "text-generation",
        "tags": ["sparsify", *_kinds(metrics), *["vllm"] * (not metrics.get("not_in_vllm")), metrics["format"]],
    }
    if hub_id:
        metadata |= {"base_model": hub_id, "base_model_relation": "quantized" if metrics["layers"] else "finetune"}
    sizes = metrics["sizes"]
    rows = [
        ("linears compressed", f"{len(metrics['layers'])} in {metrics['blocks']} blocks"),
        ("size", f"{sizes['compressed_bytes'] / 1e6:.1f} MB (dense {sizes['dense_bytes'] / 1e6:.1f} MB)"),
        ("bits per linear weight", f"{sizes['bits_per_weight']:.2f}"),
        ("calibration", _calibration(metrics["calibration"])),
    ]
    if depth := metrics.get("depth"):
        rows.insert(0, ("layers", f"{depth['layers_after']} of {depth['layers_before']}, by {depth['method']}"))
    if basis := metrics.get("basis"):
        rows.insert(-1, ("basis", basis_in_words(basis)))
    if source := metrics.get("source"):
        rows.insert(0, ("source", source_in_words(source)))
    if made := metrics.get("llm_compressor"):
        rows.insert(0, (f"llm-compressor {made['version']}", made_in_words(made)))
    if head := metrics.get("head"):
        rows.insert(-1, ("output head", head_in_words(head, sizes["head_bytes"])))
    rows += [(training["kind"], training_in_words(training)) for training in metrics.get("training", [])]
    if evaluation := metrics.get("evaluation"):
        rows += evaluation_in_words(evaluation, dense=True)
    name = (hub_id or base).rstrip("/").rsplit("/", 1)[-1]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n"
        f"# {name}, compressed by sparsify\n\n{_usage(metrics)}\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n"
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```\n\n"
        "Details of every layer are in `metrics.json`. Nothing here was measured on a GPU unless it says so.\n"
    )


def _kinds(metrics: dict[str, Any]) -> list[str]:
    """Tags for what was done."""
    made = metrics.get("llm_compressor")
    ours = not metrics.get("depth") and not (made and made["whole"])
    sparse = ours or any(layer["pattern"] == "2:4" for layer in metrics["layers"])
    depth, foreign = bool(metrics.get("depth")), made is not None
    return [*["2:4"] * sparse, *["depth-pruning"] * depth, *["llm-compressor"] * foreign]


def made_in_words(made: dict[str, Any]) -> str:
    """`AWQModifier, before the passes`; `SparseGPTModifier, all that was done; left dense, 50.0% of the weights zero`"""
    names = ", ".join(made["modifiers"])
    if not made["whole"]:
        return f"{names}, before the passes"
    return f"{names}, all that was done; left {made['stored']}, {made['zeros']:.1%} of the weights zero"


def _usage(metrics: dict[str, Any]) -> str:
    if metrics.get("depth") and not metrics["layers"] and metrics["format"] == "dense":
        return "It runs everywhere: the architecture is that of the original, with fewer layers."
    if metrics["format"] == "sparse24" and any(is_expert(layer["module"]) for layer in metrics["layers"]):
        if why := metrics.get("not_in_vllm"):
            return f"transformers runs it after `import sparsify`; vLLM does not serve its experts: {why}."
        return f"{USAGE['sparse24']} Its experts were not tried in vLLM on a GPU."
    return USAGE[metrics["format"]]


def head_note(head: OutputHead, solved: SolvedHead) -> dict[str, Any]:
    """What metrics.json says of a quantized output head."""
    scheme = ModuleScheme.of(solved.linear)
    return {
        "module": head.module,
        "shape": list(scheme.shape),
        "bits": scheme.bits,
        "pattern": scheme.pattern,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "tied": head.tied,
        "weight_error": solved.weight_error,
        "relative_error": solved.output_error,
    }


def basis_in_words(basis: dict[str, Any]) -> str:
    """`residual stream turned, values turned in 30 blocks, channels ordered in 30; 2:4 drops of self_attn.o_proj 1.06% for
    1.89%, mlp.down_proj 2.49% for 3.11%`"""
    done = [
        *(["residual stream turned"] if basis["residual"] else []),
        *([f"values turned in {basis['heads']} blocks"] if basis["heads"] else []),
        *([f"channels ordered in {basis['channels']}"] if basis["channels"] else []),
    ]
    shares = [f"{name} {after:.2%} for {before:.2%}" for name, (before, after) in basis["dropped"].items()]
    return ", ".join(done) + (f"; 2:4 drops of {', '.join(shares)}" if shares else "")


def head_in_words(head: dict[str, Any], nbytes: int) -> str:
    """`lm_head: 8-bit, 8.25 bits per weight, 29.2 MB (was tied to the embedding, which stays dense)`."""
    n, k = head["shape"]
    lost = f", output error {head['relative_error']:.4f}" if head.get("relative_error") is not None else ""
    was = " (was tied to the embedding, which stays dense)" if head["tied"] else ""
    size = f"{8 * nbytes / (n * k):.2f} bits per weight, {nbytes / 1e6:.1f} MB"
    return f"{head['module']}: {head['bits']}-bit, {size}{lost}{was}"


def training_in_words(training: dict[str, Any]) -> str:
    """`488 steps, 2.0M tokens of 3906 rows, teacher embedded:...; loss 1.91 to 0.73`."""
    teacher = f", teacher {training['teacher']}" if training["teacher"] else ""
    if masks := training.get("masks"):
        teacher += f", masks learned ({masks['method']}): {masks['moved']:.1%} of the kept weights are new"
    if averaged := training.get("averaged_steps"):
        teacher += f", mean of the weights of {averaged} steps"
    if held_out := training.get("held_out"):
        stopped = f" (stopped before step {training['planned_steps']})" if held_out["stopped"] else ""
        teacher += (
            f", state of step {held_out['best_step']}{stopped}, the best on {held_out['source']}: divergence "
            f"{held_out['curve'][0][1]:.4g} to {held_out['best']:.4g}"
        )
    return (
        f"{training['steps']} steps, {short(training['tokens'])} tokens of {training['rows']} rows{teacher}; "
        f"loss {training['first']['loss']:.4g} to {training['last']['loss']:.4g}"
    )


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration["tokens"]:
        return "none, the passes need no data"
    computed = f", computed in {calibration['computed_in']}" if calibration.get("computed_in") else ""
    return f"{calibration['samples']} x {calibration['sequence_length']} tokens from {sources_in_words(calibration)}{computed}"


def evaluation_in_words(evaluation: dict[str, Any], dense: bool = False) -> list[tuple[str, str]]:
    """Rows of a table about an evaluation. dense: with what the dense model has"""
    rows = []
    if evaluation.get("text") is not None:  # JSON has no infinity: the evaluation says None for it
        perplexity = evaluation["perplexity"]
        rows.append(("perplexity", "infinite" if perplexity is None else f"{perplexity:.2f}"))
        if dense and evaluation.get("dense_perplexity") is not None:
            rows.append(("perplexity, dense", f"{evaluation['dense_perplexity']:.2f}"))
        if dense and evaluation.get("kl") is not None:
            rows.append(("KL divergence from dense", f"{evaluation['kl']:.4f} nats per token"))
    for name, score in (evaluation.get("tasks") or {}).items():
        cut = "" if score["items"] == score["items_in_file"] else f", {score['items']} items"
        before = f", dense {score['dense_accuracy']:.1%}" if score["dense_accuracy"] is not None else ""
        rows.append((f"accuracy, {name}{cut}", f"{score['accuracy']:.1%}{before}"))
    return rows
