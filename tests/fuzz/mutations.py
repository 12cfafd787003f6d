"""Changes of inputs: of values in JSON and YAML, and of bytes. Everything follows from the generator that is given."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import yaml

LONGEST = 200_000  # bytes of an input
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 16, 127, 4096, 2**31, 2**63 - 1, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), "", "a", "0", "1", "-1", "nan", "2:4", "\0", "é", "\ud800", "\x1b[31m", "x" * 300, "re:(a+)+$", "..",
    "/", "a/b", [], {}, [[]], [None], [0], [-1], [1, 2], {"": None}, {"a": {}},
)  # fmt: skip
PIECES = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b":", b",", b"'", b"- ", b"#", b"&a ", b"*a",
    b"!!int ", b"|\n", b"NaN", b"Infinity", b"null", b"true", b"1e999", b"-", b"0x10", b"\\ud800", b"\xed\xa0\x80", b"[" * 200,
    b"9" * 5000, b"re:", b"\xe2\x80\xae", b"<<: ", b"%",
)  # fmt: skip

Write = Callable[[Any], bytes]


def mutated(data: bytes, random: Random, words: Sequence[str] = (), others: Sequence[bytes] = ()) -> bytes:
    """An input with one to four changes. words: what the target knows; others: inputs whose parts may be put into this one."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        tree = _tree(data) if random.random() < 0.75 else None
        data = _bytes(data, random, words, others) if tree is None else tree[1](_changed(tree[0], random, words))
    return data[:LONGEST]


def _tree(data: bytes) -> tuple[Any, Write] | None:
    """The values of an input that is a mapping or a list in JSON or YAML, and how to write them again."""
    try:
        found = json.loads(data)
        return (found, _json) if isinstance(found, dict | list) else None
    except (ValueError, RecursionError):
        pass
    if len(data) > 20_000 or data.count(b"[") + data.count(b"{") + data.count(b"*") > 300:
        return None  # it would take long
    try:
        found = yaml.safe_load(data)
        return (found, _yaml) if isinstance(found, dict | list) else None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError):
        return None


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"{}"


def _yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, yaml.YAMLError):
        return b"{}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value inside of another one, as the container and the key."""
    pending = [value]
    while pending:
        one = pending.pop()
        entries = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, inner in entries:
            yield one, key
            pending.append(inner)


def _changed(tree: Any, random: Random, words: Sequence[str]) -> Any:
    """The same values with one replaced, removed, added, moved or wrapped."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return random.choice(VALUES)
    where, key = random.choice(places)
    other, other_key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del where[key]
    elif kind == 1:
        where[key] = copy.deepcopy(other[other_key])
    elif kind == 2 and isinstance(where, dict):
        where[_word(random, words)] = where.pop(key)
    elif kind == 3:
        name, value = _word(random, words), random.choice(VALUES)
        where.update({name: value}) if isinstance(where, dict) else where.insert(
            random.randrange(len(where) + 1), value
        )
    elif kind == 4 and isinstance(where[key], int | float) and not isinstance(where[key], bool):
        where[key] = random.choice(
            (where[key] + 1, where[key] - 1, -where[key], where[key] * 2, where[key] * 1e6, str(where[key]))
        )
    elif kind == 5:
        where[key] = random.choice(([where[key]], {_word(random, words): where[key]}))
    elif kind == 6 and isinstance(where[key], str):
        where[key] = _text(where[key], random, words)
    else:
        where[key] = random.choice(VALUES) if random.random() < 0.7 else _word(random, words)
    return tree


def _word(random: Random, words: Sequence[str]) -> str:
    return random.choice(words) if words else random.choice("abc")


def _text(text: str, random: Random, words: Sequence[str]) -> str:
    at = random.randrange(len(text) + 1)
    return random.choice((text[:at], text[:at] + _word(random, words) + text[at:], text * 2, text[at:], text.upper()))


def _bytes(data: bytes, random: Random, words: Sequence[str], others: Sequence[bytes]) -> bytes:
    """One change of bytes: flipped, removed, doubled, or something put in."""
    kind = random.randrange(7)
    at = random.randrange(len(data) + 1)
    until = min(len(data), at + random.choice((1, 1, 2, 4, 8, 64)))
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[until:]
    if kind == 2:
        return data[:until] + data[at:]
    if kind == 3 and words:
        return data[:at] + random.choice(words).encode("utf-8", "replace") + data[at:]
    if kind == 4 and others:
        other = random.choice(others)
        return data[:at] + other[random.randrange(len(other) + 1) :]
    if kind == 5:
        return data[:at] + random.randbytes(until - at) + data[until:]
    return data[:at] + random.choice(PIECES) + data[at:]
