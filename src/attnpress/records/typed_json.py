"""Convert plain data to dataclasses by their type hints, with every field checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Built = TypeVar("Built")

LARGEST = 1e30
"""Maximum magnitude of a number; figures with larger ones cannot be drawn."""


class FieldError(ValueError):
    """A field is missing, unknown or of the wrong type.

    Attributes:
        place: of the field, such as "stages.0 'name'".
        problem: what is wrong with it.
    """

    def __init__(self, path: Sequence[str], problem: str) -> None:
        *parents, last = path or ("",)
        self.place = f"{'.'.join(parents)} {last!r}".lstrip() if last else "all of it"
        self.problem = problem
        super().__init__(f"{self.place}: {problem}")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, both inclusive, for use in `Annotated`."""

    low: float
    high: float = LARGEST


def build(kind: type[Built], value: Any, *, extra: bool = False) -> Built:
    """Convert plain JSON data according to a type hint.

    Args:
        kind: a dataclass with hints of these kinds: `Any`, `None`, `bool`, `int`, `float`, `str`, `list`, `dict` and
            `Mapping` with string keys, `Literal`, unions, `Annotated` with `Range`, and dataclasses.
        extra: ignore unknown keys at all levels instead of refusing them.

    Raises:
        FieldError: names the first invalid field.
    """
    found: Built = _build(kind, value, (), extra)
    return found


def _build(kind: Any, value: Any, path: tuple[str, ...], extra: bool) -> Any:
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _in_range(_build(inside[0], value, path, extra), inside[1:], path)
    if origin in (Union, UnionType):
        return _one_of(inside, value, path, extra)
    if origin is Literal:
        return _expect(value in inside, value, path, f"one of {', '.join(map(str, inside))}")
    if dataclasses.is_dataclass(kind):
        return _fields(kind, value, path, extra)
    if origin is list:
        _expect(isinstance(value, list), value, path, "a list")
        return [_build(inside[0], item, (*path, str(index)), extra) for index, item in enumerate(value)]
    if origin in (dict, Mapping):
        _expect(isinstance(value, dict), value, path, "a mapping")
        return {key: _build(inside[1], item, (*path, key), extra) for key, item in value.items()}
    return _scalar(kind, value, path)


def _scalar(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    if kind is float:
        fits = type(value) in (int, float) and abs(value) <= LARGEST
        return _expect(fits, value, path, "a number")
    if kind is int:
        return _expect(type(value) is int and abs(value) < 2**63, value, path, "a whole number")
    names = {str: "a text", bool: "true or false", NoneType: "null"}
    return _expect(type(value) is kind, value, path, names[kind])


def _fields(kind: Any, value: Any, path: tuple[str, ...], extra: bool) -> Any:
    _expect(isinstance(value, dict), value, path, "a mapping")
    hints, fields = _hints(kind), {one.name: one for one in dataclasses.fields(kind)}
    if unknown := [key for key in value if key not in fields and not extra]:
        raise FieldError((*path, unknown[0]), "this key is not known")
    found = {}
    for name, one in fields.items():
        if name in value:
            found[name] = _build(hints[name], value[name], (*path, name), extra)
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise FieldError((*path, name), "this key is missing")
    return kind(**found)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Cached, since Python compiles the text of a hint each time, and a full record has thousands of heads."""
    return get_type_hints(kind, include_extras=True)


def _one_of(kinds: Sequence[Any], value: Any, path: tuple[str, ...], extra: bool) -> Any:
    errors = []
    for kind in kinds:
        try:
            return _build(kind, value, path, extra)
        except FieldError as error:
            errors.append(error)
    raise errors[0] if value is not None or len(errors) == 1 else FieldError(path, "should not be null")


def _in_range(value: Any, marks: Sequence[Any], path: tuple[str, ...]) -> Any:
    for mark in marks:
        if isinstance(mark, Range):
            _expect(mark.low <= value <= mark.high, value, path, f"a number from {mark.low:g} to {mark.high:g}")
    return value


def _expect(fits: bool, value: Any, path: tuple[str, ...], wanted: str) -> Any:
    if not fits:
        given = "null" if value is None else f"{value!r:.60}"
        raise FieldError(path, f"should be {wanted}, found {given}")
    return value
