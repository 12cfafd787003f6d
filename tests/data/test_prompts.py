"""Text that the model writes itself: every token is checked against a plain forward pass without a cache."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from sparsify.data.calibration import calibration_tokens
from sparsify.data.self_generated.sample import (
    MAX_BATCH,
    RUN,
    Script,
    Segment,
    Temperature,
    batch_size,
    inverse_transform,
    sample_rows,
    useful_threads,
)
from sparsify.errors import CalibrationError
from sparsify.recipe import Calibration
from sparsify.recipe.schema import SelfText

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = Calibration(samples=6, sequence_length=40, seed=3)
AS_IT_IS = SelfText(chat=0, openings=0, corpora=0, coolest=1.0, first_tokens=0, candidates=1)
PLAIN = SPEC.model_copy(update={"self": AS_IT_IS})  # the model's own distribution and nothing else


def only(*tokens: int, varied: bool = False) -> Script:
    """Documents that all open with the same tokens."""
    while True:
        yield Segment(tokens, varied)


def scripts(count: int, *tokens: int, varied: bool = False) -> list[Script]:
    return [only(*tokens, varied=varied) for _ in range(count)]


def expected_rows(
    model: Any, samples: int, length: int, seed: int, openings: list[list[int]], endings: set[int], heat: Temperature
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token in float64 on the whole text so far. openings: taken in turn by each row."""
    draws = torch.rand(samples, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    result, likelihoods = [], []
    for row in draws.tolist():
        text, total, count, opened, since = list(openings[0]), 0.0, 0, 1, 0
        while len(text) < length:
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, -1].double()
            probability = torch.softmax(logits / heat.at(since, True), -1)
            cumulative = itertools.accumulate(probability.tolist())
            token = next(token for token, below in enumerate(cumulative) if below > row[len(text)])
            total += float(torch.log_softmax(logits, -1)[token])
            count, since = count + 1, since + 1
            text.append(token)
            if token in endings:
                given = openings[opened % len(openings)]
                text += given[1:] if given[:1] == [token] else given
                opened, since = opened + 1, 0
        result.append(text[:length])
        likelihoods.append(total / count)
    return torch.tensor(result), torch.tensor(likelihoods, dtype=torch.float64)


def test_every_token_is_drawn_from_the_models_distribution_of_the_whole_text_before_it(llama: Any) -> None:
    endings = set(range(1, 300, 7))  # so many that documents do end
    heat = Temperature(first=2.0, then=0.8, tokens=3)
    tokens, likelihood = sample_rows(llama, scripts(4, 0, 9, varied=True), 32, 3, endings, [heat] * 4, quiet=True)
    expected, expected_likelihood = expected_rows(llama, 4, 32, 3, [[0, 9]], endings, heat)
    assert torch.equal(tokens, expected)
    assert torch.allclose(likelihood, expected_likelihood, atol=1e-4)
    assert (tokens[:, 2:] == 9).any(), "no document ended: the test would not see one being opened"


def test_the_temperature_falls_in_a_straight_line_after_what_is_to_vary() -> None:
    heat = Temperature(first=2.0, then=1.0, tokens=4)
    assert [heat.at(token, True) for token in range(6)] == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]
    assert heat.at(0, False) == 1.0 and Temperature().at(0, True) == 1.0


def test_the_batching_does_not_change_the_text(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together, likelihood = sample_rows(llama, scripts(6, 0), 32, seed=3, quiet=True)
    monkeypatch.setattr("sparsify.data.self_generated.sample.MAX_BATCH", 4)
    monkeypatch.setattr("sparsify.data.self_generated.sample.DRAW_ROWS", 2)
    apart_, likelihood_ = sample_rows(llama, scripts(6, 0), 32, seed=3, quiet=True)
    assert torch.equal(apart_, together) and torch.allclose(likelihood_, likelihood)


def test_a_sliding_window_keeps_the_layers_own_cache() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    expected, _ = expected_rows(model, 2, 24, 3, [[0]], set(), Temperature())
    assert torch.equal(sample_rows(model, scripts(2, 0), 24, 3, quiet=True)[0], expected)


def test_a_model_that_opens_documents_with_the_ending_does_not_double_it(make_tokenizer: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.lm_head.weight[1] += 0.4  # so that documents do end
    tokens = calibration_tokens(PLAIN, make_tokenizer(bos=None), lambda: model, quiet=True)
    expected, _ = expected_rows(model, 6, 40, 3, [[1]], {1}, Temperature())
    assert torch.equal(tokens, expected)
    assert (tokens[:, 1:] == 1).any() and not ((tokens[:, 1:] == 1) & (tokens[:, :-1] == 1)).any()


def test_without_any_mark_a_row_opens_with_a_drawn_token(make_tokenizer: Callable[..., Any], llama: Any) -> None:
    tokenizer = make_tokenizer(bos=None)
    tokenizer.eos_token = None
    tokens = calibration_tokens(PLAIN, tokenizer, lambda: llama, quiet=True)
    assert len(set(tokens[:, 0].tolist())) > 3


def test_drawing_follows_the_probabilities() -> None:
    """Chi-square of 20000 draws from 5 tokens: 4 degrees of freedom, 99.99% quantile 23.5."""
    probability = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05], dtype=torch.float64)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warmth = torch.ones(20000, dtype=torch.float64)
    drawn, likelihood = inverse_transform(probability.log().expand(20000, 5), u, warmth)
    counts = torch.bincount(drawn, minlength=5)
    assert torch.allclose(likelihood.exp(), probability[drawn], atol=1e-6)
    assert counts[2] == 0
    expected = 20000 * probability
    assert (((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum() < 23.5
    at = torch.tensor([0.0, 0.51, 1 - 2**-53], dtype=torch.float64)
    edges, _ = inverse_transform(probability.log().expand(3, 5), at, warmth[:3])
    assert edges.tolist() == [0, 1, 4]


@pytest.mark.parametrize("vocabulary", [RUN, 3 * RUN + 7, 5000])
def test_drawing_is_inverse_transform_sampling(vocabulary: int) -> None:
    """Against the cumulative probabilities in float64. Tokens of no probability are never drawn, first, last or between."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(300, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    logits[:, -5:] = -torch.inf
    logits[0, : 2 * RUN] = -torch.inf if vocabulary > 2 * RUN else 0
    u = torch.rand(300, generator=generator, dtype=torch.float64)
    u[:100], u[100:200] = 0, 1 - 2**-53
    warmth = torch.linspace(0.5, 1.5, 300, dtype=torch.float64)
    drawn, likelihood = inverse_transform(logits, u, warmth)
    probability = torch.softmax(logits.double() / warmth[:, None], -1)
    assert (probability.gather(1, drawn[:, None]) > 0).all()
    above = probability.cumsum(-1).gather(1, drawn[:, None])[:, 0]
    assert (above > u - 1e-6).all() and (above - probability.gather(1, drawn[:, None])[:, 0] < u + 1e-6).all()
    exact = torch.log_softmax(logits.double(), -1).gather(1, drawn[:, None])[:, 0]
    assert torch.allclose(likelihood, exact, atol=1e-5)


def test_batches_are_bounded_by_their_keys_and_values(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = 2 * 2 * 2 * 2 * 8 * 64  # key and value, 2 bytes, 2 layers, 2 heads of 8, 64 tokens
    assert batch_size(llama.config, 5, 64) == 5
    assert batch_size(llama.config, MAX_BATCH + 2, 64) == (MAX_BATCH + 2) // 2
    monkeypatch.setattr("sparsify.data.self_generated.sample.CACHE_BYTES", 3 * row)
    assert batch_size(llama.config, 10, 64) == 3 and batch_size(llama.config, 10, 1 << 20) == 1
    gpu, free = torch.device("cuda"), [64 * row]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], free[0]))
    assert batch_size(llama.config, 10, 64, gpu) == 10
    free[0] = 10 * row  # half of it holds five rows
    assert batch_size(llama.config, 10, 64, gpu) == 5


def test_threads_grow_with_the_work_and_are_given_back(llama: Any) -> None:
    assert [useful_threads(8, work) for work in (0, 4.3e9, 17e9, 1e12)] == [1, 1, 4, 8]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sample_rows(llama, scripts(2, 0), 8, seed=0, quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_rows_are_full_deterministic_and_differ_by_seed(tokenizer: Any, llama: Any) -> None:
    llama.train()
    tokens = calibration_tokens(SPEC, tokenizer, lambda: llama, quiet=True)
    assert llama.training, "the model is given back as it came"
    assert tokens.shape == (6, 40) and tokens.dtype == torch.long
    assert len(tokens.unique()) > 50
    assert torch.equal(calibration_tokens(SPEC, tokenizer, lambda: llama, quiet=True), tokens)
    other = calibration_tokens(SPEC.model_copy(update={"seed": 4}), tokenizer, lambda: llama, quiet=True)
    assert not torch.equal(other, tokens)


def test_sampled_rows_are_kept_per_model(tokenizer: Any, llama: Any, tmp_path: Path) -> None:
    loads: list[int] = []

    def factory() -> Any:
        loads.append(1)
        return llama

    def get(**settings: Any) -> torch.Tensor:
        return calibration_tokens(
            SPEC, tokenizer, factory, cache_dir=tmp_path / "new" / "cache", quiet=True, **settings
        )

    first = get(key=lambda: "checkpoint-1")
    assert torch.equal(get(key=lambda: "checkpoint-1"), first) and len(loads) == 1, "a hit needs no model"
    with torch.no_grad():
        llama.lm_head.weight[5] += 1
    assert not torch.equal(get(key=lambda: "checkpoint-2"), first), "another model"
    assert not torch.equal(get(), first), "nobody said which model it is"
    assert len(list((tmp_path / "new" / "cache").glob("*"))) == 2


def test_a_damaged_entry_is_made_again(tokenizer: Any, llama: Any, tmp_path: Path) -> None:
    first = calibration_tokens(SPEC, tokenizer, lambda: llama, cache_dir=tmp_path, key=lambda: "k", quiet=True)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"garbage" * 100):
        entry.write_bytes(content)
        again = calibration_tokens(SPEC, tokenizer, lambda: llama, cache_dir=tmp_path, key=lambda: "k", quiet=True)
        assert torch.equal(again, first) and entry.read_bytes() == whole


def test_what_cannot_be_sampled_is_refused(tokenizer: Any, llama: Any) -> None:
    with pytest.raises(CalibrationError, match="source self needs the model"):
        calibration_tokens(SPEC, tokenizer)
    with pytest.raises(CalibrationError, match="sequence_length is 200 but the model reads at most 128"):
        calibration_tokens(SPEC.model_copy(update={"sequence_length": 200}), tokenizer, lambda: llama)
    with torch.no_grad():
        llama.model.norm.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="logits are NaN or infinite"):
        calibration_tokens(SPEC, tokenizer, lambda: llama)
