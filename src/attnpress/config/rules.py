"""Table of pruning rules, one row each. The module of the same name in `core/rules` computes the rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class RuleFacts:
    """Properties of a rule that are known before anything is computed.

    Attributes:
        about: one line for listings.
        counts: True if the rule keeps a number of keys; it then has no threshold to fit, fix or train.
        trainable: True if its threshold can be trained (`core.soft_gate`).
        shares: the only nonzero sparsities that it can reach; None if it can reach any.
    """

    about: str
    counts: bool = False
    trainable: bool = False
    shares: tuple[float, ...] | None = None


RULES = {
    "relative": RuleFacts(
        "keep p >= tau times the row maximum; decided on integers, before any exponential (default)", trainable=True
    ),
    "threshold": RuleFacts("keep P >= theta, the reading of the published method"),
    "topk": RuleFacts("keep the k largest of each row, ties to the lower index", counts=True),
    "mass": RuleFacts("keep the smallest set of keys whose P adds up to gamma"),
    "nm": RuleFacts(
        "keep the N largest of every 4 consecutive keys; sparsity 0.5 is 2:4 (DFSS)",
        counts=True,
        shares=(0.25, 0.5, 0.75),
    ),
}

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]


def fitted_rules() -> str:
    """Names of the rules that have thresholds to fit, as a choice in words."""
    return _choice([name for name, facts in RULES.items() if not facts.counts])


def unreachable(rule: str, sparsity: float) -> str | None:
    """The reason why a rule cannot reach a sparsity; None if it can."""
    shares = RULES[rule].shares
    if shares is None or sparsity in (0.0, *shares):
        return None
    return f"rule {rule!r} prunes {_choice([f'{share:g}' for share in shares])} of the pairs, not {sparsity:g}"


def _choice(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
