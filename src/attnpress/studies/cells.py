"""The cells of a study: any number of processes run them, each at most once, and each takes what no other works on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from attnpress.config import ConfigError

Notify = Callable[[str], None]
Cell = TypeVar("Cell")


def in_turn(
    cells: Sequence[Cell], missing: Callable[[Sequence[Cell]], list[Cell]], works_in: Callable[[Cell], Iterable[Path]]
) -> Iterator[tuple[Cell, int]]:
    """The cells that this process is to run, one after the other; the caller runs each before it asks for the next.

    Those that other processes are at work on come last, when nothing else is left: whoever runs such a cell waits.

    Args:
        cells: in the order in which they are to be run.
        missing: those of some cells that nobody has run yet; asked anew before each.
        works_in: the run folders that a cell needs for itself, that of a dense model still to be made among them.

    Yields:
        A cell, and how many are left after it.
    """
    left = missing(cells)
    while left:
        cell = next((one for one in left if not any(map(is_held, works_in(one)))), left[0])
        left.remove(cell)
        yield cell, len(left)
        left = missing(left)


def check_one_process() -> None:
    """Refuse torchrun where several processes take a run each.

    Raises:
        ConfigError: this process is one of many.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a run is trained by one process: instead of torchrun, start the command several times")


@contextmanager
def alone(place: Path, tell: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time works for a run folder, or writes a file; a process that dies lets go.

    Args:
        tell: called if another process has to be waited for.
    """
    held = _lock(place)
    try:
        held.acquire(timeout=0)
    except Timeout:
        tell()
        held.acquire()
    try:
        yield
    finally:
        held.release()


def is_held(place: Path) -> bool:
    """Whether a process works there, inside `alone`."""
    try:
        with _lock(place).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(place: Path) -> FileLock:
    place.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(place.with_name(f".{place.name}.lock"))
