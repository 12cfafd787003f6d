"""The model of `sparsify bench roofline` against measurements: published ones of Marlin and Sparse-Marlin, and ours."""

import json

import pytest

from sparsify import cli
from sparsify.bench.roofline import DENSE, GPUS, INT4, KINDS, OURS, Gpu, pass_seconds, product_seconds, roofline, table
from sparsify.bench.shapes import ModelShape
from sparsify.errors import SparsifyError

LLAMA_2_7B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, tied=False)

# H100 SXM, 22 November 2026, CUDA graphs, weights from memory: microseconds of torch.nn.functional.linear in bfloat16, of Marlin
# (IST-DASLab/marlin) and of ours, both in groups of 128, for N, K, M.
MEASURED = {
    (28672, 4096, 1): (82.6, 30.5, 25.3),
    (28672, 4096, 16): (83.3, 32.2, 29.1),
    (28672, 4096, 64): (86.9, 48.5, 51.1),
    (28672, 4096, 128): (89.4, 88.5, 83.6),
    (8192, 28672, 1): (164.3, 51.8, 39.5),
    (8192, 28672, 16): (164.2, 53.5, 50.1),
    (8192, 28672, 64): (171.8, 89.9, 79.2),
    (8192, 28672, 128): (180.6, 161.2, 146.8),
    (4096, 4096, 1): (15.6, 10.8, 7.3),
    (4096, 4096, 16): (16.0, 11.0, 8.7),
}


def speedup(gpu: Gpu, kind: str, m: int, n: int, k: int) -> float:
    return product_seconds(gpu, DENSE, m, n, k, 128) / product_seconds(gpu, kind, m, n, k, 128)


@pytest.mark.parametrize("m", [1, 16, 32])
def test_marlin_on_an_a10(m: int) -> None:
    """README of IST-DASLab/marlin: 3.87x, the most that groups of 128 allow, on a large matrix up to batches of 16 to 32."""
    assert speedup(GPUS["a10"], INT4, m, 73728, 18432) == pytest.approx(3.87, rel=0.05)


@pytest.mark.parametrize(("m", "published"), [(1, 5.3), (16, 5.3), (32, 5.3), (1024, 2.0)])
def test_sparse_marlin_on_a_3090(m: int, published: float) -> None:
    """README of IST-DASLab/Sparse-Marlin: about 5.3x up to batches of 32, and 2x with many rows."""
    assert speedup(GPUS["3090"], OURS, m, 36864, 18432) == pytest.approx(published, rel=0.15)


def test_marlin_in_vllm() -> None:
    """arXiv 2408.11743: up to 2.8x in vLLM; 3.3x for Sparse-Marlin. The first fitted STEP_SECONDS, the second did not."""
    a10 = GPUS["a10"]
    step = {kind: pass_seconds(a10, kind, LLAMA_2_7B, 1, 1, 128, 128) for kind in KINDS}
    assert step[DENSE] / step[INT4] == pytest.approx(2.8, rel=0.05)
    assert step[DENSE] / step[OURS] == pytest.approx(3.3, rel=0.05)


def test_our_measurements_on_an_h100() -> None:
    off = {kind: [] for kind in KINDS}
    for (n, k, m), microseconds in MEASURED.items():
        for kind, group, measured in zip(KINDS, (1, 128, 128), microseconds, strict=True):
            estimated = product_seconds(GPUS["h100"], kind, m, n, k, group) * 1e6
            off[kind].append(abs(estimated / measured - 1))
    for kind, errors in off.items():
        assert max(errors) < 0.25 and sum(errors) / len(errors) < 0.12, (kind, errors)


def test_large_products_of_ours_are_dense_ones_on_hopper() -> None:
    h100, shape = GPUS["h100"], (28672, 4096)
    dense, ours = (product_seconds(h100, kind, 4096, *shape, 64) for kind in (DENSE, OURS))
    written = 28672 * 4096 * (2 + 3.25 / 8) / h100.bandwidth
    assert dense + written < ours < dense + 1.5 * written
    assert product_seconds(GPUS["a100"], OURS, 4096, *shape, 64) < product_seconds(
        GPUS["a100"], DENSE, 4096, *shape, 64
    )


def test_what_must_hold_on_every_gpu() -> None:
    for name in GPUS:
        rows = roofline(name, "llama-3.1-8b").rows
        alone, *_ = rows
        assert alone.ratios[DENSE] == 1 < alone.ratios[INT4] < alone.ratios[OURS] < 16 / 3
        for kind in KINDS:
            decode = [row.seconds[kind] for row in rows if row.what == "decode"]
            assert decode == sorted(decode), "more sequences take longer"
            faster = [row.seconds[kind] / row.tokens for row in rows if row.what == "decode"]
            assert faster == sorted(faster, reverse=True), "and less per token"
        assert rows[-1].what == "prompt" and rows[-1].tokens == 2048


def test_more_context_costs() -> None:
    short, long = (roofline("a100", "llama-3.1-8b", [16], context).rows[0].seconds for context in (1024, 32768))
    cache = 16 * (32768 - 1024) * 2 * 8 * 128 * 2 * 32 / GPUS["a100"].bandwidth
    assert all(long[kind] - short[kind] > cache for kind in KINDS)


def test_refused() -> None:
    with pytest.raises(SparsifyError, match="--gpu h200 is unknown; choose from a100"):
        roofline("h200", "llama-3.1-8b")
    with pytest.raises(SparsifyError, match="positive"):
        roofline("a100", "llama-3.1-8b", batches=[0])


def test_command_says_that_it_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "roofline", "--gpu", "l40s", "--model", "llama-3.1-8b", "--batch", "1,32"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "ESTIMATE, not measured" in out and "L40S" in out
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"] is True and [row["batch"] for row in found["rows"]] == [1, 32, 1]
    assert found["rows"][0]["ratios"][OURS] > 2
    assert table(roofline("l40s", "smollm2-135m")).row_count == 7
