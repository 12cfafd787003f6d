"""What a selection may cost, as the command line says it: `bits=3.5`, `bytes=90MB`, `speed=1.8x`, `kl=0.2`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsify.errors import RecipeError

KINDS = {
    "bits": "mean bits per weight of the linears, as in bits=3.5",
    "bytes": "bytes of all tensors of the checkpoint, as in bytes=90MB",
    "speed": "how many times faster than dense the linears run, as in speed=1.8x",
    "kl": "predicted KL divergence from the dense model in nats per token, as in kl=0.2",
}
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """kind: a key of KINDS; value: bits, bytes, times, nats."""

    kind: str
    value: float
    text: str

    @property
    def file(self) -> str:
        """The name of what is written for it: `bits-3.5`."""
        return re.sub(r"[^\w.]+", "-", self.text)


def parse_budget(text: str) -> Budget:
    """RecipeError for what is no budget."""
    kind, equals, value = (part.strip() for part in text.partition("="))
    if not equals or kind not in KINDS:
        raise RecipeError(
            f"--budget {text[:100]}: write one of {', '.join(f'{k}=... ({said})' for k, said in KINDS.items())}"
        )
    units = {"bytes": UNITS, "speed": {"": 1, "x": 1}}.get(kind, {"": 1})
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)", value)
    number = float(found[1]) * units[found[2]] if found and found[2] in units else math.nan
    if not (math.isfinite(number) and number > 0):
        raise RecipeError(f"--budget {text[:100]}: '{value[:100]}' is no positive number; it means {KINDS[kind]}")
    return Budget(kind, number, f"{kind}={value.replace(' ', '')}")
