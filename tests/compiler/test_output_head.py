"""The quantized output head, from recipe or command line to files, metrics and logits, against arithmetic of its own."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsify  # noqa: F401  registers the loader
import sparsify.compiler.apply as run
from sparsify.cli import main
from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError, NumericalError, RecipeError
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.recipe import load_recipe, parse_recipe
from sparsify.report import report_on
from sparsify.solver import head_quantization as head_pass
from tests.helpers.students import bytes_of
from tests.helpers.tiny import FAMILIES, save_tiny, tiny_model, tiny_text, tiny_tokenizer

RECIPE = """
version: 1
passes:
  - prune: {{method: magnitude}}
  - quantize: {{method: rtn, bits: 4, group_size: 32}}
export: {{format: {format}{head}}}
"""
CALIBRATED = """
version: 1
calibration: {{source: "file:{text}", samples: 40, sequence_length: 32}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
export: {{head: {head}}}
"""
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
# Families whose checkpoint names the head in another way than transformers does
ON_DISK = {"gpt_neox": "embed_out"}


def recipe(head="{bits: 8, group_size: 64}", format="sparse24", *overrides):
    return parse_recipe(RECIPE.format(format=format, head=f", head: {head}" if head else ""), overrides=overrides)


def calibrated(folder, head="{bits: 4, group_size: 32}"):
    text = folder / "text.txt"
    if not text.exists():
        tiny_text(text)
    return parse_recipe(CALIBRATED.format(text=text, head=head))


def stored_head(directory, bits, group_size, module="lm_head"):
    """The head by the formula of the format, in NumPy and float64: words of offset-binary codes, lowest first."""
    tensors = load_file(directory / "model.safetensors")
    words = tensors[f"{module}.weight_packed"].numpy().view(np.uint32)
    scale = tensors[f"{module}.weight_scale"].double().numpy()
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(words), -1).astype(np.float64) - 2 ** (bits - 1)
    return codes * np.repeat(scale, group_size, axis=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_logits_are_those_of_the_dequantized_head(tmp_path, family, tied):
    """Embedding scaling and logit caps (Gemma), other names (GPT-NeoX, OPT) and a vocabulary that divides by nothing."""
    source = save_tiny(tmp_path / "source", family, torch.bfloat16, vocab_size=97, tie_word_embeddings=tied)
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    apply(recipe(head=None), str(source), tmp_path / "plain", quiet=True)
    module = ON_DISK.get(family, "lm_head")
    weight = stored_head(tmp_path / "out", 8, 64, module)
    original = open_checkpoint(source)
    assert (f"{module}.weight" in original) is not tied
    name = f"{module}.weight" if not tied else next(n for n in original.names() if original.shape(n) == (97, 64))
    dense = original.tensor(name).double().numpy()
    assert 0 < np.abs(weight - dense).max() < np.abs(dense).max() / 127
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not ours.config.get_text_config().tie_word_embeddings
    with torch.no_grad():
        embedding = theirs.get_input_embeddings().weight.clone()
        theirs.get_output_embeddings().weight = torch.nn.Parameter(torch.from_numpy(weight).float())
        assert torch.equal(ours.get_input_embeddings().weight, embedding)
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
        ours.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert torch.equal(again(IDS).logits, ours(IDS).logits)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(f"{module}.weight_"))


@pytest.mark.parametrize("format", ["sparse24", "pack-quantized"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, "channel")])
def test_every_setting_rounds_to_nearest(tmp_path, format, bits, group_size):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe(f"{{bits: {bits}, group_size: {group_size}}}", format), str(source), tmp_path / "out", quiet=True)
    size = 64 if group_size == "channel" else group_size
    weight = stored_head(tmp_path / "out", bits, size)
    dense = open_checkpoint(source).tensor("lm_head.weight").double().numpy()
    scale = np.repeat(
        load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight_scale"].double().numpy(), size, 1
    )
    top = 2 ** (bits - 1)
    nearest = np.clip(np.round(dense / scale), -top, top - 1) * scale
    # a tie may round either way: compare distances, not codes
    assert np.allclose(np.abs(weight - dense), np.abs(nearest - dense), rtol=0, atol=1e-6)
    scheme = open_compressed(tmp_path / "out").modules["lm_head"]
    assert (scheme.bits, scheme.group_size, scheme.shape) == (bits, size, (96, 64))


def test_pieces_give_what_the_whole_gives(monkeypatch):
    weight = torch.randn(97, 64, generator=torch.Generator().manual_seed(0))
    scheme = head_pass.head_scheme(recipe().export.head, torch.bfloat16)
    whole = head_pass.quantize_head("lm_head", weight, scheme)
    error = head_pass.head_error(weight, whole)
    monkeypatch.setattr(head_pass, "ROWS", 10)
    pieces = head_pass.quantize_head("lm_head", weight, scheme)
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scale, pieces.scale)
    assert head_pass.head_error(weight, pieces) == pytest.approx(error, rel=1e-12)
    exact = ((weight.double() - pieces.dense(torch.float64)) ** 2).sum() / (weight.double() ** 2).sum()
    assert error == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize(("hidden", "asked", "works"), [(96, 64, "32"), (64, 128, "64"), (48, 64, "channel")])
def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does(tmp_path, hidden, asked, works):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, hidden_size=hidden)
    wish = recipe(f"{{bits: 8, group_size: {asked}}}", "sparse24", "passes.quantize.group_size=channel")
    with pytest.raises(RecipeError, match=f"lm_head has {hidden} inputs.*group size {asked}; group size {works} works"):
        make_plan(wish, str(source))
    apply(recipe(f"{{bits: 8, group_size: {works}}}"), str(source), tmp_path / "out", quiet=True)
    assert "lm_head" in open_compressed(tmp_path / "out").modules


@pytest.mark.parametrize("tied", [False, True])
def test_metrics_keep_blocks_and_head_apart(tmp_path, tied):
    """Bits per weight of the blocks are the same with and without a head; sizes add up to the bytes of the files."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=tied)
    result = apply(recipe(), str(source), tmp_path / "out", quiet=True)
    plain = apply(recipe(head=None), str(source), tmp_path / "plain", quiet=True)
    sizes, before = result.metrics["sizes"], plain.metrics["sizes"]
    dense, head = 96 * 64 * 2, 96 * 64 + 96 * 2
    assert sizes["head_bytes"] == head and sizes["dense_head_bytes"] == (0 if tied else dense)
    assert before["head_bytes"] == 0 and plain.metrics["head"] is None
    assert sizes["bits_per_weight"] == before["bits_per_weight"] == 3.5
    assert sizes["compressed_bytes"] == before["compressed_bytes"] + head - (0 if tied else dense)
    assert sizes["compressed_bytes"] == open_checkpoint(tmp_path / "out").nbytes()
    assert [layer["module"] for layer in result.metrics["layers"]] == [x["module"] for x in plain.metrics["layers"]]
    told = result.metrics["head"]
    assert (told["module"], told["bits"], told["group_size"], told["tied"]) == ("lm_head", 8, 64, tied)
    assert 0 < told["weight_error"] < 1e-4
    left = {entry["module"] for entry in result.metrics["dense_modules"]}
    assert "model.embed_tokens" in left and "lm_head" not in left
    planned = make_plan(recipe(), str(source))
    assert planned.estimate().output_bytes == sizes["compressed_bytes"]
    assert planned.to_json()["head"]["tied"] is tied
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "| output head | lm_head: 8-bit, 8.25 bits per weight" in card and "| bits per linear weight | 3.50 |" in card
    )


def test_float32_models_are_counted_in_what_is_written(tmp_path):
    """Dense bytes are float32 there, so a difference of totals would not be the bytes of the linears."""
    source = save_tiny(tmp_path / "source")
    sizes = apply(recipe(), str(source), tmp_path / "out", quiet=True).metrics["sizes"]
    assert sizes["bits_per_weight"] == 3.5 and sizes["head_bytes"] == 96 * 64 + 96 * 2


def test_inspection_and_report_give_the_head_a_row_of_its_own(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True)
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    totals = inspect(tmp_path / "out").totals()
    assert (totals["linears"], totals["compressed_linears"], totals["bits_per_weight"]) == (21, 21, 3.5)
    assert totals["outside"] == {"lm_head": {"bits": 8, "bits_per_weight": 8.25, "nbytes": 96 * 66}}
    page = report_on(tmp_path / "out").read_text()
    assert "3.50" in page and "8.25 in the output head" in page and "8-bit output head" in page
    assert '<th scope="row">output head</th><td>0 B</td><td>6.34 kB</td>' in page


def save_uneven(directory, **changes):
    """A tiny model two inputs of whose head are many times larger than the others, as in real ones; returns the head's weight."""
    model = tiny_model(**changes)
    with torch.no_grad():
        model.model.norm.weight[[3, 40]] = 30
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model.get_output_embeddings().weight.detach().double()


def lost_logits(directory, text, samples, length, weight):
    """||X (W - What)'||^2 / ||X W'||^2 of a 4-bit head in groups of 32, with the written model in transformers and in float64."""
    ids = tiny_tokenizer()(text.read_text(), return_tensors="pt").input_ids
    written = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        X = written.model(ids[0, : samples * length].reshape(samples, length)).last_hidden_state.flatten(0, 1).double()
    difference = torch.from_numpy(stored_head(directory, 4, 32)) - weight
    return float((X @ difference.T).square().sum() / (X @ weight.T).square().sum())


@pytest.mark.parametrize("tied", [False, True])
def test_gptq_loses_less_of_the_logits_than_rounding(tmp_path, tied):
    weight = save_uneven(tmp_path / "source", tie_word_embeddings=tied)
    lost = {}
    for method in ("gptq", "rtn"):
        wish = calibrated(tmp_path, f"{{bits: 4, group_size: 32, method: {method}}}")
        metrics = apply(wish, str(tmp_path / "source"), tmp_path / method, quiet=True).metrics
        lost[method] = lost_logits(tmp_path / method, tmp_path / "text.txt", 40, 32, weight)
        told = metrics["head"]["relative_error"]
        assert told is None if method == "rtn" else told == pytest.approx(lost[method], rel=0.02)
    assert lost["gptq"] < lost["rtn"] / 4
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert f"4.50 bits per weight, 0.0 MB, output error {lost['gptq']:.2f}"[:-1] in card


@pytest.mark.parametrize(
    ("head", "data_free", "calibrating"),
    [
        ("{bits: 4, group_size: 32}", "rtn", "gptq"),
        ("{bits: 8, group_size: 32}", "rtn", "rtn"),
        ("{bits: 8, group_size: 32, method: gptq}", "gptq", "gptq"),
        ("{bits: 4, group_size: 32, method: rtn}", "rtn", "rtn"),
    ],
)
def test_a_head_is_solved_where_text_is_read_anyway_or_when_asked(tmp_path, head, data_free, calibrating):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    plan = make_plan(recipe(head), str(source))
    assert plan.head.scheme.quantize == data_free and plan.needs_data is (data_free == "gptq")
    assert data_free in plan.head.describe()
    assert make_plan(calibrated(tmp_path, head), str(source)).head.scheme.quantize == calibrating


def test_a_head_that_needs_text_leaves_linears_that_need_none_as_they_were(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    text = [f"calibration.source=file:{tiny_text(tmp_path / 'text.txt')}", "calibration.samples=8"]
    wish = recipe("{bits: 4, group_size: 32, method: gptq}", "sparse24", *text, "calibration.sequence_length=32")
    metrics = apply(wish, str(source), tmp_path / "out", quiet=True).metrics
    apply(recipe(head=None), str(source), tmp_path / "plain", quiet=True)
    assert metrics["calibration"]["tokens"] == 256 and metrics["head"]["relative_error"] > 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items() if not name.startswith("lm_head"))


def test_a_head_whose_inputs_cannot_be_seen_is_refused(tmp_path, monkeypatch):
    """A model that multiplies with the head's weight itself never calls the head."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    from transformers import LlamaForCausalLM

    def forward(self, input_ids, use_cache=False):
        return self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state @ self.lm_head.weight.T

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(CheckpointError, match="export.head.method: rtn"):
        apply(calibrated(tmp_path), str(source), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("solved", [False, True])
@pytest.mark.parametrize("killed", ["write_part", "finish"])
def test_killed_and_resumed_is_byte_identical(tmp_path, monkeypatch, killed, solved):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True)
    wish = calibrated(tmp_path) if solved else recipe()
    apply(wish, str(source), tmp_path / "whole", quiet=True)
    original = getattr(run.CheckpointWriter, killed)

    def kill(self, *args, **keywords):
        if killed == "finish" or args[0] == run.OUTSIDE:
            raise KeyboardInterrupt
        original(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(run.CheckpointWriter, killed, kill)
        with pytest.raises(KeyboardInterrupt):
            apply(wish, str(source), tmp_path / "again", quiet=True)
    apply(wish, str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")


def test_nan_in_the_head_is_named(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"][90, 5] = float("nan")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match="lm_head: its dense weight holds NaN"):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("suffix", "how"),
    [("weight_scale", "nan"), ("weight_scale", "missing"), ("weight_packed", "rows"), ("weight_packed", "missing")],
)
def test_a_damaged_head_is_refused_by_name(tmp_path, suffix, how):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True)
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    file = tmp_path / "out" / "model.safetensors"
    state, name = load_file(file), f"lm_head.{suffix}"
    if how == "nan":
        state[name][3, 0] = float("nan")
    elif how == "rows":
        state[name] = state[name][:-1].contiguous()
    else:
        del state[name]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"lm_head"):
        open_compressed(tmp_path / "out").linear("lm_head")


# ------------------------------------------------------------------------------------------------------- export


def test_exporting_with_a_head_is_applying_with_one(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True)
    apply(recipe(), str(source), tmp_path / "whole", quiet=True)
    apply(recipe(head=None), str(source), tmp_path / "plain", quiet=True)
    wish = ["export", str(tmp_path / "plain"), "--format", "sparse24", "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*wish, "--head", "8"]) == 0
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    for name in ("config.json", "recipe.yaml", "README.md", "metrics.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "out" / name).read_text(), name
    assert load_recipe(tmp_path / "out" / "recipe.yaml").export.head is not None


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_solves_the_head_on_a_text(tmp_path, capsys, tied):
    weight = save_uneven(tmp_path / "source", tie_word_embeddings=tied)
    text = tiny_text(tmp_path / "text.txt", 128 * 512 + 9)
    apply(recipe(head=None), str(tmp_path / "source"), tmp_path / "plain", quiet=True)
    wish = [
        "export",
        str(tmp_path / "plain"),
        "--format",
        "sparse24",
        "--head",
        "4",
        "--head-group-size",
        "32",
        "--quiet",
    ]
    assert main([*wish, "--output", str(tmp_path / "rtn")]) == 0
    assert "with --calibration file:TEXT it is solved" in capsys.readouterr().out
    assert main([*wish, "--output", str(tmp_path / "gptq"), "--calibration", f"file:{text}"]) == 0
    assert "nearest" not in capsys.readouterr().out
    lost = {method: lost_logits(tmp_path / method, text, 128, 512, weight) for method in ("gptq", "rtn")}
    assert lost["gptq"] < lost["rtn"] / 4
    for method, error in (("gptq", pytest.approx(lost["gptq"], rel=0.1)), ("rtn", None)):  # the model ran in bfloat16
        assert json.loads((tmp_path / method / "metrics.json").read_text())["head"]["relative_error"] == error
        assert load_recipe(tmp_path / method / "recipe.yaml").export.head.method == method
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("gptq", "rtn"))
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("lm_head"))


def test_an_export_that_cannot_be_written_reads_no_text(tmp_path, capsys, monkeypatch):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe(), str(source), tmp_path / "once", quiet=True)
    monkeypatch.setattr("sparsify.compiler.convert.open_writer", None)
    text = tiny_text(tmp_path / "text.txt")
    wish = ["export", str(tmp_path / "once"), "--format", "sparse24", "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*wish, "--head", "4", "--calibration", f"file:{text}"]) == 1
    assert "lm_head is compressed already" in capsys.readouterr().err


def test_a_model_that_does_not_run_has_no_text_to_solve_its_head_on(tmp_path, capsys, monkeypatch):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe(head=None), str(source), tmp_path / "plain", quiet=True)

    def fails(directory, dtype):
        raise ValueError("no such quantization method")

    monkeypatch.setattr("sparsify.compiler.convert.open_writer", fails)
    text = tiny_text(tmp_path / "text.txt")
    wish = ["export", str(tmp_path / "plain"), "--format", "sparse24", "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*wish, "--head", "4", "--calibration", f"file:{text}"]) == 1
    assert "export it to sparse24 first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_exporting_a_dense_two_four_model_with_a_head(tmp_path):
    """A bias-free head of its own, and 16-bit values in the blocks."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        if ".layers." in name and tensor.dim() == 2:
            tensor.view(-1, 4)[:, 1:3] = 0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    arguments = ["--head", "4", "--head-group-size", "channel", "--quiet"]
    out = tmp_path / "out"
    assert main(["export", str(source), "--format", "sparse24", "--output", str(out), *arguments]) == 0
    opened = open_compressed(out)
    assert {s.bits for m, s in opened.modules.items() if m != "lm_head"} == {16}
    assert opened.modules["lm_head"].bits == 4 and opened.modules["lm_head"].group_size == 64
    assert "lm_head.weight" not in opened.other_names() and "model.embed_tokens.weight" in opened.other_names()


@pytest.mark.parametrize(
    ("format", "options", "says"),
    [
        ("dense", ["--head", "8"], "dense stores 16-bit weights"),
        ("sparse24", ["--head", "8", "--head-group-size", "128"], "group size 64 works"),
        ("sparse24", ["--head", "8", "--head-group-size", "48"], "the group size 32, 64, 128 or channel"),
        ("sparse24", ["--head-group-size", "64"], "add --head 8"),
        ("sparse24", ["--calibration", "self"], "add --head 4"),
        ("sparse24", ["--head", "4", "--calibration", "fil:x"], "'fil:x' is not one of self, file:PATH"),
        ("sparse24", ["--head", "4", "--calibration", "file:gone.txt"], "gone.txt does not exist"),
    ],
)
def test_what_an_export_cannot_do_says_what_it_can(tmp_path, capsys, format, options, says):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe(head=None), str(source), tmp_path / "plain", quiet=True)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "plain"), "--format", format, "--output", str(out), "--quiet", *options]) == 1
    assert says in capsys.readouterr().err and not out.exists()


def test_codes_of_a_head_are_never_quantized_again(tmp_path, capsys):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe(), str(source), tmp_path / "once", quiet=True)
    wish = ["export", str(tmp_path / "once"), "--format", "sparse24", "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*wish, "--head", "4"]) == 1
    assert "lm_head is compressed already (8 bits)" in capsys.readouterr().err
    assert main(wish) == 0  # and without the wish it is carried over
    assert np.array_equal(stored_head(tmp_path / "out", 8, 64), stored_head(tmp_path / "once", 8, 64))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_multiplied_out_for_software_that_needs_it(tmp_path, tied):
    """vLLM's kernel for CPUs cannot run an 8-bit head in pack-quantized."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=tied)
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    wish = ["export", str(tmp_path / "out"), "--format", "pack-quantized", "--output", str(tmp_path / "stock")]
    assert main([*wish, "--head", "16", "--quiet"]) == 0
    opened = open_compressed(tmp_path / "stock")
    assert len(opened.modules) == 21 and "lm_head" not in opened.modules
    assert opened.config["tie_word_embeddings"] is False and "lm_head" in opened.config["quantization_config"]["ignore"]
    expected = torch.from_numpy(stored_head(tmp_path / "out", 8, 64)).bfloat16()
    assert torch.equal(opened.tensor("lm_head.weight"), expected)


def test_vllm_finds_a_packed_head_by_its_name(tmp_path):
    """Its head is a ParallelLMHead, which the target "Linear" does not mean, also where all settings are the same."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe("{bits: 4, group_size: 32}", "pack-quantized"), str(source), tmp_path / "out", quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear", "lm_head"]]
    assert "lm_head" not in config["ignore"]


def test_nested_text_configurations_are_untied_too(tmp_path):
    """Models with a text part keep its settings one level down, and either level can tie."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=True)
    from sparsify.formats.writer import CheckpointWriter
    from sparsify.model.checkpoint import Checkpoint

    config = json.loads((source / "config.json").read_text())
    nested = {"model_type": "x", "tie_word_embeddings": True, "text_config": config}
    (source / "config.json").write_text(json.dumps(nested))
    weight = open_checkpoint(source).tensor("model.embed_tokens.weight")
    linear = head_pass.quantize_head("head.output", weight, head_pass.head_scheme(recipe().export.head, torch.bfloat16))
    writer = CheckpointWriter(tmp_path / "out", "sparse24", Checkpoint("here", source))
    writer.write_part("all", {"head.output": linear}, {"model.embed_tokens.weight": weight})
    written = json.loads((writer.finish() / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["text_config"]["tie_word_embeddings"] is False
