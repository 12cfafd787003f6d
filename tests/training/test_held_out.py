"""The state that training keeps: the best on held-out text, the mean of the last ones."""

import copy

import pytest
import torch

import sparsify.training.losses as losses
from sparsify.recipe import LossWeights
from sparsify.training.averaging import WeightAverage, first_averaged
from sparsify.training.distill import TextRows, online
from sparsify.training.held_out import HeldOutText, Measurements, measure
from sparsify.training.student import Student, Teacher
from tests.helpers.tiny import tiny_model


def test_the_mean_is_that_of_all_states_and_the_parameters_come_back_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for name in "ab"}
    average = WeightAverage(parameters)
    with average.in_place():  # no mean yet
        pass
    states = []
    for _ in range(7):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn(3, 4, generator=generator))
        states.append({name: p.detach().double() for name, p in parameters.items()})
        average.add()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with average.in_place():
        for name, parameter in parameters.items():
            expected = torch.stack([state[name] for state in states]).mean(0)
            torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)
    assert average.count == 7
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name]) and not torch.equal(average.mean[name], before[name])


@pytest.mark.parametrize(("steps", "share", "first"), [(100, 0.25, 76), (10, 0.0, 11), (10, 0.3, 8), (3, 0.1, 4)])
def test_averaging_begins_where_the_last_share_does(steps, share, first):
    assert first_averaged(steps, share) == first


def test_training_stops_after_so_many_measurements_without_a_new_best():
    seen = Measurements(patience=2)
    assert not seen.stop and seen.best is None
    assert seen.add(0, 3.0) and not seen.stop
    assert seen.add(5, 2.0) and not seen.add(10, 2.0) and not seen.stop  # equal is no better, the earlier stays
    assert seen.add(15, 1.5) and not seen.add(20, 1.6) and not seen.stop
    assert not seen.add(25, 1.7) and seen.stop
    assert seen.best == (15, 1.5)
    assert seen.summary() == {
        "curve": [[0, 3.0], [5, 2.0], [10, 2.0], [15, 1.5], [20, 1.6], [25, 1.7]],
        "best_step": 15,
        "best": 1.5,
    }


def test_what_is_measured_before_masks_stand_still_does_not_count():
    seen = Measurements(patience=2, since=11)
    for step, divergence in ((0, 1.0), (5, 2.0), (10, 2.0), (15, 2.0)):
        seen.add(step, divergence)
    assert not seen.stop
    seen.add(20, 2.0)
    assert seen.stop and seen.best == (0, 1.0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(kl=0), LossWeights(kl=0, reverse_kl=1, squarehead=0)])
def test_what_is_measured_is_the_divergence_per_token(monkeypatch, family, weights):
    """Whatever the loss is; Gemma 2 caps its logits, so they are no product of the head."""
    monkeypatch.setattr(losses, "ENTRIES", 96 * 5)
    model, dense = tiny_model(family, seed=1), tiny_model(family, seed=2)
    tokens = torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        s, t = (m(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (model, dense))
    expected = (t.exp() * (t - s)).sum(-1).mean().item()
    student = Student(copy.deepcopy(model), weights, 2.0, torch.float32).train()
    text = HeldOutText(TextRows(tokens), online(Teacher(dense, feature=False, logits=True)), every=1, patience=1)
    for at_once in (2, 5):
        assert measure(student, text, at_once) == pytest.approx(expected, rel=1e-5)
    assert student.training and all(parameter.grad is None for parameter in student.parameters())
