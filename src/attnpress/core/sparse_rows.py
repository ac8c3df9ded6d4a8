"""Survivors as compressed sparse rows: start of each row, keys of its P codes, and the codes."""

from __future__ import annotations

import torch
from torch import Tensor


def csr_of(codes: Tensor) -> dict[str, Tensor]:
    """Compressed sparse rows of P codes.

    Args:
        codes: uint8 [B, H, Sq, Sk].

    Returns:
        csr_start int64 [B H Sq + 1], csr_key int32 and csr_code uint8 [survivors]; rows in the order of `codes`.
    """
    rows = codes.flatten(0, 2)
    row, key = rows.nonzero(as_tuple=True)
    start = torch.zeros(len(rows) + 1, dtype=torch.int64)
    start[1:] = torch.bincount(row, minlength=len(rows)).cumsum(0)
    return {"csr_start": start, "csr_key": key.int(), "csr_code": rows[row, key]}
