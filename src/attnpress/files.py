"""Write files and folders completely or not at all, and never over files that attnpress did not create.

A file or folder is written beside its destination, under a name ending in `.unfinished`, and renamed when complete.
Readers never see a partial result, however the writer died. Each folder carries a marker with its kind and content.
Only a folder with the right marker is replaced or removed, and only if it contains nothing else.
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
"""File in every folder that attnpress may replace or remove; see `Marker`."""

SCRATCH = "unfinished"
REPLACED = "replaced"
STREAMS = ("/dev/std", "/dev/fd/", "/proc/self/fd/")
STDIN, STDOUT = Path("/dev/stdin"), Path("/dev/stdout")


class OutputError(ValueError):
    """An output cannot be written, or would replace something foreign. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class Marker:
    """Content of a folder's marker.

    Attributes:
        what: kind of the folder, such as "export".
        holds: paths inside when it was created; None for a folder whose content changes in use, which is never replaced
            or removed as a whole.
    """

    what: str
    holds: frozenset[str] | None = None

    def foreign(self, content: frozenset[str]) -> frozenset[str]:
        """Names in a folder that were not there when it was created."""
        return content - (self.holds or frozenset())


def write_text(path: Path, text: str) -> None:
    """Replace the file's content atomically; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace the file's content by a value as indented JSON, atomically; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file's content atomically. Content is appended to a stream, such as /dev/stdout or a pipe.

    A replaced file keeps its permissions. For a symbolic link, the target is replaced.

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
    """Flush written data to disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path, what: str) -> Iterator[Path]:
    """A scratch folder that becomes `path` if the `with` block succeeds, and is deleted otherwise.

    Args:
        what: kind of the folder in a word or two; see `check_folder` for allowed previous content.

    Raises:
        OutputError: see `check_folder`; checked before the block is entered, and again when it has ended.
    """
    check_folder(path, what)
    with naming(path):
        target = _real(path)
        _make_parents(target)
    with _held(target, _make_folder) as (scratch, _):
        yield scratch
        with naming(path):
            # Written in place, since the lock of a live writer is on the marker itself.
            (scratch / MARKER).write_text(_marker_text(what, _content(scratch)), encoding="utf-8")
            _swap(scratch, target, lambda: _check_replaceable(path, target, what))


def check_folder(path: Path, what: str) -> None:
    """Check that a folder may be written as a whole, before the work starts.

    Raises:
        OutputError: it contains something that attnpress did not write as part of `what`; or it is a file, the current
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
    """Mark a folder as the place of `what`, which adds files and removes only its own.

    Args:
        is_own: whether a folder without a marker belongs to it, from a version without markers.

    Raises:
        OutputError: it contains something else.
        OSError: nothing can be written there; the path is its `filename`.
    """
    with naming(path):
        target = _real(path)
        if is_stream(path) or (os.path.lexists(target) and not target.is_dir()):
            raise OutputError(f"{path}: is a file; name a folder")
        _check_room(path, target / MARKER)
        target.mkdir(parents=True, exist_ok=True)
        with locked_folder(target):  # another process may be taking it for the same purpose
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
    """Check that a file may be written, before the work starts.

    Args:
        is_own: whether existing content was written by this command, and may be replaced. An empty file may always be.

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
            raise OutputError(f"{path}: is not a regular file; choose another name")
        if target.is_file() and (content := target.read_bytes()) and not is_own(content):
            raise OutputError(f"{path}: exists, and is not what this command writes; choose another name, or delete it")
        _check_room(path, target)


def is_stream(path: Path) -> bool:
    """True for a stream: /dev/stdout, /dev/null, a named pipe, a terminal."""
    if str(path).startswith(STREAMS):
        return True
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def is_stdout(path: Path) -> bool:
    """True if the path is another name of standard output."""
    return str(path) in (str(STDOUT), "/dev/fd/1", "/proc/self/fd/1")


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open a path for which `is_stream` is true. Standard output follows what was printed before.

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
    """Bytes to a standard output that accepts only text, such as one redirected within Python."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        sys.stdout.write(bytes(content).decode("utf-8"))
        return len(content)


def mark(folder: Path, what: str, holds: frozenset[str] | None = None) -> None:
    """Write a folder's marker; see `Marker`."""
    scratch = folder / f"{MARKER}.{SCRATCH}"  # not by write_text, since the folder itself may be locked
    scratch.write_text(_marker_text(what, holds), encoding="utf-8")
    scratch.replace(folder / MARKER)


def _marker_text(what: str, holds: frozenset[str] | None) -> str:
    plain = {"made_by": "attnpress", "what": what, "holds": None if holds is None else sorted(holds)}
    return json.dumps(plain) + "\n"


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None if attnpress did not create it."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        holds = found["holds"]
        if found["made_by"] != "attnpress" or not isinstance(found["what"], str):
            return None
        return Marker(found["what"], None if holds is None else frozenset(map(str, holds)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remove_folder(folder: Path, what: str) -> None:
    """Remove a folder with the marker of `what`. A missing folder is not an error.

    Raises:
        OutputError: it has no such marker, or contains something that attnpress did not write.
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
    """Add a file to a folder with a marker, as one that attnpress may replace or remove."""
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
    """Inside the `with` block, file-system errors name the path that the user gave."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _real(path: Path) -> Path:
    """The path with all links resolved."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _check_replaceable(path: Path, target: Path, what: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"{path}: is a file; name a folder that attnpress may create")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise OutputError(f"{path}: is the current folder, or contains it; name a folder that attnpress may create")
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
    """The first of some names, on one line whatever they contain."""
    first = min(names)
    return first if first.isprintable() else repr(first)


def _content(folder: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*")) - {MARKER, f"{MARKER}.{SCRATCH}"}


def _check_room(path: Path, target: Path) -> None:
    """Try to write where the target, or the first folder created for it, will be."""
    parent = next(folder for folder in target.parents if os.path.lexists(folder))
    if not parent.is_dir():
        parent.stat()  # raises for circular links
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
    except FileExistsError as error:  # a file in place of a folder, or circular links
        target.parent.stat()
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target)) from error


def _open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return _open_new(path / MARKER)


@contextmanager
def _held(target: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A new scratch path beside `target`, locked inside the `with` block and removed afterwards unless it was moved."""
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
    """The target's name, or its hash if it is long, since the longest allowed name leaves no room for more."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 100 else hashlib.sha256(name).hexdigest()


def _clear(target: Path) -> None:
    """Remove leftovers of killed writers of the target, and restore what one of them had moved away."""
    names = re.compile(rf"\.{re.escape(_label(target))}\.[0-9a-f]{{16}}\.({SCRATCH}|{REPLACED})")
    for left in [path for path in target.parent.iterdir() if names.fullmatch(path.name)]:
        if left.suffix == f".{REPLACED}" and not os.path.lexists(target):
            left.replace(target)
        elif _is_abandoned(left):
            _remove(left)


def _is_abandoned(scratch: Path) -> bool:
    """True if no live writer holds it. A folder is held by its marker, created in the same moment."""
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
    """Put the scratch in the target's place, if it passes the check; previous content is kept until then."""
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
