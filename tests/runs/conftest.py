"""Fixtures of several files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnpress.records.run import Record, read_record


@pytest.fixture(scope="module")
def record(finished: Path) -> Record:
    return read_record(finished)
