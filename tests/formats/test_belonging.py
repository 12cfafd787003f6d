"""Tensors and config.json belong together, or every command that opens the directory says by name what does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.bench.targets import open_targets
from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError
from sparsify.evaluation.load import load_model
from sparsify.formats.belonging import _suffixes
from sparsify.formats.inspect import inspect, render
from sparsify.model.permissions import allowing_unknown
from sparsify.model.pretrained import load_causal_lm
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny

NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj"
RTN = parse_recipe(
    "version: 1\npasses: [{quantize: {method: rtn, bits: 4, group_size: 32}}]\nexport: {format: sparse24}\n"
)
OPENED = {  # every way in
    "eval": lambda directory: load_model(directory, "cpu"),
    "inspect": lambda directory: inspect(directory, quiet=True),
    "bench": lambda directory: open_targets([directory]),
}
DENSE = {**OPENED, "plan": lambda directory: make_plan(RTN, str(directory)), "training": load_causal_lm}


def edit(directory, change, **config):
    """Change the tensors of a checkpoint of one file, and settings of its config.json (None: take away)."""
    file = directory / "model.safetensors"
    state = load_file(file)
    save_file(change(state) or state, file, {"format": "pt"})
    settings = {**json.loads((directory / "config.json").read_text()), **config}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


@pytest.fixture
def dense(tmp_path):
    def make(change=lambda state: state, family="llama", settings=None, **config):
        edit(save_tiny(tmp_path / "model", family, torch.bfloat16, **(settings or {})), change, **config)
        return tmp_path / "model"

    return make


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


DAMAGES = {
    "missing": (without(NORM), {}, rf"lacks the tensor {NORM}"),
    "no head": (without("lm_head.weight"), {"tie_word_embeddings": False}, r"lacks the tensor lm_head\.weight"),
    "no norm": (without("model.norm.weight"), {}, r"lacks the tensor model\.norm\.weight"),
    "more layers": (without(), {"num_hidden_layers": 4}, r"lacks the tensors model\.layers\.3\..*\(and 6 more\)"),
    "fewer layers": (without(), {"num_hidden_layers": 2}, r"holds model\.layers\.2\..*\(and 6 more\), which LlamaForCausalLM"),
    "unknown": (lambda s: {**s, "v_head.weight": torch.ones(1, 64)}, {}, r"holds v_head\.weight, which .*--allow-unknown-tensors"),
    "shape": (lambda s: {**s, NORM: torch.ones(32)}, {}, rf"{NORM} has shape \[32\], but config\.json asks for \[64\]"),
    "bias": (without(), {"attention_bias": True}, r"lacks the tensors model\.layers\.0\.self_attn\.k_proj\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("opened", DENSE)
def test_a_dense_directory_that_is_not_its_own_is_refused_by_name(dense, opened, damage):
    change, config, message = DAMAGES[damage]
    directory = dense(change, **config)
    with pytest.raises(CheckpointError, match=message):
        DENSE[opened](directory)


@pytest.mark.parametrize("opened", DENSE)
def test_one_expert_less_is_noticed(dense, opened):
    gone = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    directory = dense(without(gone), "mixtral")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        DENSE[opened](directory)


@pytest.mark.parametrize(
    ("change", "family", "settings", "config"),
    [
        (without("lm_head.weight"), "llama", {"tie_word_embeddings": True}, {}),
        (lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()}, "llama", {"tie_word_embeddings": True}, {}),
        (lambda s: {n.removeprefix("model."): t for n, t in s.items()}, "llama", {"tie_word_embeddings": True}, {}),
        (lambda s: {**s, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, "llama", {}, {}),
        (lambda s: {**s, "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8)}, "gpt_neox", {}, {}),
        (lambda s: {**s, "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}, "gpt_neox", {}, {}),
        (without(), "llama", {}, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}),
        (lambda s: {**s, "mtp.layers.0.fc.weight": torch.ones(64, 128)}, "qwen3", {}, {}),
    ],
    ids=["tied", "tied, stored too", "of the base model", "inv_freq", "mask", "masked", "next token", "mtp"],
)  # fmt: skip
def test_what_the_table_allows_is_no_error(dense, change, family, settings, config):
    directory = dense(change, family, settings, **config)
    for opened in DENSE.values():
        opened(directory)


def test_unknown_tensors_are_no_error_where_that_was_said(dense):
    directory = dense(DAMAGES["unknown"][0])
    with allowing_unknown(True):
        for opened in DENSE.values():
            opened(directory)
    directory = shutil.copytree(directory, directory.with_name("more"))
    edit(directory, without(NORM))
    with allowing_unknown(True), pytest.raises(CheckpointError, match=f"lacks the tensor {NORM}"):
        load_model(directory)


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize("format", ["sparse24", "pack-quantized"])
@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without(), {"quantization_config": None}, "a tensor of a quantized weight, but its config.json has no"),
        (without(f"{UP}.weight_scale"), {}, UP),
        (lambda s: {n: t for n, t in s.items() if not n.startswith(UP)}, {}, UP),
        (without(NORM), {}, NORM),
        (lambda s: {**s, f"{UP}.weight_extra": torch.ones(3)}, {}, rf"holds {UP}\.weight_extra"),
        (lambda s: {n.replace(".2.", ".3."): t for n, t in s.items()}, {}, r"layers\.[23]\."),
        (without(), {"num_hidden_layers": 4}, r"model\.layers\.3\."),
        (without(), {"num_hidden_layers": 2}, r"model\.layers\.2\."),
    ],
    ids=["no config", "no scale", "no linear", "no norm", "extra", "renumbered", "more layers", "fewer layers"],
)
def test_a_compressed_directory_that_is_not_its_own_is_refused_by_name(
    llama, compress, tmp_path, opened, format, change, config, message
):
    out, _ = compress(llama(), tmp_path / "out", format, {UP: {"pattern": "dense"}} if format != "sparse24" else None)
    edit(out, change, **config)
    with pytest.raises(CheckpointError, match=message):
        OPENED[opened](out)


@pytest.mark.parametrize("format", ["sparse24", "pack-quantized", "dense", "marlin-24"])
def test_whole_directories_are_accepted(llama, compress, tmp_path, format):
    out, _ = compress(llama(), tmp_path / "out", format)
    assert inspect(out, quiet=True).not_compared is None
    open_targets([out])
    if format != "marlin-24":  # transformers has none
        load_causal_lm(out)


def test_autogptq_without_its_config_is_no_random_model(dense):
    """AutoGPTQ v1 wrote quantize_config.json beside a config.json that says nothing; here it is lost."""

    def quantized(state):
        found = {}
        for name, tensor in state.items():
            if ".layers." in name and tensor.dim() == 2:
                (n, k), module = tensor.shape, name.removesuffix(".weight")
                found |= {
                    f"{module}.qweight": torch.zeros(k // 8, n, dtype=torch.int32),
                    f"{module}.qzeros": torch.zeros(1, n // 8, dtype=torch.int32),
                    f"{module}.scales": torch.ones(1, n, dtype=torch.float16),
                    f"{module}.g_idx": torch.zeros(k, dtype=torch.int32),
                }
            else:
                found[name] = tensor
        return found

    directory = dense(quantized)
    for opened in OPENED.values():
        with pytest.raises(
            CheckpointError, match=r"g_idx, a tensor of a quantized weight, but its config\.json has no"
        ):
            opened(directory)


@pytest.mark.parametrize("format", ["sparse24", "pack-quantized"])
def test_no_neighbour_has_to_tell_what_is_missing(llama, compress, tmp_path, format):
    out, _ = compress(llama(), tmp_path / "out", format)
    edit(out, lambda state: {n: t for n, t in state.items() if not n.endswith("weight_scale")})
    with pytest.raises(CheckpointError, match=r"lacks the tensors model\.layers\.0\.mlp\.down_proj\.weight_scale"):
        open_targets([out])


@pytest.mark.parametrize(
    ("format", "bits", "expected"),
    [
        ("sparse24", 4, {"weight_packed", "weight_meta", "weight_scale"}),
        ("sparse24", 16, {"weight_values", "weight_meta"}),
        ("pack-quantized", 8, {"weight_packed", "weight_scale", "weight_shape"}),
        ("marlin-24", 4, {"weight_packed", "scale_packed", "meta"}),
    ],
)
def test_what_a_linear_consists_of(format, bits, expected):
    assert _suffixes(format, bits, "2:4", None if bits == 16 else 128) == expected


def test_a_model_that_cannot_be_built_is_said_to_be_not_compared(dense):
    from rich.console import Console

    directory = dense(model_type="nonesuch")
    found = inspect(directory, quiet=True)
    assert "transformers cannot build this model" in str(found.not_compared) and found.to_json()["not_compared"]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(found))
    assert "not compared with config.json" in shown.get()


def test_an_adapter_beside_the_weights_is_left_out_everywhere(dense, capsys):
    """transformers puts it on the weights unasked; what is compressed is the model without it."""
    whole = dense()
    expected = load_causal_lm(whole).state_dict()
    adapter = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{n}.weight": torch.ones(s)
        for n, s in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_file(adapter, whole / "adapter_model.safetensors")
    (whole / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "target_modules": ["q_proj"]})
    )
    loaded = load_causal_lm(whole)
    assert loaded.state_dict().keys() == expected.keys() and loaded.name_or_path == str(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert "adapter_config.json) is left out" in capsys.readouterr().err
    assert make_plan(RTN, str(whole)).to_json()["left_behind"] == ["adapter_config.json"]


def test_float8_weights_without_scales_are_measured(dense):
    def cast(state):
        return {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 and ".layers." in n else t for n, t in state.items()}

    assert inspect(dense(cast), quiet=True).totals()["linears"] == 21


def test_a_class_that_transformers_lacks_is_said_in_one_line(dense):
    directory = dense(model_type="vit", architectures=None)
    said = inspect(directory, quiet=True).not_compared
    assert "\n" not in said and len(said) < 400
