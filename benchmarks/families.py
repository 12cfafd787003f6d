"""Which families of models compress, and whether transformers and vLLM then give what their dense export gives: on tiny random models.

    python benchmarks/families.py [--vllm] [--again] [FAMILY ...]

tries every causal language model and every wrapper of one that the installed transformers lists, or those that are named, and
writes benchmarks/results/families.json after each of them and docs/families.md from it. Families that the record has are passed
over without --again, so that an interrupted run goes on. --vllm also starts an engine on the dense export and one on sparse24.

Two layers, four experts, 2:4 and 4 bits, SparseGPT and GPTQ on random tokens. The dense export gets the weights that the
compressed linears decode to, unrounded, and all is computed in float32, so that only the order of sums differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sparsify  # noqa: F401  registers sparse24 with transformers
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import convert
from sparsify.compiler.planning import make_plan
from sparsify.errors import SparsifyError
from sparsify.files import atomic_write
from sparsify.formats.reader import open_compressed
from sparsify.model.decoder import meta_model
from sparsify.model.experts import is_expert, stored_fused
from sparsify.model.pretrained import load_causal_lm, loader_of
from sparsify.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the tests start engines, too
from tests.end_to_end.engine import serve  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
SMALL = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_dense_layers": 1,
    "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "num_layers": 2, "rotary_dim": 16, "vocab_size_per_layer_input": 96, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 64,
    "zero_expert_num": 2, "decoder_layers": 2, "decoder_ffn_dim": 64, "d_model": 128, "ffn_dim": 64, "d_inner": 128,
}  # fmt: skip
SEEING = {  # of towers for pictures, by the names that their configs have for them
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "projection_dim": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 128, "embed_dim": 32,
}  # fmt: skip
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# Settings of published configs that others depend on, by the model type of the config or of its text tower.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},  # the only sizes that vLLM's attention has on CPUs
    "deepseek_v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "chameleon": {
        "vocabulary_map": {"<image>": 95},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
    },
    "emu3": {"vocabulary_map": {"<image>": 95}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 32,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 32]},
    "granite4_vision": {"text_config": {"model_type": "granite"}, "deepstack_layer_map": [[0, 0]]},
    "gpt_neo": {"num_layers": 4, "num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "hunyuan_vl_text": {"rope_parameters": {**ROTARY, "mrope_section": [4, 4, 4, 4]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_vl_moe_text": {"moe_intermediate_size": 96},  # or files that hold experts turned look like those that do not
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [64, 64],
        "attn_layers": ["local", "local"],
    },
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 1, "state_size": 16},
}
LARGEST = 5e7  # weights of a tiny model
MARKERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id", "vision_start_token_id",
           "vision_end_token_id", "vision_token_id", "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")  # fmt: skip
# Of one key the sizes of several things: the first choice with which the model computes is taken. None: as the class has it.
CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "head_dim": None},
    {"head_dim": None},
    {"num_key_value_heads": 4},
    {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64},  # rotations of three axes
    {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128},
    {"num_key_value_heads": 4, "moe_intermediate_size": None},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": None},
)
ELSEWHERE = re.compile(
    "See root cause above|failed to be inspected|validation error"
)  # of vLLM, where the log has the cause before
TOWERS = re.compile(r"vision|image|audio|qformer|perceiver|vq|dac|speech")  # of configs inside a config
RECIPE = """
version: 1
calibration: {{source: "file:{tokens}", samples: 8, sequence_length: 24}}
solver: {{error_propagation: 0.5, coordinate_descent: 1}}
passes: [prune: {{method: sparsegpt}}, quantize: {{method: gptq, bits: 4, group_size: 32}}]
"""
IDS = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(3))
PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10, 11], list(range(3, 60))]
CLOSE = 1e-3  # of the largest logit
ERROR = 300  # characters of an error that the page repeats
ASKED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4",
    "llama4_text", "qwen3_next", "lfm2_moe", "hunyuan_v1_moe", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe",
    "llava", "llava_next", "mistral3", "gpt2", "openai-gpt", "falcon", "bert",
)  # fmt: skip
TITLES = {
    "compress": "compresses",
    "logits": "transformers: logits of the dense export",
    "vllm": "vLLM: tokens of the dense export",
}


def families() -> list[str]:
    """What transformers lists as a causal language model or as one that reads pictures too."""
    from transformers.models.auto import modeling_auto as auto

    return sorted({*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def fitting(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that a config has."""
    known = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    return {key: value for key, value in settings.items() if key in known}


def tiny(family: str, directory: Path) -> Exception | None:
    """Write a random model of a family. Returns why it does not compute; where none can be made at all, only its config is
    written."""
    first: Exception | None = None
    built = None
    for choice in CHOICES:
        settings = {key: value for key, value in {**SMALL, **choice}.items() if value is not None}
        try:
            model = random_model(family, settings)
            built = built or model
            with torch.no_grad():
                model(input_ids=IDS, use_cache=False)
        except SparsifyError:
            raise
        except Exception as error:  # what configs and classes raise on settings that do not go together
            first = first or error
            continue
        model.save_pretrained(directory)
        return None
    if built is not None:
        built.save_pretrained(directory)
    else:
        with contextlib.suppress(Exception):  # a class without a config of its own
            CONFIG_MAPPING[family]().save_pretrained(directory)
    return first


def random_model(family: str, sizes: dict[str, Any]) -> Any:
    """A random model of a family, of the sizes that its config has. Errors are those of transformers."""
    config = small_config(family, sizes)
    loader = loader_of(config, family)
    with init_empty_weights():
        size = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its config has sizes of names of its own, and {size / 1e9:.1f} B weights")
    torch.manual_seed(0)
    model = loader.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1)
    return model


def small_config(family: str, sizes: dict[str, Any]) -> Any:
    """The config of a family, of the sizes that it has, and of those of the towers inside of it."""
    kind, own = CONFIG_MAPPING[family], AS_PUBLISHED.get(family, {})
    default = kind(**{key: value for key, value in own.items() if isinstance(value, dict) and "model_type" in value})
    text = default.get_text_config(decoder=True)
    settings = {**fitting(text, sizes), **AS_PUBLISHED.get(text.model_type, {})}
    inside = {key: part for key in default.sub_configs if (part := getattr(default, key, None)) is not None}
    name = next((key for key, part in inside.items() if part is text), None)
    others = {
        key: fitting(part, SEEING if name is not None or TOWERS.search(key) else sizes)
        for key, part in inside.items()
        if key != name
    }
    others = {key: {**value, "model_type": inside[key].model_type} for key, value in others.items() if value}
    if name is not None:
        settings = {name: {**settings, "model_type": text.model_type}}
    markers = fitting(default, {name: 95 - number for number, name in enumerate(MARKERS)})
    others |= {key: {**others.get(key, {}), **value} for key, value in own.items() if key in inside and key != name}
    return kind(**{**own, **settings, **others, **markers})


def exact_dense(compressed: Path, dense: Path) -> Path:
    """The dense export without its rounding to 16 bits, by which a router may choose another expert."""
    convert(compressed, "dense", dense, quiet=True)
    opened, tensors = open_compressed(compressed), load_file(dense / "model.safetensors")
    whole = {f"{module}.weight": opened.linear(module).dense(torch.float32) for module in opened.modules}
    for name, fused in stored_fused(meta_model(opened.checkpoint, torch.float32)).items():
        if any(one in whole for one in fused.names()):
            members = {one: whole.pop(one) if one in whole else opened.tensor(one).float() for one in fused.names()}
            whole[name] = fused.assembled(members)
    for name in open_compressed(dense).checkpoint.transposed & whole.keys():
        whole[name] = whole[name].t().contiguous()
    save_file({**tensors, **whole}, dense / "model.safetensors", metadata={"format": "pt"})
    return dense


@torch.no_grad()
def difference(ours: Path, theirs: Path) -> float:
    """The largest difference of two models' logits, of the largest logit."""
    one, other = (
        load_causal_lm(place, dtype=torch.float32)(input_ids=IDS, use_cache=False).logits for place in (ours, theirs)
    )
    return float((one - other).abs().max() / other.abs().max())


def tokens_of(model: Path, folder: Path) -> tuple[list[list[int]] | None, str]:
    """What vLLM answers, and its own error where it does not."""
    try:
        answers = serve(model, folder, prompts=PROMPTS, dtype="float32", limit_mm_per_prompt={"image": 0})
    except AssertionError as error:
        return None, cause(str(error))
    return answers.tokens, ""


def cause(log: str) -> str:
    """The error that ended an engine: the last one of its log that does not only point at another one."""
    found = re.finditer(
        r"\b\w+(Error|Exception): .+?(?=$| \[type=)|Value error, (.+?)(?=$| \[type=)", log, re.MULTILINE
    )
    said = [match[0] for match in found]  # the second is what pydantic says below its own error
    named = [line for line in said if not ELSEWHERE.search(line)] or said or log.splitlines() or ["it ended"]
    return named[-1].strip()[:ERROR]


def served(compressed: Path, dense: Path, folder: Path) -> str:
    expected, error = tokens_of(dense, folder)
    if expected is None:
        return f"vLLM here cannot serve the dense export either: {error}"
    found, error = tokens_of(compressed, folder)
    if found is None:
        return f"no: {error}"
    return "yes" if found == expected else "no: other tokens"


def tried(family: str, folder: Path, with_vllm: bool) -> dict[str, Any]:
    """What became of a family: a sentence for each column."""
    source, output, dense = folder / "source", folder / "sparse24", folder / "dense"
    quiet = io.StringIO()
    with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        try:
            wrong = tiny(family, source)
        except SparsifyError as error:
            return {"compress": f"refused: {first_line(error).replace(f'{family}: ', '')}"}
        tokens = torch.randint(4, 90, (8, 24), generator=torch.Generator().manual_seed(1))
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        recipe = parse_recipe(RECIPE.format(tokens=folder / "tokens.safetensors"))
        try:
            if wrong is not None and (source / "config.json").exists():
                make_plan(recipe, str(source), config_only=not (source / "model.safetensors").exists())
            if wrong is not None:
                return {"compress": f"not tried: no tiny model ({first_line(wrong)})"}
            metrics = apply(recipe, str(source), output, quiet=True).metrics
        except SparsifyError as error:
            said = first_line(error).replace(str(source), "it")
            default = "transformers cannot build" in said and "Unrecognized configuration class" not in said
            if wrong is not None and default:  # its class makes a config that no model has
                return {"compress": f"not tried: no tiny model ({first_line(wrong)})"}
            return {"compress": f"refused: {said}"}
        except Exception as error:  # a fault of ours
            traceback.print_exc(file=sys.__stderr__)
            return {"compress": f"no: {type(error).__name__}: {first_line(error)}"}
        dense_experts = {m["reason"] for m in metrics["dense_modules"] if "experts" in m["module"]}
        linears = len(metrics["layers"])
        experts = sum(is_expert(layer["module"]) for layer in metrics["layers"])
        said = f"yes, {linears} linears" + (f", {experts} of experts" if experts else "")
        found = {
            "compress": said + (f"; experts stay dense: {'; '.join(sorted(dense_experts))}" if dense_experts else "")
        }
        try:
            apart = difference(output, exact_dense(output, dense))
            found["logits"] = "yes" if apart < CLOSE else f"no: {apart:.2g} of the largest logit"
        except Exception as error:  # whatever transformers raises
            found["logits"] = f"no: {first_line(error)}"
        if with_vllm and dense.exists():
            found["vllm"] = served(output, dense, folder)
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:ERROR]


def page(record: dict[str, Any]) -> str:
    """docs/families.md"""
    found: dict[str, dict[str, str]] = record["families"]
    works = {f for f, row in found.items() if row["compress"].startswith("yes") and row.get("logits") == "yes"}
    refused = {f for f, row in found.items() if row["compress"].startswith("refused")}
    untried = {f for f, row in found.items() if row["compress"].startswith("not tried")}
    red = found.keys() - works - refused - untried
    alike = {f for f in works if f not in ASKED and "dense" not in found[f]["compress"]}
    notes: list[str] = []
    shown = [family for family in ASKED if family in found]
    others = sorted(works - alike - set(shown)) + sorted(red - set(shown))
    lines = [
        "# Families of models",
        "",
        f"Tiny random models of the {len(found)} families that transformers {record['transformers']} lists as language models, with "
        "pictures or without: 2:4 and 4 bits, SparseGPT and GPTQ, in float32 on a processor. "
        "`python benchmarks/families.py --vllm` writes this page and [its record](../benchmarks/results/families.json).",
        "",
        f"**{len(works)} compress**, and transformers computes of them what it computes of their dense export. "
        f"**{len(refused)} are refused** by `sparsify plan` in one sentence, before anything is computed. "
        + (f"**{len(red)} do not work.** " if red else "")
        + (f"Of {len(untried)} no tiny model could be made, so they were not tried." if untried else ""),
        "",
        "## Mixtures of experts, models with pictures, and classes of their own",
        "",
        "vLLM's answers are compared token by token with those to the dense export, in float32, eager, by its own classes. "
        "An empty cell was not tried.",
        "",
        f"| family | {' | '.join(TITLES.values())} |",
        f"| --- |{' --- |' * len(TITLES)}",
        *(table_row(family, found[family], notes) for family in shown),
        "",
        "## All others",
        "",
        f"These {len(alike)} compress, and transformers computes the logits of the dense export:",
        "",
        f"{', '.join(sorted(alike))}.",
        "",
        *(
            [
                "These do so with a remark, or not:",
                "",
                f"| family | {TITLES['compress']} | {TITLES['logits']} |",
                "| --- | --- | --- |",
                *(table_row(family, found[family], notes, ("compress", "logits")) for family in others),
                "",
            ]
            if others
            else []
        ),
        "## Refused",
        "",
        *by_reason({f: shortened(found[f]["compress"]) for f in refused - set(shown)}, "refused: "),
        "",
        *(
            [
                "## Not tried",
                "",
                *by_reason({f: found[f]["compress"] for f in untried - set(shown)}, "not tried: no tiny model "),
                "",
            ]
            if untried
            else []
        ),
        *(["## Notes", "", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""] if notes else []),
    ]
    return "\n".join(lines)


def table_row(family: str, row: dict[str, str], notes: list[str], keys: Iterable[str] = tuple(TITLES)) -> str:
    """A row of a table; long sentences become notes."""
    cells = []
    for key in keys:
        short, _, long = (
            row.get(key, "").replace("|", "\\|").partition(": " if not row.get(key, "").startswith("yes") else "; ")
        )
        if long and long not in notes:
            notes.append(long)
        cells.append(f"{short} ({notes.index(long) + 1})" if long else short)
    return f"| {family} | {' | '.join(cells)} |"


def by_reason(said: dict[str, str], prefix: str) -> list[str]:
    """Lines of a list: families, and the reason that holds for all of them, without names."""
    reasons: dict[str, list[str]] = {}
    for family, sentence in sorted(said.items()):
        reason = sentence.removeprefix(prefix).replace(f"{family} ", "it ", 1).removeprefix("it: ")
        reasons.setdefault(re.sub(r"\b\w+For[A-Z]\w+\b", "its class", reason), []).append(family)
    most_first = sorted(reasons.items(), key=lambda one: -len(one[1]))
    return [f"- {', '.join(names)}: {reason}" for reason, names in most_first]


def shortened(refusal: str) -> str:
    """A refusal without its details: what stands in brackets or after a semicolon."""
    return re.split(r" \(|; ", refusal)[0]


def recorded() -> dict[str, Any]:
    """The record as it is."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"families": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--vllm", action="store_true", help="start engines on the dense export and on sparse24")
    parser.add_argument("--again", action="store_true", help="families that the record has, too")
    arguments = parser.parse_args()
    import transformers

    for family in arguments.family or families():
        before = recorded()["families"].get(family)
        if (
            before is not None
            and not arguments.again
            and ("vllm" in before or not arguments.vllm or "logits" not in before)
        ):
            continue
        with tempfile.TemporaryDirectory() as name:
            found = tried(family, Path(name), arguments.vllm)
        print(family, found, flush=True)
        known = {**recorded(), "transformers": transformers.__version__}  # another process may have written meanwhile
        known["families"][family] = found
        atomic_write(RECORD, json.dumps(known, indent=2) + "\n")
        atomic_write(PAGE, page(known))


if __name__ == "__main__":
    main()
