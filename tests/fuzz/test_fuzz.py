"""Every target on its corpus and on some random inputs, always the same ones; `make fuzz` is the long run."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from sparsify.errors import SparsifyError
from sparsify.progress import silenced
from tests.fuzz import targets
from tests.fuzz.__main__ import kernel_targets, reader_targets
from tests.fuzz.mutations import mutated

EXECUTIONS = {
    "config": 12,
    "plan": 40,
    "quantization": 40,
    "tensors": 40,
    "resume": 40,
    "report": 60,
    "text": 60,
    "tokenizer": 30,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_result_or_an_error_of_ours(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, seeds, words = targets.prepare(name, folder / name)
    monkeypatch.chdir(folder)
    random = Random(name)
    with silenced(True):
        accepted = [targets.run(function, seed) for seed in seeds]
        assert any(accepted)  # or nothing behind the first check is ever reached
        for _ in range(EXECUTIONS.get(name, 150)):
            data = mutated(random.choice(seeds), random, words, seeds)
            try:
                targets.run(function, data)
            except Exception as error:
                error.add_note(f"target {name}, input {data!r}")
                raise


def test_what_does_not_hold_is_found() -> None:
    def nothing(data: bytes) -> None:
        raise SparsifyError(data.decode())

    assert not targets.run(nothing, b"a sentence") and targets.run(len, b"")
    with pytest.raises(targets.Broken, match="a message of 1 characters"):
        targets.run(nothing, b" ")
    with pytest.raises(targets.Broken, match="a message of 9000 characters"):
        targets.run(nothing, b"a" * 9000)
    with pytest.raises(ZeroDivisionError):
        targets.run(lambda data: 1 // len(data), b"")


# In a process of its own, as targets run: one that has run many tests may have memory of theirs to give again.
GREEDY = """
from tests.fuzz import targets

for _ in range(2):  # what the process held before hides nothing
    try:
        targets.run(lambda _: b"a" * 2 * targets.NBYTES, b"")
    except targets.Broken as found:
        print(found)
"""


def test_an_input_that_takes_much_memory_is_found(repository) -> None:
    ran = subprocess.run([sys.executable, "-c", GREEDY], cwd=repository, capture_output=True, text=True, check=True)
    said = ran.stdout.splitlines()
    assert len(said) == 2 and all("MB" in line for line in said)


def test_inputs_are_changed_the_same_way_each_time() -> None:
    for data in (b'{"a": [1, "b"]}', b"a: [1, b]\n", b"\xff\0", b""):
        once, again = (
            [mutated(data, random, ("word",), [b"other"]) for _ in range(200)] for random in (Random(1), Random(1))
        )
        assert once == again and len(set(once)) > 50


def test_the_command_knows_every_target() -> None:
    assert reader_targets() == list(targets.TARGETS)
    assert kernel_targets() == ["kernels/gram", "kernels/softmax", "kernels/solver", "kernels/sparse24"]
