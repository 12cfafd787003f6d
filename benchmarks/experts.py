"""Which mixtures of experts compress, and whether transformers gives the logits of their dense export: on tiny random models.

    python benchmarks/experts.py [FAMILY ...]      prints the table of docs/experts.md

Every causal language model of the installed transformers whose class describes its experts is tried, with two layers and four
experts: 2:4 and 4 bits, SparseGPT and GPTQ. Logits are compared in float32 after the dense model was given the weights that the
compressed one decodes to, so that only the order of sums differs.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import sparsify  # noqa: F401  registers sparse24 with transformers
from sparsify.compiler.apply import apply
from sparsify.errors import SparsifyError
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import BlockModel, find_blocks, load_state, source_map
from sparsify.model.experts import fused_experts, is_expert, stored_fused
from sparsify.recipe import parse_recipe

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_dense_layers": 1,
    "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
SAME_HEADS = ("deepseek_v3", "deepseek_v2", "kimi_linear")  # every head has keys of its own
RECIPE = """
version: 1
calibration: {{source: "file:{tokens}", samples: 8, sequence_length: 24}}
solver: {{error_propagation: 0.5, coordinate_descent: 1}}
passes: [prune: {{method: sparsegpt}}, quantize: {{method: gptq, bits: 4, group_size: 32}}]
"""
IDS = torch.randint(4, 96, (2, 20), generator=torch.Generator().manual_seed(3))


def families() -> list[str]:
    """Causal language models of transformers whose modelling code uses `use_experts_implementation`."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = Path(transformers.__file__).parent / "models"
    found = []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        code = folder / family / f"modeling_{family}.py"
        if code.exists() and "@use_experts_implementation" in code.read_text():
            found.append(family)
    return sorted(found)


def tiny(family: str, directory: Path) -> None:
    """Write a random model of a family."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
    settings = {key: value for key, value in SMALL.items() if key in known}
    if family in SAME_HEADS:
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1)
    if not fused_experts(model):
        raise ValueError("the tiny model has no experts")
    model.save_pretrained(directory)


@torch.no_grad()
def difference(directory: Path, compressed: Path) -> float:
    """The largest difference of logits between the compressed model and the dense one with the same weights, of the largest logit."""
    from transformers import AutoModelForCausalLM

    opened = open_compressed(compressed)
    ours = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tensors = {name: opened.tensor(name) for name in opened.other_names()}
    tensors |= {f"{module}.weight": opened.linear(module).dense(torch.float32) for module in opened.modules}
    for name, fused in stored_fused(dense).items():
        members = {one: tensors.pop(one) for one in fused.names()}
        tensors[name] = fused.assembled({one: tensor.float() for one, tensor in members.items()})
    checkpoint = open_checkpoint(directory)
    whole = BlockModel(checkpoint, dense, find_blocks(dense), source_map(dense, checkpoint), torch.float32)
    load_state(whole.model, tensors, torch.float32)
    dense.tie_weights()
    theirs = dense(IDS, use_cache=False).logits
    return float((ours(IDS, use_cache=False).logits - theirs).abs().max() / theirs.abs().max())


def row(family: str, folder: Path, recipe: str) -> str:
    """One line of the table."""
    source, output = folder / family, folder / f"{family}-out"
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            tiny(family, source)
    except Exception as error:  # what configs and classes raise on settings that do not go together
        return f"| {family} | not tried: no tiny model ({first_line(error)}) | |"
    try:
        with contextlib.redirect_stderr(quiet):
            metrics = apply(parse_recipe(recipe), str(source), output, quiet=True).metrics
    except SparsifyError as error:
        return f"| {family} | refused: {first_line(error).replace(str(source), 'it')} | |"
    experts = [layer for layer in metrics["layers"] if is_expert(layer["module"])]
    if not experts:
        why = {m["reason"] for m in metrics["dense_modules"] if "experts" in m["module"]}
        return f"| {family} | experts stay dense: {'; '.join(sorted(why))} | |"
    try:
        with contextlib.redirect_stderr(quiet):
            apart = difference(source, output)
    except Exception as error:  # whatever transformers raises
        return f"| {family} | yes | no: {first_line(error)} |"
    return f"| {family} | yes | {'yes' if apart < 1e-3 else f'no: {apart:.2g} of the largest logit'} |"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def main() -> None:
    print("| family | experts compress | logits = own dense export |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = torch.randint(4, 96, (8, 24), generator=torch.Generator().manual_seed(1))
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        for family in sys.argv[1:] or families():
            print(row(family, folder, RECIPE.format(tokens=folder / "tokens.safetensors")), flush=True)


if __name__ == "__main__":
    main()
