"""Fixtures of several files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from attnpress.config import RunConfig
from attnpress.models.loading import load_model, load_tokenizer
from attnpress.tasks import TaskData, load_task


@pytest.fixture(scope="module")
def data(tiny_recipe: RunConfig) -> TaskData:
    return load_task(tiny_recipe.data, load_tokenizer(tiny_recipe.model), tiny_recipe.seed)


@pytest.fixture
def dense(finished: Path) -> PreTrainedModel:
    return load_model(str(finished / "dense"), "classification", ("no", "yes"))
