"""Agreement of a compressed encoder with the dense one: of vectors, classes or scores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attnpress.models.encoders import Kind

HEADLINE: dict[Kind, str] = {"embedder": "cosine", "classifier": "same_decisions", "reranker": "same_order"}
"""The metric for `--max-loss`, whose loss is 1 minus it."""


def agreement(kind: Kind, dense: Tensor, compressed: Tensor, groups: Sequence[Hashable] = ()) -> dict[str, float]:
    """Metrics of agreement, the headline first; 1 is perfect.

    Args:
        dense, compressed: results of `Encoder.answer` for the same texts, [rows, ...].
        groups: for a reranker, the query of each row; rows of one query are ranked among themselves.
    """
    if kind == "embedder":
        cosines = cosine_similarity(dense.double(), compressed.double(), dim=-1)
        return {"cosine": float(cosines.mean()), "lowest_cosine": float(cosines.min())}
    change = float((compressed - dense).double().norm() / dense.double().norm().clamp(min=1e-30))
    if kind == "classifier":
        same = (dense.argmax(-1) == compressed.argmax(-1)).double().mean()
        return {"same_decisions": float(same), "logit_change": change}
    return {"same_order": same_order(dense[:, 0], compressed[:, 0], groups), "score_change": change}


def loss_of(kind: Kind, found: dict[str, float]) -> float:
    """1 minus the headline."""
    return 1 - found[HEADLINE[kind]]


def same_order(dense: Tensor, compressed: Tensor, groups: Sequence[Hashable] = ()) -> float:
    """Share of pairs of rows that both models rank alike, among those that the dense scores [rows] rank.

    Only pairs within a group count, if any group has several rows; otherwise all pairs.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    own = torch.tensor([numbers[group] for group in groups]) if len(numbers) < len(dense) else torch.zeros(len(dense))
    together = (own.unsqueeze(0) == own.unsqueeze(1)) if len(numbers) else torch.ones(len(dense), len(dense)).bool()
    before, after = (x.unsqueeze(0) - x.unsqueeze(1) for x in (dense.double(), compressed.double()))
    ordered = together & (before > 0)
    count = int(ordered.sum())
    return 1.0 if count == 0 else float((after[ordered] > 0).double().mean())
