"""sparsify: a compiler that turns large language models into 2:4 sparse, 4-bit checkpoints.

Importing this package is cheap on purpose: nothing heavy is imported here, every module is imported by whoever needs it.
"""

__version__ = "0.1.0"
