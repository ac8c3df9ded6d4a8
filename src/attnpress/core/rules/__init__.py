"""The pruning rules (numerics, section 4): which valid pairs survive. One module each, listed in `config/rules.py`."""

from __future__ import annotations

from importlib import import_module

from attnpress.config import AttentionSpec
from attnpress.config.rules import RULES as FACTS
from attnpress.core.rules.base import Rule, Scored

RULES: dict[str, Rule] = {name: import_module(f"{__name__}.{name}").RULE for name in FACTS}


def rule_of(spec: AttentionSpec) -> Rule:
    """The rule of a spec."""
    return RULES[spec.rule]


def runs_on(kernel: str, spec: AttentionSpec) -> bool:
    """True if a backend or an export supports the rule of a spec; none supports predicted masks."""
    return kernel in rule_of(spec).kernels and spec.predictor_bits is None


def rules_of(kernel: str) -> list[str]:
    """Names of the rules that a backend or an export supports."""
    return [name for name, rule in RULES.items() if kernel in rule.kernels]


__all__ = ["RULES", "Rule", "Scored", "rule_of", "rules_of", "runs_on"]
