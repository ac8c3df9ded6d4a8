"""Runs of a changed recipe, and stages of their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnpress.config import RunConfig
from attnpress.records.run import Record, StageRecord
from attnpress.runs.compression import compress


def quietly(config: RunConfig, output: Path) -> Record:
    return compress(config, output, notify=lambda _: None)


def staged(record: Record, name: str) -> StageRecord:
    stage = record.stage(name)
    assert stage is not None
    return stage


def no_training(*_: Any, **__: Any) -> None:
    raise AssertionError("went on to train or evaluate")
