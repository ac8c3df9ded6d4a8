"""The picture of the tail in docs/method.md is what its code draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_picture_is_what_the_code_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "tail_picture.py"))
    rows = drawn["rows_of_p"]()
    assert (DOCS / "figures" / "tail.svg").read_text(encoding="utf-8") == drawn["svg"](rows), (
        "run: python docs/tail_picture.py"
    )
    assert all(float(row.sum()) == pytest.approx(1, abs=1e-5) for row in rows.values())
    assert int((rows["none"] > 0).sum()) == len(re.findall("#2563eb", drawn["svg"](rows))) - 1
