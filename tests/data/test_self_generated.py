"""What the model is asked to write, what is kept of it, and how sources are mixed."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from sparsify.data.calibration import calibration_tokens
from sparsify.data.mixture import interleave
from sparsify.data.self_generated.prompts import (
    KINDS,
    chat_script,
    chat_turns,
    document_mark,
    documents_script,
    opening_text,
)
from sparsify.data.self_generated.ptb_style import apart, corpus_rows, without_rare_words
from sparsify.data.self_generated.rows import best_rows, distinct_ngrams, own_rows
from sparsify.errors import CalibrationError
from sparsify.recipe import Calibration
from sparsify.recipe.schema import SelfText

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
UNMARKED = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '.' }}{% endfor %}"


def test_a_template_is_taken_apart_into_what_stands_before_each_turn(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    turns = chat_turns(tokenizer)
    assert turns is not None
    assert tokenizer.decode(turns.first) == "<s>user:"
    assert tokenizer.decode(turns.answer) == "</s><s>assistant:"
    assert tokenizer.decode(turns.further) == "</s><s>user:"
    assert turns.endings == {tokenizer.eos_token_id}
    messages = [{"role": role, "content": words} for role, words in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    a, b, c = (tokenizer(words, add_special_tokens=False)["input_ids"] for words in "abc")
    assert [*turns.first, *a, *turns.answer, *b, *turns.further, *c] == whole[:-1]


def test_templates_whose_turns_cannot_be_told_apart_are_not_used(make_tokenizer: Callable[..., Any]) -> None:
    for template in (None, UNMARKED, "{{ raise_exception('no') }}", "nothing of it"):
        assert chat_turns(make_tokenizer(template=template)) is None


def test_a_mark_that_became_one_of_turns_no_longer_opens_documents(make_tokenizer: Callable[..., Any]) -> None:
    plain, chat = make_tokenizer(), make_tokenizer(template=TURNS)
    assert document_mark(plain, None) == plain.bos_token_id
    assert document_mark(make_tokenizer(bos=None), None) == plain.eos_token_id
    assert document_mark(chat, chat_turns(chat)) == chat.bos_token_id, "nothing better in this vocabulary"
    chat.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert document_mark(chat, chat_turns(chat)) == chat.convert_tokens_to_ids("<|endoftext|>")


def test_conversations_alternate_and_some_go_on(make_tokenizer: Callable[..., Any]) -> None:
    turns = chat_turns(make_tokenizer(template=TURNS))
    assert turns is not None
    segments = list(islice(chat_script(turns, Random("0 1")), 200))
    assert all(segment.varied and segment.tokens in (turns.first, turns.further) for segment in segments[::2])
    assert all(not segment.varied and segment.tokens == turns.answer for segment in segments[1::2])
    assert 20 < sum(segment.tokens == turns.first for segment in segments) < 80


def test_documents_begin_with_given_words_as_often_as_asked(tokenizer: Any) -> None:
    def opened(share: float) -> int:
        segments = islice(documents_script(tokenizer, 0, 300, share, Random("0 2")), 400)
        return sum(len(segment.tokens) > 1 for segment in segments)

    assert opened(0.0) == 0 and opened(1.0) == 400 and 140 < opened(0.5) < 260
    texts = {opening_text(Random(f"{seed}")) for seed in range(2000)}
    assert len(texts) > 600 and not any("{topic}" in text or "{year}" in text for text in texts)
    assert all(kind.format(topic="T", place="P", year=1, number=2) for kind in KINDS)


def test_rows_that_loop_go_first_and_unlikely_ones_next() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 90, (5, 64), generator=generator)
    tokens[1] = torch.tensor([5, 6, 7, 8]).repeat(16)
    likelihood = torch.tensor([-3.0, -0.1, -9.0, -2.0, -4.0], dtype=torch.float64)
    assert distinct_ngrams(tokens)[1] == 4 / 61 and distinct_ngrams(tokens)[0] > 0.99
    assert best_rows(tokens, likelihood, 4).tolist() == [0, 2, 3, 4]
    assert best_rows(tokens, likelihood, 2).tolist() == [0, 3]
    assert best_rows(tokens, likelihood, 5).tolist() == [0, 1, 2, 3, 4]


def test_of_all_candidates_the_likelier_are_kept_in_the_text_that_all_of_them_have(tokenizer: Any, llama: Any) -> None:
    def written(candidates: float, samples: int) -> set[tuple[int, ...]]:
        options = SelfText(chat=0, corpora=0, coolest=1.0, candidates=candidates)
        rows = own_rows(llama, tokenizer, samples, 32, 3, options, quiet=True)
        return set(map(tuple, rows.tolist()))

    everything, best = written(1, 8), written(2, 4)
    assert best < everything and len(best) == 4


def test_a_share_of_the_rows_are_conversations(make_tokenizer: Callable[..., Any], llama: Any) -> None:
    tokenizer = make_tokenizer(template=TURNS)
    turns = chat_turns(tokenizer)
    assert turns is not None

    def conversations(chat: float | None) -> int:
        options = SelfText(chat=chat, corpora=0)
        rows = own_rows(llama, tokenizer, 8, 24, 3, options, quiet=True)
        return sum(tuple(row[: len(turns.first)]) == turns.first for row in rows.tolist())

    assert [conversations(chat) for chat in (0.0, 0.5, 1.0, None)] == [0, 4, 8, 2]
    with pytest.raises(CalibrationError, match="has no chat template whose turns end"):
        own_rows(llama, make_tokenizer(), 8, 24, 3, SelfText(chat=0.5))


def test_the_form_of_a_corpus() -> None:
    assert apart("The well-known 1,200 (or so), 3.5 km.\n\n# History\nHe didn't say \"no\": it's his.") == (
        "The well @-@ known 1 @,@ 200 ( or so ) , 3 @.@ 5 km . \n = History = \n He did n't say \" no \" : it 's his ."
    )
    assert apart("") == "" and apart("plain words stay") == "plain words stay"


def test_rare_words_are_unknown_and_marks_stay(tokenizer: Any) -> None:
    assert without_rare_words("the lazy zyxwvut, 2:4", tokenizer) == "the lazy <unk>, 2:4"
    ids = tokenizer("the lazy, brown fox jumps", add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[0, *ids, 1], [0, *ids, 1]])
    rewritten = corpus_rows(rows, tokenizer, {0, 1})
    assert rewritten.shape == rows.shape and rewritten[0, 0] == 0
    assert tokenizer.decode(rewritten.flatten()[1:]).startswith("the lazy , brown fox jumps</s>")


def test_a_share_of_the_plain_rows_takes_that_form(tokenizer: Any, llama: Any) -> None:
    def written(corpora: float) -> set[tuple[int, ...]]:
        rows = own_rows(llama, tokenizer, 8, 64, 3, SelfText(corpora=corpora), quiet=True)
        return set(map(tuple, rows.tolist()))

    assert [len(written(0.0) & written(share)) for share in (0.0, 0.25, 1.0)] == [8, 6, 0]


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_parts_are_shuffled_among_each_other_but_not_within() -> None:
    parts = [torch.arange(0, 5)[:, None], torch.arange(10, 13)[:, None], torch.empty(0, 1, dtype=torch.long)]
    mixed = interleave(parts, seed=0)[:, 0].tolist()
    assert sorted(mixed) == [0, 1, 2, 3, 4, 10, 11, 12] and mixed != sorted(mixed)
    assert [row for row in mixed if row < 10] == [0, 1, 2, 3, 4] and [row for row in mixed if row >= 10] == [10, 11, 12]
    assert interleave(parts, seed=0)[:, 0].tolist() == mixed
    assert len({tuple(interleave(parts, seed)[:, 0].tolist()) for seed in range(20)}) > 10
    assert torch.equal(interleave(parts[:1], seed=7), parts[0])


def test_a_mixture_holds_the_rows_that_each_source_gives_alone(tokenizer: Any, llama: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"the lazy {name} jumps over the dog " * 60)
    entries = [
        {"source": "self", "weight": 1.0},
        {"source": f"file:{tmp_path}/a.txt", "weight": 2.0},
        {"source": f"file:{tmp_path}/b.txt", "weight": 1.0},
    ]
    spec = Calibration(sources=entries, samples=8, sequence_length=24, seed=5, self=SelfText(candidates=1))

    def get(**changes: Any) -> list[tuple[int, ...]]:
        given = {**spec.model_dump(), **changes}
        rows = calibration_tokens(Calibration(**given), tokenizer, lambda: llama, tmp_path, lambda: "key", quiet=True)
        return list(map(tuple, rows.tolist()))

    mixed = get()
    alone = [get(sources=None, source="self", samples=2)] + [
        get(sources=None, source=entry["source"], samples=count, self=None)
        for entry, count in zip(entries[1:], (4, 2), strict=True)
    ]
    for rows in alone:
        places = [mixed.index(row) for row in rows]
        assert places == sorted(places)
    assert sorted(mixed) == sorted(row for rows in alone for row in rows)
    assert get() == mixed and get(seed=6) != mixed
