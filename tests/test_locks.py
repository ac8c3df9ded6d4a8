"""One process works at a time: the next one is told, or refused, and goes on when the first has ended or died."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnpress.locks import alone, is_held

HOLD = """
import sys
from pathlib import Path
from attnpress.locks import alone
with alone(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "made" / "run"


@pytest.fixture
def holder(place: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_a_lock_file_lies_beside_what_it_is_for(place: Path) -> None:
    assert not is_held(place)
    with alone(place):
        assert is_held(place)
    assert not is_held(place)
    assert [path.name for path in place.parent.iterdir()] == [".run.lock"]


def test_a_second_process_is_refused_in_the_words_of_the_caller(place: Path, holder: subprocess.Popen[str]) -> None:
    def refuse() -> None:
        raise ValueError("busy")

    assert is_held(place)
    with pytest.raises(ValueError, match="busy"), alone(place, refuse):
        pass
    assert holder.poll() is None


def test_a_second_process_waits_and_a_killed_one_lets_go(place: Path, holder: subprocess.Popen[str]) -> None:
    told = []

    def tell() -> None:
        told.append("waiting")
        holder.kill()

    with alone(place, tell):
        assert told == ["waiting"]
    with alone(place, tell):
        assert told == ["waiting"]
