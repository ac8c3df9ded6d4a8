"""Seeds of the operators' fuzzer that are kept: each call that failed once, and some of every kind."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.fuzz import operators
from tests.kernels.factories import needs_kernel

pytestmark = needs_kernel


def test_seeds() -> None:
    ends = Counter(outcome for seeds in operators.REGRESSIONS for outcome in operators.outcomes(*seeds))
    assert all(
        ends[f"{entry}:{end}"] > 0 for entry in ("attention", "packed", "operator") for end in ("refused", "correct")
    )


def test_a_call_that_kills_its_process_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "COMMAND", ("-c", "print('0 fine', flush=True); import os; os.abort()"))
    with pytest.raises(AssertionError, match="seed 1: its process ended with -6"):
        list(operators.outcomes(0, 3))


def test_a_call_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "COMMAND", ("-c", "import time; time.sleep(600)"))
    monkeypatch.setattr(operators, "PATIENCE", 0.1)
    with pytest.raises(AssertionError, match="seed 7: did not end"):
        list(operators.outcomes(7, 1))
