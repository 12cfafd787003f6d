"""Prompts that are computed once for all their answers, against lm-evaluation-harness, which computes them with each answer."""

import random

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM

from sparsify.evaluation.harness import quiet_harness
from sparsify.evaluation.shared_prompts import LOGITS, Prompt, SharedPrompts, batches, by_prompt, of_like_lengths

from ..helpers.tiny import COMMON, FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer

POSITIONS = COMMON["max_position_embeddings"]


class Sharing(SharedPrompts, HFLM):
    """As `harness.HarnessModel`, without its checks."""


def model_of(kind, model, **settings):
    with quiet_harness():
        return kind(pretrained=model, backend="causal", tokenizer=tiny_tokenizer(), batch_size=3, **settings)


def questions(count=12, most=30, answers=(1, 5), seed=0):
    """Requests in a random order: prompts of 4 lengths, two to four answers of one to five tokens, all with texts of their own."""
    rng, found = random.Random(seed), []
    for item in range(count):
        before = [rng.randrange(4, VOCABULARY) for _ in range(most - item % 4)]
        for answer in range(rng.randrange(2, 5)):
            after = [rng.randrange(4, VOCABULARY) for _ in range(rng.randint(*answers))]
            found.append(((f"prompt {item}", f"answer {answer}"), before, after))
    rng.shuffle(found)
    return found


class Seen:
    """How many tokens a model's forwards read, and what its harness reports."""

    def __init__(self, model):
        self.tokens, self.answers = 0, []
        model.model.register_forward_pre_hook(self.read, with_kwargs=True)
        model.cache_hook = self

    def read(self, _, args, kwargs):
        self.tokens += (args[0] if args else kwargs["input_ids"]).numel()

    def add_partial(self, attr, request, score):
        self.answers.append((request, score))


def assert_as_the_harness(mine, model, requests):
    theirs = model_of(HFLM, model)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [one for one, _ in mine] == pytest.approx([one for one, _ in theirs], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_scores_are_those_of_whole_sequences(family):
    absent = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None} if family == "bloom" else {}
    model, requests = tiny_model(family, **absent), questions(count=40)
    shared = model_of(Sharing, model)
    seen = Seen(shared)
    mine = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    whole = sum(len(before) + len(after) - 1 for _, before, after in requests)
    assert seen.tokens < 0.7 * whole  # and not the harness's own way
    assert dict(seen.answers) == {request[0]: score for request, score in zip(requests, mine, strict=True)}
    assert len(seen.answers) == len(requests)
    assert_as_the_harness(mine, model, requests)


def test_greedy_answers_are_known_as_such():
    model = tiny_model()
    before = list(range(4, 20))
    after = model.generate(torch.tensor([before]), max_new_tokens=4, do_sample=False)[0, len(before) :].tolist()
    requests = [(("p", str(n)), before, answer) for n, answer in enumerate([after, after[:1], [*after[:3], 5], [5]])]
    found = model_of(Sharing, model)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, True, after[3] == 5, after[0] == 5]
    assert_as_the_harness(found, model, requests)


def test_answers_of_one_token_cost_the_prompt_alone():
    model, requests = tiny_model(), questions(answers=(1, 1))
    shared = model_of(Sharing, model)
    seen = Seen(shared)
    mine = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    prompts = {tuple(before) for _, before, _ in requests}
    assert seen.tokens <= sum(map(len, prompts)) + 4 * min(map(len, prompts))  # two prompts are computed both ways
    assert_as_the_harness(mine, model, requests)


def test_a_prompt_that_does_not_fit_loses_its_beginning_as_in_the_harness():
    model, requests = tiny_model(), questions(count=4, most=POSITIONS + 3)
    shared = model_of(Sharing, model)
    assert_as_the_harness(shared._loglikelihood_tokens(requests, disable_tqdm=True), model, requests)
    assert all(
        len(prompt.tokens) + len(answer) == POSITIONS + 1
        for prompt in by_prompt(requests, POSITIONS)
        for answer in prompt.answers.values()
        if len(prompt.tokens) < POSITIONS
    )


@pytest.mark.parametrize("kind", ["linear attention", "keys of another prompt", "no cache"])
def test_what_cannot_be_continued_is_left_to_the_harness(kind, monkeypatch):
    if kind == "linear attention":
        model = tiny_model(
            "qwen3_next", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        )  # fmt: skip
    else:
        model = tiny_model()
    requests = questions()
    shared = model_of(Sharing, model)
    if kind == "keys of another prompt":
        monkeypatch.setattr(
            "transformers.cache_utils.Cache.reorder_cache",
            lambda cache, owner: cache.batch_select_indices(torch.zeros_like(owner)) or shake(cache),
        )
    if kind == "no cache":
        monkeypatch.setattr(model.config, "use_cache", False)
        inner = model.forward
        monkeypatch.setattr(model, "forward", lambda *a, use_cache=None, **k: inner(*a, use_cache=False, **k))
    seen = Seen(shared)
    mine = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    assert seen.tokens > 0.9 * sum(len(before) + len(after) - 1 for _, before, after in requests)
    assert len(seen.answers) == len(requests)
    assert_as_the_harness(mine, model, requests)


def shake(cache):
    for layer in cache.layers:
        layer.values = layer.values.flip(-2)


def test_passes_hold_prompts_of_one_length_and_no_more_than_their_tokens(monkeypatch):
    monkeypatch.setattr("sparsify.evaluation.shared_prompts.TOKENS", 100)
    prompts = by_prompt(questions(count=40), POSITIONS)
    found = list(batches(prompts))
    assert [prompt for batch in found for prompt in batch] == prompts
    assert all(len({len(prompt.tokens) for prompt in batch}) == 1 for batch in found)
    assert all(sum(prompt.size for prompt in batch) <= 100 or len(batch) == 1 for batch in found)
    assert max(map(len, found)) > 1
    one = Prompt((1, 2), {0: [1], 1: [1, 2, 3]})
    assert (one.longest, one.size) == (3, 6)


def test_answers_of_a_pass_are_of_like_length():
    prompts = by_prompt(questions(count=60, answers=(1, 40)), POSITIONS)
    found = list(of_like_lengths(prompts))
    rows = [row for some in found for row in some]
    assert sorted((row.number, row.tokens) for row in rows) == sorted(
        one for prompt in prompts for one in prompt.answers.items()
    )
    assert all(prompts[row.prompt].answers[row.number] == row.tokens for row in rows)
    padded = sum(len(some) * len(some[0].tokens) for some in found)
    assert padded < 1.2 * sum(len(row.tokens) for row in rows)
    assert all(len(some) * len(some[0].tokens) <= LOGITS for some in found)
