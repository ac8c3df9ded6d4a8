"""The cells of a study: any number of processes run them, each at most once, and each takes what no other works on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from attnpress.config import ConfigError
from attnpress.locks import is_held

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
