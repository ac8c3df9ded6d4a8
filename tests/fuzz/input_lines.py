"""Inputs of `run` by mutation: JSON lines and tables of anything, interrupted, with a damaged state. Allowed: an answer
for every good row in its order, byte for byte that of an undisturbed run; or one PredictionError or TaskError.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from attnpress.runs import row_files
from attnpress.runs.row_files import PredictionError, Progress, predict_file
from attnpress.tasks.lines import TaskError
from tests.fuzz.mutations import PIECES, as_json, damage_bytes, damage_text, odd, to_bytes

REGRESSIONS: list[int] = [*range(60)]
"""Seeds that are replayed as tests: some of every kind, and each that failed once."""

WORDS = ("good", "dull", "ça", "", " ", "a, b", 'say "no"', "two\nlines", "\u2028", "tab\there", "'", "\\", "x" * 200)


class StoppedError(Exception):
    """What stands for a kill: it ends the writing in the middle."""


def replay(seed: int) -> str:
    """One file, answered in one go and again with interruptions; returns how it ended.

    Raises:
        AssertionError: not as it may; names the seed.
    """
    rng = random.Random(seed)
    name, content = _draw(rng)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(row_files, "CHUNK", rng.choice((1, 3, 1024))):
        source = Path(folder) / name
        source.write_bytes(content)
        try:
            return _compare(rng, source)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r:.2000}") from error


def _compare(rng: random.Random, source: Path) -> str:
    said = ""
    whole, broken = source.with_name("whole.jsonl"), source.with_name("broken.jsonl")
    try:
        done = _predict(source, whole, _answer)
    except (PredictionError, TaskError) as error:
        said, done = str(error), None
    if done is None:
        assert 0 < len(said) < 5000, f"a message of {len(said)} characters"
        assert not whole.exists(), "a refused file has an output"
        return "refused"
    _check(whole, done)
    for _ in range(rng.choice((1, 2, 3))):
        calls = rng.choice((0, 1, 2, 5))
        try:
            _predict(source, broken, _stopping(calls))
            break
        except StoppedError:
            _damage_state(rng, broken)
    if not broken.exists():
        try:
            _predict(source, broken, _answer)
        except PredictionError as error:  # a state that belongs to something else
            said = str(error)
    if not broken.exists():
        assert "was begun with another" in said, said
        return "state refused"
    assert broken.read_bytes() == whole.read_bytes(), "an interrupted run has other answers"
    left = {path.name for path in source.parent.iterdir()} - {source.name, whole.name, broken.name}
    assert all(name.endswith(".lock") for name in left), f"left lying: {left}"
    return "answered"


def _predict(source: Path, output: Path, answer: Callable[[Sequence[Any]], list[Any]]) -> Progress:
    return predict_file(answer, ("text",), source, output, {"model": "m"}, warn=lambda _: None)


def _answer(rows: Sequence[Any]) -> list[Any]:
    return [{"label": "yes", "score": len(row["text"]) / 1000} for row in rows]


def _stopping(calls: int) -> Callable[[Sequence[Any]], list[Any]]:
    left = [calls]

    def answer(rows: Sequence[Any]) -> list[Any]:
        if left[0] == 0:
            raise StoppedError
        left[0] -= 1
        return _answer(rows)

    return answer


def _check(output: Path, done: Progress) -> None:
    text = output.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    rows = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in text.split("\n")[:-1]]
    numbers = [row["line"] for row in rows]
    assert numbers == sorted(set(numbers)), "lines out of order"
    assert len(rows) == done.written


def _damage_state(rng: random.Random, output: Path) -> None:
    """What a crash, a full disk or a user may do to what lies beside an unfinished output."""
    names = [output.with_name(f".{output.name}.{ending}") for ending in ("unfinished", "progress")]
    file = rng.choice(names)
    kind = rng.choice(("nothing", "nothing", "cut", "longer", "bytes", "remove"))
    if not file.is_file() or kind == "nothing":
        return
    content = file.read_bytes()
    if kind == "remove":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[: rng.randint(0, len(content))])
    elif kind == "longer":
        file.write_bytes(content + rng.choice((b"\0" * 50, b'{"line": 1}\n', b"half of")))
    else:
        file.write_bytes(damage_bytes(rng, content))


def _draw(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice(("in.jsonl", "in.jsonl", "in.json", "in.csv", "in.tsv", "in.txt", "in"))
    rows = [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(rng.choice((0, 1, 2, 9, 40)))]
    if name.endswith("csv"):
        lines = ["text,id"] + ['"' + row.replace('"', '""') + f'",{n}' for n, row in enumerate(rows)]
    elif name.endswith((".tsv", ".txt")):
        lines = ["text\tid"] + [f"{row}\t{n}" for n, row in enumerate(rows)]
    else:
        lines = [_object(rng, row, n) for n, row in enumerate(rows)]
    text = rng.choice(("\n", "\n", "\r\n")).join(lines) + rng.choice(("\n", ""))
    kind = rng.choice(("whole", "text", "text", "bytes", "encoding"))
    if kind == "text":
        text = damage_text(rng, text)
    content = to_bytes(text)
    if kind == "bytes":
        return name, damage_bytes(rng, content)
    if kind == "encoding":
        return name, text.encode(rng.choice(("utf-8-sig", "utf-16", "latin-1", "utf-32")), "replace")
    return name, content


def _object(rng: random.Random, text: str, number: int) -> str:
    kind = rng.choice(("good", "good", "good", "good", "odd", "id", "pieces", "keys"))
    if kind == "odd":
        return as_json(odd(rng))
    if kind == "pieces":
        return "".join(rng.choices(PIECES, k=4))
    row: dict[str, Any] = {"text": text, "id": odd(rng) if kind == "id" else number}
    if kind == "keys":
        row[rng.choice(("Text", "text ", "label", "line"))] = odd(rng)
        row["text"] = odd(rng)
    return as_json(row)
