"""Read a safetensors file without loading it: each tensor as a view of the file, mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnpress.export.errors import ExportError

TYPES = {
    "BOOL": "?",
    "U8": "<u1",
    "I8": "<i1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "F32": "<f4",
    "F64": "<f8",
}
LENGTH = 8
"""Bytes in front of the header that say how long it is."""


def map_tensors(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a file by name, read from the disk only where they are looked at; and its metadata.

    Args:
        file: what `attnpress export --to trace` or `--to csr` wrote, or any other safetensors file.

    Raises:
        ExportError: not such a file, or a type that NumPy does not have.
    """
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(LENGTH), "little")
            header = json.loads(opened.read(min(size, file.stat().st_size)))
        metadata = header.pop("__metadata__", {})
        content = np.memmap(file, mode="r")[LENGTH + size :]
        return {name: _view(content, about) for name, about in header.items()}, metadata
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExportError(f"{file}: not a safetensors file that can be mapped ({error})") from error


def _view(content: NDArray[np.uint8], about: dict[str, Any]) -> NDArray[Any]:
    begin, end = about["data_offsets"]
    found: NDArray[Any] = content[begin:end].view(TYPES[about["dtype"]]).reshape(about["shape"])
    return found
