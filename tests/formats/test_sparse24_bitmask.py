"""sparse-24-bitmask: what compressed-tensors 0.12.2 wrote is read to the bit.

Its wheel cannot stand beside the current one: where it lies in a folder (SPARSIFY_ORACLE) it packs what is read here
(pip download --no-deps --dest FOLDER compressed-tensors==0.12.2), else a writer of a few lines, made from the layout, does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from tests.helpers.bitmask import checkpoint, expected, given, packed

FORMAT = get_format("sparse-24-bitmask")
WHEEL = "compressed_tensors-0.12.2-py3-none-any.whl"
N, K = 24, 64
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"kind": "none", "dtype": torch.bfloat16},
    "float16": {"kind": "none", "dtype": torch.float16},
    "int8 channel": {"kind": "int8", "dtype": torch.bfloat16, "scales": N},
    "int8 tensor": {"kind": "int8", "dtype": torch.float16, "scales": 1},
    "float8 channel": {"kind": "float8", "dtype": torch.bfloat16, "scales": N},
    "float8 tensor": {"kind": "float8", "dtype": torch.bfloat16, "scales": 1},
    "float8, float32 scales": {"kind": "float8", "dtype": torch.float32, "scales": N},
}


def scheme_of(kind: str) -> ModuleScheme:
    return ModuleScheme(8 if kind == "int8" else 16, K, "2:4", (N, K))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read(name: str) -> None:
    kind = KINDS[name]["kind"]
    tensors = given(**KINDS[name])
    linear = FORMAT.decode("m", packed(tensors, kind), scheme_of(kind))
    exact = expected(tensors, kind)
    rounded = exact if kind == "int8" else exact.to(linear.dtype).float()
    assert torch.equal(linear.dense(torch.float32), rounded)
    assert (linear.bits, linear.pattern) == (8 if kind == "int8" else 16, "2:4")


def test_what_the_old_wheel_packed_is_read(tmp_path: Path) -> None:
    wheel = Path(os.environ.get("SPARSIFY_ORACLE", "")) / WHEEL
    if not wheel.is_file():
        pytest.skip(f"no {WHEEL} in the folder that SPARSIFY_ORACLE names; pip download --no-deps gets it")
    arguments: list[Any] = []
    for i, kind in enumerate(KINDS.values()):
        save_file(given(**kind), tmp_path / f"given{i}")
        arguments += [tmp_path / f"given{i}", kind["kind"], tmp_path / f"packed{i}"]
    program = Path(__file__).with_name("bitmask_oracle.py")
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    subprocess.run([sys.executable, str(program), *map(str, arguments)], env=environment, check=True)
    for i, kind in enumerate(KINDS.values()):
        tensors = load_file(tmp_path / f"packed{i}")
        weight = tensors.pop("expected")
        linear = FORMAT.decode("m", tensors, scheme_of(kind["kind"]))
        if kind["kind"] == "int8":  # the wheel multiplies in the type of the scales, which is rounding once
            assert torch.equal(linear.dense(kind["dtype"]).float(), weight), kind
        else:
            assert torch.equal(linear.dense(torch.float32), weight.to(linear.dtype).float()), kind


@pytest.mark.parametrize(
    ("name", "suffix", "change", "says"),
    [
        ("bfloat16", "bitmask", lambda t: t | 7, "expected two of every four bits"),
        ("bfloat16", "bitmask", lambda t: t[:, 1:], "expected uint8 [24, 8]"),
        ("bfloat16", "compressed", lambda t: t.float(), "expected bfloat16 or float16 [24, 32]"),
        ("bfloat16", "compressed", lambda t: t * float("inf"), "NaN or Inf"),
        ("bfloat16", "shape", lambda t: t + 1, "expected [24, 64], found [25, 65]"),
        ("bfloat16", "shape", lambda t: None, "expected [24, 64], found nothing"),
        ("int8 channel", "compressed", lambda t: t.bfloat16(), "expected int8 [24, 32]"),
        ("int8 channel", "weight_scale", lambda t: t[1:], "expected bfloat16 or float16 [24, 1]"),
        ("float8 tensor", "compressed", lambda t: t.bfloat16(), "expected float8_e4m3fn [24, 32]"),
        ("float8 tensor", "weight_scale", lambda t: t * float("nan"), "NaN or Inf"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(
    name: str, suffix: str, change: Callable[[Tensor], Tensor | None], says: str
) -> None:
    kind = KINDS[name]["kind"]
    tensors = packed(given(**KINDS[name]), kind)
    changed = change(tensors.pop(suffix))
    tensors |= {} if changed is None else {suffix: changed}
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.up", tensors, scheme_of(kind))
    assert f"model.layers.0.up.{suffix}: " in str(caught.value) and says in str(caught.value)


def test_a_zero_point_is_refused_unless_it_is_zero() -> None:
    tensors = packed(given(**KINDS["int8 channel"]), "int8")
    zero = torch.zeros(N, 1, dtype=torch.int8)
    FORMAT.decode("m", {**tensors, "weight_zero_point": zero}, scheme_of("int8"))
    with pytest.raises(CheckpointError, match="m.weight_zero_point: expected symmetric codes"):
        FORMAT.decode("m", {**tensors, "weight_zero_point": zero + 1}, scheme_of("int8"))


@pytest.mark.parametrize("kind", ["none", "int8", "float8"])
def test_a_checkpoint_is_inspected_and_exported(llama: Any, tmp_path: Path, kind: str) -> None:
    meant = checkpoint(llama(), tmp_path / "old", kind)
    found = inspect(tmp_path / "old", quiet=True)
    totals = found.totals()
    assert found.format == "sparse-24-bitmask"
    assert totals["compressed_linears"] == totals["two_four_linears"] == len(meant)
    sparse = open_compressed(export(tmp_path / "old", "sparse24", tmp_path / "sparse24", quiet=True))
    dense = open_checkpoint(export(tmp_path / "old", "dense", tmp_path / "dense", quiet=True))
    assert "quantization_config" not in dense.config and "sparsity_config" not in str(sparse.config)
    assert {scheme.bits for scheme in sparse.modules.values()} == {8 if kind == "int8" else 16}
    for name, weight in meant.items():
        assert torch.equal(dense.tensor(name), weight.to(torch.bfloat16)), name
        assert torch.equal(sparse.linear(name.removesuffix(".weight")).dense(torch.bfloat16), dense.tensor(name))


def refused(directory: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> str:
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"], tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        open_compressed(directory)
    return str(caught.value)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "edit", "says"),
    [
        ("none", lambda c, t: c["sparsity_config"].update(ignore=[UP]), f"{UP} has a bitmask, but config.json says"),
        (
            "none",
            lambda c, t: c["sparsity_config"].update(sparsity_structure="unstructured"),
            "structure 2:4, found 'unst",
        ),
        (
            "none",
            lambda c, t: c["sparsity_config"].update(format="sparse-bitmask"),
            "sparse-bitmask, which sparsify cannot",
        ),
        ("none", lambda c, t: t.pop(f"{UP}.compressed"), f"{UP}.compressed: expected a matrix, found nothing"),
        (
            "int8",
            lambda c, t: t.pop(f"{UP}.weight_scale"),
            f"{UP}.weight_scale: config.json says quantized, found none",
        ),
        ("int8", lambda c, t: c.update(ignore=[UP]), f"{UP}.weight_scale: config.json says not quantized, found one"),
        ("int8", lambda c, t: t.pop(f"{UP}.bitmask"), f"{UP}.weight_scale: expected beside a bitmask"),
        ("int8", lambda c, t: c["config_groups"]["group_0"]["weights"].update(num_bits=4), "expected symmetric 8-bit"),
        ("int8", lambda c, t: c.update(format="pack-quantized"), "is in sparse-24-bitmask beside pack-quantized"),
    ],
)
def test_config_and_tensors_that_disagree_are_refused(
    llama: Any, tmp_path: Path, kind: str, edit: Callable[[dict[str, Any], dict[str, Tensor]], Any], says: str
) -> None:
    checkpoint(llama(), tmp_path / "old", kind)
    assert says in refused(tmp_path / "old", edit)
