"""Stands in for every program of `make versus`: `python -I -S fake_peer.py KIND JOB.json`, each call a line of FAKE_LOG.

FAKE_ROWS (JSON, row -> behaviour) may let the compression of a row `hang` after it has begun to write, `fail` with an error in
its log, or end without its `nothing`.
"""

import json
import os
import sys
import time
from pathlib import Path

kind, place = sys.argv[1:]
job = json.loads(Path(place).read_text())
row = Path(place).parent.parent.name
with Path(os.environ["FAKE_LOG"]).open("a") as log:
    log.write(json.dumps([kind, row, os.getpid()]) + "\n")
behaviour = json.loads(os.environ.get("FAKE_ROWS", "{}")).get(row) if kind == "compress" else None
result = {}
if kind == "prepare":
    Path(job["rows"]).write_bytes(b"rows")
    result = {
        "dense": str(Path(place).parent), "gguf": None, "gguf_type": None, "compute": "float32", "threads": 2,
        "parameters": 1000, "fingerprint": "abc", "shape": [4, 64], "machine": json.loads(os.environ["FAKE_MACHINE"]),
        "versions": {"torch": "2"},
    }  # fmt: skip
elif kind == "compress":
    Path(job["output"]).mkdir()
    (Path(job["output"]) / "model.safetensors").write_bytes(b"half")
    if behaviour == "hang":
        time.sleep(600)
    if behaviour == "fail":
        print("begin", file=sys.stderr)
        sys.exit(f"MemoryError: cannot allocate what {job['output']}/model.safetensors needs")
    (Path(job["output"]) / "model.safetensors").write_bytes(b"whole")
    result = {"versions": {"peer": "1.2"}}
elif kind == "score":
    text = {"perplexity": 20.5, "kl": 0.25, "top1_agreement": 0.75, "chunks": 2, "sequence_length": 64, "tokens": 126}
    result = {"file_bytes": 5000, "block_bits": 4.25, "two_of_four": 0.5, "text": text, "versions": {}}
else:
    result = {"first_token_seconds": [0.5, 0.5], "request_seconds": [1.2, 1.2], "elapsed_seconds": [4.0]}
if behaviour != "nothing":
    Path(job["result"]).write_text(json.dumps(result))
else:
    (Path(job["output"]) / "model.safetensors").unlink()
    Path(job["output"]).rmdir()
