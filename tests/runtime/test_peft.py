"""peft on a sparse24 model: what it gives on the dense model with the very same weights, forward and backward."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsify  # noqa: F401  what a user has to write
from sparsify.errors import SparsifyError
from sparsify.formats.reader import open_compressed
from sparsify.runtime.module import Sparse24Linear

peft = pytest.importorskip("peft", reason="peft is not installed; pip install 'sparsify-24[train]'")

IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pair(llama: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The sparse24 model, and the dense one with its weights to the bit."""
    ours, dense = (AutoModelForCausalLM.from_pretrained(llama / f, dtype=torch.float32) for f in ("sparse24", "dense"))
    compressed = open_compressed(llama / "sparse24")
    for name in compressed.modules:
        dense.get_submodule(name).weight.data = compressed.linear(name).dense(torch.float32)
    return ours, dense


def adapted(model: PreTrainedModel, targets: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    with_adapter = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return with_adapter


def digest(model: PreTrainedModel) -> str:
    found = hashlib.sha256()
    for module in model.modules():
        for _, tensor in sorted(module.packed_tensors().items()) if isinstance(module, Sparse24Linear) else ():
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["names", "all-linear"])
def test_an_adapter_trains_as_on_the_dense_model(llama: Path, targets: Any, settings: dict[str, Any]) -> None:
    before, losses, gradients, after = None, [], [], []
    for model in pair(llama):
        if isinstance(model.model.layers[0].mlp.up_proj, Sparse24Linear):
            before = digest(model)
        student = adapted(model, targets, **settings)
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        loss = student(IDS, labels=IDS).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            after.append(student(IDS).logits)
        if before and len(losses) == 1:
            assert digest(model) == before  # the base stands still
    expected = EVERY if targets == "all-linear" else targets
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in gradients[0]} == set(expected)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after[0], after[1], rtol=1e-3, atol=1e-4)


def test_an_adapter_of_the_dense_model_fits_and_can_be_switched_off(llama: Path, tmp_path: Path) -> None:
    ours, dense = pair(llama)
    with torch.no_grad():
        without = ours(IDS).logits
        adapter = adapted(dense, EVERY)
        adapter.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(ours, tmp_path)
        torch.testing.assert_close(loaded(IDS).logits, adapter(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(loaded(IDS).logits, without, atol=1e-2)
        with loaded.disable_adapter():
            assert torch.equal(loaded(IDS).logits, without)
        assert torch.equal(loaded.unload()(IDS).logits, without)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused(llama: Path, safe: bool) -> None:
    """peft would add the product of the factors to a weight that is not there."""
    with pytest.raises(
        SparsifyError, match="its weight is compressed and cannot be changed in place; merge adapters into"
    ):
        adapted(pair(llama)[0], EVERY).merge_and_unload(safe_merge=safe)


def test_transformers_trainer_takes_it(llama: Path, tmp_path: Path) -> None:
    """It refuses quantized models whose quantizer does not say that adapters beside its linears can be trained."""
    from transformers import Trainer, TrainingArguments

    student = adapted(pair(llama)[0], EVERY)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], save_strategy="no", use_cpu=True,
        gradient_checkpointing=True, learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    before = {name: p.clone() for name, p in student.named_parameters() if p.requires_grad}
    Trainer(student, settings, train_dataset=data).train()
    assert all(not torch.equal(p, before[name]) for name, p in student.named_parameters() if name in before)
