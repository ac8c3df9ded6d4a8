"""Sizes of heads that the compiled and the Triton kernel are made for; the reference takes all that a spec can have."""

from __future__ import annotations

LARGEST = 256
"""Up to it scores of 8-bit codes stay below 2^22, which the Triton kernel's floats hold exactly.

Buffers of the compiled kernel are as wide: LARGEST_HEAD in csrc/attention.h.
"""

STEP = 4
"""Codes that the kernels multiply at once."""


def fits(head_dim: int) -> bool:
    """Whether both kernels take heads of this size."""
    return STEP <= head_dim <= LARGEST and head_dim % STEP == 0
