"""Which linears a list of patterns names: `ignore`, the `match` of an override, the `targets` of adapters."""

import fnmatch
from collections.abc import Iterable

from sparsify.matching import matches


def ignored_by(module: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that names `module` (`model.layers.0.mlp.down_proj`), or None.

    A pattern is compared with the full name and with every run of last components (`mlp.down_proj`, `down_proj`). It
    is a name, a name with `*`, `?`, `[..]`, or `re:REGEX`. As in compressed-tensors a regular expression is anchored
    at the start only, so that lists written for it keep their meaning; one that begins with `^` is compared with the
    full name alone."""
    parts = module.split(".")
    names = [".".join(parts[start:]) for start in range(len(parts))]
    for pattern in patterns:
        if pattern.startswith("re:"):
            whole = pattern.startswith("re:^")
            if any(matches(pattern[3:], name) for name in (names[:1] if whole else names)):
                return pattern
        elif any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return pattern
    return None


def last_components(module: str, count: int) -> str:
    """`mlp.down_proj` of `model.layers.0.mlp.down_proj`."""
    return ".".join(module.split(".")[-count:])
