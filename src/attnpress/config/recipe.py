"""Read and write specs as YAML recipes, plain data and `key=value` overrides. Errors say what to do."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from attnpress.config import ConfigError, RunConfig
from attnpress.config.strict_yaml import LARGEST, YamlError, parse_yaml

Spec = TypeVar("Spec")

TOLD = 10
"""Maximum number of mistakes that one error lists."""

MENDS = {"device": "an accelerator is used where there is one; CUDA_VISIBLE_DEVICES in the environment hides it"}
"""Hints for keys that users look for but recipes do not have."""


def parse_spec(kind: type[Spec], data: Mapping[str, Any]) -> Spec:
    """Build a spec from plain data.

    Raises:
        ConfigError: with one line per mistake, naming the key; unknown keys get the nearest known one.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(data))
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_explain(kind, item) for item in found[:TOLD]]
        more = [f"and {len(found) - TOLD:,} more mistakes"] if len(found) > TOLD else []
        raise ConfigError("\n".join([*lines, *more])) from None


def checked(kind: Any, value: Any, name: str) -> Any:
    """Validate a single value of a type of `attnpress.config`, such as Count or Sparsity.

    Raises:
        ConfigError: the value is out of range or not a number. The message is one line that begins with `name`.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{name}: {message} (found {_short(value)})") from None


def spec_to_dict(spec: Any) -> dict[str, Any]:
    """Convert a spec to plain JSON-ready data; the inverse of `parse_spec`."""
    plain = TypeAdapter(type(spec)).dump_python(spec, mode="json")
    return cast("dict[str, Any]", plain)


def comparable(spec: Any) -> dict[str, Any]:
    """`spec_to_dict` without keys that have no effect, to compare specs: `tail_rank` counts only with tail `linear`."""
    return _effective(spec_to_dict(spec))


def _effective(plain: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _effective(value) if isinstance(value, dict) else value for key, value in plain.items()}
    if kept.get("tail", "linear") != "linear":
        del kept["tail_rank"]
    return kept


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML recipe and apply `key.sub=value` overrides; see `load_spec`."""
    return load_spec(RunConfig, path, overrides)


def load_spec(kind: type[Spec], path: Path, overrides: Iterable[str] = ()) -> Spec:
    """Read a spec from a YAML file and apply `key.sub=value` overrides; see `override` for the syntax of values.

    Raises:
        ConfigError: the file cannot be read, the YAML or an override is malformed, or a value is invalid. The message
            lists every mistake.
    """
    data = read_yaml(path)
    for item in overrides:
        override(kind, data, item)
    try:
        return parse_spec(kind, data)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from None


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file. An empty file gives an empty mapping.

    Raises:
        ConfigError: the file cannot be read, is not valid YAML (see `parse_yaml`), or does not hold a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4 * LARGEST)  # bounded, since the path may be /dev/zero
        found = parse_yaml(content.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: not valid YAML: line {line}: not UTF-8 text; save the file as UTF-8") from None
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {type(found).__name__}")
    return found or {}


def dump_config(spec: Any) -> str:
    """The recipe as YAML text, with every key written out."""
    return str(yaml.safe_dump(spec_to_dict(spec), sort_keys=False))


def override(kind: type[Any], data: dict[Any, Any], item: str) -> None:
    """Apply `key.sub=value` to plain data of a spec, in place.

    Strings and paths are taken literally, except for surrounding quotes and null: they may contain `#` and `: `, and
    may look like a number or `no`. All other values are parsed as YAML.

    Args:
        kind: the class of the spec.

    Raises:
        ConfigError: the override is malformed, its value is not YAML, or its key lies inside a single value.
    """
    key, separator, text = item.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {item}: write it as key=value, for example --set attention.sparsity=0.95")
    keys = key.strip().split(".")
    try:
        value = _override_value(_type_at(kind, keys), text.strip())
    except YamlError as error:
        raise ConfigError(f"--set {item:.200}: the value is not valid YAML: {error}") from None
    *parents, last = keys
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {item}: {parent} is a single value and has no keys inside")
    data[last] = value


def _override_value(kind: Any, text: str) -> Any:
    if kind in (str, Path):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return None if text in ("", "null", "~") else parse_yaml(text) if quoted else text
    value = parse_yaml(text)
    is_text = isinstance(value, str) and text[:1] not in "'\""
    return text if is_text or (isinstance(value, dict) and not text.startswith("{")) else value


def _type_at(kind: Any, keys: Iterable[str]) -> Any:
    """The type of a spec's field without its `| None`; None if the field is unknown."""
    for key in keys:
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(key)
        elif get_origin(kind) is dict:
            inside = get_args(kind)[1]
            kind = get_type_hints(RunConfig).get(key) if inside is Any else inside  # changes of a recipe
        else:
            return None
        if get_origin(kind) in (Union, UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
    return kind


def _explain(kind: type[Any], item: Any) -> str:
    place = ".".join(str(part)[:80] for part in item["loc"])
    if item["type"] != "unexpected_keyword_argument":
        told = isinstance(item["input"], dict) or item["type"] in ("value_error", "missing")
        given = "" if told else f" (found {_short(item['input'])})"
        message = item["msg"].removeprefix("Value error, ")
        mend = "; put it in quotes" if item["type"] == "string_type" and item["input"] is not None else ""
        return f"{place}: {message}{given}{mend}" if place else message
    known = _known_keys(kind, item["loc"][:-1])
    name = str(item["loc"][-1])[:80]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else MENDS.get(name, f"known keys: {', '.join(known)}")
    return f"{place}: unknown key; {hint}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number that is too long"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_keys(kind: Any, path: Iterable[Any]) -> list[str]:
    for part in path:
        kind = get_args(kind)[-1] if get_origin(kind) is dict else get_type_hints(kind)[str(part)]
    return [field.name for field in dataclasses.fields(kind)]
