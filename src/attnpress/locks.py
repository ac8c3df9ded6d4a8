"""Locks between processes: one works at a time, and one that dies lets go by itself, however it died."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def alone(place: Path, busy: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
    """One process at a time works for a file or folder, which may not be there yet; the lock file lies beside it.

    Args:
        busy: as `locked` takes it.
    """
    return locked(_beside(place), busy)


def is_held(place: Path) -> bool:
    """Whether a process works for a file or folder, inside `alone`."""
    lock = _beside(place)
    if not lock.is_file():
        return False
    held = FileLock(lock)
    free = _acquired(held)
    held.release()
    return not free


@contextmanager
def locked(lock: Path, busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time is inside the `with` block.

    Args:
        lock: a file for it, made with its folder where it is not there; it stays.
        busy: called once when another process is inside, before waiting for it. An error of it is raised instead.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    if not _acquired(held):
        busy()
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.lock")


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


# FileLock makes a file of its own. What follows locks what is there already: a folder that nothing may be left in, or a
# file by the handle that its writer has on it.


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """One process at a time makes, moves or clears away what lies in a folder; no longer than a moment."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def lock_handle(handle: int) -> bool:
    """Lock an open file until the handle is closed, if no other process has; whether it could."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
