"""How llm-compressor names modules, in the patterns of our recipes.

It compares a target with the full name of a module, a regular expression with the start of that name, and a word with the
names of the module's classes (compressed-tensors 0.19, `utils/match.py`). Ours are also compared with the last components of
a name, unless the regular expression begins with `^`.
"""

import re

from sparsify.matching import matches, pattern_problem

EVERYTHING = ("Linear", "__ALL__", "__ALL_PRUNABLE__")
HEADS = ("lm_head", "language_model.lm_head", "model.lm_head", "embed_out", "proj_out", "output")
"""Output heads by the names that transformers' classes give them."""

_ATTENTION = [f"self_attn.{leaf}_proj" for leaf in "qkvo"]
_MLP = [f"mlp.{part}{leaf}_proj" for part in ("", "experts.0.") for leaf in ("gate", "up", "down")]
USUAL = tuple(f"model.layers.{layer}.{leaf}" for layer in (0, 1, 2, 10, 31) for leaf in [*_ATTENTION, *_MLP])
"""Linears as they are called in most models: for what can be said of a target before there is a model."""


def is_class(target: str) -> bool:
    """Whether a target is a class: those of modules begin with a capital, names of modules do not."""
    return re.fullmatch(r"[A-Z]\w*", target) is not None


def names(target: str, module: str) -> bool:
    """Whether a target names a module of this full name, as compressed-tensors decides it (classes apart)."""
    if not target.startswith("re:"):
        return target == module
    try:
        return matches(target[3:], module)
    except ValueError:  # the recipe's own check says so
        return False


def names_head(target: str) -> bool:
    return any(names(target, head) for head in HEADS)


def rank(target: str) -> tuple[int, str]:
    """Sorts the targets of a linear by precedence, lowest first: names win over regular expressions, those over classes, and
    among equals the alphabetically first (`match_targets`)."""
    return (0 if target in EVERYTHING else 1 if target.startswith("re:") else 2), _reversed(target)


def _reversed(text: str) -> str:
    return "".join(chr(0x10FFFF - ord(letter)) for letter in text) + chr(0x10FFFF)


def pattern_of(target: str) -> str:
    """Our pattern for the linears that a target names."""
    if not target.startswith("re:"):
        return f"re:^{re.escape(target)}$" if set(target) & set("*?[") else target
    regex = target[3:]
    free = regex.startswith(".*") and not _alternatives(regex)  # matches a name when it matches its last components
    if free or regex.startswith("^") or pattern_problem(regex):
        return target
    return f"re:^(?:{regex})" if _alternatives(regex) else f"re:^{regex}"


def pattern_inside(target: str) -> str | None:
    """Our pattern for the linears that a target names or that lie in a module which it names; None where that cannot be said."""
    inside = r"(?:\..+)?$"
    if not target.startswith("re:"):
        return f"re:^{re.escape(target)}{inside}" if "." in target else target
    regex = target[3:]
    ends = len(re.findall(r"(?<!\\)\$", regex))
    if not ends:
        return pattern_of(target)
    if ends == 1 and regex.endswith("$") and not _alternatives(regex):
        return pattern_of(f"re:{regex[:-1]}{inside}")
    return None


def _alternatives(regex: str) -> bool:
    """Whether a regular expression has a `|` outside of all brackets."""
    depth, skip, inside = 0, False, False
    for letter in regex:
        if skip:
            skip = False
        elif letter == "\\":
            skip = True
        elif inside:
            inside = letter != "]"
        elif letter == "[":
            inside = True
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and depth == 0:
            return True
    return False
