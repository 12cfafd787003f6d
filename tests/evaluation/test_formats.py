"""One set of codes and scales, stored in every format, is one model: evaluation must not see a difference."""

from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.compiler.convert import export
from sparsify.evaluation import evaluate_all
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.linear import LinearWeights
from tests.helpers.bitmask import checkpoint

from .conftest import VOCABULARY, make_tokenizer

GROUP = 32


def compress(weight):
    """Magnitude 2:4 and round to nearest, written out. weight: [N, K]"""
    n, k = weight.shape
    quads = weight.reshape(n, k // 4, 4)
    kept = torch.zeros_like(quads, dtype=torch.bool).scatter(2, quads.abs().topk(2, dim=2).indices, True)
    pruned = (quads * kept).reshape(n, k // GROUP, GROUP)
    scale = (pruned.abs().amax(2) / 7).to(torch.bfloat16)
    codes = (pruned / scale.float()[:, :, None]).round().clamp(-8, 7).to(torch.int8).reshape(n, k)
    return LinearWeights(4, "2:4", GROUP, codes=codes, scale=scale).validate("test")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """dense: random bfloat16 model; exact: the compressed weights as plain float32; and one directory per format."""
    root = tmp_path_factory.mktemp("formats")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    source = open_checkpoint(root / "dense")
    linears = {
        name.removesuffix(".weight"): compress(source.tensor(name).float())
        for name in source.names()
        if "_proj" in name
    }
    others = {name: source.tensor(name) for name in source.names() if "_proj" not in name}
    for form in ("sparse24", "pack-quantized", "gptq"):
        writer = CheckpointWriter(root / form, form, source)
        writer.write_part("all", linears, others)
        writer.finish()
    model.float()
    with torch.no_grad():
        for name, linear in linears.items():
            model.get_submodule(name).weight.copy_(linear.dense(torch.float32))
    model.save_pretrained(root / "exact")
    make_tokenizer().save_pretrained(root / "exact")
    return root


@pytest.mark.parametrize("form", ["sparse24", "pack-quantized"])
def test_every_format_scores_like_its_weights(stored, text_file, form):
    if form == "pack-quantized" and find_spec("compressed_tensors") is None:
        pytest.skip("pack-quantized needs compressed-tensors: pip install 'sparsify-24[test]'")
    models = [stored / form, stored / "exact"]
    packed, exact = evaluate_all(models, stored / "dense", text_file, 32, 4, device="cpu", quiet=True)
    assert packed.format == form and packed.nbytes < exact.nbytes
    assert packed.kl == pytest.approx(exact.kl, rel=1e-3)
    assert packed.perplexity == pytest.approx(exact.perplexity, rel=1e-4)
    assert exact.kl > 0.01, "compression must be visible, or the comparison proves nothing"
    [against_exact] = evaluate_all([stored / form], stored / "exact", text_file, 32, 4, device="cpu", quiet=True)
    assert against_exact.kl < 1e-5


@pytest.mark.parametrize("form", ["gptq", "sparse-24-bitmask"])
def test_what_transformers_cannot_load_is_scored_all_the_same(stored, text_file, tmp_path, form):
    old = stored / form
    if form == "sparse-24-bitmask":
        old = tmp_path / "old"
        assert len(checkpoint(stored / "dense", old, "float8")) == 14
    export(old, "dense", tmp_path / "dense", quiet=True)
    make_tokenizer().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(old)
    packed, dense = evaluate_all([old, tmp_path / "dense"], None, text_file, 32, 4, device="cpu", quiet=True)
    assert packed.format == form and packed.nbytes < dense.nbytes
    assert packed.perplexity == pytest.approx(dense.perplexity, rel=1e-5)
