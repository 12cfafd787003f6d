"""A call of the operating system fails, the disk is full, memory or the clock gives way: one sentence, and the same bytes after.

A few places, drawn at random; benchmarks/faults.py goes through all of them.
"""

import errno
import random
import shutil
import sys

import pytest

from tests.helpers.faults import Fault, Server, commands, contents, exported, trial

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="the library that lets calls fail needs Linux and cc"
)
LARGE = 1 << 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The server, and by name of the command: itself, what it writes, how often it calls what."""
    folder = tmp_path_factory.mktemp("faults") / "files"
    folder.mkdir()
    server, made = Server(folder), commands(folder)
    ran = server.run(made["apply"].argv, large=LARGE)
    assert ran.status == 0, ran.error
    found = {"apply": (made["apply"], contents(made["apply"].output), ran.counted)}
    shutil.rmtree(made["apply"].output)
    export = exported(server, made["apply"], folder)
    ran = server.run(export.argv, large=LARGE)
    assert ran.status == 0, ran.error
    found["export"] = (export, contents(export.output), ran.counted)
    shutil.rmtree(export.output)
    yield server, found
    server.close()


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("apply", "write", {"error": errno.ENOSPC, "lasting": True}),
        ("apply", "rename", {"killing": True}),
        ("apply", "read", {}),
        ("apply", "allocate", {"error": errno.ENOMEM}),
        ("apply", "clock", {"jump": -31_536_000}),
        ("export", "write", {"error": errno.ENOSPC, "lasting": True}),
        ("export", "fsync", {}),
        ("export", "rename", {}),
        ("export", "mkdir", {"killing": True}),
    ],
)
def test_one_sentence_and_the_same_bytes_after(runs, name, kind, more):
    server, found = runs
    command, expected, counted = found[name]
    at = random.Random(f"{name} {kind}").randint(1, max(counted[kind], 20))
    assert trial(server, command, expected, Fault(kind, at, **more), large=LARGE) is None
