"""What the Triton kernels compile to for a GPU that need not be there: registers, shared memory, spills.

    python -m sparsify.runtime.backends.triton_compile [TARGET...]

prints one JSON object per kernel and target. Triton compiles for any target on any machine; registers and spills of
NVIDIA targets come from the `cuobjdump` inside Triton's own package, those of AMD from the assembly it keeps.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.triton_config import Config
from sparsify.runtime.backends.triton_launch import DTYPES, constants

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
TARGETS = NVIDIA + AMD
# Shared memory a program may use: CUDA C++ programming guide, "Technical specifications per compute capability"; CDNA3 ISA.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
# One configuration of each kernel and size of tile that the rule may choose.
CONFIGS = (
    Config("gemv", 1, 16, 2048, 1, 8, 1),
    Config("gemv", 1, 32, 1024, 1, 8, 1),
    Config("gemm", 16, 32, 64, 1, 2, 4),
    Config("gemm", 32, 64, 64, 1, 2, 4),
    Config("gemm", 64, 64, 64, 1, 4, 4),
    Config("decode", 1, 32, 256, 1, 4, 1),
    Config("experts", 16, 32, 64, 1, 2, 4),
    Config("experts", 32, 64, 64, 1, 2, 4),
)
MIXTURE = {"CHOSEN": 8, "EXPERTS": 128}  # of Qwen3-30B-A3B


@dataclass(frozen=True)
class Resources:
    """What one kernel takes. registers, spilled_bytes: per thread, None where no tool reports them; shared_bytes: per program."""

    target: str
    kernel: str
    activations: str
    registers: int | None
    spilled_bytes: int | None
    shared_bytes: int
    code_bytes: int


def compile_for(
    target: str, config: Config, scheme: ModuleScheme, dtype: torch.dtype = torch.bfloat16, first: bool = True
) -> Resources:
    """Compile one kernel for "sm_90", "gfx942", ... and say what it takes. first: of experts, gate and up (`run_experts`)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsify.runtime.backends import triton_kernels

    if triton_kernels.INTERPRETED:
        raise SparsifyError("TRITON_INTERPRET=1 replaces the compiler by an interpreter; unset it to compile")
    kernel = getattr(triton_kernels, config.kind)
    fixed, options = constants(config, scheme, dtype, dtype, has_bias=True)
    fixed |= {**MIXTURE, "FIRST": first} if config.kind == "experts" else {}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else _type(name, config, dtype, first) for name in names}
    values = {(names.index(name),): value for name, value in fixed.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in fixed and _aligned(name)}
    vendor, architecture, lanes = ("cuda", int(target[3:]), 32) if target in NVIDIA else ("hip", target, 64)
    compiled = triton.compile(
        ASTSource(kernel, signature, values, aligned), target=GPUTarget(vendor, architecture, lanes), options=options
    )
    binary = compiled.asm["cubin" if vendor == "cuda" else "hsaco"]
    registers, spilled = _cubin_usage(binary) if vendor == "cuda" else _amd_usage(compiled.asm["amdgcn"])
    activations = str(dtype).removeprefix("torch.")
    return Resources(target, str(config), activations, registers, spilled, compiled.metadata.shared, len(binary))


def shared_limit(target: str) -> int:
    """Bytes of shared memory that one program may use on `target`."""
    return SHARED_KIB[target] * 1024


def _type(name: str, config: Config, dtype: torch.dtype, first: bool) -> str:
    """How Triton writes the type of a runtime argument."""
    half = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    pointers = {"words": "*i32", "partial": "*fp32", "scales": half, "bias": half, "y": half, "weight": half}
    pointers["x"] = "*i64" if config.kind == "gemv" else half
    pointers |= {"order": "*i64", "starts": "*i32", "block_expert": "*i32", "block_start": "*i32", "gates": "*fp32"}
    if not first:
        pointers["y"] = "*fp32"
    return pointers.get(name, "i32")


def _aligned(name: str) -> bool:
    """Whether an argument is a multiple of 16, which Triton finds out at the first call: tensors, padded sizes, inputs."""
    return name not in ("n_rows", "n_units", "n_groups", "n_fours")


def _cubin_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers, bytes of stack and local memory) by the cuobjdump inside Triton's package; Nones where it is missing."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)


def _amd_usage(assembly: str) -> tuple[int | None, int | None]:
    """(vector registers, bytes of scratch) from the metadata at the end of the assembly."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return (int(registers[1]) if registers else None, int(scratch[1]) if scratch else None)


def compile_all(targets: tuple[str, ...] = TARGETS) -> Iterator[Resources]:
    """Every kernel for every target, 4-bit 2:4 in groups of 128; float16 on one target, since it differs in little."""
    scheme = ModuleScheme(4, 128, "2:4", (4096, 4096))
    for target in targets:
        for dtype in DTYPES if target == targets[0] else DTYPES[:1]:
            for config in CONFIGS:
                for first in (True, False) if config.kind == "experts" else (True,):
                    yield compile_for(target, config, scheme, dtype, first)


def main(arguments: list[str]) -> Any:
    """Print the resources of every kernel for these targets, or for all."""
    for resources in compile_all(tuple(arguments) or TARGETS):
        print(json.dumps(asdict(resources)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
