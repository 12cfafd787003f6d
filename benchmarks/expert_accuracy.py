"""Accuracy of a small mixture of experts whose experts are 2:4 with 4 bits: trained here on real text, compressed, tuned, scored.

    python benchmarks/expert_accuracy.py --train train.txt --text test.txt --output out/mixture

trains a Qwen3-MoE of 4 layers with 16 experts, two for each token, and a byte-pair tokenizer, both on --train (some minutes);
compresses it with the attention alone, with all linears, and with all linears and then tuned (`2of4-w4a16` and its training),
calibrated on --train; scores all of them on --text. Then it compresses the mixture on few rows twice, with and without shrinking the
Hessian of experts with few tokens toward the layer's (sparsify/solver/shrinkage.py), and compares what these experts give for
tokens of --text that their routers send to them. What is there in --output already is not made again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify import api
from sparsify.bench.machine import describe_machine, installed_versions
from sparsify.evaluation import evaluate_all
from sparsify.files import read_json, write_json
from sparsify.formats.foreign import open_dense
from sparsify.formats.reader import open_compressed
from sparsify.model.pretrained import load_causal_lm
from sparsify.solver import shrinkage

VOCABULARY, LENGTH = 4096, 256
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "router_aux_loss_coef": 0.01, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
BATCH, LEARNING_RATE = 16, 2e-3
SOLVER = {"damping": 0.004, "error_propagation": 0.4, "coordinate_descent": 5}
QUANTIZE = {"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}
TUNE = {
    "distill": {
        "tokens": "72k", "batch_size": 4, "sequence_length": LENGTH, "learning_rate": 0.008, "scale_learning_rate": 0.002,
        "norm_learning_rate": 0.002, "loss": {"kl": 1, "squarehead": 0, "cross_entropy": 0.3},
    }
}  # fmt: skip
FEW_ROWS = 12  # of LENGTH tokens: three eighths of an input of an expert, on average


def train(text: str, steps: int, output: Path) -> None:
    """A random mixture, trained on next tokens with the loss that balances its routers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES), dtype=torch.float32)
    model.config.output_router_logits = True
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(tokens)} tokens of text", flush=True
    )
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,)).tolist()
        rows = torch.stack([tokens[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(output)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(output)


def compressed(
    name: str,
    model: Path,
    output: Path,
    text: str,
    rows: int,
    passes: list[dict[str, Any]],
    ignore: tuple[str, ...] = (),
) -> Path:
    """The model after `passes`, all but what `ignore` names."""
    made = output / name
    if not made.exists():
        print(f"compressing: {name}", flush=True)
        calibration = {"source": f"file:{text}", "samples": rows, "sequence_length": LENGTH}
        recipe = {
            "version": 1, "calibration": calibration, "ignore": ["lm_head", *ignore], "solver": SOLVER, "passes": passes,
            "export": {"format": "sparse24"},
        }  # fmt: skip
        api.apply(recipe, model, made, quiet=True)
    return made


def accuracy(dense: Path, output: Path, train_text: str, text: str) -> dict[str, Any]:
    """Perplexity and KL of the mixture and of what was made of it."""
    prune = [{"prune": {"method": "alps", "pattern": "2:4"}}, QUANTIZE]
    models = {
        "dense": dense,
        "attention 2:4 + 4 bits, experts dense": compressed(
            "attention", dense, output, train_text, 128, prune, ("*.experts.*",)
        ),
        "all 2:4 + 4 bits, one shot": compressed("one-shot", dense, output, train_text, 128, prune),
        "all 2:4 + 4 bits, tuned": compressed("tuned", dense, output, train_text, 128, [*prune, TUNE]),
    }
    results = evaluate_all(list(models.values()), dense, text, sequence_length=LENGTH, chunks=128, quiet=True)
    rows = {}
    for name, result in zip(models, results, strict=True):
        assert result.first is not None
        rows[name] = {"perplexity": result.first.perplexity, "kl": result.first.kl, "nbytes": result.nbytes}
    return rows


# ------------------------------------------------------------------------------------------------ experts with few tokens


@torch.no_grad()
def routed(model: Any, tokens: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Of each layer, what each expert reads [M, K] for rows of tokens."""
    seen: dict[int, Tensor] = {}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args[0].flatten(0, 1)}))
        for number, block in enumerate(model.model.layers)
    ]
    model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    for number, block in enumerate(model.model.layers):
        x = seen[number]
        chosen = (x @ block.mlp.gate.weight.T).topk(SIZES["num_experts_per_tok"]).indices
        yield number, [x[(chosen == expert).any(1)] for expert in range(SIZES["num_experts"])]


def expert_output(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return functional.linear(functional.silu(x @ gate.T) * (x @ up.T), down)


def output_errors(dense: Path, made: Path, text: str) -> dict[str, float]:
    """||f'(x) - f(x)||^2 / ||f(x)||^2 of every expert over tokens of `text` that the dense model gives to it."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(dense)(text)["input_ids"][: 64 * LENGTH]
    origin, opened = open_dense(dense), open_compressed(made)
    errors = {}
    for layer, inputs in routed(
        load_causal_lm(dense, dtype=torch.float32), torch.tensor(ids).unflatten(0, (-1, LENGTH))
    ):
        for expert, x in enumerate(inputs):
            names = [f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj" for kind in ("gate", "up", "down")]
            if len(x):
                exact = expert_output(x, *(origin.tensor(f"{name}.weight").float() for name in names))
                found = expert_output(x, *(opened.linear(name).dense(torch.float32) for name in names))
                errors[names[0].rpartition(".")[0]] = float((found - exact).square().sum() / exact.square().sum())
    return errors


def few_tokens(dense: Path, output: Path, train_text: str, text: str) -> dict[str, Any]:
    """Output errors of experts with fewer tokens than inputs, with and without shrinking."""
    passes = [{"prune": {"method": "sparsegpt", "pattern": "2:4"}}, QUANTIZE]
    shrunk = compressed("few-shrunk", dense, output, train_text, FEW_ROWS, passes)
    usual, shrinkage.FEW = shrinkage.FEW, 0
    plain = compressed("few-plain", dense, output, train_text, FEW_ROWS, passes)
    shrinkage.FEW = usual
    counts = {
        layer["module"].rpartition(".")[0]: layer["tokens"]
        for layer in read_json(shrunk / "metrics.json")["layers"]
        if layer.get("tokens") is not None
    }
    words = Path(text).read_text(encoding="utf-8")
    ours, theirs = (output_errors(dense, made, words) for made in (shrunk, plain))
    k = SIZES["hidden_size"]
    found: dict[str, Any] = {}
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0)):
        experts = [name for name, count in counts.items() if 0 < count and low * k <= count < high * k and name in ours]
        ratios = [ours[name] / theirs[name] for name in experts]
        found[f"{low} to {high} tokens per input"] = {
            "experts": len(ratios),
            "error_shrunk": statistics.fmean(ours[name] for name in experts) if experts else None,
            "error_not_shrunk": statistics.fmean(theirs[name] for name in experts) if experts else None,
            "median_ratio": statistics.median(ratios) if ratios else None,
            "lower_with_shrinking": sum(ratio < 1 for ratio in ratios),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="FILE", help="text to train on and to calibrate on")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to score on")
    parser.add_argument("--output", type=Path, default=Path("out/mixture"), metavar="DIR")
    parser.add_argument(
        "--steps", type=int, default=400, help=f"of training, with {BATCH} rows of {LENGTH} tokens each (400)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="where the figures are written as JSON too")
    asked = parser.parse_args()
    dense: Path = asked.output / "dense"
    if not dense.exists():
        train(Path(asked.train).read_text(encoding="utf-8"), asked.steps, dense)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/expert_accuracy.py --train {Path(asked.train).name} --text {Path(asked.text).name}",
        "steps": asked.steps, "machine": describe_machine(), "versions": installed_versions(),
        "accuracy": accuracy(dense, asked.output, asked.train, asked.text),
        "few_tokens": few_tokens(dense, asked.output, asked.train, asked.text),
    }  # fmt: skip
    if asked.record:
        write_json(asked.record, record)
    print(json.dumps({key: record[key] for key in ("accuracy", "few_tokens")}, indent=1))


if __name__ == "__main__":
    main()
