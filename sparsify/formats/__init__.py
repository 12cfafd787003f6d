"""Checkpoint formats: what a compressed linear looks like on disk. A new format is one file here and one line below."""

from sparsify.errors import CheckpointError
from sparsify.formats.dense import Dense
from sparsify.formats.gptq import Gptq
from sparsify.formats.marlin24 import Marlin24
from sparsify.formats.pack_quantized import PackQuantized
from sparsify.formats.scheme import Format, ModuleScheme
from sparsify.formats.sparse24 import Sparse24
from sparsify.formats.sparse24_bitmask import Sparse24Bitmask

_ALL: tuple[Format, ...] = (Sparse24(), Dense(), PackQuantized(), Gptq(), Marlin24(), Sparse24Bitmask())
_FORMATS: dict[str, Format] = {format.name: format for format in _ALL}

__all__ = ["Format", "ModuleScheme", "get_format", "known_formats", "written_formats"]


def known_formats() -> list[str]:
    """Names of the formats that are read."""
    return list(_FORMATS)


def written_formats() -> list[str]:
    """Names of the formats that are written too."""
    return [name for name, format in _FORMATS.items() if format.written]


def get_format(name: str) -> Format:
    """The format called `name`; CheckpointError lists the known ones."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise CheckpointError(f"format {name!r} is unknown; known formats: {', '.join(_FORMATS)}") from None
