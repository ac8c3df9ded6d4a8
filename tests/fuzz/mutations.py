"""Damage that targets have in common: to text, to bytes, and to plain data such as JSON holds."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 9, 255, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.5, -0.5, 1e-45,
    1e38, 1e300, math.nan, math.inf, -math.inf, "", " ", "0", "no", "nan", "a" * 300, "\x00", "\ud800", "é", "../..",
    "/", [], [[]], [0], {}, {"": {}}, {"a": None},
)  # fmt: skip
"""Values that belong nowhere, or nearly."""

PIECES = (
    "\ufeff", "\x00", "\r", "\n", "\r\n", "\t", " ", ",", ":", ": ", "#", "-", "- ", "{", "}", "[", "]", '"', "'",
    "&a ", "*a", "<<: ", "!!python/object:os.system ", "!!int ", "!!timestamp ", "~", "null", "nan", ".inf", "1e999",
    "2026-11-29", "0x", "1_0", "yes", "\\ud800", "\ud800", "\u2028", "|", ">", "%", "@", "`", "---", "...",
)  # fmt: skip
"""What means something to a reader of JSON, YAML or CSV."""


def odd(rng: random.Random) -> Any:
    """A value to put anywhere."""
    return copy.deepcopy(rng.choice(ODD))


def places(value: Any, limit: int = 20_000) -> list[tuple[Any, Any]]:
    """Every container in plain data with each of its keys or places."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left and len(found) < limit:
        inside = left.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else []
        for key in keys:
            found.append((inside, key))
            left.append(inside[key])
    return found


def damage_plain(rng: random.Random, value: Any) -> Any:
    """A copy of plain data with one thing wrong, somewhere; not all that is done makes it wrong."""
    try:
        value = copy.deepcopy(value)
    except RecursionError:  # so deep that there is nothing to add
        return value
    spots = places(value)
    if not spots:
        return odd(rng)
    # By depth first: a record has ten thousand figures of heads, and one format.
    by_key: dict[str, list[tuple[Any, Any]]] = {}
    for inside, key in spots:
        by_key.setdefault(key if isinstance(key, str) else "[]", []).append((inside, key))
    inside, key = rng.choice(by_key[rng.choice(sorted(by_key))])
    kind = rng.choice(("replace", "replace", "remove", "add", "swap", "nest", "text"))
    if kind == "remove":
        del inside[key]
    elif kind == "add" and isinstance(inside, dict):
        inside[rng.choice(("extra", "", "a" * 500, str(key) + "s", "\ud800"))] = odd(rng)
    elif kind == "add":
        inside.append(odd(rng))
    elif kind == "swap":
        other, place = rng.choice(spots)
        inside[key] = copy.deepcopy(other[place])
    elif kind == "nest":
        depth = rng.choice((1, 2, 50, 3000))
        for _ in range(depth):
            inside[key] = [inside[key]] if rng.random() < 0.5 else {"a": inside[key]}
    elif kind == "text":
        inside[key] = str(inside[key])[:1000]
    else:
        inside[key] = odd(rng)
    return value


def as_json(value: Any) -> str:
    """JSON as Python writes it, with NaN and lone surrogates where they are; too deep a nesting becomes brackets."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


def damage_text(rng: random.Random, text: str) -> str:
    """A text cut, repeated, or with pieces put in or taken out."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, width = rng.randint(0, len(text)), rng.choice((1, 2, 10, 100))
        kind = rng.choice(("cut", "drop", "insert", "insert", "repeat", "line"))
        if kind == "cut":
            text = text[:place]
        elif kind == "drop":
            text = text[:place] + text[place + width :]
        elif kind == "insert":
            text = text[:place] + rng.choice(PIECES) * rng.choice((1, 1, 1, 3, 200)) + text[place:]
        elif kind == "repeat":
            text = text[:place] + text[place : place + width] * rng.choice((2, 3, 50)) + text[place + width :]
        else:
            lines = text.splitlines(keepends=True)
            if lines:
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "".join(lines)
    return text[:200_000]


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut, flipped, overwritten, or put in."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        place = rng.randrange(len(found) + 1)
        kind = rng.choice(("cut", "flip", "flip", "insert", "zeros"))
        if kind == "cut":
            del found[place:]
        elif kind == "flip" and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif kind == "insert":
            found[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        else:
            found[place : place + 64] = bytes(len(found[place : place + 64]))
    return bytes(found)


def to_bytes(text: str) -> bytes:
    """UTF-8, and what is no Unicode as the bytes that some writers make of it."""
    return text.encode("utf-8", "surrogatepass")
