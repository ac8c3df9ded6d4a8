"""How commands end: one line and the right status for what the system refuses, for signals and for a closed pipe."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from attnpress.cli.exit_status import exit_status, one_line
from attnpress.config import ConfigError


def told(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def command() -> int:
        raise error

    status = exit_status(command)
    return status, capsys.readouterr().err


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def meanwhile(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


class SafetensorError(Exception):
    """As the library's own, which is no OSError."""


class OutOfMemoryError(RuntimeError):
    """As torch's own."""


FULL = OSError(errno.ENOSPC, "No space left on device", "out/model")
ENDINGS: list[tuple[BaseException, int, str]] = [
    (ConfigError("seed: no"), 1, "attnpress: seed: no\n"),
    (FULL, 1, "attnpress: out/model: No space left on device; make room, and start the same command again\n"),
    (OSError(errno.EFBIG, "File too large"), 1, "attnpress: File too large; raise the limit on the size of files"),
    (PermissionError(errno.EACCES, "Permission denied", "a"), 1, "attnpress: a: Permission denied; change its perm"),
    (OSError(errno.EROFS, "Read-only file system", "a"), 1, "attnpress: a: Read-only file system; choose a place"),
    (wrapped(ValueError("datasets failed"), FULL), 1, "attnpress: out/model: No space left on device; make room"),
    (meanwhile(KeyError("x"), FULL), 1, "attnpress: out/model: No space left on device; make room"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "attnpress: No space left on device;"),
    (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"), 1, "attnpress: a checkpoint could"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "attnpress: not enough memory; do less"),
    (OutOfMemoryError("CUDA out of memory"), 1, "attnpress: not enough memory; do less at once (CUDA out of memory)"),
    (MemoryError(), 1, "attnpress: not enough memory; do less at once (out of memory)"),
    (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates"), 1, r"attnpress: a name or text holds '\udcff'"),
    (KeyboardInterrupt(), 130, "attnpress: interrupted; the same command resumes, or starts again\n"),
]


@pytest.mark.parametrize(("error", "status", "line"), ENDINGS)
def test_each_ending_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(error, capsys)
    assert found[0] == status
    assert found[1].startswith(line)
    assert found[1].count("\n") == 1


DEFECTS = [
    KeyError("layers"),
    RuntimeError("shapes do not fit"),
    meanwhile(KeyError("x"), FileNotFoundError(errno.ENOENT, "none")),
    AssertionError(),
]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_keeps_its_traceback(defect: Exception) -> None:
    def command() -> int:
        raise defect

    assert one_line(defect) is None
    with pytest.raises(type(defect)):
        exit_status(command)


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        finally:
            cleaned.append("yes")

    assert exit_status(command) == 143
    assert capsys.readouterr().err == "attnpress: terminated; the same command resumes, or starts again\n"
    assert cleaned == ["yes"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_command_runs_outside_the_main_thread_too() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(exit_status(lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]


PROGRAM = """
import os, sys, time
from attnpress.cli.exit_status import exit_status
def command():
    kind = sys.argv[1]
    if kind == "print":
        for _ in range(20000):
            print("a line")
    if kind == "escape":
        print("Prüfung \\udcff")
        print("Ärger", file=sys.stderr)
    if kind == "sleep":
        print("begun", flush=True)
        time.sleep(60)
    if kind == "another pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")
    return 0
sys.exit(exit_status(command))
"""


COMMAND = [sys.executable, "-c", PROGRAM]


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_had_enough_is_no_error(buffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with subprocess.Popen(
        [*COMMAND, "print"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_a_broken_pipe_that_is_not_the_output_is_an_error() -> None:
    done = subprocess.run([*COMMAND, "another pipe"], capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"attnpress: Broken pipe\n")


def test_a_full_output_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*COMMAND, "print"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"attnpress: No space left on device; make room, and start the same command again\n"


def test_no_output_at_all_is_fine() -> None:
    done = subprocess.run([*COMMAND, "print"], stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, "escape"], capture_output=True, env=environment)
    output, errors = done.stdout.decode(encoding).strip(), done.stderr.decode(encoding).strip()
    assert done.returncode == 0
    assert output == (r"Pr\xfcfung \udcff" if encoding == "ascii" else r"Prüfung \udcff")
    assert errors == (r"\xc4rger" if encoding == "ascii" else "Ärger")


@pytest.mark.parametrize(
    ("number", "status", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_from_outside(number: signal.Signals, status: int, what: str) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        running = subprocess.Popen([*COMMAND, "sleep"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with running:
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        running.send_signal(number)
        errors = running.communicate()[1]
    assert (running.returncode, errors) == (status, f"attnpress: {what}; the same command resumes, or starts again\n")


LATE = """
import atexit, os, sys
from attnpress.cli import main
late = int(sys.argv.pop())
atexit.register(lambda: os.kill(os.getpid(), late))
sys.exit(main())
"""


@pytest.mark.parametrize("late", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_does_not_change_how_it_ended(late: signal.Signals) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LATE, "ls", "rules", str(int(late))], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "relative" in ended.stdout
