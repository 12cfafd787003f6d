"""Linears that vLLM loads as one: they must be stored alike, or the checkpoint cannot be served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from sparsify.solver.solve import Scheme

if TYPE_CHECKING:
    from sparsify.compiler.plan import Planned

MERGED = (  # what vLLM's model classes put side by side
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def as_sparse24(scheme: Scheme | None, inputs: int) -> tuple[object, ...]:
    """What the format tells apart of a linear with so many inputs."""
    if scheme is None:
        return ("dense",)
    return (
        "2:4" if scheme.pattern == "2:4" else "any",
        scheme.bits,
        (scheme.group_size or inputs) if scheme.quantize else None,
        scheme.symmetric,
    )


def _as_pack_quantized(scheme: Scheme | None, inputs: int) -> tuple[object, ...]:
    """Zeros are no pattern there, and what is not quantized is written dense."""
    return as_sparse24(scheme, inputs)[1:] if scheme is not None and scheme.quantize else ("dense",)


STORED: dict[str, Callable[[Scheme | None, int], tuple[object, ...]]] = {
    "sparse24": as_sparse24,
    "pack-quantized": _as_pack_quantized,
    "gptq": _as_pack_quantized,
}


def merged_with(name: str) -> list[str]:
    """The linears that vLLM puts beside this one, where the model has them."""
    parent, dot, leaf = name.rpartition(".")
    return [f"{parent}{dot}{other}" for together in MERGED if leaf in together for other in together if other != leaf]


def merged_units(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The linears of `names` that vLLM loads as one, together; every other one by itself. In the order of their first."""
    known = list(dict.fromkeys(names))
    units: dict[str, tuple[str, ...]] = {}
    for name in known:
        together = {name, *merged_with(name)}
        units.setdefault(min(together), tuple(other for other in known if other in together))
    return [*units.values()]


def merging_problem(linears: Mapping[str, Planned], format: str) -> str | None:
    """Which two linears would be merged and are not stored alike in `format`, or None. Where nothing merges, nothing is wrong."""
    stored = STORED.get(format)
    if stored is None:
        return None
    for name in linears:
        parent, dot, leaf = name.rpartition(".")
        for together in MERGED:
            present = [f"{parent}{dot}{member}" for member in together if f"{parent}{dot}{member}" in linears]
            if leaf not in together or present[0] != name:
                continue  # each set is looked at once, from its first linear
            one = linears[name]
            for other in present[1:]:
                two = linears[other]
                if stored(one.scheme, one.shape[1]) != stored(two.scheme, two.shape[1]):
                    return (
                        f"vLLM merges {name} and {other} into one linear, so both must be stored alike; but of {leaf} the recipe "
                        f"says: {one.describe()}; of {other.rpartition('.')[2]}: {two.describe()}. "
                        f"Match all of {', '.join(together)} in overrides and ignore"
                    )
    return None
