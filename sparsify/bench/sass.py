"""`sparsify kernels inspect`: what the compiler made of the CUDA kernel, for every architecture, without a GPU.

Registers and spills are what ptxas says (-v), instructions are counted in the machine code that cuobjdump shows, and
occupancy follows from them and from the limits of the architecture (CUDA C++ Programming Guide, "Technical
specifications per compute capability").
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsify.errors import MissingDependency, SparsifyError
from sparsify.native import build, build_cuda, emulator

KERNEL = "cuda/sparse24"
REGISTERS = 65536  # of a multiprocessor, of all these architectures; a warp takes them in pieces of 256
RESERVED = 1024  # bytes of shared memory that a block takes beside its own
LINEAR = re.compile(r"linear_kernelI(\d+)(__half|__nv_bfloat16)NS_6ConfigI((?:Li\d+E)+)EELb([01])E")
TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor, and of one block's shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


LIMITS = {
    80: Limits(64, 32, 164 * 1024, 163 * 1024),
    86: Limits(48, 16, 100 * 1024, 99 * 1024),
    89: Limits(48, 24, 100 * 1024, 99 * 1024),
    90: Limits(64, 32, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 227 * 1024),
    120: Limits(48, 32, 100 * 1024, 99 * 1024),
}


@dataclass(frozen=True)
class Instance:
    """One instance of the kernel on one architecture.

    registers: per thread; spilled: bytes stored and loaded; shared: bytes per block; blocks: resident on a multiprocessor,
    0 when it cannot be launched; warps: share of the most there can be. instructions, sparse_mma: in the machine code, of
    all and of the sparse tensor cores, None where there is no cuobjdump.
    """

    arch: int
    config: int
    name: str
    dtype: str
    group32: bool
    threads: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    warps: float
    instructions: int | None
    sparse_mma: int | None


@dataclass(frozen=True)
class Inspection:
    """One run. compiler: nvcc's release."""

    compiler: str
    instances: list[Instance]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(archs: Sequence[int] = tuple(LIMITS)) -> Inspection:
    """Compile the kernel for some architectures and read what came out. Takes about half a minute for each."""
    if unknown := [arch for arch in archs if arch not in LIMITS]:
        raise SparsifyError(f"--arch {unknown[0]}: limits are known for {', '.join(map(str, LIMITS))}")
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        raise MissingDependency(f"no CUDA compiler found: {build_cuda.GET_NVCC}")
    resources = Resources()
    dumper = find_cuobjdump(nvcc)
    notes = [] if dumper else ["no cuobjdump (pip install nvidia-cuda-cuobjdump): instructions were not counted"]
    instances: list[Instance] = []
    for arch in archs:
        log, code = compile_for(nvcc, dumper, arch)
        instances += read(arch, log, code, resources)
    if not instances:
        raise SparsifyError(f"{KERNEL}: no instance of linear_kernel in what nvcc {nvcc.version} made")
    return Inspection(nvcc.version, sorted(instances, key=lambda i: (i.config, i.arch, i.dtype, i.group32)), notes)


class Resources:
    """Names, threads and shared memory of the tile shapes, from the kernel's own constants (sparse24_resources.h)."""

    def __init__(self) -> None:
        self.c = emulator.Sparse24().c  # for the processor: it needs no GPU and compiles in seconds
        self.names = [self.c.sparse24_cuda_config_name(i).decode() for i in range(self.c.sparse24_cuda_config_count())]

    def threads(self, config: int) -> int:
        return int(self.c.sparse24_cuda_config_threads(config))

    def shared(self, config: int, group32: bool) -> int:
        return int(self.c.sparse24_cuda_config_shared_bytes(config, int(group32)))


def compile_for(nvcc: build_cuda.Nvcc, dumper: str | None, arch: int) -> tuple[str, str | None]:
    """What ptxas says about every kernel, and the machine code, for one architecture."""
    source = build.kernels_directory() / f"{KERNEL}.cu"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [*nvcc.command, "-O3", "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
        run = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if run.returncode:
            raise build.NativeBuildError(f"nvcc {nvcc.version} refuses {source.name}: {run.stderr.strip()[:400]}")
        if dumper is None:
            return run.stderr, None
        dump = subprocess.run([dumper, "-sass", str(cubin)], capture_output=True, text=True, check=True)
        return run.stderr, dump.stdout


def find_cuobjdump(nvcc: build_cuda.Nvcc) -> str | None:
    """On the search path, beside nvcc, or in a wheel of NVIDIA's or Triton's."""
    beside = [Path(shutil.which(nvcc.command[0]) or nvcc.command[0]).resolve().parent]
    for package, pattern in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = find_spec(package)
        places = spec.submodule_search_locations if spec else None
        beside += [folder for place in places or () for folder in Path(place).glob(pattern)]
    found = shutil.which("cuobjdump") or next(
        (str(f / "cuobjdump") for f in beside if (f / "cuobjdump").exists()), None
    )
    return found


def read(arch: int, log: str, code: str | None, resources: Resources) -> Iterator[Instance]:
    """The instances in ptxas' words and in the machine code."""
    counts = count_instructions(code) if code is not None else {}
    entry = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.S,
    )
    for symbol, stores, loads, registers in entry.findall(log):
        match = LINEAR.search(symbol)
        if match is None:
            continue
        _, dtype, numbers, flag = match.groups()
        config = config_of([int(number) for number in re.findall(r"\d+", numbers)], resources.names)
        group32 = flag == "1"
        threads, shared = resources.threads(config), resources.shared(config, group32)
        blocks, warps = occupancy(arch, threads, int(registers), shared)
        instructions, sparse = counts.get(symbol, (None, None))
        yield Instance(
            arch, config, resources.names[config], TYPES[dtype], group32, threads, int(registers),
            int(stores) + int(loads), shared, blocks, warps, instructions, sparse,
        )  # fmt: skip


def config_of(numbers: Sequence[int], names: Sequence[str]) -> int:
    """Which tile shape has these template arguments: the numbers in its name, without those that never change."""
    units, slices, *rest = numbers
    wr, wt, wk, stages = rest[:4]
    wanted = f"{units}x32 outputs, {slices}x8 tokens a warp; warps {wr}x{wt}x{wk}; {stages} stages"
    return list(names).index(wanted)


def count_instructions(code: str) -> dict[str, tuple[int, int]]:
    """For every function: its instructions, and those of the sparse tensor cores among them."""
    counts: dict[str, tuple[int, int]] = {}
    for part in re.split(r"\n\s*Function : ", code)[1:]:
        symbol, _, body = part.partition("\n")
        # the address of an instruction, a predicate maybe, and its name
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.]*)", body, re.M)
        counts[symbol.strip()] = len(names), sum(".SP" in name and "MMA" in name for name in names)
    return counts


def occupancy(arch: int, threads: int, registers: int, shared: int) -> tuple[int, float]:
    """Resident blocks of a multiprocessor, and its warps as a share of the most there can be."""
    limits = LIMITS[arch]
    warps = threads // 32
    if shared > limits.shared_of_block:
        return 0, 0.0
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    blocks = min(limits.warps // warps, limits.blocks, by_registers, limits.shared // (shared + RESERVED))
    return blocks, blocks * warps / limits.warps


def table(inspection: Inspection) -> Table:
    """One row per tile shape and architecture: the worst of its instances."""
    view = Table(
        title=f"{KERNEL} by nvcc {inspection.compiler}: per tile shape and architecture, over bfloat16, float16 and all groups",
        title_justify="left",
        caption="\n".join([*inspection.notes, "blocks: resident on a multiprocessor; warps: of the most there can be"]),
        caption_justify="left",
    )
    view.add_column("tile shape", no_wrap=True)
    for heading in (
        "sm",
        "threads",
        "registers",
        "spilled bytes",
        "shared KiB",
        "blocks",
        "warps",
        "HMMA.SP",
        "instructions",
    ):
        view.add_column(heading, justify="right")
    last = -1
    for (config, arch), group in grouped(inspection.instances).items():
        if config != last and last >= 0:
            view.add_section()
        blocks, spilled = min(i.blocks for i in group), sum(i.spilled for i in group)
        sparse = [i.sparse_mma for i in group if i.sparse_mma is not None]
        every = [i.instructions for i in group if i.instructions is not None]
        view.add_row(
            Text(f"{config}: {group[0].name}" if config != last else ""),
            str(arch),
            str(group[0].threads),
            str(max(i.registers for i in group)),
            Text(str(spilled), style="red" if spilled else ""),
            f"{max(i.shared for i in group) / 1024:.1f}",
            Text(str(blocks) if blocks else "does not fit", style="" if blocks else "red"),
            f"{100 * min(i.warps for i in group):.0f}%",
            str(min(sparse)) if sparse else "-",
            str(max(every)) if every else "-",
        )
        last = config
    return view


def markdown(inspection: Inspection) -> str:
    """The table of docs/kernels.md: per tile shape and architecture registers, spilled bytes and resident blocks."""
    groups = grouped(inspection.instances)
    archs = sorted({arch for _, arch in groups})
    lines = [
        f"| nvcc {inspection.compiler} | threads | shared KiB | HMMA.SP | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        "|" + " --- |" * (4 + len(archs)),
    ]
    for config in sorted({config for config, _ in groups}):
        every = [instance for arch in archs for instance in groups.get((config, arch), [])]
        cells = [
            f"{max(i.registers for i in group)}, {sum(i.spilled for i in group)}, {min(i.blocks for i in group)}"
            for group in (groups[config, arch] for arch in archs)
        ]
        sparse = min((i.sparse_mma for i in every if i.sparse_mma is not None), default=None)
        lines.append(
            f"| {every[0].name} | {every[0].threads} | {max(i.shared for i in every) / 1024:.0f} | "
            f"{'-' if sparse is None else sparse} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def grouped(instances: Sequence[Instance]) -> dict[tuple[int, int], list[Instance]]:
    """By tile shape and architecture."""
    groups: dict[tuple[int, int], list[Instance]] = {}
    for instance in instances:
        groups.setdefault((instance.config, instance.arch), []).append(instance)
    return groups
