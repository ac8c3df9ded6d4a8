"""Files and folders written whole or not at all, and never over what attnpress did not make.

A file or folder is written beside its place, under a name that ends in `.unfinished`, and put there when it is whole: a
reader never sees half of one, however the writer died. Each folder carries a marker that says what it is and what it
holds. Only a folder with the right marker is ever replaced or removed, and only while nothing else lies in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from attnpress.locks import lock_handle, locked_folder

MARKER = ".attnpress.json"
"""In every folder that attnpress may replace or remove: what it is, and the names that attnpress put into it."""

SCRATCH = "unfinished"
REPLACED = "replaced"
STREAMS = ("/dev/std", "/dev/fd/", "/proc/self/fd/")
STDIN, STDOUT = Path("/dev/stdin"), Path("/dev/stdout")


class OutputError(ValueError):
    """A place that cannot be written, or that holds what attnpress did not make; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Marker:
    """What a folder says of itself.

    Attributes:
        what: it is, such as "export".
        holds: paths inside, as they were when it was made; None for a folder whose content changes while it is used,
            which is never replaced or removed as a whole.
    """

    what: str
    holds: frozenset[str] | None = None

    def foreign(self, content: frozenset[str]) -> frozenset[str]:
        """What of a folder's content was not there when it was made."""
        return content - (self.holds or frozenset())


def write_text(path: Path, text: str) -> None:
    """Replace the file's content in one step; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace the file's content by a value as indented JSON; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file's content in one step. A stream, such as /dev/stdout or a pipe, is written on.

    What is replaced keeps its permissions; through a symbolic link, the file that it leads to is replaced.

    Raises:
        OSError: with the path as its `filename`.
    """
    if is_stream(path):
        with open_stream(path) as stream:
            stream.write(content)
        return
    with naming(path):
        target = _real(path)
        if target.exists() and not target.is_file():
            raise OSError(errno.EISDIR if target.is_dir() else errno.EINVAL, "not a file", str(path))
        _make_parents(target)
        with _held(target, _open_new) as (scratch, handle):
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(content)
                sync(file)
            if target.exists():
                shutil.copymode(target, scratch)
            scratch.replace(target)


def sync(file: BinaryIO) -> None:
    """Have what was written on disk before going on."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path, what: str) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the `with` block ends well, and vanishes when it does not.

    Args:
        what: it is, in a word or two; see `check_folder` for what may be there before.

    Raises:
        OutputError: see `check_folder`; before the block is entered, and again when it has ended.
    """
    check_folder(path, what)
    with naming(path):
        target = _real(path)
        _make_parents(target)
    with _held(target, _make_folder) as (scratch, _):
        yield scratch
        with naming(path):
            # In place: the lock that says that this writer lives is the marker's own.
            (scratch / MARKER).write_text(_marker_text(what, _content(scratch)), encoding="utf-8")
            _swap(scratch, target, lambda: _check_replaceable(path, target, what))


def check_folder(path: Path, what: str) -> None:
    """Ask whether a folder may be written as a whole: before the work, so that it is not done in vain.

    Raises:
        OutputError: it holds something that attnpress did not write as part of `what`; it is a file, the current
            folder, or a mount point.
        OSError: nothing can be written there; the path is its `filename`.
    """
    with naming(path):
        target = _real(path)
        if target.parent.is_dir():
            with locked_folder(target.parent):
                _check_replaceable(path, target, what)
        _check_room(path, target)


def take_folder(path: Path, what: str, is_own: Callable[[Path], bool] = lambda _: False) -> None:
    """Make a folder the place of `what`, which adds to it and removes only what it made in it.

    Args:
        is_own: whether a folder without a marker is one all the same, made before there were markers.

    Raises:
        OutputError: something else lies there.
        OSError: nothing can be written there; the path is its `filename`.
    """
    with naming(path):
        target = _real(path)
        if is_stream(path) or (os.path.lexists(target) and not target.is_dir()):
            raise OutputError(f"{path}: is a file; name a folder")
        _check_room(path, target / MARKER)
        target.mkdir(parents=True, exist_ok=True)
        with locked_folder(target):  # another process may be taking it for the same
            found = read_marker(target)
            if found is not None and found.what == what:
                return
            held = next((entry.name for entry in target.iterdir()), None)
            if held is not None and (found is not None or not is_own(target)):
                raise OutputError(
                    f"{path}: holds {_shown({held})}, and is no folder of kind {what!r}; name another folder"
                )
            mark(target, what)


def check_file(path: Path, is_own: Callable[[bytes], bool]) -> None:
    """Ask whether a file may be written: before the work, so that it is not done in vain.

    Args:
        is_own: whether content is what this command writes, so that it may be replaced. Nobody misses an empty file.

    Raises:
        OutputError: something else is there.
        OSError: nothing can be written there; the path is its `filename`.
    """
    if is_stream(path):
        return
    with naming(path):
        target = _real(path)
        if target.is_dir():
            raise OutputError(f"{path}: is a folder; name a file, such as {path / 'FILE'}")
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: is no ordinary file; choose another name")
        if target.is_file() and (content := target.read_bytes()) and not is_own(content):
            raise OutputError(f"{path}: exists, and is not what this command writes; choose another name, or delete it")
        _check_room(path, target)


def is_stream(path: Path) -> bool:
    """Whether what is written there flows on: /dev/stdout, /dev/null, a named pipe, a terminal."""
    if str(path).startswith(STREAMS):
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def is_stdout(path: Path) -> bool:
    """Whether the path is another name of standard output."""
    return str(path) in (str(STDOUT), "/dev/fd/1", "/proc/self/fd/1")


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """What `is_stream` is true for, to be written on; standard output comes after what was printed before.

    Raises:
        OSError: with the path as its `filename`.
    """
    if is_stdout(path) and sys.stdout is not None:
        sys.stdout.flush()
        yield cast(BinaryIO, getattr(sys.stdout, "buffer", None) or _Printed())
        sys.stdout.flush()
        return
    with naming(path), path.open("ab") as file:
        yield file


class _Printed(io.RawIOBase):
    """Bytes to a standard output that takes text only, as one that was redirected within Python does."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        sys.stdout.write(bytes(content).decode("utf-8"))
        return len(content)


def mark(folder: Path, what: str, holds: frozenset[str] | None = None) -> None:
    """Write a folder's marker; see `Marker`."""
    scratch = folder / f"{MARKER}.{SCRATCH}"  # not by write_text: the folder itself may be locked
    scratch.write_text(_marker_text(what, holds), encoding="utf-8")
    scratch.replace(folder / MARKER)


def _marker_text(what: str, holds: frozenset[str] | None) -> str:
    plain = {"made_by": "attnpress", "what": what, "holds": None if holds is None else sorted(holds)}
    return json.dumps(plain) + "\n"


def read_marker(folder: Path) -> Marker | None:
    """What a folder says of itself; None if attnpress did not make it."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        holds = found["holds"]
        if found["made_by"] != "attnpress" or not isinstance(found["what"], str):
            return None
        return Marker(found["what"], None if holds is None else frozenset(map(str, holds)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remove_folder(folder: Path, what: str) -> None:
    """Remove a folder that carries the marker of `what`; one that is not there is fine.

    Raises:
        OutputError: it carries no such marker, or holds something that attnpress did not write.
    """
    if not folder.is_dir():
        return
    if folder.is_symlink() or (found := read_marker(folder)) is None or found.what != what:
        raise OutputError(f"{folder}: attnpress did not make this folder, so it is not removed; move it away")
    if foreign := found.foreign(_content(folder)):
        raise OutputError(
            f"{folder}: {_shown(foreign)} in it is not attnpress's own, so it is not removed; move it away"
        )
    with contextlib.suppress(FileNotFoundError):  # another process is removing it too
        shutil.rmtree(folder)


def add_text(folder: Path, name: str, text: str) -> None:
    """Write a file into a folder that carries a marker, as one more of those that attnpress may replace or remove."""
    write_text(folder / name, text)
    found = read_marker(folder)
    if found is not None and found.holds is not None:
        mark(folder, found.what, found.holds | {name})


def explain(error: OSError) -> str:
    """An error of the file system as one line: where, what, and what to do."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    mend = MENDS.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {mend}" if mend else "")


MENDS = {
    errno.ENOSPC: "make room, and start the same command again",
    errno.EDQUOT: "make room in your quota, and start the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), and start the same command again",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOTDIR: "a part of this path is a file where a folder is needed; choose another place",
    errno.EISDIR: "name a file",
    errno.EEXIST: "choose another name, or delete it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "make memory free, or do less at once",
    errno.EIO: "the device failed; check it, and start the same command again",
    errno.ESTALE: "mount the network folder again, and start the same command again",
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the `with` block, errors of the file system name the path that the user gave."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _real(path: Path) -> Path:
    """Where a path leads, through every link."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _check_replaceable(path: Path, target: Path, what: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"{path}: is a file; name a folder that attnpress may make")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise OutputError(f"{path}: is the current folder, or holds it; name a folder that attnpress may make")
    if target.is_mount():
        raise OutputError(f"{path}: is a mount point; name a folder inside it")
    found, held = read_marker(target), _content(target)
    if held and (found is None or found.what != what):
        raise OutputError(
            f"{path}: holds {_shown(held)}, and is no folder of kind {what!r} that attnpress made, so it is not "
            "replaced; name another folder"
        )
    if found is not None and (foreign := found.foreign(held)):
        raise OutputError(
            f"{path}: holds {_shown(foreign)}, which attnpress did not write, so it is not replaced; move that away, "
            "or name another folder"
        )


def _shown(names: Collection[str]) -> str:
    """The first of some names, on one line whatever it holds."""
    first = min(names)
    return first if first.isprintable() else repr(first)


def _content(folder: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*")) - {MARKER, f"{MARKER}.{SCRATCH}"}


def _check_room(path: Path, target: Path) -> None:
    """Try to write where the target, or the first folder made for it, is to lie."""
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    if not parent.is_dir():
        parent.stat()  # raises for links in a circle
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    longest = os.pathconf(parent, "PC_NAME_MAX")
    too_long = any(len(os.fsencode(name)) > longest for name in target.relative_to(parent).parts)
    if too_long or len(os.fsencode(target)) >= os.pathconf(parent, "PC_PATH_MAX"):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    with tempfile.TemporaryFile(dir=parent) as trial:
        trial.write(bytes(4096))


def _make_parents(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file, where the path asks for a folder, or links in a circle
        target.parent.stat()
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target)) from error


def _open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return _open_new(path / MARKER)


@contextmanager
def _held(target: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """Something new beside `target`, locked while the `with` block runs; gone after it, if it has not been moved."""
    scratch = _beside(target, SCRATCH)
    with locked_folder(target.parent):
        _clear(target)
        handle = make(scratch)
        lock_handle(handle)
    try:
        yield scratch, handle
    finally:
        _remove(scratch)
        os.close(handle)


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{_label(target)}.{secrets.token_hex(8)}.{ending}")


def _label(target: Path) -> str:
    """The target's name; of a long one its hash, since the longest that is allowed has no room for more around it."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 100 else hashlib.sha256(name).hexdigest()


def _clear(target: Path) -> None:
    """Remove what killed writers of the target left; put back what one of them had moved away."""
    names = re.compile(rf"\.{re.escape(_label(target))}\.[0-9a-f]{{16}}\.({SCRATCH}|{REPLACED})")
    for left in [path for path in target.parent.iterdir() if names.fullmatch(path.name)]:
        if left.suffix == f".{REPLACED}" and not os.path.lexists(target):
            left.replace(target)
        elif _is_abandoned(left):
            _remove(left)


def _is_abandoned(scratch: Path) -> bool:
    """Whether no writer that lives holds it; a folder is held by its marker, which is made in the same moment."""
    folder = scratch.is_dir()
    if folder and not (scratch / MARKER).is_file():
        return not any(scratch.iterdir())
    try:
        handle = os.open(scratch / MARKER if folder else scratch, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    free = lock_handle(handle)
    os.close(handle)
    return free


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _swap(scratch: Path, target: Path, check: Callable[[], None]) -> None:
    """Put the scratch in the target's place, if it passes the check; what was there stays beside it until it is."""
    old = _beside(target, REPLACED)
    with locked_folder(target.parent):
        check()
        replaces = os.path.lexists(target)
        if replaces:
            target.replace(old)
        try:
            scratch.replace(target)
        except BaseException:
            if replaces:
                old.replace(target)
            raise
    if replaces:
        _remove(old)
