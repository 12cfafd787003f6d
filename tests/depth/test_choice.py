"""What the depth methods choose, against the plainest computation of the same: run the whole model once per candidate."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsify.compiler.shorten.choose import choose_block, choose_sublayers
from sparsify.compiler.shorten.source import open_source
from sparsify.depth import best_block
from sparsify.depth.deepest import deepest_block
from sparsify.depth.finercut import METRICS, Greedy
from sparsify.depth.layers import Layer, as_layers
from sparsify.model.in_memory import Resident, sublayers_of
from sparsify.model.sublayers import Sublayer
from sparsify.progress import progress_bar
from sparsify.recipe import Depth, DepthTarget
from tests.helpers.tiny import save_tiny

LAYERS, SAMPLES, LENGTH = 5, 6, 24


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("depth") / "source", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def dense(source):
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def ragged_micro_batches(monkeypatch):
    monkeypatch.setattr("sparsify.model.sequential.TOKENS_PER_MICRO_BATCH", 4 * LENGTH)
    monkeypatch.setattr("sparsify.model.in_memory.LOGIT_TOKENS", 4 * LENGTH)


def tokens():
    return torch.randint(4, 96, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def choose(source, **settings):
    with progress_bar("", None, quiet=True) as bar:
        opened, depth = open_source(source), Depth(**settings)
        return (choose_sublayers if depth.method == "finercut" else choose_block)(depth, opened, tokens(), bar)


@torch.no_grad()
def states_of(dense):
    """The hidden state that enters each layer, and what leaves the last: [L + 1, samples, T, d]."""
    found = []
    layers = dense.model.layers
    hooks = [layer.register_forward_pre_hook(lambda m, args: found.append(args[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda m, args, output: found.append(output)))
    dense(tokens(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@torch.no_grad()
def logits_without(dense, gone):
    """Logits [samples * T, V] of the model that skips some sublayers, written out layer by layer."""
    model, ids = dense.model, tokens()
    h = model.embed_tokens(ids)
    rotary = model.rotary_emb(h, torch.arange(LENGTH)[None])
    for i, layer in enumerate(model.layers):
        if (i, "attention") not in gone:
            h = h + layer.self_attn(layer.input_layernorm(h), rotary, None)[0]
        if (i, "feed_forward") not in gone:
            h = h + layer.mlp(layer.post_attention_layernorm(h))
    return dense.lm_head(model.norm(h)).flatten(0, 1)


def distance(name, reference, logits):
    """The three metrics, position by position and in the words of their definitions."""
    total = 0.0
    for x, y in zip(reference.double(), logits.double(), strict=True):
        if name == "euclidean":
            total += float((x - y).square().sum().sqrt())
        elif name == "angular":
            total += math.acos(min(1.0, float((x @ y) / (x.norm() * y.norm())))) / math.pi
        else:
            p, q = x.softmax(0), y.softmax(0)
            m = (p + q) / 2
            total += float(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
    return total / len(reference)


def test_angular_distances_are_those_of_the_last_tokens(source, dense):
    choice = choose(source, method="angular", drop=2, protect_first=0, protect_last=0)
    last = states_of(dense)[:, :, -1]
    best = {}
    for first in range(LAYERS):
        for n in range(1, LAYERS - first + 1):
            cosines = [
                a @ b / (a.norm() * b.norm())
                for a, b in zip(last[first].double(), last[first + n].double(), strict=True)
            ]
            expected = sum(math.acos(min(1.0, float(c))) for c in cosines) / math.pi / SAMPLES
            assert choice.note["matrix"][first][n - 1] == pytest.approx(expected, rel=1e-6)
            best[first, n] = expected
    first = min(range(LAYERS - 1), key=lambda l: best[l, 2])  # noqa: E741
    assert choice.note["first"] == first and choice.note["score"] == pytest.approx(best[first, 2], rel=1e-6)
    assert choice.layers == [Layer(b, b) for b in range(LAYERS) if not first <= b < first + 2]


def test_streamline_compares_all_tokens_and_takes_the_most_similar(source, dense):
    choice = choose(source, method="streamline", drop=1, replacement="none", protect_first=1, protect_last=2)
    states = states_of(dense).flatten(1, 2).double()
    expected = {}
    for first in range(LAYERS):
        for n in range(1, LAYERS - first + 1):
            a, b = states[first], states[first + n]
            expected[first, n] = float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())
            # batches of another size may sum products in another order: the float32 states differ in their last bits
            assert choice.note["matrix"][first][n - 1] == pytest.approx(expected[first, n], abs=1e-6)
    assert choice.note["first"] == max(range(1, LAYERS - 2), key=lambda first: expected[first, 1])


@pytest.mark.parametrize("metric", METRICS)
def test_finercut_scores_every_candidate_of_every_step(source, dense, metric):
    resident = Resident(open_source(source).model, tokens())
    everything = sublayers_of(range(LAYERS))
    search = Greedy(resident, everything, sublayers_of([0, LAYERS - 1]), METRICS[metric])
    reference, gone = logits_without(dense, set()), set()
    for _ in range(3):
        scores = {search.kept[position]: score for position, score in search.scores().items()}
        expected = {}
        for block in range(1, LAYERS - 1):
            for position, kind in enumerate(("attention", "feed_forward")):
                if (block, kind) not in gone:
                    logits = logits_without(dense, gone | {(block, kind)})
                    expected[Sublayer(block, position)] = distance(metric, reference, logits)
        assert scores == pytest.approx(expected, rel=1e-4)
        best = min(expected, key=lambda sublayer: expected[sublayer])
        search.remove(search.kept.index(best), expected[best])
        gone.add((best.block, best.kind))
    choice = choose(source, method="finercut", metric=metric, drop=3)
    assert {(block, kind) for step in choice.note["steps"] for block, kind in step["removed"]} == gone
    assert len(choice.kept) == 2 * LAYERS - 3


def test_finercut_in_pairs_leaves_whole_layers(source, dense):
    resident = Resident(open_source(source).model, tokens())
    search = Greedy(resident, sublayers_of(range(LAYERS)), [], METRICS["euclidean"], units=2)
    reference = logits_without(dense, set())
    for position, score in search.scores().items():
        pair = {(s.block, s.kind) for s in search.kept[position : position + 2]}
        assert score == pytest.approx(distance("euclidean", reference, logits_without(dense, pair)), rel=1e-4)
    choice = choose(source, method="finercut", units="pairs", drop=4)
    assert len(choice.layers) == LAYERS - 2 and all(layer.absent is None for layer in choice.layers)


def test_the_divergence_of_what_is_left(source, dense):
    choice = choose(source, method="finercut", drop=3)
    gone = {(block, kind) for step in choice.note["steps"] for block, kind in step["removed"]}
    p, q = (torch.log_softmax(x.double(), 1) for x in (logits_without(dense, set()), logits_without(dense, gone)))
    assert choice.note["divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)


def test_the_prefix_before_a_removal_is_not_run_again(source, monkeypatch):
    resident = Resident(open_source(source).model, tokens())
    search = Greedy(resident, sublayers_of(range(LAYERS)), [], METRICS["angular"])
    before = [list(states) for states in search.entering]
    search.remove(6, 0.0)
    for states, old in zip(search.entering, before, strict=True):
        assert all(now is then for now, then in zip(states[:7], old[:7], strict=True))
        assert len(states) == len(search.kept) + 1
    ran = []
    monkeypatch.setattr(resident, "run", lambda sublayers, hidden, batch: ran.append(len(sublayers)) or hidden)
    search.scores()
    assert ran == [*range(len(search.kept) - 1, -1, -1)] * len(
        resident.batches
    )  # each candidate costs what comes after it


def test_a_larger_drop_goes_on_from_a_smaller_one(source, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    searched = []
    scores = Greedy.scores
    monkeypatch.setattr(Greedy, "scores", lambda search: searched.append(len(search.kept)) or scores(search))
    two = choose(source, method="finercut", drop=2)
    four = choose(source, method="finercut", drop=4)
    assert searched == [10, 9, 8, 7] and four.note["steps"][:2] == two.note["steps"]
    again = choose(source, method="finercut", drop=4)
    assert len(searched) == 4 and again.note == four.note and again.kept == four.kept
    choose(source, method="finercut", drop=2, metric="euclidean")
    choose(source, method="finercut", drop=2, protect_first=2)
    assert len(searched) == 8  # what is measured otherwise is searched anew
    for file in tmp_path.rglob("*.json"):
        file.write_text('{"steps": [{"sublayers": [[0, 0]]}]}')
    assert choose(source, method="finercut", drop=2).note["steps"] == two.note["steps"]
    assert len(searched) == 10  # and what is damaged, too


def test_neighbouring_halves_become_one_layer():
    kept = [
        Sublayer(0, 0),
        Sublayer(0, 1),
        Sublayer(1, 0),
        Sublayer(2, 1),
        Sublayer(3, 1),
        Sublayer(4, 0),
        Sublayer(5, 0),
    ]
    assert as_layers(kept) == [Layer(0, 0), Layer(1, 2), Layer(None, 3), Layer(4, None), Layer(5, None)]


def test_the_deepest_block_ends_before_the_protected_layers():
    assert deepest_block(30, 6, 1) == 23
    assert deepest_block(30, 6, 0) == 24


def test_protection_limits_the_choice():
    scores = torch.full((5, 5), math.nan, dtype=torch.float64)
    scores[:4, 1] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert best_block(scores, 2, 0, 0, greatest=False) == 0
    assert best_block(scores, 2, 1, 0, greatest=False) == 3
    assert best_block(scores, 2, 1, 1, greatest=False) == 2
    assert best_block(scores, 2, 0, 0, greatest=True) == 1


def test_a_target_removes_no_more_than_it_takes(source):
    goal = choose(source, method="angular", target=DepthTarget(parameters=0.65))
    fewer = choose(source, method="angular", drop=goal.note["count"])
    assert goal.layers == fewer.layers
    blocks = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).model.layers.parameters())
    everything = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    left = everything - goal.note["count"] * blocks / LAYERS
    assert left <= 0.65 * everything < left + blocks / LAYERS
    faster = choose(source, method="finercut", target=DepthTarget(speedup=1.4))
    assert len(faster.kept) < 2 * LAYERS


def test_a_bound_on_the_divergence_stops_before_it_is_passed(source, dense):
    def divergence(kept):
        everything = {(s.block, s.kind) for s in sublayers_of(range(LAYERS))}
        gone = everything - {(s.block, s.kind) for s in kept}
        p, q = (torch.log_softmax(x.double(), 1) for x in (logits_without(dense, set()), logits_without(dense, gone)))
        return float((p.exp() * (p - q)).sum(1).mean())

    one, two = (divergence(choose(source, method="deepest", drop=n).kept) for n in (1, 2))
    assert one < two
    within = choose(source, method="deepest", target=DepthTarget(divergence=(one + two) / 2))
    assert within.note["count"] == 1 and within.note["divergence"] == pytest.approx(one, rel=1e-4)
    fine = choose(source, method="finercut", target=DepthTarget(divergence=two))
    assert divergence(fine.kept) <= two
    assert fine.note["divergence"] == pytest.approx(divergence(fine.kept), rel=1e-4)
