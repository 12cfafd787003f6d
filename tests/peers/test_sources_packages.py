"""Sources in the formats of AutoGPTQ, GPTQModel and AutoAWQ: packed by the packages themselves, and equal to what they read back.

Each package has an environment of its own, .venv-autogptq, .venv-gptqmodel and .venv-autoawq in the folder that SPARSIFY_PEERS
names, by default the repository's. A missing one is skipped by name.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.formats.foreign import open_dense
from tests.helpers.foreign import quantized_checkpoint, rounded_groups

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("source_program.py")


def python_of(package: str) -> Path:
    python = Path(os.environ.get("SPARSIFY_PEERS", ROOT)) / f".venv-{package}" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment .venv-{package} with {package}")
    return python


KINDS: list[tuple[str, int, bool, bool, int]] = [
    # package, bits, symmetric, activation order, version of the zero points
    *(
        ("autogptq", bits, symmetric, order, 1)
        for bits in (2, 3, 4, 8)
        for symmetric, order in ((True, True), (False, False))
    ),
    *(("gptqmodel", bits, False, True, version) for bits in (2, 3, 4, 8) for version in (1, 2)),
    ("gptqmodel", 4, True, False, 1),
    ("autoawq", 4, False, False, 1),
]


@pytest.mark.parametrize("package, bits, symmetric, order, version", KINDS)
def test_weights_are_those_that_the_package_reads(
    package: str, bits: int, symmetric: bool, order: bool, version: int, tmp_path: Path
) -> None:
    python = python_of(package)
    low = 1 if package == "autogptq" else 0  # AutoGPTQ overwrites a word with a zero point of 0
    done: dict[int, dict[str, Tensor]] = {}

    def write(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        if k not in done:  # one matrix for each number of inputs: starting a package takes seconds
            group = np.arange(k) // 32
            group = group[np.random.default_rng(0).permutation(k)] if order else group
            codes, scale, zero = rounded_groups(weight, bits, group, symmetric, low)
            given = {
                "weight": torch.from_numpy((codes - zero[:, group]) * scale[:, group]).float(),
                "scales": torch.from_numpy(scale).float(),
                "zeros": torch.from_numpy(zero).float(),
                "g_idx": torch.from_numpy(group).int(),
            }
            save_file(given, tmp_path / "given")
            arguments = [package, tmp_path / "given", tmp_path / "result", str(bits), str(version)]
            environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}
            environment.pop("PYTHONPATH", None)
            run = subprocess.run([python, PROGRAM, *arguments], env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-3000:]
            done[k] = load_file(tmp_path / "result")
            assert torch.equal(done[k]["dequantized"], given["weight"]) or package == "autogptq"
        tensors = {name: tensor.clone() for name, tensor in done[k].items()}
        return tensors, tensors.pop("dequantized")

    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "desc_act": order,
    }
    config |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    if package == "gptqmodel":
        config["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    if package == "autoawq":
        config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    # every matrix has the outputs of one shape, so that one packed matrix serves all of its number of inputs
    sizes = {"num_key_value_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    expected = quantized_checkpoint(tmp_path / "m", config, write, **sizes)
    opened = open_dense(tmp_path / "m")
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        tensors = {suffix: opened.stored.tensor(f"{module}.{suffix}") for suffix in opened.modules[module].stored}
        found = opened.modules[module].decode(module, tensors)
        # AutoGPTQ has no function that dequantizes: its product with the unit matrix adds zeros
        assert torch.equal(found, weight) or (
            package == "autogptq" and torch.allclose(found, weight, rtol=1e-6, atol=0)
        ), name
