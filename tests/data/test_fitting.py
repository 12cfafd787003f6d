"""Text that does not fit the model, and files as other systems write them: read, or named with the place."""

import json

import pytest

from sparsify.cli import main
from sparsify.compiler.apply import apply
from sparsify.data.calibration import calibration_tokens
from sparsify.data.chat import conversation_rows
from sparsify.data.files import file_records, read_text
from sparsify.data.fitting import refuse_surrogates
from sparsify.data.given import write_calibration
from sparsify.data.self_generated.rows import own_rows
from sparsify.errors import CalibrationError, RecipeError, SparsifyError
from sparsify.evaluation import check_inputs, evaluate
from sparsify.files import encoding_problem
from sparsify.recipe import load_recipe, parse_recipe
from sparsify.recipe.schema import Calibration, SelfText
from tests.helpers.tiny import VOCABULARY, save_tiny, tiny_text, tiny_tokenizer

BOM = b"\xef\xbb\xbf"
RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 4, sequence_length: 32}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def spec(source, samples=3, sequence_length=16):
    return Calibration(source=str(source), samples=samples, sequence_length=sequence_length)


# ------------------------------------------------------------------------------------------------- tokens beyond the model


@pytest.fixture
def beyond(tmp_path):
    """A model whose tokenizer has got a token more than the embedding, and a text that holds it."""
    model = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    text = tiny_text(tmp_path / "text.txt")
    text.write_text(text.read_text()[:100] + "<tool>" + text.read_text()[100:])
    return model, text, tokenizer


NAMED = rf"holds the token '<tool>' with the id {VOCABULARY}, but the embedding of the model has {VOCABULARY} rows"


def test_a_token_beyond_the_embedding_is_named_in_calibration(beyond, tmp_path, monkeypatch):
    model, text, _ = beyond
    monkeypatch.setattr("sparsify.compiler.calibrate.Walk", None)  # nothing is computed
    with pytest.raises(CalibrationError, match=f"text.txt {NAMED}"):
        apply(parse_recipe(RECIPE.format(text=text)), str(model), tmp_path / "out", quiet=True)


def test_a_token_beyond_the_embedding_is_named_in_training_text_first(beyond, tmp_path, monkeypatch):
    model, text, _ = beyond
    monkeypatch.setattr("sparsify.compiler.calibrate.Walk", None)
    good = tiny_text(tmp_path / "good.txt")
    distill = f'  - distill: {{tokens: 256, sequence_length: 32, batch_size: 2, source: "file:{text}"}}\n'
    with pytest.raises(CalibrationError, match=f"text.txt {NAMED}"):
        apply(parse_recipe(RECIPE.format(text=good) + distill), str(model), tmp_path / "out", quiet=True)


def test_a_token_beyond_the_embedding_is_named_in_conversations(beyond, tmp_path):
    tokenizer = beyond[2]
    data = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<tool>"}]
    data.write_text(json.dumps({"messages": turns}))
    with pytest.raises(CalibrationError, match=f"chat.jsonl:1 {NAMED}"):
        conversation_rows(f"file:{data}", None, tokenizer, 32, None, 0, VOCABULARY)


def test_a_token_beyond_the_embedding_is_named_in_evaluation(beyond, monkeypatch):
    model, text, _ = beyond
    monkeypatch.setattr("sparsify.evaluation.load_model", None)  # no weight is read
    for measured in (lambda: evaluate(model, None, text, 32, 4, quiet=True), lambda: check_inputs(model, text, 32, 4)):
        with pytest.raises(SparsifyError, match=f"text.txt: the evaluation text {NAMED}"):
            measured()


def test_a_prompt_of_self_written_text_beyond_the_embedding_is_named(make_tokenizer, llama, monkeypatch):
    monkeypatch.setattr("sparsify.data.self_generated.rows.sample_rows", None)  # nothing is written
    tokenizer = make_tokenizer(template=CHAT.replace("<s>", "<tool>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    llama.resize_token_embeddings(size := len(tokenizer) - 1)
    with pytest.raises(CalibrationError, match=rf"chat template holds the token '<tool>' with the id {size}"):
        own_rows(llama, tokenizer, 2, 16, 0, SelfText())
    llama.resize_token_embeddings(40)  # of a model whose vocabulary was cut
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"beginning of a text, holds the token .* has 40 rows"):
        own_rows(llama, tokenizer, 8, 16, 0, SelfText())


# ----------------------------------------------------------------------------------------------------------- characters


def test_half_a_surrogate_pair_is_named_with_file_and_line(tokenizer, make_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good", "other": "\\ud800"}\n{"text": "bad \\ud83d word"}\n')
    with pytest.raises(CalibrationError, match=r"a.jsonl:2 holds half of a surrogate pair .*ud83d at character 4"):
        calibration_tokens(spec(f"file:{path}"), tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud800"}]
    path.write_text(json.dumps({"messages": turns}))
    chat = make_tokenizer(template=CHAT)
    with pytest.raises(CalibrationError, match=r"a.jsonl:1 holds half of a surrogate pair"):
        calibration_tokens(spec(f"file:{path}"), chat)
    with pytest.raises(CalibrationError, match=r"a.jsonl:1 holds half of a surrogate pair"):
        conversation_rows(f"file:{path}", None, chat, 32, None, 0)
    with pytest.raises(CalibrationError, match=r"calibration document 2 holds half of a surrogate pair"):
        write_calibration(["good", "bad \udfff"], spec("self"), tmp_path)
    refuse_surrogates(["a whole pair: \U0001f600", {"a": 1}], "here")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_text(tmp_path, newline):
    lines = [json.dumps({"text": "first"}), json.dumps({"text": "second"})]
    records, text, recipe = tmp_path / "a.jsonl", tmp_path / "a.txt", tmp_path / "a.yaml"
    records.write_bytes(BOM + newline.join(lines).encode())
    text.write_bytes(BOM + f"first{newline}second".encode())
    body = RECIPE.format(text=text)
    recipe.write_bytes(BOM + body.replace("\n", newline).encode())
    assert [record["text"] for _, record in file_records(records)] == ["first", "second"]
    assert read_text(text, 100) == "first\nsecond"
    assert load_recipe(recipe) == parse_recipe(body)


def test_evaluation_reads_a_text_with_a_byte_order_mark(tmp_path):
    model, text = save_tiny(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    plain = evaluate(model, None, text, 32, 4, quiet=True).perplexity
    text.write_bytes(BOM + text.read_bytes())
    assert evaluate(model, None, text, 32, 4, quiet=True).perplexity == plain


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("text".encode("utf-16"), "byte 0xff at offset 0, the mark of UTF-16"),
        ("text".encode("utf-16-le"), "byte 0x00 at offset 1"),
        ("text".encode("utf-32"), "the mark of UTF-32"),
        (b"a" * 3_000_000 + b"\xff", "byte 0xff at offset 3000000"),
        (b"a" * ((1 << 20) - 1) + "é".encode()[:1] + b"x", f"byte 0xc3 at offset {(1 << 20) - 1}"),
        ("whole é".encode()[:-1], "byte 0xc3 at offset 6, where the file ends"),
    ],
)
def test_other_encodings_are_named_with_the_byte(tokenizer, tmp_path, content, place):
    for name in ("a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=rf"{name} is not .*{place}"):
            calibration_tokens(spec(f"file:{path}"), tokenizer)
        assert place in encoding_problem(path)
    model = save_tiny(tmp_path / "model")
    with pytest.raises(SparsifyError, match=rf"not UTF-8 .*{place}"):
        check_inputs(model, tmp_path / "a.txt")


def test_a_recipe_in_another_encoding_is_named_with_the_byte(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"version: 1 # caf\xe9\n")
    with pytest.raises(RecipeError, match="byte 0xe9 at offset 16"):
        load_recipe(path)
    assert main(["plan", str(path)]) == 1
    assert "bug in sparsify" not in capsys.readouterr().err


def test_utf8_is_no_problem(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("é" * 2_000_000, encoding="utf-8")
    assert encoding_problem(path) is None
