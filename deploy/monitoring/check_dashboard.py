#!/usr/bin/env python3
"""Asks every query of the Grafana dashboard of a real Prometheus that scrapes a real server; fails where one has no series.

    deploy/monitoring/check_dashboard.py http://127.0.0.1:8000 --model NAME [--prometheus PROGRAM]

Starts Prometheus on a free port in a temporary folder, sends the server a few requests, waits for some scrapes, asks.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent.parent / "chart" / "dashboards" / "sparsify.json"
SCRAPES = 5
VARIABLES = {"$__rate_interval": "5m", "$model": ".*"}


def ask(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def query(prometheus: str, expression: str) -> list[Any]:
    return ask(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")["data"]["result"]


def expressions() -> list[tuple[str, str]]:
    """(panel, query) of the dashboard, its variables replaced."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found.append((panel["title"], expression))
    return found


def start(program: str, server: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Prometheus, scraping the server every second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = urllib.parse.urlparse(server).netloc
    jobs = [{"job_name": "sparsify", "static_configs": [{"targets": [target]}]}]
    (folder / "prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    return process, f"http://127.0.0.1:{port}"


def wait_for_scrapes(prometheus: str, seconds: int) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = query(prometheus, "count_over_time(vllm:num_requests_running[10m])")
            if found and float(found[0]["value"][1]) >= SCRAPES:
                return
        except OSError:
            pass  # Prometheus is starting
        time.sleep(1)
    raise SystemExit(f"Prometheus has not scraped the server {SCRAPES} times in {seconds} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="address of `sparsify serve`")
    parser.add_argument("--model", default="model", help="its name there (model)")
    parser.add_argument("--prometheus", default="prometheus", metavar="PROGRAM")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=300, help="to wait for scrapes (300)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, address = start(arguments.prometheus, arguments.server, Path(folder))
        try:
            for number in range(arguments.requests):
                body = {"model": arguments.model, "prompt": "Hello" * (number + 1), "max_tokens": 4, "temperature": 0}
                ask(f"{arguments.server}/v1/completions", body)
            wait_for_scrapes(address, arguments.seconds)
            results = [(panel, expression, query(address, expression)) for panel, expression in expressions()]
        finally:
            process.terminate()
            process.wait()
    for panel, expression, series in results:
        print(f"{len(series):3} series  {panel}: {expression}")
    empty = [expression for _, expression, series in results if not series]
    if empty:
        sys.exit(f"{len(empty)} of {len(results)} queries have no series")
    print(f"all {len(results)} queries have series")


if __name__ == "__main__":
    main()
