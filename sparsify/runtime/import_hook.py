"""Registers the transformers loader without importing transformers.

`transformers.quantizers.auto` must be imported before a quantizer can be registered, and that costs seconds: too much
for `sparsify --help`, and too much for vLLM's workers. So `import sparsify` leaves a finder behind that waits for this
one module and registers right after it was imported, by whomever. It removes itself then.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.quantizers.auto"
REGISTERED_BY = "sparsify.runtime.hf_quantizer"


class _RegisterAfterImport(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(REGISTERED_BY)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Make `from_pretrained` know sparse24: now if transformers' quantizers are there, else when they are imported."""
    if AWAITED in sys.modules:
        importlib.import_module(REGISTERED_BY)
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
