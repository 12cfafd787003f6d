"""Tasks through lm-evaluation-harness with vLLM as the back end: the model is scored as it is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsify.errors import MissingDependency, SparsifyError
from sparsify.evaluation.harness import Checked, Watch, quiet_harness, require_ends

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise MissingDependency(
        f"--backend vllm needs vLLM, which cannot be imported ({error}): pip install 'sparsify-24[cpu]' "
        "(on a machine with an NVIDIA GPU: pip install 'sparsify-24[cuda]')"
    ) from error
try:
    from lm_eval.models.vllm_causallms import VLLM
except ImportError as error:
    raise MissingDependency(
        f"lm-evaluation-harness cannot use this vLLM ({error}): pip install --upgrade 'sparsify-24[eval]'"
    ) from error

AT_ONCE = 256  # answers that vLLM is given at a time; without a number the harness has it show a bar of its own


class ServedModel(Checked, VLLM):
    """A checkpoint in a vLLM engine of its own, in the type and through the kernels that serving it takes.

    directory: of the checkpoint; tokenizer: its own; context: tokens of a prompt with its answer, at most; advance: that of `Watch`
    """

    room = -1  # vLLM generates a token after what it scores

    def __init__(
        self, name: str, directory: Path, tokenizer: Any, context: int | None, advance: Callable[[], None]
    ) -> None:
        require_ends(name, tokenizer)
        try:
            with quiet_harness():
                super().__init__(pretrained=str(directory), max_model_len=context, batch_size=AT_ONCE)
        except Exception as error:  # of vLLM's engine, of any kind
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise SparsifyError(
                f"{name}: vLLM does not start with it ({reason}); `sparsify doctor` looks at vLLM"
            ) from error
        self.name = name
        self.set_cache_hook(Watch(name, advance))

    @property
    def config(self) -> Any:
        """That of transformers."""
        return self._config

    def close(self) -> None:
        """End the engine and its process."""
        self.model.llm_engine.engine_core.shutdown()
        del self.model
