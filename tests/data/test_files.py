"""Calibration tokens from files and from the hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.data.calibration import calibration_tokens, check_sources
from sparsify.errors import CalibrationError, MissingDependency
from sparsify.recipe import Calibration

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
SENTENCES = [f"sentence {number} about a quick brown fox" for number in range(20)]
CHAT = [
    [{"role": "user", "content": f"what is {n} plus {n}?"}, {"role": "assistant", "content": f"it is {2 * n}"}]
    for n in range(20)
]


def spec(source: object, samples: int = 3, sequence_length: int = 16, seed: int = 0) -> Calibration:
    return Calibration(source=str(source), samples=samples, sequence_length=sequence_length, seed=seed)


def rows(ids: list[int], samples: int = 3, sequence_length: int = 16) -> torch.Tensor:
    """The reference: as the measured prototype cuts rows."""
    return torch.tensor([ids[i * sequence_length : (i + 1) * sequence_length] for i in range(samples)])


def packed(tokenizer: Any, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]


def templated(tokenizer: Any, chats: list[Any]) -> list[int]:
    return [
        token for chat in chats for token in tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
    ]


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["wiki.txt", "README", "notes.md"])
def test_plain_text_is_tokenised_whole_and_cut_into_consecutive_rows(tokenizer: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n\n".join(SENTENCES) + "\r\nünïcode\n", encoding="utf-8")
    tokens = calibration_tokens(spec(f"file:{path}"), tokenizer)
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, rows(tokenizer(open(path, encoding="utf-8").read()).input_ids))


def test_only_the_needed_start_of_a_huge_text_is_read(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "a.txt", "\n".join(SENTENCES * 50)
    path.write_text(text)
    whole = calibration_tokens(spec(f"file:{path}"), tokenizer)
    monkeypatch.setattr("sparsify.data.calibration.LEAST_CHARACTERS", 100)
    monkeypatch.setattr("sparsify.data.calibration.CHARACTERS_PER_TOKEN", 8)
    seen: list[str] = []

    class Spy:
        bos_token_id, eos_token_id, get_vocab = 0, 1, tokenizer.get_vocab

        def __call__(self, text: str, **settings: Any) -> Any:
            seen.append(text)
            return tokenizer(text, **settings)

    assert torch.equal(calibration_tokens(spec(f"file:{path}"), Spy()), whole)
    assert seen == [text[: text.index("\n", 8 * 3 * 16) + 1]]


def test_too_little_text_says_how_far_it_reaches(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 50)
    count = len(tokenizer("x" * 50).input_ids)
    with pytest.raises(CalibrationError) as caught:
        calibration_tokens(spec(f"file:{path}", samples=10), tokenizer)
    assert str(caught.value) == (
        f"{path} holds {count} tokens, which make {count // 16} samples of 16, but 10 were asked for; give more text or "
        f"lower calibration.samples to {count // 16} or lower calibration.sequence_length to {count // 10}"
    )
    for key, value in (("samples", count // 16), ("sequence_length", count // 10)):
        advised = spec(f"file:{path}", samples=10).model_copy(update={key: value})
        assert calibration_tokens(advised, tokenizer).shape == (advised.samples, advised.sequence_length)
    path.write_text("")
    with pytest.raises(CalibrationError, match="holds 0 tokens.*give more text$"):
        calibration_tokens(spec(f"file:{path}"), tokenizer)


def test_files_that_are_no_text_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    (tmp_path / "data.json").write_text("[]")
    for name, words in (
        ("missing.txt", "does not exist"),
        (".", "is a directory"),
        ("weights.bin", "not a UTF-8 text"),
        ("data.json", "write it as .jsonl"),
    ):
        with pytest.raises(CalibrationError, match=words):
            calibration_tokens(spec(f"file:{tmp_path / name}"), tokenizer)


def test_the_source_can_be_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    check_sources(spec("self"))
    check_sources(spec("hub:a/b"))
    path = tmp_path / "a.txt"
    with pytest.raises(CalibrationError, match="does not exist"):
        check_sources(spec(f"file:{path}"))
    path.write_text("x")
    check_sources(spec(f"file:{path}"))
    mixture = [{"source": "self", "weight": 1.0}, {"source": f"file:{tmp_path / 'b.txt'}", "weight": 1.0}]
    with pytest.raises(CalibrationError, match="b.txt does not exist"):
        check_sources(Calibration(sources=mixture))


# ------------------------------------------------------------------------------------------------------------ records


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    return path


def test_jsonl_texts_are_documents_one_after_another(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in SENTENCES])
    assert torch.equal(calibration_tokens(spec(f"file:{path}"), tokenizer), rows(packed(tokenizer, SENTENCES)))


def test_jsonl_messages_go_through_the_chat_template_and_get_no_marks_beside_it(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat, "text": "unused"} for chat in CHAT])
    tokens = calibration_tokens(spec(f"file:{path}"), tokenizer)
    assert torch.equal(tokens, rows(templated(tokenizer, CHAT)))
    assert tokenizer.decode(tokens[0]).startswith("<s>user: what is 0")


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_parquet_gives_the_same_rows_as_jsonl(make_tokenizer: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tokenizer = make_tokenizer(template=TEMPLATE)
    values = SENTENCES if kind == "text" else CHAT
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(20)), kind: values}), path, row_group_size=7)
    other = write_jsonl(tmp_path / "a.jsonl", [{kind: value} for value in values])
    tokens = calibration_tokens(spec(f"file:{path}", 8), tokenizer)
    assert torch.equal(tokens, calibration_tokens(spec(f"file:{other}", 8), tokenizer))


def test_damaged_records_are_named(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    plain, chat = make_tokenizer(), make_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    path = tmp_path / "a.jsonl"
    for content, tokenizer, words in (
        ('{"text": "a"}\n{"text": \n', plain, "a.jsonl:2: not a JSON record"),
        ('{"text": "a"}\n[1]\n', plain, "a.jsonl:2: a record must be a JSON object"),
        (
            '{"prompt": "a", "answer": "b"}\n',
            plain,
            "a.jsonl:1 holds prompt, answer; a record needs one of messages or text",
        ),
        ('{"text": 3}\n', plain, "a.jsonl:1 holds text"),
        (json.dumps({"messages": CHAT[0]}), plain, "has no chat template"),
        (json.dumps({"messages": CHAT[0]}), chat, "refuses these messages .roles must alternate"),
    ):
        path.write_text(content)
        with pytest.raises(CalibrationError, match=words):
            calibration_tokens(spec(f"file:{path}"), tokenizer)
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"]}), table)
    with pytest.raises(CalibrationError, match="a.parquet row 1 holds prompt, answer; a record needs"):
        calibration_tokens(spec(f"file:{table}"), plain)
    table.write_bytes(b"PAR1 this is not parquet PAR1")
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        calibration_tokens(spec(f"file:{table}"), plain)


def test_no_more_records_are_read_than_needed(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES) + "not json\n")
    calibration_tokens(spec(f"file:{path}"), tokenizer)
    with pytest.raises(CalibrationError, match="a.jsonl:21: not a JSON record"):
        calibration_tokens(spec(f"file:{path}", samples=1000), tokenizer)


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **settings: Any) -> Any:
        calls.append((*args, settings))
        if args[0] == "no/such":
            raise FileNotFoundError("no/such is\nnot there")
        return datasets.Dataset.from_list([{"text": text} for text in SENTENCES]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_records_are_streamed_shuffled_and_kept(hub: list[Any], tokenizer: Any, tmp_path: Path) -> None:
    asked = spec("hub:org/name:en:validation", samples=4)
    tokens = calibration_tokens(asked, tokenizer, cache_dir=tmp_path)
    assert hub == [("org/name", "en", {"split": "validation", "streaming": True})]
    decoded = tokenizer.decode(calibration_tokens(spec("hub:org/name", samples=4), tokenizer).reshape(-1))
    documents = [text for text in decoded.split("</s>") if text][:-1]
    assert set(documents) <= set(SENTENCES) and documents != SENTENCES[: len(documents)]
    assert hub[1] == ("org/name", None, {"split": "train", "streaming": True})
    assert torch.equal(calibration_tokens(asked, tokenizer, cache_dir=tmp_path), tokens) and len(hub) == 2
    other = calibration_tokens(asked.model_copy(update={"seed": 1}), tokenizer, cache_dir=tmp_path)
    assert not torch.equal(other, tokens) and len(hub) == 3


def test_hub_failures_are_one_sentence(hub: list[Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match=r"^hub:no/such:train cannot be loaded \(no/such is not there\); check"):
        calibration_tokens(spec("hub:no/such"), tokenizer)
    with pytest.raises(CalibrationError, match="hub:a/b holds .* but 1000 were asked for"):
        calibration_tokens(spec("hub:a/b", samples=1000), tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependency, match="sparsify-24.data."):
        calibration_tokens(spec("hub:a/b"), tokenizer)
