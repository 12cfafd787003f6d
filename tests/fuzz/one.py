"""One target under atheris: `python -m tests.fuzz.one NAME FOLDER [options of libFuzzer]`, which `python -m tests.fuzz` starts.

A finding does not end the run: its input is kept in FOLDER/findings, one for each place in the code that it comes from.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from hashlib import sha256
from pathlib import Path
from random import Random

import atheris

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

with atheris.instrument_imports(include=["sparsify"]):
    from tests.fuzz.mutations import mutated
    from tests.fuzz.targets import prepare, run

from sparsify.progress import silenced

OURS = Path(__file__).parent.parent.parent


def place_of(error: BaseException) -> str:
    """Where an error comes from: the last line of ours on the way to it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "sparsify/" in frame.filename and "/site-packages/" not in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} {Path(last.filename).name}:{last.lineno}"


def main(name: str, folder: Path, options: list[str]) -> None:
    """Does not return: libFuzzer ends the process."""
    corpus, findings = folder / "corpus", folder / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    work = tempfile.TemporaryDirectory(prefix="sparsify-fuzz-")
    os.environ["SPARSIFY_CACHE"] = f"{work.name}/cache"
    logging.disable(logging.CRITICAL)
    function, seeds, words = prepare(name, Path(work.name) / "target")
    for seed in seeds:
        (corpus / sha256(seed).hexdigest()[:16]).write_bytes(seed)
    os.chdir(work.name)

    def one(data: bytes) -> None:
        try:
            run(function, data)
        except Exception as error:
            place = place_of(error)
            kept = findings / sha256(place.encode()).hexdigest()[:12]
            if not kept.exists():
                kept.write_bytes(data)
                kept.with_suffix(".txt").write_text(f"{place}\n{traceback.format_exc()[-4000:]}")
                print(f"finding: {place}: {str(error)[:200]!r}", file=sys.stderr, flush=True)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.4:
            return bytes(atheris.Mutate(data, longest))
        return mutated(data, random, words, seeds)[:longest]

    atheris.Setup([name, str(corpus), *options], one, custom_mutator=mutate)
    with silenced(True):
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3:])
