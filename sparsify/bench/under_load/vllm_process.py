"""vLLM's command line as a process that ends with the one that started it: `python -m sparsify.bench.under_load.vllm_process`."""

from __future__ import annotations

from sparsify.bench.vllm_cli import main
from sparsify.bench.worker import end_with_parent  # importing it also keeps vLLM to SPARSIFY_CPU_LEVEL

# vLLM's processes are spawned and import this file again: only the real call may run the command.
if __name__ == "__main__":
    end_with_parent()
    main()
