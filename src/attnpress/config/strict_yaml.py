"""YAML as recipes need it: small, without surprises, and with every fault named by its line.

Scalars are read as YAML 1.2 has them: `no` is a text, and so are dates and `1:30`. Every key is a text. What PyYAML
writes is read back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

LARGEST, MOST_NODES, DEEPEST = 2**20, 20_000, 32
"""Characters of a document; values in it, with each alias counted as what it stands for; levels of nesting."""


class YamlError(ValueError):
    """A text that is not the YAML of a recipe; the message names the line, and what is wrong there."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Keys are texts, as in JSON: the 0 of `layers: {0: ...}` is "0"."""
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
    """The value of a document: plain data in which nothing is shared; None if it is empty.

    Raises:
        YamlError: not YAML, a key that a mapping holds twice, a value that cannot be made, a number that is infinite or
            NaN, or too large or too deep.
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
        raise YamlError("it holds half of a surrogate pair, which no text can") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise YamlError(f"a value that cannot be made ({str(error)[:100]})") from None


@dataclass
class _Open:
    """A collection whose end has not come yet: its anchor, the values counted before it, and its keys, if a mapping."""

    anchor: str | None
    before: int
    keys: set[str] | None = None
    is_key: bool = field(default=True)


def _check(events: Iterator[yaml.Event]) -> None:
    """Count values without making them, so that what is too large is never made.

    Raises:
        YamlError: see `parse_yaml`.
    """
    counted, sizes, around = 0, dict[str, int](), list[_Open]()
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent):
            if any(one.anchor == event.anchor for one in around):
                raise YamlError(f"line {line}: the anchor {event.anchor!r} stands for something that holds itself")
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
    """Note a key, or the value that belongs to it."""
    if not around or around[-1].keys is None:
        return
    inside = around[-1]
    if inside.is_key and isinstance(event, yaml.ScalarEvent):
        assert inside.keys is not None
        if event.value in inside.keys:
            raise YamlError(f"line {line}: the key {event.value[:40]!r} stands there twice; keep one")
        inside.keys.add(event.value)
    inside.is_key = not inside.is_key


def _unshared(value: Any) -> Any:
    """A copy in which an anchor's value is another object wherever it is used: each can be overridden by itself."""
    if isinstance(value, float) and not math.isfinite(value):
        raise YamlError(f"a number that is {value}, which no recipe has")
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _where(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{' '.join(str(error.problem or error.context).split())[:200]}"
