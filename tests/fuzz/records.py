"""Records by mutation: of runs, tables, sweeps and leaderboards, read and drawn.

Allowed: a page, or one RecordError that names the file.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from attnpress.records import leaderboard as board_record
from attnpress.records import sweep as sweep_record
from attnpress.records.reading import RecordError, to_json
from attnpress.records.run import read_record
from attnpress.records.table import is_table, read_table
from attnpress.report.leaderboard import board_table
from attnpress.report.page import make_report
from attnpress.report.render import front_table, stages_table
from tests.fuzz.mutations import as_json, damage_bytes, damage_plain, damage_text, to_bytes

ROOT = Path(__file__).parents[2]
REGRESSIONS: list[int] = [*range(25), 41]
"""Seeds that are replayed as tests: some of every kind, and each that failed once."""

TABLE = "table.json"

DRAWN = 0.02
"""Share of records whose figures are drawn as well: that takes seconds."""


def replay(seed: int) -> str:
    """One record; returns how it ended.

    Raises:
        AssertionError: not as it may; names the seed.
    """
    rng = random.Random(seed)
    kind, text = rng.choice(_samples())
    how = rng.choice(("plain", "plain", "plain", "text", "bytes"))
    if how == "plain":
        plain = json.loads(text)
        for _ in range(rng.choice((1, 1, 2))):
            plain = damage_plain(rng, plain)
        content = to_bytes(as_json(plain))
    else:
        content = to_bytes(damage_text(rng, text)) if how == "text" else damage_bytes(rng, text.encode())
    try:
        return _show(kind, content, drawn=rng.random() < DRAWN)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r:.2000}") from error


def _show(kind: str, content: bytes, *, drawn: bool) -> str:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = folder / kind
        file.write_bytes(content)
        try:
            _tables(kind, folder)
            if kind != board_record.FILE:
                with _undrawn() if not drawn else mock.MagicMock():
                    make_report([file if kind == TABLE else folder], [])
        except RecordError as error:
            said = str(error)
        else:
            return "drawn" if drawn else "read"
    assert kind in said, f"the file is not named: {said}"
    assert len(said) < 2000, f"a message of {len(said)} characters"
    return "refused"


def _tables(kind: str, folder: Path) -> None:
    if kind == sweep_record.FILE:
        front_table(sweep_record.read_sweep(folder))
    elif kind == board_record.FILE:
        board_table(board_record.read_board(folder))
    elif kind == TABLE:
        for record in read_table(folder / TABLE).values():
            stages_table(record)
    else:
        stages_table(read_record(folder))


def _undrawn() -> Any:
    """A page's text and tables only."""
    return mock.patch("attnpress.report.plots.to_svg", return_value="<svg ></svg>")


@functools.cache
def _samples() -> list[tuple[str, str]]:
    """Records of the project, the smallest of each kind first of all; of runs, also those of the smallest table."""
    found: list[tuple[str, str]] = []
    files = sorted((ROOT / "records").rglob("*.json"), key=lambda path: (path.stat().st_size, str(path)))
    in_table = next(read_table(file) for file in files if is_table(file))
    for text in [*(file.read_text(encoding="utf-8") for file in files), *map(to_json, in_table.values())]:
        for kind, read in _READERS.items():
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / kind).write_text(text, encoding="utf-8")
                try:
                    read(Path(folder))
                except RecordError:
                    continue
                found += [(kind, text)] if [name for name, _ in found].count(kind) < 3 else []
                break
    assert {kind for kind, _ in found} >= {"record.json", TABLE}, "there are records of runs"
    return found


_READERS = {
    "record.json": read_record,
    TABLE: lambda folder: read_table(folder / TABLE),
    sweep_record.FILE: sweep_record.read_sweep,
    board_record.FILE: board_record.read_board,
}
