"""The model in training: what is compared, what is frozen, and that memory-saving tricks change no number."""

import copy

import pytest
import torch

from sparsify.model.linear import LinearWeights
from sparsify.recipe import LossWeights
from sparsify.solver.grid import Grid, round_to_nearest
from sparsify.training.qat_linear import make_trainable
from sparsify.training.student import BlockOutputs, Student, Teacher, has_plain_head, trainable_parameters
from sparsify.training.trainer import Rows
from tests.helpers.tiny import tiny_model

ALL = LossWeights(squarehead=1.0, kl=0.5, cross_entropy=0.25)


def compressed(model, bits=4):
    """Every linear in the blocks as a trainable one without zeros."""
    linears = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and ".layers." in f".{name}":
            codes, scale, _ = round_to_nearest(module.weight.detach(), Grid(bits, 32, torch.bfloat16, False))
            bias = None if module.bias is None else module.bias.detach().bfloat16()
            linears[name] = LinearWeights(bits, "dense", 32, codes=codes, scale=scale, bias=bias)
    return make_trainable(model, linears)


def stored(model):
    return {name: torch.bfloat16 for name, _ in model.named_parameters()}


def batch(rows=2, length=12):
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    return ids, labels


@pytest.mark.parametrize(
    ("family", "plain"), [("llama", True), ("qwen3", True), ("gpt_neox", True), ("opt", True), ("gemma2", False)]
)
def test_heads_that_are_more_than_a_product_are_noticed(family, plain):
    """Gemma 2 caps its logits, at 30; on small logits the cap is invisible, so numbers of all sizes are tried."""
    assert has_plain_head(tiny_model(family)) is plain


def test_a_scaled_head_is_noticed():
    model = tiny_model()
    head = model.lm_head.forward
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    assert not has_plain_head(model)
    model.forward = forward
    model.lm_head.forward = head
    assert has_plain_head(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt"])
def test_the_loss_is_that_of_the_models_own_logits_and_hidden_states(family):
    model, dense = tiny_model(family, seed=1), tiny_model(family, seed=2)
    ids, labels = batch()
    with torch.no_grad():
        student, teacher = (m(ids, use_cache=False, output_hidden_states=True) for m in (model, dense))
    s, t = (x.logits[:, :-1].double().flatten(0, 1) for x in (student, teacher))
    p, log_q = t.softmax(1), s.log_softmax(1)
    kl = (p * (t.log_softmax(1) - log_q)).sum(1).mean()
    ce = -log_q.gather(1, ids[:, 1:].flatten()[:, None]).mean()
    outputs = {}
    for name, m in (("s", model), ("t", dense)):
        with BlockOutputs(m).recording() as found, torch.no_grad():
            m(ids, use_cache=False)
        outputs[name] = found
    for found, whole in ((outputs["s"], student), (outputs["t"], teacher)):
        assert len(found) == 3
        for one, other in zip(found[:-1], whole.hidden_states[1:-1], strict=True):  # the last one there is normed
            assert torch.equal(one, other)
    feature = (
        sum(
            ((a - b).double().square().sum() / b.double().square().sum())
            for a, b in zip(outputs["s"], outputs["t"], strict=True)
        )
        / 3
    )
    teacher_outputs = Teacher(dense, True, True)(ids)
    found = Student(model, ALL, 1.0, torch.float32)(ids, labels, labels.ne(-100).sum(), teacher_outputs)
    assert found["squarehead"].item() == pytest.approx(feature.item(), rel=1e-4)
    assert found["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert found["cross_entropy"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert found["loss"].item() == pytest.approx((feature + 0.5 * kl + 0.25 * ce).item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_micro_batches_padding_and_checkpointing_change_nothing(family):
    dense = Teacher(tiny_model(family, seed=2), True, True)
    ids, labels = batch(4)
    keep = torch.ones_like(ids, dtype=torch.bool)
    gradients = []
    for way in ("whole", "checkpointed"):
        model = tiny_model(family, seed=1)
        linears = compressed(model)
        trainable_parameters(model, linears, ["linears", "norms"], stored(model))
        if way == "checkpointed":
            model.gradient_checkpointing_enable()
        student = Student(model, ALL, 1.0, torch.float32).train()
        student(ids, labels, labels.ne(-100).sum(), dense(ids), keep)["loss"].backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)

    weights = LossWeights(squarehead=0.0, kl=1.0, cross_entropy=1.0)  # SquareHead is a ratio within a micro-batch
    student = Student(tiny_model(family, seed=1), weights, 1.0, torch.float32)
    short = [(ids[:2], labels[:2]), (ids[2:, :9], torch.cat([labels[2:, :8], torch.full((2, 1), -100)], 1))]
    items = sum(one.ne(-100).sum() for _, one in short)
    apart = sum(student(i, one, items, dense(i))["loss"] for i, one in short)
    padded = [torch.nn.functional.pad(x, (0, 3), value=v) for x, v in zip(short[1], (0, -100), strict=True)]
    joined = [torch.cat(pair) for pair in zip(short[0], padded, strict=True)]
    whole = student(*joined, items, dense(joined[0]))["loss"]
    assert apart.item() == pytest.approx(whole.item(), rel=1e-5)


def test_only_what_is_asked_for_is_trained():
    def trained(*train, tie=False, **others):
        model = tiny_model("qwen2", tie_word_embeddings=tie)
        linears = compressed(model)
        before = sum(p.numel() for p in model.parameters())
        groups = trainable_parameters(model, linears, train, {**stored(model), **others})
        assert sum(p.numel() for p in model.parameters()) == before
        assert {p for group in groups.values() for p in group} == {p for p in model.parameters() if p.requires_grad}
        return {kind: len(group) for kind, group in groups.items()}, model

    assert trained("linears")[0] == {"weights": 21, "scales": 21}
    assert trained("norms")[0] == {"norms": 7 + 9}  # qwen2's q, k and v have a bias
    counts, model = trained("linears", "norms", "embedding", tie=True)
    assert counts == {"weights": 22, "scales": 21, "norms": 16}
    assert model.lm_head.weight.grad_fn is not None and torch.equal(
        model.lm_head.weight, model.model.embed_tokens.weight
    )
    counts, model = trained("embedding")
    assert counts == {"weights": 1} and not model.lm_head.weight.requires_grad


def test_what_the_checkpoint_does_not_hold_as_it_is_stays_frozen():
    model = tiny_model()
    known = {name: dtype for name, dtype in stored(model).items() if "layers.1.input_layernorm" not in name}
    groups = trainable_parameters(model, compressed(model), ["norms"], known)
    assert len(groups["norms"]) == 6 and not model.model.layers[1].input_layernorm.weight.requires_grad


def test_the_model_sees_norms_as_they_will_be_stored():
    model = tiny_model()
    trainable_parameters(model, compressed(model), ["norms"], stored(model))
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        norm.parametrizations.weight.original.add_(1e-4)
    assert norm.weight.eq(1).all() and norm.parametrizations.weight.original.ne(1).all()
    model(batch()[0]).logits.sum().backward()
    assert norm.parametrizations.weight.original.grad.abs().sum() > 0


def test_the_teacher_is_left_alone():
    dense = tiny_model(seed=2)
    before = copy.deepcopy(dense.state_dict())
    teacher_outputs = Teacher(dense, True, True)(batch()[0])
    assert len(teacher_outputs.hidden) == 3 and not any(h.requires_grad for h in teacher_outputs.hidden)
    assert not any(p.requires_grad for p in dense.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


def test_every_row_is_seen_once_an_epoch_in_batches_of_similar_length():
    rows = [{"input_ids": torch.zeros(3 + 7 * i % 50)} for i in range(40)]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    for given in (None, lengths):
        order = Rows(rows, 20, 4, 0, given).order
        assert len(order) == 80 and all(order.bincount() == 2)
        assert torch.equal(order, Rows(rows, 20, 4, 0, given).order)
        assert not torch.equal(order, Rows(rows, 20, 4, 1, given).order)
        assert sorted(Rows(rows, 10, 4, 0, given).order.tolist()) == list(range(40))

    def padding(order):
        batches = lengths[order].reshape(-1, 4)
        return int((batches.max(1).values[:, None] - batches).sum())

    grouped = Rows(rows, 20, 4, 0, lengths).order
    assert padding(grouped) < 0.5 * padding(Rows(rows, 20, 4, 0).order)
    longest = lengths[grouped].reshape(-1, 4).max(1).values
    assert not torch.equal(longest, longest.sort().values)  # but not from short to long
