"""Recipes: specs to and from YAML files, plain data and `key=value` overrides, with errors that name the mend."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from attnpress.config import ConfigError, RunConfig

Spec = TypeVar("Spec")


def parse_spec(kind: type[Spec], data: Mapping[str, Any]) -> Spec:
    """Build a spec from plain data.

    Raises:
        ConfigError: with one line per mistake, naming the key; unknown keys get the nearest known one.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(data))
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def checked(kind: Any, value: Any, name: str) -> Any:
    """A single value of a type of `attnpress.config`, such as Count or Sparsity.

    Raises:
        ConfigError: out of its range, or not a number; in one line that begins with `name`.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{name}: {error.errors(include_url=False)[0]['msg']} (found {value!r})") from None


def spec_to_dict(spec: Any) -> dict[str, Any]:
    """The spec as plain JSON-ready data; `parse_spec` reads it back."""
    plain = TypeAdapter(type(spec)).dump_python(spec, mode="json")
    return cast("dict[str, Any]", plain)


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML recipe and apply `key.sub=value` overrides (values are YAML); see `load_spec`."""
    return load_spec(RunConfig, path, overrides)


def load_spec(kind: type[Spec], path: Path, overrides: Iterable[str] = ()) -> Spec:
    """Read a spec from a YAML file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: unreadable file, malformed YAML or override, or an invalid value; all are named.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, found {type(data).__name__}")
    for item in overrides:
        _override(data, item)
    try:
        return parse_spec(kind, data)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from None


def dump_config(spec: Any) -> str:
    """The recipe as YAML text, every key written out."""
    return str(yaml.safe_dump(spec_to_dict(spec), sort_keys=False))


def _override(data: dict[Any, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {item}: write it as key=value, for example --set attention.sparsity=0.95")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {item}: the value is not valid YAML: {error}") from None
    *parents, last = key.strip().split(".")
    for parent in parents:
        # YAML reads the 0 of `layers: {0: ...}` as a number.
        data = data.setdefault(int(parent) if parent.isdigit() and int(parent) in data else parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {item}: {parent} is a single value and has no keys inside")
    data[last] = value


def _explain(kind: type[Any], item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] != "unexpected_keyword_argument":
        given = (
            "" if isinstance(item["input"], dict) or item["type"] == "value_error" else f" (found {item['input']!r})"
        )
        message = item["msg"].removeprefix("Value error, ")
        return f"{place}: {message}{given}" if place else message
    known = _known_keys(kind, item["loc"][:-1])
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{place}: unknown key; {hint}"


def _known_keys(kind: Any, path: Iterable[Any]) -> list[str]:
    for part in path:
        kind = get_args(kind)[-1] if get_origin(kind) is dict else get_type_hints(kind)[str(part)]
    return [field.name for field in dataclasses.fields(kind)]
