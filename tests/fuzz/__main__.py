"""`python -m tests.fuzz`: runs the targets one after another and says what came of it (`make fuzz`).

A target of targets.py needs atheris; one of kernels/ needs clang with libFuzzer, at best clang 19. What is lacking is said, and
left out. Everything goes to --output: corpora, inputs of findings, and result.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "tests" / "fuzz" / "kernels"
COMPILERS = ("clang++-21", "clang++-20", "clang++-19", "clang++-18", "clang++-17", "clang++")  # 16 fails on AMX
FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize=null,object-size,vptr",
    "-fno-sanitize-recover=all", "-Wno-bitwise-conditional-parentheses",
)  # fmt: skip
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "2"}
# Seconds here are of the clock, which on a busy machine says nothing about an input: those of computing are counted by `run`.
LIMITS = (
    "-timeout=120", "-report_slow_units=120", "-rss_limit_mb=4096", "-len_control=0", "-print_final_stats=1", "-verbosity=1",
)  # fmt: skip


def kernel_targets() -> list[str]:
    return [f"kernels/{file.stem}" for file in sorted(KERNELS.glob("*.cpp"))]


def reader_targets() -> list[str]:
    """The names in targets.py, without importing all that it needs."""
    text = (ROOT / "tests" / "fuzz" / "targets.py").read_text()
    return re.findall(r'^    "(\w+)": Target\(', text, re.MULTILINE)


def compiler() -> str | None:
    """The first clang that builds a program with libFuzzer and both sanitizers."""
    probe = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    for name in (os.environ.get("FUZZ_CXX"), *COMPILERS):
        if name and shutil.which(name):
            command = [name, *FLAGS, "-x", "c++", "-", "-o", os.devnull]
            if subprocess.run(command, input=probe.encode(), capture_output=True).returncode == 0:
                return name
    return None


def built(name: str, clang: str, folder: Path) -> Path:
    """The program of a target of kernels/, built again when a source changes."""
    source = KERNELS / f"{Path(name).name}.cpp"
    sources = [source, KERNELS / "input.h", *sorted((ROOT / "kernels" / "cpu").iterdir())]
    version = subprocess.run([clang, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"".join([version, " ".join(FLAGS).encode(), *(file.read_bytes() for file in sources)]))
    program = folder / f"{source.stem}-{key.hexdigest()[:16]}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        say(f"building {name} with {clang}, which takes a minute or some")
        aside = program.with_suffix(".partial")
        subprocess.run([clang, *FLAGS, str(source), "-o", str(aside)], check=True)
        aside.replace(program)
    return program


def fuzz(name: str, seconds: int, runs: int, seed: int, output: Path, clang: str | None) -> dict[str, Any]:
    """Run one target; executions, inputs that reach new code, findings, seconds."""
    folder = (output / name.replace("/", "-")).resolve()
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    bounds = [
        f"-max_total_time={seconds}",
        *([f"-runs={runs}"] if runs else []),
        f"-seed={seed}",
        f"-artifact_prefix={folder}/crash-",
        *LIMITS,
    ]
    if name.startswith("kernels/"):
        assert clang is not None
        program = built(name, clang, output / "programs")
        for kept in (ROOT / "tests" / "fuzz" / "corpus" / name.replace("/", "-")).glob("*"):
            shutil.copyfile(kept, folder / "corpus" / kept.name)
        command = [str(program), str(folder / "corpus"), "-max_len=600", *bounds]
    else:
        command = [sys.executable, "-m", "tests.fuzz.one", name, str(folder), "-max_len=200000", *bounds]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", **SANITIZERS}
    started = time.monotonic()
    with (folder / "log").open("wb") as log:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    text = (folder / "log").read_text(errors="replace")
    units = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text)
    findings = [*sorted(folder.glob("findings/*.txt")), *sorted(folder.glob("crash-*"))]
    if ended.returncode and not findings:
        findings = [folder / "log"]
    return {
        "executions": int(units[-1]) if units else 0,
        "corpus": len(list((folder / "corpus").iterdir())),
        "findings": len(findings),
        "seconds": round(time.monotonic() - started),
        "where": [str(file) for file in findings],
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="NAME", help=f"of {', '.join([*reader_targets(), *kernel_targets()])}"
    )
    parser.add_argument("--seconds", type=int, default=300, help="for each target (default 300)")
    parser.add_argument("--runs", type=int, default=0, help="executions of each target at most")
    parser.add_argument("--seed", type=int, default=0, help="of the random input; 0: another one each time")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "fuzz")
    args = parser.parse_args()
    known = [*reader_targets(), *kernel_targets()]
    if unknown := [name for name in args.targets if name not in known]:
        parser.error(f"unknown target {unknown[0]}; known are {', '.join(known)}")
    names = args.targets or known
    clang = compiler() if any(name in kernel_targets() for name in names) else None
    if clang is None and (left := [name for name in names if name in kernel_targets()]):
        say(f"left out, since no clang from 17 on with libFuzzer is here: {', '.join(left)}")
        names = [name for name in names if name not in left]
    if find_spec("atheris") is None and (left := [name for name in names if name in reader_targets()]):
        say(f"left out, since atheris is not installed (make fuzz makes an environment that has it): {', '.join(left)}")
        names = [name for name in names if name not in left]
    result, file = {}, args.output / "result.json"
    for name in names:
        result[name] = fuzz(name, args.seconds, args.runs, args.seed, args.output, clang)
        one = result[name]
        say(
            f"{name}: {one['executions']} executions, {one['findings']} findings in {one['seconds']} s {' '.join(one['where'])}"
        )
        file.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if any(one["findings"] for one in result.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
