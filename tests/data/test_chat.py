"""Conversations as training rows: the loss falls on exactly what the assistant says."""

import json

import pytest
import torch

from sparsify.data.chat import conversation_rows, render
from sparsify.errors import CalibrationError
from sparsify.recipe import Columns

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}\n{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (  # shows an answer in full only while it is the last turn, as templates do that hide earlier reasoning
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if loop.last and m['role'] == 'assistant' %}[full]{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "two of four"},
    {"role": "user", "content": "the quick fox"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "a model"},
    {"role": "assistant", "content": "keeps its own text"},
]


def said(tokenizer, messages) -> str:
    ids, mask = render(tokenizer, messages, "here")
    return "".join(tokenizer.decode([token]) for token, one in zip(ids, mask, strict=True) if one)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_exactly_the_answers_and_their_end_marks_are_learned(make_tokenizer, template):
    tokenizer = make_tokenizer(template=template)
    assert said(tokenizer, TALK) == "jumps over<|end|>keeps its own text<|end|>"
    ids, mask = render(tokenizer, TALK, "here")
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert not mask[0] and 0 < sum(mask) < len(mask)


def test_a_token_that_reaches_into_an_answer_belongs_to_it(make_tokenizer):
    """`>` and the first letter may be one token of a larger vocabulary; what the model has to write must be in the loss."""
    tokenizer = make_tokenizer(template=PLAIN.replace("<|assistant|>", "over").replace("<|{{ m['role'] }}|>", "over"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " the lazy dog"}]
    assert said(tokenizer, messages).lstrip().startswith("the lazy dog") or "the lazy dog" in said(tokenizer, messages)


def test_labels_are_the_next_token_where_it_is_said(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(template=PLAIN)
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    (row,) = conversation_rows(f"file:{file}", None, tokenizer, 512, None, 0)
    ids, mask = render(tokenizer, TALK, "here")
    assert row["input_ids"].tolist() == ids
    expected = [ids[i + 1] if i + 1 < len(ids) and mask[i + 1] else -100 for i in range(len(ids))]
    assert row["labels"].tolist() == expected


def test_cutting_keeps_the_beginning_and_drops_what_has_no_answer_left(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(template=PLAIN)
    file = tmp_path / "talk.jsonl"
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "model"}]
    late = [{"role": "user", "content": "a model writes its own text " * 20}, {"role": "assistant", "content": "dog"}]
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (short, late)))
    rows = conversation_rows(f"file:{file}", None, tokenizer, 60, None, 0)
    assert len(rows) == 1 and len(rows[0]["input_ids"]) <= 60
    assert len(conversation_rows(f"file:{file}", None, tokenizer, 500, None, 0)) == 2
    assert len(conversation_rows(f"file:{file}", None, tokenizer, 500, 1, 0)) == 1
    with pytest.raises(CalibrationError, match="none of its 2 conversations has an answer within 4 tokens"):
        conversation_rows(f"file:{file}", None, tokenizer, 4, None, 0)


def test_records_of_two_columns_become_conversations(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(template=PLAIN)
    columns = Columns(prompt="question", answer="answer")
    record = {"question": "2 + 2", "answer": "four"}
    jsonl = tmp_path / "qa.jsonl"
    jsonl.write_text(json.dumps(record) + "\n")
    (row,) = conversation_rows(f"file:{jsonl}", columns, tokenizer, 100, None, 0)
    assert tokenizer.decode(row["labels"][row["labels"] >= 0]) == "four<|end|>"
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(
        pyarrow.table({"question": ["2 + 2"], "answer": ["four"], "more": [1]}), tmp_path / "qa.parquet"
    )
    (again,) = conversation_rows(f"file:{tmp_path / 'qa.parquet'}", columns, tokenizer, 100, None, 0)
    assert torch.equal(row["input_ids"], again["input_ids"]) and torch.equal(row["labels"], again["labels"])
    with pytest.raises(CalibrationError, match="no text 'prompt'; it has question, answer"):
        conversation_rows(f"file:{jsonl}", Columns(prompt="prompt", answer="answer"), tokenizer, 100, None, 0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "prose"}', r"talk\.jsonl:1 holds text, no list of messages; name its fields with columns"),
        ('{"messages": "hello"}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing in it is said by the assistant"),
        ('{"messages": [', r"talk\.jsonl:1: not a JSON record"),
        ("", "it holds no conversation"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(make_tokenizer, tmp_path, line, words):
    file = tmp_path / "talk.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(CalibrationError, match=words):
        conversation_rows(f"file:{file}", None, make_tokenizer(template=PLAIN), 64, None, 0)


def test_a_template_that_rewrites_earlier_turns_is_refused_and_fine_for_one_answer(make_tokenizer):
    tokenizer = make_tokenizer(template=FORGETFUL)
    with pytest.raises(CalibrationError, match="turn 3 differently in a longer conversation"):
        render(tokenizer, TALK, "here")
    assert said(tokenizer, TALK[:3]) == "[full]jumps over<|end|>"


def test_what_is_missing_is_said(make_tokenizer, tmp_path):
    with pytest.raises(CalibrationError, match="no chat template"):
        conversation_rows("file:x.jsonl", None, make_tokenizer(), 64, None, 0)
    tokenizer = make_tokenizer(template=PLAIN)
    with pytest.raises(CalibrationError, match="does not exist"):
        conversation_rows(f"file:{tmp_path / 'x.jsonl'}", None, tokenizer, 64, None, 0)
    (tmp_path / "x.txt").write_text("prose")
    with pytest.raises(CalibrationError, match=r"neither \.jsonl nor \.parquet"):
        conversation_rows(f"file:{tmp_path / 'x.txt'}", None, tokenizer, 64, None, 0)
