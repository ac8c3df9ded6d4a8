"""Head sizes that the compiled and the Triton kernel support. The reference supports all that a spec allows."""

from __future__ import annotations

LARGEST = 256
"""Up to this size, scores of 8-bit codes stay below 2^22, which float32 in the Triton kernel represents exactly.

The compiled kernel's buffers have the same size: LARGEST_HEAD in csrc/attention.h.
"""

STEP = 4
"""Number of codes that the kernels multiply at once."""


def fits(head_dim: int) -> bool:
    """True if both kernels support this head size."""
    return STEP <= head_dim <= LARGEST and head_dim % STEP == 0
