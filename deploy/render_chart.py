#!/usr/bin/env python3
"""Renders deploy/chart without a cluster: render_chart.py VALUES.yaml > manifests.yaml

Needs PyYAML, and Helm: as the program, or as the package helm-python-sdk, which holds Helm's own code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "chart"
RELEASE = "sparsify"
HEADER = """\
# `sparsify serve` in Kubernetes on CPU nodes, without Helm:  kubectl apply -f deploy/kubernetes.yaml
# What deploy/chart renders from ci/cpu-volume-values.yaml; written by `make manifests`, change it there. The checkpoint is
# expected at the root of the volume claim `sparsify-model`; name the image that you pushed. docs/deployment.md says more.
apiVersion: v1
kind: Namespace
metadata:
  name: sparsify
"""


def renderer() -> str | None:
    """What renders here: helm_python, helm, or None."""
    return "helm_python" if find_spec("helm_python") else shutil.which("helm")


def render(values: dict[str, Any]) -> list[str]:
    """The documents of every template, by the templates' names. Raises where values.schema.json refuses `values`."""
    if find_spec("helm_python") is None:
        command = ["helm", "template", RELEASE, str(CHART), "--namespace", RELEASE, "--values", "-"]
        run = subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True, check=False)
        if run.returncode:
            raise ValueError(run.stderr)
        rendered = sorted(part.split("\n", 1) for part in run.stdout.split("# Source: ")[1:])
        texts = [text for _, text in rendered]
    else:
        import helm_python

        with helm_python.Chart.load(str(CHART)) as chart:
            chart.validate_schema(chart.merge_values(values))
            found = chart.render(values, name=RELEASE, namespace=RELEASE)
        texts = [text for name, text in sorted(found.items()) if name.endswith(".yaml")]
    documents = (document.strip("\n") for text in texts for document in text.split("\n---\n"))
    return [document.removesuffix("\n---") for document in documents if yaml.safe_load(document) is not None]


def plain(values: dict[str, Any]) -> str:
    """The text of deploy/kubernetes.yaml."""
    documents = (document.replace("managed-by: Helm", "managed-by: kubectl") for document in render(values))
    return "---\n".join([HEADER, *(f"{document}\n" for document in documents)])


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(plain(yaml.safe_load(Path(sys.argv[1]).read_text())), end="")


if __name__ == "__main__":
    main()
