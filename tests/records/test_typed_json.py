"""Plain data into dataclasses: each kind of field, right and wrong, named by its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from attnpress.records.typed_json import FieldError, Range, build


@dataclass(frozen=True)
class Inner:
    name: str
    share: Annotated[float, Range(0, 1)] = 0.5


@dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"]
    inner: list[Inner]
    by_name: Mapping[str, int | float | None]
    on: bool = False
    text: str | None = None
    anything: dict[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {"count": 3, "kind": "a", "inner": [{"name": "x"}], "by_name": {"q": 8, "k": 6.5, "v": None}}


def test_plain_data_becomes_what_the_hints_say() -> None:
    assert build(Outer, GOOD) == Outer(3, "a", [Inner("x")], {"q": 8, "k": 6.5, "v": None})
    assert build(Outer, {**GOOD, "on": True, "text": "t", "anything": {"deep": [1]}}).anything == {"deep": [1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "'count': should be a whole number, found True"),
        ({"count": 1.0}, "'count': should be a whole number, found 1.0"),
        ({"count": 2**70}, "'count': should be a whole number"),
        ({"count": None}, "'count': should be a whole number, found null"),
        ({"kind": "c"}, "'kind': should be one of a, b, found 'c'"),
        ({"kind": []}, r"'kind': should be one of a, b, found \[\]"),
        ({"inner": {}}, "'inner': should be a list"),
        ({"inner": [None]}, "inner '0': should be a mapping, found null"),
        ({"inner": [{}]}, "inner.0 'name': this key is missing"),
        ({"inner": [{"name": "x", "nmae": "y"}]}, "inner.0 'nmae': this key is not known"),
        ({"inner": [{"name": "x", "share": 1.5}]}, "inner.0 'share': should be a number from 0 to 1, found 1.5"),
        ({"inner": [{"name": "x", "share": "1"}]}, "inner.0 'share': should be a number, found '1'"),
        ({"by_name": {"q": "8"}}, "by_name 'q': should be a"),
        ({"by_name": {"q": 1e300}}, "by_name 'q': should be a"),
        ({"by_name": [8]}, "'by_name': should be a mapping"),
        ({"on": 1}, "'on': should be true or false"),
        ({"text": 1}, "'text': should be a text, found 1"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=f"^{message}"):
        build(Outer, GOOD | change)


def test_unknown_keys_can_be_left_out() -> None:
    assert build(Inner, {"name": "x", "more": 1}, extra=True) == Inner("x")
    with pytest.raises(FieldError, match="all of it: should be a mapping, found null"):
        build(Inner, None)
