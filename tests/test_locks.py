"""One process works at a time: the next one is told, or refused, and goes on when the first has ended or died."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnpress.locks import alone, beside, is_held

HOLD = """
import sys
from pathlib import Path
from attnpress.locks import alone
with alone(Path(sys.argv[1])):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return beside(tmp_path / "made" / "run")


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_a_lock_file_lies_beside_what_it_is_for(lock: Path) -> None:
    assert lock.name == ".run.lock"
    assert not is_held(lock)
    with alone(lock):
        assert is_held(lock)
    assert not is_held(lock)


def test_a_second_process_is_refused_in_the_words_of_the_caller(lock: Path, holder: subprocess.Popen[str]) -> None:
    def refuse() -> None:
        raise ValueError("busy")

    assert is_held(lock)
    with pytest.raises(ValueError, match="busy"), alone(lock, refuse):
        pass
    assert holder.poll() is None


def test_a_second_process_waits_and_a_killed_one_lets_go(lock: Path, holder: subprocess.Popen[str]) -> None:
    told = []

    def tell() -> None:
        told.append("waiting")
        holder.kill()

    with alone(lock, tell):
        assert told == ["waiting"]
    with alone(lock, tell):
        assert told == ["waiting"]
