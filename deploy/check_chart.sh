#!/usr/bin/env bash
# Renders deploy/chart with every values file of ci/ and checks what comes out: Helm's lint, the schemas of Kubernetes
# (strict) and checkov's rules for security. Also that deploy/kubernetes.yaml is what the chart gives.
#
#   deploy/check_chart.sh           check
#   deploy/check_chart.sh --write   write deploy/kubernetes.yaml again first
#
# Settings, all optional:
#   VENV     where its tools go (default .venv-chart); they are installed once
#   PYTHON   the interpreter to make it with (default python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/versions.sh
VENV=${VENV:-.venv-chart}
KUBERNETES=(1.29 1.37) # oldest and newest that are checked

say() { printf '\033[1m[check-chart]\033[0m %s\n' "$*" >&2; }
if [ ! -e "$VENV/.ready" ]; then
  say "making $VENV with ${CHART_TOOLS[*]}"
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "${CHART_TOOLS[@]}"
  touch "$VENV/.ready"
fi
PATH=$(cd "$VENV" && pwd)/bin:$PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

[ "${1:-}" != --write ] || python deploy/render_chart.py deploy/chart/ci/cpu-volume-values.yaml > deploy/kubernetes.yaml
python - <<'PYTHON'
import helm_python

found = helm_python.lint("deploy/chart")
problems = [*found["errors"], *(message for message in found["messages"] if message["severity"] > 1)]
raise SystemExit("\n".join(map(str, problems)) or None)
PYTHON
for values in deploy/chart/ci/*-values.yaml; do
  name=$(basename "$values" -values.yaml)
  python deploy/render_chart.py "$values" > "$work/$name.yaml"
  say "$name: $(grep -c '^kind:' "$work/$name.yaml") objects"
done
cmp "$work/cpu-volume.yaml" deploy/kubernetes.yaml ||
  { say "deploy/kubernetes.yaml is not what the chart gives: run make manifests"; exit 1; }
# It knows no ServiceMonitor, which belongs to the Prometheus operator, and warns.
for version in "${KUBERNETES[@]}"; do kubernetes-validate --strict --quiet -k "$version" "$work"/*.yaml; done
say "schemas of Kubernetes ${KUBERNETES[*]}: passed"
checkov --framework kubernetes --compact --quiet --skip-download --directory "$work"
checkov --framework dockerfile --compact --quiet --skip-download --directory deploy
say "checkov: passed"
