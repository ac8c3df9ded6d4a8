"""Cost of an encoder on this machine: texts per second and peak memory, each side in its own process, in turns."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnpress.benchmark.machine import peak_megabytes, resident_megabytes
from attnpress.benchmark.turns import Prepared, Side, in_turns
from attnpress.deployment import deploy
from attnpress.kernels import cpu
from attnpress.models.encoders import Rows, saved_encoder
from attnpress.models.loading import quiet

ROUNDS = 3
TIMED = 64
"""Texts per timed call."""


@dataclass(frozen=True)
class Cost:
    """Cost of one side.

    Attributes:
        texts_per_second: of the median call.
        peak_mb: largest resident memory while answering, of the model only: minus the memory before it was loaded.
        file_mb: of its folder.
    """

    texts_per_second: float
    peak_mb: float
    file_mb: float


def costs(dense: Path, compressed: Path, rows: Rows, threads: int, seconds: float = 6.0) -> tuple[Cost, Cost, str]:
    """Costs of both sides, and the kernel's target.

    Args:
        dense, compressed: folders written by `Encoder.save`; the second is deployed.
        rows: texts; each call answers the first TIMED of them.
        seconds: timing of each side, at least ROUNDS calls.

    Raises:
        SideError: a side could not be loaded or run.
    """
    chosen = [list(row) for row in rows[:TIMED]]
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "rows.json"
        file.write_text(json.dumps(chosen), encoding="utf-8")
        sides, facts = [], []
        for name, folder in (("dense", dense), ("compressed", compressed)):
            side = stack.enter_context(Side(name))
            asked: dict[str, Any] = {"folder": str(folder), "rows": str(file), "threads": threads}
            facts.append(side.prepare(f"{__name__}:prepare", deployed=name == "compressed", **asked))
            sides.append(side)
        times = in_turns(sides, seconds, ROUNDS)
    first, second = (
        Cost(len(chosen) / statistics.median(_flat(times[side.name])) * 1e3, fact["peak_mb"], fact["file_mb"])
        for side, fact in zip(sides, facts, strict=True)
    )
    return first, second, facts[1]["target"]


def prepare(folder: str, rows: str, threads: int, deployed: bool) -> Prepared:
    """Prepare one side, in its own process."""
    quiet()
    torch.set_num_threads(threads)
    texts = json.loads(Path(rows).read_text(encoding="utf-8"))
    before = resident_megabytes()
    encoder = saved_encoder(Path(folder))
    if deployed:
        deploy(encoder.model, "cpu")
    peak = peak_megabytes(lambda: encoder.answer(texts)) - before
    facts = {"peak_mb": max(0.0, peak), "file_mb": megabytes(Path(folder)), "target": cpu.active_target()}
    return Prepared(lambda: encoder.answer(texts), facts)


def megabytes(folder: Path) -> float:
    """Total size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _flat(turns: Sequence[Sequence[float]]) -> list[float]:
    return [time for turn in turns for time in turn]
