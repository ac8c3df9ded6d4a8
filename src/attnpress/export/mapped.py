"""Memory-map a safetensors file: each tensor is a view of the file."""

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
"""Size in bytes of the header's length field."""


def map_tensors(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Memory-map the tensors of a file; returns them by name, and the file's metadata.

    Args:
        file: written by `attnpress export --to trace` or `--to csr`, or any other safetensors file.

    Raises:
        ExportError: not a safetensors file, or a dtype that NumPy does not support.
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
