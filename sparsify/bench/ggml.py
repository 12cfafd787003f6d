"""llama.cpp's matrix product on CPUs: ggml's shared libraries, called by their C interface.

They are not installed with sparsify, because they are compiled on the machine, which takes long. Either the package
llama-cpp-python brings them, or SPARSIFY_LLAMA_CPP names a folder that has them: that of llama.cpp's own build (it or its
`bin`). To have one library for every instruction set, from which the one for SPARSIFY_CPU_LEVEL is taken:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DCMAKE_INSTALL_BINDIR=llama_cpp/lib" \\
        pip install --no-binary llama-cpp-python llama-cpp-python

Without CMAKE_ARGS there is one library, for the processor that it was compiled on; at another level it is not measured.
Arrays are given by their addresses.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator, Sequence
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparsify.bench.missing import PeerMissing
from sparsify.processor import FORCE

VARIABLE = "SPARSIFY_LLAMA_CPP"
INSTALL = "pip install llama-cpp-python (compiled here, for minutes), or name a folder that has libggml-base by "
BLOCK = 32  # weights of a block, in all formats here
# ggml's number of a format (in its files, so it stays), and bytes of a block: nibbles, a float16 scale, Q4_1 a minimum too.
FORMATS = {"q4_0": (2, 18), "q4_1": (3, 20)}
FLOAT32 = 0
ALIGNMENT = 32  # of arrays that ggml is given, in bytes
EXAMPLE_ROWS = 512  # of the product that ggml is asked about, as llama.cpp asks
TRIAL_SECONDS, TRIAL_TOLERANCE = 60, 0.02
_THREADPOOL_PARAMETERS = 4096  # more bytes than ggml_threadpool_params has
_SUFFIXES = (".so", ".dylib")

# name: (result, arguments)
_BASE = {
    "ggml_init": (c_void_p, None),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_type_size": (c_size_t, [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_buft_get_alloc_size": (c_size_t, [c_void_p, c_void_p]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_plan_create": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_graph_plan_free": (None, [c_void_p, c_void_p]),
    "ggml_backend_graph_plan_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_threadpool_params_init": (None, [c_void_p, c_int]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
}
_CPU = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_new": (c_void_p, [c_void_p]),
    "ggml_threadpool_pause": (None, [c_void_p]),
}


WARNING = 3  # ggml's numbers of log levels: this and the next are shown
_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


@_Log
def _log(level: int, text: bytes, _: int | None) -> None:
    if level in (WARNING, WARNING + 1):
        sys.stderr.write(text.decode(errors="replace"))


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


@dataclass(frozen=True)
class Variant:
    """One of ggml's libraries for CPUs. level: the name in `processor.LEVELS` of what it was compiled for, None for what
    lies between two of them. score: ggml's own order of what this processor can run."""

    name: str
    path: Path
    level: str | None
    score: int

    @property
    def label(self) -> str:
        return self.name + (f" ({self.level})" if self.level not in (None, self.name) else "")


# ----------------------------------------------------------------------------------------------------- finding it


def folders(named: str | None) -> list[Path]:
    """Where ggml's libraries may be: the folder that the user names, else that of llama-cpp-python."""
    if named:
        root = Path(named)
        return [root, root / "bin", root / "build" / "bin", root / "lib"]
    spec = find_spec("llama_cpp")
    return [Path(place) / "lib" for place in (spec.submodule_search_locations or [])] if spec else []


def base_library(named: str | None) -> Path:
    """ggml's base library; PeerMissing without one."""
    for folder in folders(named):
        for suffix in _SUFFIXES:
            if found := sorted(folder.glob(f"libggml-base{suffix}*")):
                return found[0]
    if named:
        raise PeerMissing(
            "not in its folder", f"{VARIABLE}={named}: no libggml-base there; build it as shared libraries"
        )
    raise PeerMissing("not installed", f"ggml is not installed: {INSTALL}{VARIABLE}")


def variants(base: Path) -> list[Variant]:
    """The libraries for CPUs beside the base library that this processor can run, best first."""
    ctypes.CDLL(str(base))  # they need it, and would look for it elsewhere
    found = {}
    for suffix in _SUFFIXES:
        for path in sorted(base.parent.glob(f"libggml-cpu*{suffix}*")):
            name = path.name.split(suffix)[0].removeprefix("libggml-cpu").lstrip("-") or "native build"
            if name not in found and (variant := _variant(name, path)):
                found[name] = variant
    return sorted(found.values(), key=lambda variant: -variant.score)


def _variant(name: str, path: Path) -> Variant | None:
    """None for a library that does not load, or whose instructions this processor lacks."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    score = int(library.ggml_backend_score()) if hasattr(library, "ggml_backend_score") else 1
    return Variant(name, path, level_of(library), score) if score > 0 else None


def level_of(library: ctypes.CDLL) -> str | None:
    """The name of the instruction sets that a library was compiled for, None where they lie between two levels."""

    def has(feature: str) -> bool:
        ask = getattr(library, f"ggml_cpu_has_{feature}", None)
        return ask is not None and bool(ask())

    if has("amx_int8"):
        return "amx"
    if has("avx512_bf16"):
        return "avx512bf16"
    if has("avx512"):
        return None if has("avx512_vnni") or has("avx512_vbmi") else "avx512"
    if has("avx_vnni"):
        return "avxvnni"
    if has("avx2"):
        return "avx2"
    return None if has("ssse3") or has("avx") else "portable"


def suitable(found: Sequence[Variant], forced: str | None) -> list[Variant]:
    """The variants of the forced level, or all of them; PeerMissing without any."""
    if not found:
        raise PeerMissing("no library runs", "none of ggml's libraries for CPUs runs on this processor")
    if fitting := [variant for variant in found if forced in (None, variant.level)]:
        return fitting
    have = ", ".join(variant.label for variant in found)
    raise PeerMissing(
        f"none for {forced}",
        f"{FORCE}={forced}, and ggml's libraries here are: {have}; GGML_CPU_ALL_VARIANTS=ON builds them for all levels",
    )


def find(level: str | None, folder: str | None) -> tuple[Path, Variant]:
    """ggml's base library and the best one for CPUs that passes a trial in a process of its own; PeerMissing says why not.

    level: that a library must have been compiled for, None for any. folder: where they are, None for the installed.
    """
    base = base_library(folder)
    failures = []
    for variant in suitable(variants(base), level):
        try:
            _try_out(base, variant.path)
        except PeerMissing as error:
            failures.append(error)
        else:
            return base, variant
    raise failures[0]


def _try_out(base: Path, cpu: Path) -> None:
    """An interface that changed would end this process: multiply in another one first."""
    command = [sys.executable, "-m", "sparsify.bench.ggml", str(base), str(cpu)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerMissing("its trial hangs", f"ggml's trial in a process of its own: {error}") from None
    if run.returncode:
        ended = f"signal {-run.returncode}" if run.returncode < 0 else f"status {run.returncode}"
        last_line = (run.stderr.strip().splitlines() or [""])[-1]
        raise PeerMissing(
            "its trial fails", f"ggml's trial ({cpu.name}) in a process of its own ended by {ended}: {last_line}"
        )


# -------------------------------------------------------------------------------------------------------- using it


class Ggml:
    """ggml with one library for CPUs and its own pool of threads."""

    def __init__(self, base: Path, cpu: Path, threads: int) -> None:
        self.base, self.cpu = ctypes.CDLL(str(base)), ctypes.CDLL(str(cpu))
        for library, functions in ((self.base, _BASE), (self.cpu, _CPU)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype = result
                function.argtypes = [_InitParameters] if arguments is None else arguments
        self.base.ggml_log_set(_log, None)
        for name, (number, nbytes) in FORMATS.items():
            if self.base.ggml_type_name(number) != name.encode() or self.base.ggml_type_size(number) != nbytes:
                raise PeerMissing("unknown version", f"this ggml does not store {name} as expected")
        self.threads = threads
        self.backend = self.cpu.ggml_backend_cpu_init()
        parameters = ctypes.create_string_buffer(_THREADPOOL_PARAMETERS)
        self.base.ggml_threadpool_params_init(parameters, threads)
        self.pool = self.cpu.ggml_threadpool_new(parameters)
        if not self.backend or not self.pool:
            raise PeerMissing("does not start", "ggml's CPU back end or its threads did not start")
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.cpu.ggml_backend_cpu_set_threadpool(self.backend, self.pool)

    def rest(self) -> None:
        """Let its threads sleep until the next product, instead of looking for work."""
        self.cpu.ggml_threadpool_pause(self.pool)

    def quantize(self, kind: str, source: int, target: int, rows: int, columns: int) -> None:
        """Pack float32 [rows, columns] at the address `source` as `kind`: `packed_bytes` of them, at `target`."""
        number, _ = FORMATS[kind]
        written = self.base.ggml_quantize_chunk(number, source, target, 0, rows, columns, None)
        if written != packed_bytes(kind, rows, columns):
            raise PeerMissing(
                "unknown version", f"this ggml packs {rows}x{columns} weights as {written} bytes of {kind}"
            )

    def context(self, tensors: int) -> int:
        """Room for the descriptions of some tensors and one graph; their contents lie elsewhere."""
        size = tensors * self.base.ggml_tensor_overhead() + self.base.ggml_graph_overhead_custom(tensors, False)
        return int(self.base.ggml_init(_InitParameters(size, None, True)))

    def buffer_types(self) -> Iterator[int]:
        """Layouts of weights that this library has kernels of its own for, in ggml's order; the plain one last."""
        device = self.base.ggml_backend_get_device(self.backend)
        registry = self.base.ggml_backend_dev_backend_reg(device)
        if address := self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts"):
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
            index = 0
            while extra and extra[index]:
                yield int(extra[index])
                index += 1
        yield int(self.base.ggml_backend_get_default_buffer_type(self.backend))


def packed_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of [rows, columns] weights in ggml's blocks of a kind."""
    return rows * columns // BLOCK * FORMATS[kind][1]


class Weight:
    """One weight [N, K] in a 4-bit format, in the layout that llama.cpp would give it, and products with it."""

    def __init__(self, ggml: Ggml, kind: str, n: int, k: int, packed: int) -> None:
        """packed: address of the blocks, row after row. PeerMissing where K is no multiple of a block."""
        if k % BLOCK:
            raise PeerMissing("inputs not x32", f"ggml's blocks are {BLOCK} weights, which do not divide {k} inputs")
        self.ggml, self.n, self.k = ggml, n, k
        self.context = self.tensor = self.buffer = 0
        self.layout = ""
        if not any(self._lies_in(layout, kind) for layout in ggml.buffer_types()):
            raise PeerMissing("no such product", f"this ggml does not multiply {kind} weights of {n}x{k}")
        ggml.base.ggml_backend_tensor_set(self.tensor, packed, 0, packed_bytes(kind, n, k))
        self.product: Product | None = None

    def _lies_in(self, layout: int, kind: str) -> bool:
        """Allocate it in this layout; False where no kernel reads it there. ggml can only be asked about a tensor with memory."""
        base, k = self.ggml.base, self.k
        context = self.ggml.context(3)
        tensor = base.ggml_new_tensor_2d(context, FORMATS[kind][0], k, self.n)
        buffer = base.ggml_backend_buft_alloc_buffer(layout, base.ggml_backend_buft_get_alloc_size(layout, tensor))
        if not buffer:
            raise PeerMissing("out of memory", f"ggml cannot allocate a weight of {self.n}x{k}")
        base.ggml_backend_tensor_alloc(buffer, tensor, base.ggml_backend_buffer_get_base(buffer))
        example = base.ggml_mul_mat(context, tensor, base.ggml_new_tensor_2d(context, FLOAT32, k, EXAMPLE_ROWS))
        if base.ggml_backend_dev_supports_op(base.ggml_backend_get_device(self.ggml.backend), example):
            self.context, self.tensor, self.buffer = context, tensor, buffer
            self.layout = base.ggml_backend_buft_name(layout).decode()
            return True
        base.ggml_backend_buffer_free(buffer)
        base.ggml_free(context)
        return False

    def multiply(self, x: int, y: int, m: int) -> None:
        """float32 x [M, K] -> y [M, N] at their addresses; what was planned for the same ones is used again."""
        if self.product is None or self.product.key != (x, y, m):
            if self.product:
                self.product.free()
            self.product = Product(self, x, y, m)
        if status := self.ggml.base.ggml_backend_graph_plan_compute(self.ggml.backend, self.product.plan):
            raise PeerMissing(
                "its product fails", f"ggml's product of {m} rows with {self.n}x{self.k} ends with {status}"
            )

    def __del__(self) -> None:
        if product := getattr(self, "product", None):
            product.free()
        if getattr(self, "buffer", 0):
            self.ggml.base.ggml_backend_buffer_free(self.buffer)
            self.ggml.base.ggml_free(self.context)


class Product:
    """A graph of one product and the plan to compute it, over and over."""

    def __init__(self, weight: Weight, x: int, y: int, m: int) -> None:
        self.key, self.ggml = (x, y, m), weight.ggml
        base = self.ggml.base
        if x % ALIGNMENT or y % ALIGNMENT:
            raise ValueError(f"arrays must be aligned to {ALIGNMENT} bytes")
        self.context = self.ggml.context(4)
        source = base.ggml_new_tensor_2d(self.context, FLOAT32, weight.k, m)
        result = base.ggml_mul_mat(self.context, weight.tensor, source)
        self.buffers = []
        for tensor, address in ((source, x), (result, y)):
            buffer = base.ggml_backend_cpu_buffer_from_ptr(address, base.ggml_nbytes(tensor))
            base.ggml_backend_tensor_alloc(buffer, tensor, address)
            self.buffers.append(buffer)
        graph = base.ggml_new_graph_custom(self.context, 4, False)
        base.ggml_build_forward_expand(graph, result)
        self.plan = base.ggml_backend_graph_plan_create(self.ggml.backend, graph)

    def free(self) -> None:
        base = self.ggml.base
        base.ggml_backend_graph_plan_free(self.ggml.backend, self.plan)
        for buffer in self.buffers:
            base.ggml_backend_buffer_free(buffer)
        base.ggml_free(self.context)


# -------------------------------------------------------------------------------------------------------- trial


def trial(base: Path, cpu: Path, n: int = 64, k: int = 64, m: int = 33) -> None:
    """Small products of whole numbers with one and with some rows; PeerMissing where one comes out wrong."""
    ggml = Ggml(base, cpu, threads=2)
    weights = [[(3 * i + 5 * j) % 16 - 8 for j in range(k)] for i in range(n)]
    rows = [[(7 * i + 11 * j) % 255 - 127 for j in range(k)] for i in range(m)]
    arrays = {"w": 4 * n * k, "x": 4 * m * k, "y": 4 * m * n}
    memory = {name: ctypes.create_string_buffer(nbytes + ALIGNMENT) for name, nbytes in arrays.items()}
    at = {name: ctypes.addressof(array) + -ctypes.addressof(array) % ALIGNMENT for name, array in memory.items()}
    _floats(at["w"], n * k)[:] = [float(value) for row in weights for value in row]
    _floats(at["x"], m * k)[:] = [float(value) for row in rows for value in row]
    for kind in FORMATS:
        packed = ctypes.create_string_buffer(packed_bytes(kind, n, k))
        ggml.quantize(kind, at["w"], ctypes.addressof(packed), n, k)
        weight = Weight(ggml, kind, n, k, ctypes.addressof(packed))
        for count in (1, 2, m):
            weight.multiply(at["x"], at["y"], count)
            found = list(_floats(at["y"], count * n))
            exact = [sum(a * b for a, b in zip(x, w, strict=True)) for x in rows[:count] for w in weights]
            worst = max(abs(a - b) for a, b in zip(found, exact, strict=True)) / max(map(abs, exact))
            if not worst <= TRIAL_TOLERANCE:
                raise PeerMissing("wrong product", f"{kind} with {count} rows: relative error {worst:.2g}")


def _floats(address: int, count: int) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * count).from_address(address)


if __name__ == "__main__":
    trial(Path(sys.argv[1]), Path(sys.argv[2]))
