"""The pruning rules by name: one row each. What a rule computes is in the module of that name in `core/rules`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class RuleFacts:
    """What has to be known of a rule before anything is computed.

    Attributes:
        about: one line for listings.
        counts: whether it keeps a number of keys, and so has no threshold to fit, to fix or to train.
        trainable: whether its threshold can be trained (`core.soft_gate`).
        shares: the only sparsities that it can reach, above 0; None if any.
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
    """What is wrong with a sparsity that a rule cannot reach; None if it can."""
    shares = RULES[rule].shares
    if shares is None or sparsity in (0.0, *shares):
        return None
    return f"rule {rule!r} prunes {_choice([f'{share:g}' for share in shares])} of the pairs, not {sparsity:g}"


def _choice(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
