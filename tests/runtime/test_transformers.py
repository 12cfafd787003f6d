"""`from_pretrained` on sparse24 directories: right numbers, right bytes back, nothing damaged gets through."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sparsify  # noqa: F401  what a user has to write
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.reader import open_compressed
from sparsify.runtime.module import Sparse24Linear
from tests.helpers.agreement import Agree, close
from tests.helpers.compressed import compress, make_dense, round_linear

FAMILIES = ["llama", "qwen2", "phi3", "opt", "gpt_neox"]
Q = "model.layers.0.self_attn.q_proj"
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_dense_export(family: str, tmp_path: Path, agree: Agree) -> None:
    make_dense(family, tmp_path / "model")
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse24", dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    replaced = [module.name for module in ours.modules() if isinstance(module, Sparse24Linear)]
    assert set(replaced) == set(open_compressed(tmp_path / "sparse24").modules) and replaced
    agree(logits(ours), logits(dense))


LOADED = """
import sys
import torch
from transformers import AutoModelForCausalLM
import sparsify
from sparsify import memory
from sparsify.runtime.module import Sparse24Linear

first, directory = sys.argv[1:]
ids = torch.arange(8)[None]
with torch.no_grad():
    AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)(ids)  # what libraries take once
before = memory.anonymous()
if before is None:
    sys.exit()
with memory.peak_anonymous() as peak:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.no_grad():
        model(ids)
    peak.sample()
linears = [module for module in model.modules() if isinstance(module, Sparse24Linear)]
prepared = sum(tensor.nbytes for linear in linears for tensor in linear._prepared)
print(memory.anonymous() - before, peak.nbytes - before, prepared)
"""


def test_loading_takes_the_compressed_size_once(tmp_path: Path) -> None:
    """No dense weight is made, and the packed tensors beside what a back end made of them are pages of the files."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 16, "num_hidden_layers": 2}
    compress(make_dense("llama", tmp_path / "tiny"), tmp_path / "first")
    directory = compress(make_dense("llama", tmp_path / "model", **sizes), tmp_path / "sparse24")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "first"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    if not done.stdout.strip():
        pytest.skip("the system does not say what a process has")
    held, peak, prepared = map(int, done.stdout.split())
    on_disk = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    dense = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert 2 * on_disk < dense / 2
    if prepared < 1.2 * on_disk:  # the back end of this machine keeps weights packed
        slack = on_disk / 2  # of the allocator; both copies would be twice the size on disk
        assert held < 1.1 * on_disk + slack and peak < 1.1 * on_disk + slack, (held, peak, on_disk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_transformers_renames_and_assembles_is_loaded_in_the_type_asked_for(
    dtype: torch.dtype, tmp_path: Path, agree: Agree
) -> None:
    """Experts and router of a mixture: for a quantized checkpoint transformers leaves them as they are in the files."""
    make_dense("mixtral", tmp_path / "model")
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse24", dtype=dtype)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    plain = {name: parameter.dtype for name, parameter in ours.named_parameters()}
    assert any("experts" in name for name in plain) and set(plain.values()) == {dtype}
    assert torch.isfinite(logits(ours)).all()
    if dtype == torch.float32:  # with the very weights; roundings of another type would send tokens to other experts
        compressed = open_compressed(tmp_path / "sparse24")
        for name in compressed.modules:
            dense.get_submodule(name).weight.data = compressed.linear(name).dense(dtype)
        agree(logits(ours), logits(dense))


def test_every_kind_of_linear_in_one_model(llama: Path, agree: Agree) -> None:
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.bfloat16)
    kinds = {(m.scheme.bits, m.scheme.pattern) for m in ours.modules() if isinstance(m, Sparse24Linear)}
    assert kinds == {(4, "2:4"), (8, "2:4"), (16, "2:4"), (4, "dense"), (8, "dense")}
    assert isinstance(ours.lm_head, Sparse24Linear)
    dense = AutoModelForCausalLM.from_pretrained(llama / "dense", dtype=torch.bfloat16)
    agree(logits(ours), logits(dense))


def test_float32_is_decoded_in_float32(llama: Path) -> None:
    """Not the bfloat16 weights widened: scale * code with all its bits, as near to float64 as float32 arithmetic is."""
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.float32)
    widened = AutoModelForCausalLM.from_pretrained(llama / "dense", dtype=torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(llama / "dense", dtype=torch.float64)
    compressed = open_compressed(llama / "sparse24")
    for name in compressed.modules:
        module = exact.get_submodule(name)
        assert isinstance(module, nn.Linear)
        linear = compressed.linear(name)
        if linear.codes is not None:
            module.weight.data = linear.codes.double() * linear.scale.double().repeat_interleave(linear.group_size, 1)
    expected = logits(exact)
    error, of_widened = ((logits(model).double() - expected).norm() / expected.norm() for model in (ours, widened))
    assert error < 2e-6 and of_widened > 1e-3


def test_generates_and_compiles(llama: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.bfloat16)
    dense = AutoModelForCausalLM.from_pretrained(llama / "dense", dtype=torch.bfloat16)
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS, **greedy), dense.generate(IDS, **greedy))
    expected = logits(ours)
    ours.forward = torch.compile(ours.forward, backend="aot_eager")
    torch.testing.assert_close(logits(ours), expected, rtol=2e-2, atol=2e-2)


def test_model_without_its_head(llama: Path) -> None:
    base = AutoModel.from_pretrained(llama / "sparse24", dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_save_pretrained_gives_back_the_bytes(llama: Path, tmp_path: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.float32)
    ours.save_pretrained(tmp_path)
    before, after = (load_file(directory / "model.safetensors") for directory in (llama / "sparse24", tmp_path))
    assert before.keys() == after.keys()
    for name in (name for name in before if ".weight_" in name):  # the rest was asked for in float32
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
    old, new = (json.loads((d / "config.json").read_text()) for d in (llama / "sparse24", tmp_path))
    assert old["quantization_config"] == new["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(ours))


def test_scales_keep_their_type_and_bits(llama: Path, tmp_path: Path, agree: Agree) -> None:
    """float16 scales, which bfloat16 cannot hold, in a bfloat16 model: neither loading nor .to() rounds them."""
    compress(llama / "model", tmp_path / "half", scale_dtype=torch.float16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate_proj"
    gate, linear = ours.get_submodule(name), open_compressed(tmp_path / "half").linear(name)
    stored = linear.scale
    assert stored.dtype == torch.float16 and not torch.equal(stored, stored.bfloat16().half())
    for dtype in (None, torch.float32, torch.bfloat16):
        ours.to(dtype)
        assert torch.equal(gate.weight_scale, stored)
        x = torch.randn(5, gate.in_features, dtype=dtype or torch.bfloat16)
        expected = nn.functional.linear(x, linear.dense(x.dtype))
        agree(gate(x), expected)


def test_copies_prepare_their_own_weights(llama: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.bfloat16)
    other = copy.deepcopy(ours)
    expected = logits(ours)
    del ours
    assert torch.equal(logits(other), expected)


def test_gradients_pass_through_to_what_lies_before(llama: Path) -> None:
    """Those of the dense model with the very same weights; compressed weights have none of their own."""
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(llama / "dense", dtype=torch.float32)
    compressed = open_compressed(llama / "sparse24")
    for name in compressed.modules:
        dense.get_submodule(name).weight.data = compressed.linear(name).dense(torch.float32)
    found = []
    for model in (ours, dense):
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(IDS).clone().requires_grad_()
        model(inputs_embeds=embedded, labels=IDS).loss.backward()
        found.append(embedded.grad)
    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_bias_and_of_an_empty_linear() -> None:
    weights = round_linear(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 3, 64)
    for linear in (weights, weights.zeroed()):
        module = Sparse24Linear("m", ModuleScheme.of(linear), torch.bfloat16, bias=True)
        module.load_state_dict({**get_format("sparse24").encode(linear), "bias": torch.randn(32)})
        module.bias.requires_grad_(True)
        ours, wanted = (x.clone().requires_grad_() for _ in range(2))
        bias = module.bias.detach().clone().requires_grad_(True)
        module(ours).square().sum().backward()
        nn.functional.linear(wanted, linear.dense(torch.float32), bias).square().sum().backward()
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.bias.grad, bias.grad, rtol=1e-4, atol=1e-4)


STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16, "time_step_rank": 32},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 32},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1},
}


@pytest.mark.usefixtures("agree")  # chooses the back end
@pytest.mark.parametrize("family", STATE_SPACE)
def test_models_that_multiply_with_the_weight_themselves(family: str, tmp_path: Path) -> None:
    """Mamba's blocks compute `self.dt_proj.weight @ x`, and their initialization reads `out_proj.weight`.

    Where a weight lies in memory decides how PyTorch adds up some of these products, so bits are not compared.
    """
    config = CONFIG_MAPPING[family](
        vocab_size=96, hidden_size=128, num_hidden_layers=2, tie_word_embeddings=False, eos_token_id=2,
        **STATE_SPACE[family],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    for format in ("sparse24", "dense"):
        compress(
            tmp_path / "model", tmp_path / format, format, {"lm_head": {"bits": 8, "pattern": "dense"}}, group_size=32
        )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse24", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    modules = {module.name for module in ours.modules() if isinstance(module, Sparse24Linear)}
    assert {"lm_head", "backbone.layers.1.mixer.out_proj"} <= modules
    assert family == "mamba2" or "backbone.layers.1.mixer.dt_proj" in modules
    compressed = open_compressed(tmp_path / "sparse24")
    for name in compressed.modules:
        dense.get_submodule(name).weight.data = compressed.linear(name).dense(torch.float32)
    close(logits(ours), logits(dense))
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS, **greedy), dense.generate(IDS, **greedy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_weight_is_the_dense_one_in_the_type_of_the_activations(llama: Path, dtype: torch.dtype) -> None:
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=dtype)
    compressed = open_compressed(llama / "sparse24")
    for name in compressed.modules:
        weight = ours.get_submodule(name).weight
        assert (weight.dtype, tuple(weight.shape)) == (dtype, compressed.linear(name).shape)
        assert type(weight.clone()) is torch.Tensor and torch.equal(
            weight.clone(), compressed.linear(name).dense(dtype)
        )
    ours.to(torch.float16)
    assert ours.get_submodule(name).weight.dtype == torch.float16


def test_asking_for_its_type_or_shape_dequantizes_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.float32)
    weight = ours.get_submodule(Q).weight
    monkeypatch.setattr(Sparse24Linear, "dense", lambda *_: pytest.fail("dequantized"))
    assert weight.shape == (128, 128) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert weight.data.detach().is_floating_point() and weight.numel() == 128 * 128 and Q in repr(weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda module: module.weight.mul_(2),
        lambda module: module.weight.data.add_(1),
        lambda module: setattr(module.weight, "data", torch.zeros(128, 128)),
        lambda module: torch.add(module.weight, 1, out=module.weight),
    ],
)
def test_the_weight_cannot_be_written(llama: Path, write: Callable[[nn.Module], object]) -> None:
    """It would be lost: nothing of it is stored."""
    ours = AutoModelForCausalLM.from_pretrained(llama / "sparse24", dtype=torch.float32)
    with pytest.raises(SparsifyError, match=rf"{Q}: its weight is compressed and cannot be changed in place"):
        write(ours.get_submodule(Q))


def _edit(tensors: dict[str, torch.Tensor], name: str, how: str) -> None:
    tensor = tensors[name].clone()
    if how == "descending":
        tensor[0, 0] = 0x01  # first position 1, second 0
    elif how == "nan":
        tensor[1, 0] = float("nan")
    elif how == "rows":
        tensor = tensor[:-1].contiguous()
    elif how == "wide":
        tensor = tensor.to(torch.int64 if tensor.dtype == torch.int32 else torch.float32)
    elif how == "missing":
        del tensors[name]
        return
    tensors[name] = tensor


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (f"{Q}.weight_meta", "descending"), (f"{Q}.weight_meta", "missing"), (f"{Q}.weight_meta", "rows"),
        (f"{Q}.weight_scale", "nan"), (f"{Q}.weight_scale", "wide"), (f"{Q}.weight_scale", "missing"),
        (f"{Q}.weight_packed", "rows"), (f"{Q}.weight_packed", "wide"), (f"{Q}.weight_packed", "missing"),
        ("model.layers.0.self_attn.o_proj.weight_values", "nan"),
        ("model.layers.1.mlp.down_proj.weight_scale", "rows"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused_by_name(llama: Path, tmp_path: Path, name: str, how: str) -> None:
    tensors = load_file(llama / "sparse24" / "model.safetensors")
    _edit(tensors, name, how)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "sparse24" / "config.json").read_text())
    named = name if how != "rows" or "meta" not in name else name.rpartition(".")[0]
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 1.*99; update sparsify"),
        ({"bits": 3}, "expected bits 4, 8 or 16"),
        ({"modules": []}, "modules must map"),
        ({"ignore": ["model.embed_tokens"]}, r"model\.layers\.1\.self_attn\.o_proj.*is compressed"),
    ],
)
def test_impossible_configurations_are_refused(
    llama: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((llama / "sparse24" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(llama / "sparse24" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_of_another_model_are_refused(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "sparse24" / "config.json").read_text())
    config["intermediate_size"] = 512
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(llama / "sparse24" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj: the checkpoint holds \[128, 256\].*\[128, 512\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dense_models_are_not_compressed_on_the_fly(llama: Path) -> None:
    from sparsify.runtime.hf_quantizer import Sparse24QuantizationConfig

    wish = Sparse24QuantizationConfig(version=1, bits=4, group_size=64)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(llama / "dense", quantization_config=wish)


@pytest.mark.parametrize("first", ["import sparsify", "import transformers.quantizers.auto"])
def test_registers_whichever_is_imported_first(first: str) -> None:
    code = (
        f"{first}\nimport sparsify, sys\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['sparse24'].__name__ == 'Sparse24Quantizer'\n"
        "assert not any('sparsify' in type(finder).__module__ for finder in sys.meta_path)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
