"""torchrun with two gloo processes gives what one process gives, up to the order of sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsify.compiler.calibrate as calibrate
from sparsify.compiler.apply import apply
from sparsify.distributed import join, share, sum_symmetric_over_all
from sparsify.errors import SparsifyError
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from tests.helpers.ranks import in_ranks
from tests.helpers.tiny import save_tiny, tiny_text

CALIBRATED = """
version: 1
calibration: {{source: "file:{text}", samples: {samples}, sequence_length: 32}}
solver: {{error_propagation: 0.4}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
ALL = (
    CALIBRATED
    + "  - tune: {{epochs: 2, batch_size: 3, holdout: 0.2}}\n"
    + "  - distill: {{tokens: 512, samples: 16, sequence_length: 32, batch_size: 4, precision: float32}}\n"
    + "export: {{head: {{bits: 4, group_size: 32}}}}\n"
)


def torchrun(recipe: Path, model: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "sparsify", "apply", str(recipe), "--model", str(model), "--output", str(output), *more,
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def compare(one, two):
    """The first linears have the same codes but for ties. One that falls the other way moves all that comes after it, so
    further on it is the errors that must be equal."""
    assert one.modules == two.modules and one.modules
    for module in one.modules:
        a, b = one.linear(module), two.linear(module)
        assert is_two_four(b.codes) or module == "lm_head"
        if ".0." in module and any(name in module for name in ("q_proj", "k_proj", "v_proj")):
            assert (a.codes == b.codes).float().mean() > 0.99, module


def test_two_processes_come_to_what_one_comes_to(tmp_path, monkeypatch):
    """Calibration, block tuning and distillation (FSDP2), in one recipe. In float32: whether tuning helps a block is decided
    on held-out text, and in bfloat16 rounding decides it here."""
    monkeypatch.setenv("SPARSIFY_COMPUTE", "float32")
    source, recipe = save_tiny(tmp_path / "source"), tmp_path / "recipe.yaml"
    recipe.write_text(ALL.format(text=tiny_text(tmp_path / "text.txt"), samples=65))  # not a multiple of two
    one = apply(parse_recipe(recipe.read_text()), str(source), tmp_path / "one", quiet=True).metrics
    ran = torchrun(recipe, source, tmp_path / "two", "--json")
    assert ran.returncode == 0, ran.stderr
    two = json.loads(ran.stdout)  # one process speaks
    assert two["run"]["processes"] == 2 and not list(tmp_path.glob("*.partial"))
    compare(open_compressed(tmp_path / "one"), open_compressed(tmp_path / "two"))
    for a, b in zip(one["layers"], two["layers"], strict=True):
        assert b["relative_error"] == pytest.approx(a["relative_error"], rel=0.05), a["module"]
    assert two["head"]["relative_error"] == pytest.approx(one["head"]["relative_error"], rel=0.05)
    for a, b in zip(one["tuning"], two["tuning"], strict=True):
        assert a["steps"] == b["steps"] == 36
        assert all(b[when] == pytest.approx(a[when], rel=0.05) for when in ("before", "after"))
    (a,), (b,) = one["training"], two["training"]
    for when in ("first", "last"):
        for name, value in a[when].items():
            assert b[when][name] == pytest.approx(value, rel=0.05), (when, name)


def test_too_few_samples_to_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SparsifyError, match="1 calibration samples cannot be shared by 2 processes"):
        calibrate.own_rows(torch.zeros(1, 8, dtype=torch.long))


def test_shares_cover_everything_once(monkeypatch):
    for world in (1, 2, 3, 5):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        rows, parts = [], []
        for number in range(world):
            monkeypatch.setenv("RANK", str(number))
            rows += calibrate.own_rows(torch.arange(11)[:, None])[:, 0].tolist()
            parts += list(range(11))[share(11)]
        assert sorted(rows) == parts == list(range(11))


def of_each(k: int) -> list[torch.Tensor]:
    """Whole numbers, whose sums are exact: symmetric [k, k], one for each of two processes."""
    drawn = [torch.randint(-9, 9, (k, k), generator=torch.Generator().manual_seed(n)).float() for n in range(2)]
    return [matrix + matrix.t() for matrix in drawn]


def add_up(sizes: list[int], folder: Path) -> None:
    join()
    rank = int(os.environ["RANK"])
    summed = {str(k): sum_symmetric_over_all(of_each(k)[rank]) for k in sizes}
    torch.save(summed, folder / f"{rank}.pt")


def test_symmetric_matrices_are_added_up(tmp_path):
    sizes = [3, 128, 130, 1024, 1300]  # more than one strip and step, and what does not fill them
    ended = in_ranks(tmp_path, add_up, sizes, tmp_path)
    assert ended.codes == [0, 0], ended.said
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(found[str(k)], sum(of_each(k))) for k in sizes)
