"""Strict JSON: what Python's reader takes beyond the standard is refused, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnpress.records.strict_json import JsonError, dump_json, is_unicode, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=8,
)


@given(VALUES)
def test_what_json_can_hold_goes_there_and_back(value: Any) -> None:
    assert parse_json(dump_json(value)) == value
    assert parse_json("\ufeff" + json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "reason", "line"),
    [
        ('{"a": NaN}', "NaN is not a JSON value", 1),
        ('{"a": -Infinity}', "-Infinity is not a JSON value", 1),
        ('{"a": 1e999}', "1e999 is beyond the largest number", 1),
        ('{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'", 1),
        ('[{"b": {"c": 1, "c": 1}}]', "duplicate key 'c'", 1),
        ("[" * 100_000, "nested too deeply", 1),
        ("9" * 5000, "an integer with too many digits", 1),
        ('{\n"a": 1,\n}', "column", 3),
        ("", "Expecting value", 1),
    ],
)
def test_what_is_not_json_is_refused_with_its_reason_and_line(text: str, reason: str, line: int) -> None:
    with pytest.raises(JsonError, match=reason) as told:
        parse_json(text)
    assert told.value.line == line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": "\ud83d"}, ["\udcff"]])
def test_what_cannot_be_written_is_not_written(value: Any) -> None:
    with pytest.raises(ValueError, match=r"surrogate|JSON"):
        dump_json(value)


def test_halves_of_surrogate_pairs_are_no_unicode() -> None:
    assert is_unicode("\U0001f600")
    assert not is_unicode("fine \ud83d")
