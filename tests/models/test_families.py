"""The committed table of families is what the models do."""

from __future__ import annotations

import json

import pytest

from tests.kernels.factories import needs_kernel
from tests.models.factories import MODELS
from tests.models.families import FILE, REFUSED, SUPPORTED, measure

LARGEST_ERROR = 0.05
"""Of 8 bits on tiny models with wide random weights, which look at their attention more than trained ones do."""


def test_the_table_has_every_family() -> None:
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    assert list(rows) == [*SUPPORTED, *REFUSED]
    assert sorted(SUPPORTED) == sorted(MODELS)


@needs_kernel
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_family_keeps_its_row(name: str) -> None:
    promised, found = json.loads(FILE.read_text(encoding="utf-8"))[name], measure(name)
    assert found["error_8bit"] < LARGEST_ERROR
    assert found["error_8bit"] == pytest.approx(promised["error_8bit"], rel=0.5), "codes may tip on another machine"
    for promise in ("eager", "deployed", "round_trip"):
        assert (promised[promise], found[promise]) == (True, True), promise
    assert promised["generate"] == found["generate"]
    assert found["generate"] in (True, None)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_as_the_table_says(name: str) -> None:
    assert measure(name) == json.loads(FILE.read_text(encoding="utf-8"))[name]
