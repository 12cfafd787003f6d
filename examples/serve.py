"""Serve a compressed checkpoint with vLLM's OpenAI-compatible server, and ask it something.

    python examples/serve.py out/model-2of4-w4a16 ["The sea" [options of vllm serve]]

Needs vLLM: pip install 'sparsify-24[cpu]', or [cuda] on a machine with an NVIDIA GPU.
"""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PATIENCE = 600  # seconds that the server may take to start


def main(directory: str, prompt: str = "The sea", *options: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "sparsify",
        "serve",
        directory,
        "--",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "64",
        *options,
    ]
    server = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        body = {"model": Path(directory).resolve().name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
        print(prompt + text)
        return text
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Until the server answers; an error when it ends before."""
    for _ in range(PATIENCE):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}; its output above says why")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server did not answer within {PATIENCE} seconds")


if __name__ == "__main__":
    main(*sys.argv[1:])
