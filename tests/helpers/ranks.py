"""Runs a function in several processes as torchrun starts them. They are forked from one that has loaded the libraries, which saves
half a minute of imports; what torchrun itself does is tested elsewhere."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["sparsify.compiler.apply", "sparsify.training.trainer", "sparsify.cli", "transformers.models.llama"]
SECONDS = 600
AGENT_SECONDS = 90  # a process that was killed before all had met is known to torchrun alone
KILL_SECONDS = 30  # after which torchrun kills what SIGTERM did not end: who waits for others to come hears no signal


@dataclass(frozen=True)
class Ended:
    """Of each process its exit code (negative: the signal that ended it) and what it wrote on stdout and stderr."""

    codes: list[int | None]
    said: list[str]


def in_ranks(
    folder: Path, function: Callable[..., None], *args: Any, count: int = 2, kill: tuple[int, float] | None = None
) -> Ended:
    """Call `function(*args)`, which must be importable, in `count` processes.

    folder: for their logs; kill: a rank, and the seconds after which it is killed
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    started = [
        CONTEXT.Process(target=_one, args=(rank, count, port, log, function, args)) for rank, log in enumerate(logs)
    ]
    for process in started:
        process.start()
    if kill is not None:
        rank, seconds = kill
        started[rank].join(seconds)
        started[rank].kill()
        for process in started:  # torchrun ends the others at once; here they may first find out by themselves
            process.join(AGENT_SECONDS)
            if process.is_alive():
                process.terminate()
                process.join(KILL_SECONDS)
            if process.is_alive():
                process.kill()
    for process in started:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    said = [log.read_text(errors="replace") if log.exists() else "" for log in logs]
    return Ended([process.exitcode for process in started], said)


def _one(rank: int, count: int, port: int, log: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*args)


def command(argv: list[str], dies: str | None = None) -> None:
    """`sparsify ARGV`. dies: where process 1 ends by SIGKILL, `step 6` of a training or `block 1` of the walk"""
    if dies is not None and os.environ["RANK"] == "1":
        _die_at(*dies.split())
    from sparsify.cli import main

    sys.exit(main(argv))


def _die_at(what: str, number: str) -> None:
    from sparsify.model.sequential import Walk
    from sparsify.training.trainer import DistillTrainer

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if what == "step":
        end = DistillTrainer._end_of_step

        def end_of_step(self: Any) -> None:
            end(self)
            if len(self.watch.losses) == int(number):
                die()

        DistillTrainer._end_of_step = end_of_step  # type: ignore[method-assign]
    else:
        visit = Walk.visit

        def visited(self: Any, index: int, *args: Any) -> Any:
            found = visit(self, index, *args)
            if index == int(number):
                die()
            return found

        Walk.visit = visited  # type: ignore[method-assign]


def noting_what_is_whole(argv: list[str], file: str) -> None:
    """`command`, with the most weights that were whole in this process at once, while the student was read, in `file` + rank."""
    import sparsify.compiler.run_training as training
    from sparsify.training.sharding import is_shard

    most = 0
    ready = training._ready

    def noted(settings: Any, names: Any, opened: Any, block: str) -> None:
        nonlocal most
        whole = [p.numel() for p in opened.model.parameters() if not p.is_meta and not is_shard(p)]
        most = max(most, sum(whole))
        ready(settings, names, opened, block)
        Path(file + os.environ["RANK"]).write_text(str(most))

    training._ready = noted
    command(argv)


def differing(recipe: str, models: list[str], output: str) -> None:
    """What `apply` says in each process where one differs from the main one: in a version, the recipe, a file of the model."""
    import sparsify.compiler.apply as applying
    from sparsify.errors import SparsifyError
    from sparsify.recipe import parse_recipe

    second = os.environ["RANK"] == "1"
    versions = applying._versions
    for case in ("version", "recipe", "file"):
        applying._versions = (lambda: {**versions(), "torch": "1.0"}) if second and case == "version" else versions
        text = recipe.replace("samples: 8", "samples: 9") if second and case == "recipe" else recipe
        model = models[1] if second and case == "file" else models[0]
        try:
            applying.apply(parse_recipe(text), model, output, quiet=True)
        except SparsifyError as error:
            print(f"{case}: {error}", flush=True)
