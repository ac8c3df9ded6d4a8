"""The subset of YAML that recipes use. Every error names its line.

Scalars follow YAML 1.2: `no`, dates and `1:30` are strings. Every key is a string. Output of PyYAML is read back
unchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

LARGEST, MOST_NODES, DEEPEST = 2**20, 20_000, 32
"""Limits of a document: characters, values (with aliases expanded), and levels of nesting."""


class YamlError(ValueError):
    """The text is not valid YAML for a recipe. The message names the line and the mistake."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Convert keys to strings, as in JSON: the 0 of `layers: {0: ...}` becomes "0"."""
        self.flatten_mapping(node)
        node.value = [(_as_text(key), value) for key, value in node.value]
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _as_text(key: yaml.Node) -> yaml.Node:
    if not isinstance(key, yaml.ScalarNode):
        return key
    return yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first) or [""])


_resolve("null", "~|null|Null|NULL|", "~nN")
_resolve("null", "", "")
_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", "[-+]?(?:0|[1-9][0-9]*)", "-+0123456789")
_resolve(
    "float",
    r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)
_resolve("merge", "<<", "<")


def parse_yaml(text: str) -> Any:
    """Parse a document to plain data without shared objects. An empty document gives None.

    Raises:
        YamlError: invalid YAML, a duplicate key, a value that cannot be constructed, an infinite or NaN number, or a
            document that is too large or too deeply nested.
    """
    if len(text) > LARGEST:
        raise YamlError(f"longer than {LARGEST:,} characters, which no recipe is")
    try:
        _check(yaml.parse(text, Loader=_Loader))
        return _unshared(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        raise YamlError(_where(error)) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())[:200]) from None
    except YamlError:
        raise
    except UnicodeEncodeError:
        raise YamlError("it holds an unpaired surrogate, which UTF-8 cannot encode") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise YamlError(f"a value that cannot be made ({str(error)[:100]})") from None


@dataclass
class _Open:
    """A collection that is still open: its anchor, the number of values before it, and for a mapping its keys."""

    anchor: str | None
    before: int
    keys: set[str] | None = None
    is_key: bool = field(default=True)


def _check(events: Iterator[yaml.Event]) -> None:
    """Count values without constructing them, so that a document that is too large is rejected first.

    Raises:
        YamlError: see `parse_yaml`.
    """
    counted, sizes, around = 0, dict[str, int](), list[_Open]()
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            if any(one.anchor == event.anchor for one in around):
                raise YamlError(f"line {line}: the anchor {event.anchor!r} refers to a value that contains itself")
            counted += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            counted += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            keys = set[str]() if isinstance(event, yaml.MappingStartEvent) else None
            _see_value(event, line, around)
            around.append(_Open(event.anchor, counted, keys))
            counted += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = around.pop()
            if ended.anchor:
                sizes[ended.anchor] = counted - ended.before
        if isinstance(event, yaml.AliasEvent | yaml.ScalarEvent):
            _see_value(event, line, around)
        if counted > MOST_NODES or len(around) > DEEPEST:
            what = f"more than {MOST_NODES:,} values" if counted > MOST_NODES else f"nested more than {DEEPEST} deep"
            raise YamlError(f"line {line}: {what}, which no recipe has")


def _see_value(event: yaml.Event, line: int, around: list[_Open]) -> None:
    """Record a key, or the value that belongs to it."""
    if not around or around[-1].keys is None:
        return
    inside = around[-1]
    if inside.is_key and isinstance(event, yaml.ScalarEvent):
        assert inside.keys is not None
        if event.value in inside.keys:
            raise YamlError(f"line {line}: duplicate key {event.value[:40]!r}; keep one")
        inside.keys.add(event.value)
    inside.is_key = not inside.is_key


def _unshared(value: Any) -> Any:
    """Copy the value, so that each use of an anchor can be overridden separately."""
    if isinstance(value, float) and not math.isfinite(value):
        raise YamlError(f"a number that is {value}, which no recipe has")
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{' '.join(str(error.problem or error.context).split())[:200]}"
