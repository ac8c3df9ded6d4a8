"""JSON according to RFC 8259. Python's reader also accepts NaN, repeated keys and unpaired surrogates."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


class JsonError(ValueError):
    """A text is not valid JSON. The message gives the reason.

    Attributes:
        line: line number from 1, if known.
    """

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def parse_json(text: str) -> Any:
    """Parse a JSON text; a leading byte-order mark is dropped.

    Raises:
        JsonError: invalid JSON, including NaN, infinity, numbers beyond float64, duplicate keys, and nesting or
            integers too long for Python.
    """
    try:
        return json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg}: column {error.colno}", error.lineno) from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except JsonError:
        raise
    except ValueError:
        raise JsonError("an integer with too many digits") from None


def dump_json(value: Any) -> str:
    """One line of JSON in Unicode.

    Raises:
        ValueError: NaN, infinity, an unpaired surrogate, or nesting that is too deep.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not is_unicode(text):
        raise ValueError("an unpaired surrogate")
    return text


def is_unicode(text: str) -> bool:
    """False for a string with an unpaired surrogate, which no Unicode encoding can represent."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise JsonError(f"duplicate key {twice[:40]!r}")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"{text[:20]} is beyond the largest number")
    return value


def _refuse(name: str) -> float:
    raise JsonError(f"{name} is not a JSON value")
