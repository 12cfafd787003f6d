"""Checkpoint formats: what a compressed linear looks like on disk. A new format is one file here and one line below."""

from sparsify.errors import CheckpointError
from sparsify.formats.dense import Dense
from sparsify.formats.marlin24 import Marlin24
from sparsify.formats.pack_quantized import PackQuantized
from sparsify.formats.scheme import Format, ModuleScheme
from sparsify.formats.sparse24 import Sparse24

_FORMATS: dict[str, Format] = {format.name: format for format in (Sparse24(), Dense(), PackQuantized(), Marlin24())}

__all__ = ["Format", "ModuleScheme", "get_format", "known_formats"]


def known_formats() -> list[str]:
    """Names that `get_format` and recipes accept."""
    return list(_FORMATS)


def get_format(name: str) -> Format:
    """The format called `name`; CheckpointError lists the known ones."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise CheckpointError(f"format {name!r} is unknown; known formats: {', '.join(_FORMATS)}") from None
