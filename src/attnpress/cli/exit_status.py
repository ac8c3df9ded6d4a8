"""How a command ends: its exit status, and a one-line message for errors."""

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
    """SIGTERM as an exception, so that the cleanup after Ctrl-C also runs after SIGTERM."""


def exit_status(command: Callable[[], int]) -> int:
    """Run a command and determine its exit status.

    Returns:
        Its own status; 1 after an error with a one-line message, 130 after Ctrl-C, 143 after SIGTERM, and 141,
        silently, if the reader of its output closed the pipe.

    Raises:
        SystemExit: of argparse.
        Exception: a bug in attnpress keeps its traceback.
    """
    try:
        with _printing_anything(), _sigterm_raises():
            try:
                return command()
            finally:
                _flush()  # flush now, while errors can still be handled
    except (KeyboardInterrupt, Exception) as error:
        status, line = _ending(error)
        if status is None:
            raise
        if line:
            _tell(line)
        _silence()
        return status


def ignore_late_signals() -> None:
    """Ignore signals during interpreter shutdown, so that the process ends with its own status."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _ending(error: BaseException) -> tuple[int | None, str | None]:
    """The exit status and the message for an error; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        what, status = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        return status, f"{what}; the same command resumes, or starts again"
    if isinstance(error, BrokenPipeError) and any(_has_no_reader(stream) for stream in _streams()):
        return PIPE_CLOSED, None
    line = one_line(error)
    return (None if line is None else 1), line


def one_line(error: BaseException) -> str | None:
    """The one-line message for an error; None for a bug."""
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
    """The system error behind an error that a library has wrapped."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    if told := re.search(r"\(os error (\d+)\)", text):  # Rust libraries
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
    """Inside the `with` block, characters that the terminal cannot show are printed as escapes."""
    before = [(stream, stream.errors) for stream in _streams() if hasattr(stream, "reconfigure")]
    for stream, _ in before:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # it flushes, possibly into a closed stream
                stream.reconfigure(errors=errors)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside the `with` block, SIGTERM ends the command like Ctrl-C; only possible in the main thread."""
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
    """Discard output that can no longer be written, so that Python does not complain at exit."""
    for stream in _streams():
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
