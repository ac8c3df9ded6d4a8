"""Distribute the cells of a study over any number of processes. Each cell is run at most once."""

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
    """The cells that this process should run. The caller runs each before it requests the next.

    Cells that other processes are working on come last, when no others are left; running one then waits for it.

    Args:
        cells: in the order in which to run them.
        missing: returns those of the given cells without a result; called before each.
        works_in: the run folders that a cell needs exclusively, including that of a dense model still to be trained.

    Yields:
        A cell, and the number of cells left after it.
    """
    left = missing(cells)
    while left:
        cell = next((one for one in left if not any(map(is_held, works_in(one)))), left[0])
        left.remove(cell)
        yield cell, len(left)
        left = missing(left)


def check_one_process() -> None:
    """Refuse torchrun, since processes take whole runs.

    Raises:
        ConfigError: this process is one of many.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a run is trained by one process: instead of torchrun, start the command several times")
