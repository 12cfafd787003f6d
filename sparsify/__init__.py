"""sparsify: a compiler that turns large language models into 2:4 sparse, 4-bit checkpoints.

Importing this package is cheap on purpose: every module is imported by whoever needs it. All it does is leave word
with transformers, so that `from_pretrained` loads sparse24 checkpoints.
"""

from sparsify.runtime.import_hook import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
