"""Fixtures of several files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnpress.config import RunConfig
from attnpress.models.loading import load_tokenizer
from attnpress.records.run import Record, read_record
from attnpress.tasks import TaskData, load_task


@pytest.fixture(scope="module")
def record(finished: Path) -> Record:
    return read_record(finished)


@pytest.fixture(scope="module")
def data(tiny_recipe: RunConfig) -> TaskData:
    return load_task(tiny_recipe.data, load_tokenizer(tiny_recipe.model), tiny_recipe.seed)
