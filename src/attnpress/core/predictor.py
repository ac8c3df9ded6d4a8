"""Predicted masks: low-bit scores decide which pairs are kept, before exact scores (numerics, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnpress.config import AttentionSpec

WIDEST_STEP = 2.0**100
"""Maximum step of a predicted score, in nats; beyond it, any nonzero distance gives a P code of zero."""


def foretold_scores(q_codes: Tensor, k_codes: Tensor, spec: AttentionSpec) -> Tensor | None:
    """q' . k', the predicted integer scores for the rule; None if it uses the exact ones.

    Args:
        q_codes, k_codes: integers in any dtype [B, Hq, S, D], with keys repeated for their query heads.

    Returns:
        float32 holding integers [B, Hq, Sq, Sk], below 2^24 in magnitude.
    """
    if spec.predictor_bits is None:
        return None
    q, k = (_short(codes, spec, shift) for codes, shift in zip((q_codes, k_codes), _shifts(spec), strict=True))
    return q @ k.mT


def foretold_step(alpha: Tensor, spec: AttentionSpec) -> Tensor:
    """alpha', the real score of one integer step of a predicted score; float32, shape of `alpha`."""
    return (alpha * 2.0 ** sum(_shifts(spec))).clamp(max=WIDEST_STEP)


def _shifts(spec: AttentionSpec) -> tuple[int, int]:
    """Number of bits removed from the codes of Q and of K."""
    assert spec.predictor_bits is not None
    q, k = (max(0, (matrix.bits or 0) - spec.predictor_bits) for matrix in (spec.q, spec.k))
    return q, k


def _short(codes: Tensor, spec: AttentionSpec, shift: int) -> Tensor:
    if shift == 0:
        return codes.float()
    assert spec.predictor_bits is not None
    largest = 2 ** (spec.predictor_bits - 1) - 1
    return torch.floor((codes.float() + 2.0 ** (shift - 1)) / 2.0**shift).clamp_(-largest, largest)
