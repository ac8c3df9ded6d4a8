"""How good an encoder's answers are, by what people know of the texts: scores of pairs, or the passage of each query.

What a form or a runtime keeps is its figure as a share of float32's, which is how sentence-transformers publishes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnpress.models.encoders import Kind, Rows
from attnpress.tasks.metrics import score
from attnpress.tasks.texts import Text

CUTOFF = 10
"""A passage beyond this rank counts as not found."""


@dataclass(frozen=True)
class Exam:
    """Texts to answer, and the figure of the answers.

    Attributes:
        rows: the texts, each once.
        timed: those of them that are worth a timing: passages, of queries and passages.
        measure: "Spearman", "MRR@10", or None where nothing is known of the texts.
        judge: from answers [rows, ...] to the figure, a fraction; NaN where there is none.
    """

    rows: Rows
    timed: Rows
    measure: str | None = None
    judge: Callable[[Tensor], float] = lambda _: math.nan


def exam(kind: Kind, rows: Sequence[Text], scores: Mapping[Text, float]) -> Exam:
    """What can be asked of an encoder about texts.

    Args:
        rows: single texts; pairs for a reranker; for an embedder pairs too: with scores two texts that are more or less
            alike, without scores a query and its passage.
        scores: of pairs, by people, for an embedder or a reranker; empty if there are none.
    """
    if kind == "embedder" and rows and len(rows[0]) == 2:
        return scored_pairs(rows, [scores[row] for row in rows]) if scores else retrieval(rows)
    if scores:
        known = torch.tensor([scores[row] for row in rows], dtype=torch.float64)
        return Exam(rows, rows, "Spearman", lambda answers: spearman(answers[:, 0], known))
    return Exam(rows, rows)


def scored_pairs(pairs: Sequence[Text], scores: Sequence[float]) -> Exam:
    """For an embedder: Spearman correlation of the cosines of pairs with their scores."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: number for number, text in enumerate(texts)}
    left, right = ([place[pair[side]] for pair in pairs] for side in (0, 1))
    known = torch.tensor(scores, dtype=torch.float64)

    def judge(answers: Tensor) -> float:
        unit = normalize(answers.double(), dim=-1)
        return spearman((unit[left] * unit[right]).sum(-1), known)

    rows = [(text,) for text in texts]
    return Exam(rows, rows, "Spearman", judge)


def retrieval(pairs: Sequence[Text]) -> Exam:
    """For an embedder: each query is asked of the passages of all; mean reciprocal rank of its own one."""
    passages = list(dict.fromkeys(passage for _, passage in pairs))
    queries = list(dict.fromkeys(query for query, _ in pairs))
    asked, place = ({text: number for number, text in enumerate(texts)} for texts in (queries, passages))
    which, own = [asked[query] for query, _ in pairs], [place[passage] for _, passage in pairs]

    def judge(answers: Tensor) -> float:
        unit = normalize(answers.double(), dim=-1)
        return reciprocal_rank(unit[len(passages) :][which] @ unit[: len(passages)].mT, own)

    return Exam([(text,) for text in passages + queries], [(text,) for text in passages], f"MRR@{CUTOFF}", judge)


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of ranks, ties at their mean rank; both [N]."""
    return score(["spearman"], x.double(), y.double(), 0)["spearman"] / 100


def reciprocal_rank(found: Tensor, own: Sequence[int]) -> float:
    """Mean reciprocal rank of the own passage among all, 0 beyond CUTOFF.

    Args:
        found: similarity of queries and passages, [queries, passages].
        own: the passage of each query.
    """
    ours = found.gather(1, torch.tensor(own).unsqueeze(-1))
    rank = (found > ours).sum(-1) + 1
    return float((1 / rank.double()).masked_fill(rank > CUTOFF, 0.0).mean())
