"""Fixtures of several files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.checkpoints import make_compressed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a compressed classifier."""
    make_compressed().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
