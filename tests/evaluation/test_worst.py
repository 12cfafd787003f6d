"""The worst tokens and the agreement of the likeliest, against float64 over all positions at once."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsify.evaluation.score as score_module
from sparsify.cli import checkpoint
from sparsify.errors import SparsifyError
from sparsify.evaluation import ALL, evaluate, evaluate_all
from sparsify.evaluation.text import texts_of

LENGTH, CHUNKS = 32, 6


@pytest.fixture(scope="module")
def by_hand(directories, text_file):
    """Tokens [C, S], and log-probabilities of both models in float64, [C, S - 1, V]."""
    words = [int(word[1:]) for word in text_file.read_text().split()]
    ids = torch.tensor(words[: LENGTH * CHUNKS]).reshape(CHUNKS, LENGTH)
    with torch.no_grad():
        p, q = (
            torch.log_softmax(
                AutoModelForCausalLM.from_pretrained(directories / name).double()(ids).logits[:, :-1], dim=-1
            )
            for name in ("dense", "compressed")
        )
    return ids, p, q


def test_the_worst_tokens_in_context(directories, text_file, by_hand, monkeypatch):
    monkeypatch.setattr(score_module, "ROWS", 7)  # several slices of a chunk
    ids, p, q = by_hand
    kl = (p.exp() * (p - q)).sum(-1)
    result = evaluate(directories / "compressed", directories / "dense", text_file, LENGTH, CHUNKS, quiet=True)
    found = json.loads(json.dumps(result.to_json()))["texts"][text_file.name]["worst"]
    order = kl.flatten().argsort(descending=True)[:20]
    assert [(one["chunk"], one["position"]) for one in found] == [
        (int(place) // (LENGTH - 1), int(place) % (LENGTH - 1) + 1) for place in order
    ]
    for one in found:
        chunk, position = one["chunk"], one["position"]
        row = [f"w{token}" for token in ids[chunk].tolist()]
        assert one["kl"] == pytest.approx(kl[chunk, position - 1].item(), rel=1e-3)
        assert one["before"].split() == row[max(position - 24, 0) : position]
        assert one["token"] == row[position] and one["after"].split() == row[position + 1 : position + 9]
        for name, log_p in (("dense", p), ("model", q)):
            best = log_p[chunk, position - 1].exp().topk(5)
            assert [guess["probability"] for guess in one[name]] == pytest.approx(best.values.tolist(), rel=1e-3)
            assert [guess["token"] for guess in one[name]] == [
                {0: "<unk>", 1: "<s>", 2: "</s>"}.get(token, f"w{token}") for token in best.indices.tolist()
            ]


def test_agreement_of_the_five_likeliest(directories, text_file, by_hand):
    _, p, q = by_hand
    rows = zip(p.flatten(0, 1).topk(5).indices.tolist(), q.flatten(0, 1).topk(5).indices.tolist(), strict=True)
    shares = [len(set(its) & set(mine)) / 5 for its, mine in rows]
    both = evaluate_all(
        [directories / "compressed", directories / "dense"],
        directories / "dense",
        text_file,
        LENGTH,
        CHUNKS,
        quiet=True,
    )
    score, same = (result.first for result in both)
    assert score.top5_agreement == pytest.approx(sum(shares) / len(shares)) and 0 < score.top5_agreement < 1
    assert same.top5_agreement == 1 and same.worst == []
    alone = evaluate(directories / "compressed", None, text_file, LENGTH, CHUNKS, quiet=True).first
    assert alone.top5_agreement is None and alone.worst == []


def test_a_text_at_several_lengths(directories, text_file):
    found = evaluate(directories / "compressed", directories / "dense", text_file, [16, 64], ALL, quiet=True)
    assert {name: (score.sequence_length, score.chunks) for name, score in found.texts.items()} == {
        f"{text_file.name} (16)": (16, 43), f"{text_file.name} (64)": (64, 10),
    }  # fmt: skip
    alone = evaluate(directories / "compressed", directories / "dense", text_file, 64, ALL, quiet=True)
    assert alone.perplexity == found.texts[f"{text_file.name} (64)"].perplexity != found.perplexity
    with pytest.raises(SparsifyError, match="gives 700 tokens, fewer than one chunk of 701"):
        evaluate(directories / "compressed", None, text_file, [16, 701], quiet=True)
    with pytest.raises(SparsifyError, match="16 is given twice"):
        texts_of(text_file, [16, 16])
    with pytest.raises(SparsifyError, match="has no end: give a number of --chunks"):
        texts_of("self", None, ALL)
    assert checkpoint.ALL_CHUNKS == ALL
