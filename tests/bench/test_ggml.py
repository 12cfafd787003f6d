"""llama.cpp's product: finding ggml's libraries and choosing one, and, where they are, its arithmetic against float64."""

import ctypes
import functools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparsify.bench import ggml
from sparsify.bench.baselines import error_of, llama_blocks, llama_dense, llama_linear
from sparsify.bench.ggml import FORMATS, Ggml, Variant, Weight, base_library, find, level_of, suitable
from sparsify.bench.missing import PeerMissing
from sparsify.processor import FORCE, LEVELS

KINDS = list(FORMATS)


def variant(name: str, level: str | None, score: int = 1) -> Variant:
    return Variant(name, Path(f"libggml-cpu-{name}.so"), level, score)


# --------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("features", "level"),
    [
        ("", "portable"),
        ("sse3 ssse3", None),
        ("sse3 ssse3 avx", None),
        ("ssse3 avx f16c fma avx2 bmi2", "avx2"),
        ("ssse3 avx f16c fma avx2 bmi2 avx_vnni", "avxvnni"),
        ("ssse3 avx avx2 avx512", "avx512"),
        ("ssse3 avx avx2 avx512 avx512_vnni", None),
        ("ssse3 avx avx2 avx512 avx512_vbmi avx512_vnni", None),
        ("ssse3 avx avx2 avx512 avx512_vnni avx512_bf16", "avx512bf16"),
        ("ssse3 avx avx2 avx512 avx512_vbmi avx512_vnni avx512_bf16 amx_int8", "amx"),
    ],
)
def test_level_of_a_library(features: str, level: str | None) -> None:
    library = SimpleNamespace(**{f"ggml_cpu_has_{name}": lambda: 1 for name in features.split()})
    library.ggml_cpu_has_neon = lambda: 0
    assert level_of(library) == level  # type: ignore[arg-type]


def test_the_library_of_the_forced_level_is_taken() -> None:
    found = [
        variant("sapphirerapids", "amx"), variant("zen4", "avx512bf16"), variant("icelake", None),
        variant("skylakex", "avx512"), variant("haswell", "avx2"), variant("x64", "portable"),
    ]  # fmt: skip
    assert suitable(found, None) == found
    for forced, name in (("amx", "sapphirerapids"), ("avx512", "skylakex"), ("avx2", "haswell"), ("portable", "x64")):
        assert [one.name for one in suitable(found, forced)] == [name]
    with pytest.raises(PeerMissing, match=r"avxvnni, and .* haswell \(avx2\).*GGML_CPU_ALL_VARIANTS") as error:
        suitable(found, "avxvnni")
    assert error.value.why == "none for avxvnni"
    with pytest.raises(PeerMissing, match="none of ggml's libraries"):
        suitable([], None)
    assert [one.label for one in found[1:3]] == ["zen4 (avx512bf16)", "icelake"]


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    with pytest.raises(PeerMissing, match="pip install llama-cpp-python") as error:
        base_library(None)
    assert error.value.why == "not installed"
    with pytest.raises(PeerMissing, match="no libggml-base there") as error:
        base_library(str(tmp_path))
    assert error.value.why == "not in its folder"
    package = tmp_path / "llama_cpp"
    for folder in (package / "lib", tmp_path / "build" / "bin"):
        folder.mkdir(parents=True)
        (folder / "libggml-base.so.0.1").write_text("")
    assert base_library(str(tmp_path)) == tmp_path / "build" / "bin" / "libggml-base.so.0.1"
    monkeypatch.setattr(ggml, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(package)]))
    assert base_library(None) == package / "lib" / "libggml-base.so.0.1"


def test_what_does_not_load_is_no_candidate(tmp_path: Path) -> None:
    (tmp_path / "libggml-base.so").write_text("no library")
    with pytest.raises(OSError, match=r"libggml-base\.so"):
        find(None, str(tmp_path))


def test_a_trial_that_dies_says_so(tmp_path: Path) -> None:
    """Whatever is wrong with a library, it ends another process."""
    libc = Path(
        next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)
    )
    with pytest.raises(PeerMissing, match=r"in a process of its own ended by status 1: .*ggml_init") as error:
        ggml._try_out(libc, libc)
    assert error.value.why == "its trial fails"


# ----------------------------------------------------------------------------------------------------- the real ones


def test_one_that_fails_its_trial_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [variant("sapphirerapids", "amx"), variant("cooperlake", "avx512bf16")]
    broken = {"libggml-cpu-sapphirerapids.so"}

    def try_out(base: Path, cpu: Path) -> None:
        if cpu.name in broken:
            raise PeerMissing("its trial fails", f"{cpu.name} ended by signal 4")

    monkeypatch.setattr(ggml, "base_library", lambda folder: Path("libggml-base.so"))
    monkeypatch.setattr(ggml, "variants", lambda base: found)
    monkeypatch.setattr(ggml, "_try_out", try_out)
    assert find(None, None)[1].name == "cooperlake"
    with pytest.raises(PeerMissing, match="sapphirerapids.so ended by signal 4"):
        find("amx", None)
    broken.add("libggml-cpu-cooperlake.so")
    with pytest.raises(PeerMissing, match="sapphirerapids.so ended by signal 4"):
        find(None, None)


@functools.cache
def found(level: str | None) -> tuple[Path, Variant] | str:
    try:
        return find(level, os.environ.get(ggml.VARIABLE))
    except PeerMissing as error:
        return str(error)


def library(level: str | None, threads: int) -> Ggml:
    one = found(level)
    if isinstance(one, str):
        pytest.skip(f"llama.cpp: {one}")
    return Ggml(one[0], one[1].path, threads)


@pytest.mark.parametrize("level", [None, *LEVELS])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weights(kind: str, level: str | None) -> None:
    """Within what rounding activations to 8 bits in blocks of 32, and scales and sums to float16, can change."""
    ggml_here = library(level, threads=2)
    n, k = 96, 256
    packed = llama_blocks(ggml_here, kind, n, k, seed=0)
    dense = llama_dense(packed, kind, k)
    weight = Weight(ggml_here, kind, n, k, packed.data_ptr())
    for m in (1, 2, 5, 8, 33):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        y = torch.full((m, n), float("nan"))
        weight.multiply(x.data_ptr(), y.data_ptr(), m)
        exact = x.double() @ dense.t()
        allowed = rounding_bound(x.double(), dense, kind)
        assert ((y - exact).abs() <= allowed).all(), ((y - exact).abs() / allowed).max()
        assert (y - exact).abs().max() > 0  # it does round
        ggml_here.rest()


def rounding_bound(x: Tensor, dense: Tensor, kind: str) -> Tensor:
    """The most that a product can differ: half a step of a block's largest activation over 127 for each of its weights;
    2^-10 of each weight's or minimum's product for the float16 of a scale and of a sum; 2^-16 for sums in float32."""
    m, k = x.shape
    blocks = x.view(m, k // 32, 32)
    step = (blocks.abs().amax(-1, keepdim=True) / 127).expand_as(blocks).reshape(m, k)
    half = (step * (0.5 + 2.0**-10 * 127)) @ dense.abs().t()
    if kind == "q4_0":
        return half + 2.0**-16 * (x.abs() @ dense.abs().t())
    # scale x codes and minimum are added apart: each is at most what the block's range and least weight are
    parts = dense.view(-1, k // 32, 32)
    least, largest = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    apart = (largest - least + least.abs()).expand_as(parts).reshape(-1, k)
    return (step * (0.5 + 2.0**-10 * 127)) @ apart.t() + 2.0**-10 * (x.abs() @ apart.t())


@pytest.mark.parametrize("kind", KINDS)
def test_what_ggml_packs_is_near_what_was_given(kind: str) -> None:
    """Our reading of its blocks against the numbers that it packed: nothing is further off than a step."""
    ggml_here = library(None, threads=1)
    dense = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    packed = torch.empty(7, ggml.packed_bytes(kind, 1, 96), dtype=torch.uint8)
    ggml_here.quantize(kind, dense.data_ptr(), packed.data_ptr(), 7, 96)
    blocks = dense.view(7, 3, 32)
    # 16 codes over the range, or 8 on the side of the largest magnitude
    width = blocks.amax(-1) - blocks.amin(-1) if kind == "q4_1" else 2 * blocks.abs().amax(-1)
    off = (llama_dense(packed, kind, 96).view(7, 3, 32) - blocks).abs().amax(-1)
    assert (off <= width / 15).all()
    assert 0 < off.max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_contestant(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    library(None, threads=1)
    baseline = llama_linear(64, 128, copies=2, kind=kind)
    assert baseline.name == f"llama.cpp {kind.upper()}" and baseline.detail
    assert baseline.nbytes == 64 * 128 // 32 * FORMATS[kind][1]
    for m in (1, 9, 1):
        x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m))
        assert 0 < error_of(baseline, x) <= baseline.tolerance
        first = baseline.calls[0](x).clone()
        assert torch.equal(first, baseline.calls[1](x))
    assert baseline.rest is not None
    baseline.rest()
    with pytest.raises(PeerMissing, match="do not divide 100 inputs"):
        llama_linear(64, 100, copies=1, kind=kind)


def test_arrays_must_be_aligned() -> None:
    ggml_here = library(None, threads=1)
    packed = llama_blocks(ggml_here, "q4_1", 32, 32, seed=0)
    weight = Weight(ggml_here, "q4_1", 32, 32, packed.data_ptr())
    memory = ctypes.create_string_buffer(1024)
    odd = ctypes.addressof(memory) // 32 * 32 + 4
    with pytest.raises(ValueError, match="aligned to 32 bytes"):
        weight.multiply(odd, odd, 1)
