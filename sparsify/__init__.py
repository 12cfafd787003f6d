"""sparsify: a compiler that turns large language models into 2:4 sparse, 4-bit checkpoints.

Importing this package is cheap on purpose: every module is imported by whoever needs it. It only registers an import
hook with transformers, so that `from_pretrained` loads sparse24 checkpoints.
"""

from sparsify._version import __version__ as __version__
from sparsify.runtime.import_hook import register_with_transformers

register_with_transformers()
