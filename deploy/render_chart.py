#!/usr/bin/env python3
"""Renders deploy/chart without a cluster: render_chart.py VALUES.yaml > manifests.yaml

Needs helm-python-sdk (Helm's own code as a Python package; `helm template` gives the same) and PyYAML.
"""

from __future__ import annotations

import sys
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


def render(values: dict[str, Any]) -> list[str]:
    """The documents of every template, in the templates' order."""
    import helm_python

    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name=RELEASE, namespace=RELEASE)
    return [
        document.strip("\n")
        for name, text in sorted(rendered.items())
        if name.endswith(".yaml")
        for document in text.split("\n---\n")
        if yaml.safe_load(document) is not None
    ]


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
