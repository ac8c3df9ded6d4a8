"""How a command ends: its exit status, and one line for whatever kept it from its end."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from attnpress.files import explain

INTERRUPTED, PIPE_CLOSED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGPIPE, 128 + signal.SIGTERM
FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ESTALE}


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the command was: what is cleaned up after Ctrl-C is cleaned up after this, too."""


def exit_status(command: Callable[[], int]) -> int:
    """Run a command to whatever end.

    Returns:
        What it returned; 1 after an error that is explained in one line, 130 after Ctrl-C, 143 after SIGTERM, and 141,
        without a word, when the reader of its output has had enough.

    Raises:
        SystemExit: of argparse.
        Exception: a defect of attnpress, which keeps its traceback.
    """
    try:
        with _printing_anything(), _sigterm_raises():
            try:
                return command()
            finally:
                _flush()  # now: after the end, Python can only complain
    except (KeyboardInterrupt, Exception) as error:
        status, line = _ending(error)
        if status is None:
            raise
        if line:
            _tell(line)
        _silence()
        return status


def ignore_late_signals() -> None:
    """Let the process end with its status: what comes while Python takes itself down would replace it by a signal."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _ending(error: BaseException) -> tuple[int | None, str | None]:
    """The exit status and the line for an error; None for a defect."""
    if isinstance(error, KeyboardInterrupt):
        what, status = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        return status, f"{what}; the same command resumes, or starts again"
    if isinstance(error, BrokenPipeError) and any(_has_no_reader(stream) for stream in _streams()):
        return PIPE_CLOSED, None
    line = one_line(error)
    return (None if line is None else 1), line


def one_line(error: BaseException) -> str | None:
    """What an error says to whoever typed the command; None for a defect."""
    if any(kind.__module__.startswith("attnpress.") for kind in type(error).__mro__):
        return str(error)
    if (found := _environment(error)) is not None:
        return explain(found)
    if isinstance(error, UnicodeEncodeError):
        odd = error.object[error.start : error.end]
        return f"a name or text holds {odd!a}, which is no Unicode character; rename or correct it"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"not enough memory; do less at once ({str(error).splitlines()[0] if str(error) else 'out of memory'})"
    return None


def _environment(error: BaseException) -> OSError | None:
    """The error of the system behind an error, as the libraries wrap it."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    if told := re.search(r"\(os error (\d+)\)", text):  # libraries in Rust
        return OSError(int(told[1]), os.strerror(int(told[1])))
    if "PytorchStreamWriter" in text or "inline_container" in text:  # does not say why
        return OSError(errno.ENOSPC, "a checkpoint could not be written")
    if type(error).__module__.startswith("sqlite3") and "unlocked" not in text:
        return OSError(errno.EIO, f"the study's database: {text}")
    if error.__cause__ is not None and (found := _environment(error.__cause__)) is not None:
        return found
    around = error.__context__
    return around if isinstance(around, OSError) and around.errno in FULL_OR_BROKEN else None


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


@contextmanager
def _printing_anything() -> Iterator[None]:
    """Inside the `with` block, what the terminal cannot show is printed as an escape."""
    before = [(stream, stream.errors) for stream in _streams() if hasattr(stream, "reconfigure")]
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # it flushes, into what may be closed
                stream.reconfigure(errors=errors)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside the `with` block, SIGTERM ends the command as Ctrl-C does; not outside the main thread, where none can."""
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(*_: object) -> None:
    raise Terminated


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _flush() -> None:
    for stream in _streams():
        stream.flush()


def _tell(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"attnpress: {line}", file=sys.stderr, flush=True)


def _has_no_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError):
        return False


def _silence() -> None:
    """Let what cannot be written any more go nowhere, or Python complains of it when it ends."""
    for stream in _streams():
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
