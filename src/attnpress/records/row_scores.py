"""Score of each evaluation row in a stage, packed for a record, so that two stages can be compared row by row."""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnpress.records.typed_json import Range

STEPS = 65_535
"""Steps between the smallest and the largest value; correlations and means change by less than 0.01 points."""


@dataclass(frozen=True)
class RowScores:
    """One number for each evaluation row in order; in extractive question answering, for each question.

    Attributes:
        kind: "right" for a classification, 1 or 0; "score" for a metric that is a mean over rows, 0 to 1; "value" for
            the prediction of a regression.
        rows: their number.
        low, high: the smallest and the largest.
        packed: base64 of zlib of bits, if "right"; else of 16-bit little-endian steps from `low`, 0, to `high`, 65535.
    """

    kind: Literal["right", "score", "value"]
    rows: Annotated[int, Range(0, 10**9)]
    low: float
    high: float
    packed: str

    def values(self) -> NDArray[np.float64]:
        """The numbers, to one part in 65,535 of their range.

        Raises:
            ValueError: `packed` is invalid.
        """
        size = -(-self.rows // 8) if self.kind == "right" else 2 * self.rows
        unpack = zlib.decompressobj()
        try:
            content = unpack.decompress(base64.b64decode(self.packed, validate=True), size + 1)
        except (binascii.Error, zlib.error, ValueError):
            raise ValueError("should be base64 of compressed rows") from None
        if len(content) != size:
            raise ValueError(f"should hold {self.rows} rows")
        if self.kind == "right":
            return np.unpackbits(np.frombuffer(content, np.uint8), count=self.rows).astype(np.float64)
        steps = np.frombuffer(content, "<u2").astype(np.float64)
        return self.low + steps / STEPS * (self.high - self.low)


def pack_rows(kind: Literal["right", "score", "value"], values: ArrayLike) -> RowScores:
    """Pack finite numbers for a record."""
    found = np.asarray(values, np.float64)
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 0.0)
    if kind == "right":
        content = np.packbits(found != 0).tobytes()
    else:
        content = np.rint((found - low) / ((high - low) or 1.0) * STEPS).astype("<u2").tobytes()
    return RowScores(kind, len(found), low, high, base64.b64encode(zlib.compress(content, 9)).decode())
