"""Locks between processes. A lock ends with its process, however that died."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def alone(place: Path, busy: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
    """Let one process at a time work on a file or folder, which may not exist yet. The lock file is beside it.

    Args:
        busy: see `locked`.
    """
    return locked(_beside(place), busy)


def is_held(place: Path) -> bool:
    """True if a process works on a file or folder inside `alone`."""
    lock = _beside(place)
    if not lock.is_file():
        return False
    held = FileLock(lock)
    free = _acquired(held)
    held.release()
    return not free


@contextmanager
def locked(lock: Path, busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let one process at a time into the `with` block.

    Args:
        lock: the lock file. It is created with its folder if missing, and stays.
        busy: called once before waiting for another process. An error that it raises is propagated.
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


# FileLock creates a file. The functions below lock what exists: a folder in which no file may be left, or a file by its
# writer's handle.


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time create, move or remove the content of a folder; only for a moment."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not support locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def lock_handle(handle: int) -> bool:
    """Lock an open file until it is closed; returns False if another process has locked it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
