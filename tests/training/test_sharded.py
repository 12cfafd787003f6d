"""Two processes train as one does: FSDP2 over gloo, on the CPU."""

import os
import socket
import subprocess
import sys


def test_fsdp_gives_the_loss_and_the_gradients_of_one_process(repository):
    """Tied embedding, checkpointed blocks and parametrized norms included: whatever FSDP2 could trip over."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    run = subprocess.run(
        [*command, "tests/training/sharded.py"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "equal: 50 gradients" in run.stdout
