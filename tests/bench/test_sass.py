"""What is read out of the compiler's words and of machine code; nvcc itself is run by `sparsify kernels inspect`."""

import shutil
from pathlib import Path

import pytest

from sparsify.bench import sass
from sparsify.bench.sass import LIMITS, Resources, config_of, count_instructions, occupancy, read
from sparsify.errors import SparsifyError
from sparsify.native import build_cuda

NAMES = [
    "1x32 outputs, 1x8 tokens a warp; warps 1x1x8; 4 stages",
    "2x32 outputs, 8x8 tokens a warp; warps 4x1x1; 4 stages",
]
SYMBOL = "_ZN12_GLOBAL__N_113linear_kernelI{type}NS_6ConfigILi{numbers}EEELb{flag}EEEvNS_9ArgumentsE"
FIRST = SYMBOL.format(type="6__half", numbers="1ELi1ELi1ELi1ELi8ELi4", flag=0)
SECOND = SYMBOL.format(type="13__nv_bfloat16", numbers="2ELi8ELi4ELi1ELi1ELi4", flag=1)
SAID = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN12_GLOBAL__N_111pack_kernelENS_5ShapeEPKj' for 'sm_90'
ptxas info    : Function properties for _ZN12_GLOBAL__N_111pack_kernelENS_5ShapeEPKj
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function '{FIRST}' for 'sm_90'
ptxas info    : Function properties for {FIRST}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 79 registers, used 1 barriers
ptxas info    : Compiling entry function '{SECOND}' for 'sm_90'
ptxas info    : Function properties for {SECOND}
    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
"""
CODE = f"""
	code for sm_90
		Function : {FIRST}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x40 ;                              /* 0x0000000000008947 */
        /*0020*/                   HMMA.SP.16832.F32 R8, R4, R12, R8, R3, 0x0 ;   /* 0x0 */
        /*0030*/                   HMMA.16816.F32 R8, R4, R12, R8 ;        /* 0x0 */
		Function : {SECOND}
        /*0000*/                   HMMA.SP.16832.F32.BF16 R8, R4, R12, R8, R3, 0x1 ;   /* 0x0 */
        /*0010*/              @P1  EXIT ;                                  /* 0x0 */
"""


class Known(Resources):
    """Of two tile shapes."""

    def __init__(self) -> None:
        self.names = NAMES

    def threads(self, config: int) -> int:
        return (256, 128)[config]

    def shared(self, config: int, group32: bool) -> int:
        return 50000 + 10000 * group32


def test_what_the_compiler_says() -> None:
    first, second = read(90, SAID, CODE, Known())
    assert (first.config, first.dtype, first.group32, first.registers, first.spilled) == (0, "float16", False, 79, 0)
    assert (second.config, second.dtype, second.group32, second.registers, second.spilled) == (
        1,
        "bfloat16",
        True,
        255,
        36,
    )
    assert (first.instructions, first.sparse_mma) == (4, 1) and (second.instructions, second.sparse_mma) == (2, 1)
    # 256 threads of 80 registers: 3 blocks; 228 KiB of shared memory hold 4 of 51024 bytes
    assert (first.blocks, first.warps) == (3, 24 / 64) and (second.blocks, second.warps) == (2, 8 / 64)
    without = list(read(90, SAID, None, Known()))
    assert [i.registers for i in without] == [79, 255] and without[0].instructions is None


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        (80, 128, 32, 1000, 16),  # warps: 64 / 4
        (86, 128, 32, 1000, 12),  # 48 / 4
        (86, 32, 32, 0, 16),  # blocks
        (90, 256, 128, 1000, 2),  # registers: 65536 / (128 x 256)
        (90, 256, 129, 1000, 1),  # which are given out in pieces
        (90, 128, 32, 75000, 3),  # shared memory: 233472 / 76024
        (86, 128, 32, 99 * 1024, 1),
        (86, 128, 32, 99 * 1024 + 1, 0),  # more than a block may have
    ],
)
def test_occupancy(arch: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert occupancy(arch, threads, registers, shared) == (blocks, blocks * threads / 32 / LIMITS[arch].warps)


def test_tile_shapes_are_known_by_their_arguments() -> None:
    assert config_of([2, 8, 4, 1, 1, 4], NAMES) == 1 and config_of([1, 1, 1, 1, 8, 4, 99], NAMES) == 0
    with pytest.raises(ValueError):
        config_of([3, 1, 1, 1, 8, 4], NAMES)
    assert count_instructions("nothing") == {}


def test_a_table_shows_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "Resources", Known)
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: build_cuda.Nvcc(("nvcc",), "13.0.88"))
    monkeypatch.setattr(sass, "compile_for", lambda nvcc, dumper, arch: (SAID, None))
    monkeypatch.setattr(sass, "find_cuobjdump", lambda nvcc: None)
    result = sass.inspect([86, 90])
    assert [(i.config, i.arch) for i in result.instances] == [(0, 86), (0, 90), (1, 86), (1, 90)]
    assert sass.table(result).row_count == 4 and "no cuobjdump" in result.notes[0]
    first, _, *rows = sass.markdown(result).splitlines()
    assert first == "| nvcc 13.0.88 | threads | shared KiB | HMMA.SP | sm_86 | sm_90 |"
    assert rows[0] == f"| {NAMES[0]} | 256 | 49 | - | 79, 0, 2 | 79, 0, 3 |" and "| 255, 36, " in rows[1]
    assert result.to_json()["compiler"] == "13.0.88"
    with pytest.raises(SparsifyError, match="limits are known for 80, 86"):
        sass.inspect([87])


def test_cuobjdump_is_found_beside_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cuobjdump").touch()
    nvcc = tmp_path / "nvcc"
    nvcc.touch(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(nvcc) if name.endswith("nvcc") else None)
    assert sass.find_cuobjdump(build_cuda.Nvcc((str(nvcc),), "13")) == str(tmp_path / "cuobjdump")
