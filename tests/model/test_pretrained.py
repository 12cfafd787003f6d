"""Models and tokenizers with Python code of their own: never a question, one sentence, and with the option all works."""

import json
import os

import pytest

from sparsify.cli import main
from sparsify.errors import CheckpointError
from sparsify.evaluation.load import load_model, load_tokenizer
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import open_blocks
from sparsify.model.permissions import TRUST, trusting, trusts_remote_code
from sparsify.model.pretrained import load_causal_lm, load_config
from tests.helpers.tiny import save_tiny, tiny_text

CONFIG = "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
MODEL = (
    "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n\n\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
)
TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\n\n\nclass MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)
SENTENCE = r"needs Python code that comes with it \({}\.py.*--trust-remote-code"


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def own_model(directory):
    save_tiny(directory)
    (directory / "configuration_mine.py").write_text(CONFIG)
    (directory / "modeling_mine.py").write_text(MODEL)
    classes = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit(directory / "config.json", auto_map=classes, model_type="mine", architectures=["MineForCausalLM"])
    return directory


def own_tokenizer(directory):
    save_tiny(directory)
    (directory / "tokenization_mine.py").write_text(TOKENIZER)
    classes = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    edit(directory / "tokenizer_config.json", auto_map=classes, tokenizer_class="MineTokenizer")
    return directory


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(text=""):
        raise AssertionError(f"asked on the terminal: {text}")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.delenv(TRUST, raising=False)


def test_code_of_a_model_is_refused_everywhere(tmp_path):
    model = own_model(tmp_path / "model")
    checkpoint = open_checkpoint(model)
    for opened in (
        lambda: open_blocks(checkpoint), lambda: load_model(model), lambda: load_config(model), lambda: load_causal_lm(model),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=SENTENCE.format("configuration_mine")):
            opened()


def test_code_of_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=SENTENCE.format("tokenization_mine")):
        load_tokenizer(own_tokenizer(tmp_path / "model"))


@pytest.mark.parametrize("make", [own_model, own_tokenizer])
def test_the_command_says_one_sentence_or_does_all(tmp_path, capsys, make):
    model, text = make(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    more = ["calibration.samples=4", "calibration.sequence_length=32", f"calibration.source=file:{text}"]
    sets = [part for one in [*more, "passes.quantize.group_size=32", "export.head=null"] for part in ("--set", one)]
    apply = ["apply", "2of4-w4a16", "--model", str(model), "--output", str(tmp_path / "out"), "--quiet", *sets]
    assert main(apply) == 1
    said = capsys.readouterr().err
    assert "--trust-remote-code" in said and "bug in sparsify" not in said and "Traceback" not in said
    assert main([*apply, "--trust-remote-code"]) == 0
    assert not trusts_remote_code() and TRUST not in os.environ
    out = tmp_path / "out"
    assert {file.name for file in model.glob("*.py")} == {file.name for file in out.glob("*.py")}
    score = ["eval", str(out), "--dense", str(model), "--text", str(text), "--sequence-length", "32", "--chunks", "2"]
    assert main([*score, "--quiet"]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*score, "--quiet", "--trust-remote-code"]) == 0
    again = ["export", str(out), "--format", "dense", "--output", str(tmp_path / "dense"), "--quiet"]
    assert main(again) == 0  # nothing of the code is needed for this


def test_trust_ends_with_the_block(monkeypatch):
    with trusting(True):
        assert trusts_remote_code()
        with trusting(False):
            assert trusts_remote_code()
    assert not trusts_remote_code()
    monkeypatch.setenv(TRUST, "0")
    with trusting(True):
        assert trusts_remote_code()
    assert os.environ[TRUST] == "0" and not trusts_remote_code()


def test_python_permits_it_by_an_argument(tmp_path):
    import sparsify

    model, text = own_model(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    recipe = {"passes": [{"prune": {"method": "magnitude"}}]}
    calls = {
        "plan": lambda **given: sparsify.plan(recipe, model, **given),
        "apply": lambda **given: sparsify.apply(recipe, model, tmp_path / "out", quiet=True, **given).model,
        "evaluate": lambda **given: sparsify.evaluate(tmp_path / "out", None, text, 32, 2, quiet=True, **given),
    }
    for name, call in calls.items():
        with pytest.raises(CheckpointError, match=r"trust_remote_code=True"):
            call()
        assert call(trust_remote_code=True) is not None, name
    assert sparsify.inspect(tmp_path / "out").not_compared is not None
    assert sparsify.inspect(tmp_path / "out", trust_remote_code=True).not_compared is None
    assert not trusts_remote_code()


def test_an_engine_is_told(monkeypatch):
    from sparsify.bench import BenchOptions
    from sparsify.bench.workload import LatencyWorkload, engine_arguments

    assert "--trust-remote-code" not in engine_arguments(LatencyWorkload(), None, BenchOptions())
    with trusting(True):
        assert "--trust-remote-code" in engine_arguments(LatencyWorkload(), None, BenchOptions())


@pytest.mark.parametrize(
    "reference",
    ["../../evil--x.Y", "../evil.Y", "/etc/evil.Y", "a/../../evil.Y", "~/evil--x.Y", "evil--x.Y", "a/b/c--x.Y", "x"],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_outside_of_the_directory_never_runs(tmp_path, file, reference):
    model = save_tiny(tmp_path / "model")
    edit(model / file, auto_map={"AutoConfig": reference, "AutoTokenizer": [None, reference]})
    for trust in (False, True):
        with trusting(trust), pytest.raises(CheckpointError, match=rf"{file} names code outside of the directory"):
            open_checkpoint(model)


def test_a_link_to_code_out_of_the_directory_is_refused(tmp_path):
    model = own_model(tmp_path / "model")
    (model / "modeling_mine.py").rename(tmp_path / "evil.py")
    (model / "modeling_mine.py").symlink_to(tmp_path / "evil.py")
    with (
        trusting(True),
        pytest.raises(CheckpointError, match=r"modeling_mine\.py is a link to .*evil\.py, which is outside"),
    ):
        open_checkpoint(model)


@pytest.mark.parametrize("nested", [False, True])
def test_code_of_another_repository_is_named(tmp_path, capsys, nested):
    model = save_tiny(tmp_path / "model")
    named = {"auto_map": {"AutoConfig": "other/re.po--mine.MineConfig"}}
    edit(model / "config.json", **({"text_config": named} if nested else named))
    with pytest.raises(CheckpointError, match=r"of another repository, other/re\.po .*--trust-remote-code"):
        open_checkpoint(model)
    with trusting(True):
        open_checkpoint(model), open_checkpoint(model)
    assert capsys.readouterr().err.count("may run Python code of another repository: other/re.po (mine.py)") == 1
