"""Runs one command and says what it took: `python supervise.py RESULT.json COMMAND ...`.

RESULT gets `seconds` of the whole process and `peak_bytes`, the highest anonymous and shared memory of it and of all that it
starts in its session, seen up to ten times a second. The command ends with the process that started this one, however that ended.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from sparsify.files import write_json
from sparsify.memory import anonymous, anonymous_of_session

INTERVAL = 0.1  # seconds between two looks at the memory, of which one costs a twentieth of them, or waits for a second


def main(result: str, command: list[str]) -> int:
    """The exit status of the command; its signal ends this process too."""
    parent, session, started, peak, pause = os.getppid(), os.getsid(0), time.monotonic(), 0, INTERVAL
    running = subprocess.Popen(command)
    while True:
        with suppress(subprocess.TimeoutExpired):
            status = running.wait(pause)
            break
        looked = time.monotonic()
        peak = max(peak, (anonymous_of_session(session) or 0) - (anonymous() or 0))
        pause = min(1.0, max(INTERVAL, 20 * (time.monotonic() - looked)))
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
    if status < 0:
        os.kill(os.getpid(), -status)
    if status == 0:
        write_json(Path(result), {"seconds": round(time.monotonic() - started, 2), "peak_bytes": peak})
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
