"""What vLLM calls at start, in each of its processes (entry point `vllm.general_plugins`): the plugin, or a refusal.

The plugin takes part in the loading of weights, which vLLM changes between versions without notice. In a version that it is not
for, a sparse24 checkpoint is refused in a sentence when it is loaded, and all other models are served as ever.
"""

import logging
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.runtime.vllm_versions import installed_version, version_problem

METHOD = "sparse24"

logger = logging.getLogger("vllm.sparsify")


def register() -> None:
    """Entry point. vLLM calls it in every process, in some twice."""
    problem = version_problem(installed_version())
    if problem is None:
        from sparsify.runtime import vllm_plugin

        vllm_plugin.register()
    else:
        register_refusal(problem)


def register_refusal(problem: str) -> None:
    """Make vLLM refuse sparse24 checkpoints with this sentence; no other API of vLLM is used."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Refused(QuantizationConfig):
        @classmethod
        def get_name(cls) -> Any:
            return METHOD

        @classmethod
        def get_supported_act_dtypes(cls) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Refused":
            raise CheckpointError(problem)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            raise CheckpointError(problem)

    register_quantization_config(METHOD)(Refused)
    logger.debug(problem)
