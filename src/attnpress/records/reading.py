"""Read and write records: JSON of a known format, with each field checked by type."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from attnpress.records.strict_json import JsonError, is_unicode, parse_json
from attnpress.records.typed_json import FieldError, Range, build

Built = TypeVar("Built")

Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0)]
Whole = Annotated[int, Range(0)]
Some = Annotated[int, Range(1)]


class RecordError(ValueError):
    """A record cannot be read. The message names the file and the reason."""


def to_json(record: Any) -> str:
    """A record as indented JSON; NaN and infinity are refused."""
    return json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"


def read_json(file: Path, newest: int, kind: type[Built]) -> Built:
    """Read a JSON file of a known format as a dataclass.

    Raises:
        RecordError: the file is missing, damaged or of a newer format.
    """
    try:
        data = parse_json(read_text(file))
        if data["format"] != newest:
            raise RecordError(f"{file}: format {data['format']!r:.40}; this version reads {newest}: update attnpress")
    except JsonError as error:
        raise RecordError(f"{file}: damaged (line {error.line}: {error})") from None
    except (TypeError, KeyError) as error:
        raise RecordError(f"{file}: damaged ({error!r})") from None
    return build_record(kind, data, str(file))


def build_record(kind: type[Built], data: Any, where: str, damaged: str = "damaged", *, extra: bool = False) -> Built:
    """Convert plain data of a file to a dataclass; see `typed_json.build`.

    Raises:
        RecordError: names the file and the invalid field.
    """
    if not _is_unicode(data):
        raise RecordError(f"{where}: {damaged}: it holds an unpaired surrogate, which UTF-8 cannot encode")
    try:
        return build(kind, data, extra=extra)
    except FieldError as error:
        raise RecordError(f"{where}: {damaged} ({error.place}): {error.problem}") from None


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        RecordError: the file cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecordError(f"{file}: damaged: not UTF-8 text") from None


def _is_unicode(data: Any) -> bool:
    if isinstance(data, dict):
        return all(is_unicode(key) and _is_unicode(value) for key, value in data.items())
    return all(map(_is_unicode, data)) if isinstance(data, list) else not isinstance(data, str) or is_unicode(data)
