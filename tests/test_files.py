"""Files are written whole or not at all, and only what carries our own marker is ever replaced or removed."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from attnpress.files import (
    MARKER,
    Marker,
    OutputError,
    check_file,
    check_folder,
    explain,
    is_stream,
    mark,
    read_marker,
    remove_folder,
    sha256_of,
    whole_folder,
    write_bytes,
    write_text,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path below and its content, so that nothing can be lost unseen."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("old", [None, "old"])
def test_text_that_cannot_be_written_changes_nothing(old: str | None, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    if old is not None:
        file.write_text(old, encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half of it \ud800")
    assert listing(tmp_path) == ([] if old is None else ["record.json"])
    assert old is None or file.read_text(encoding="utf-8") == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "record.json"
    write_text(file, "old")
    monkeypatch.setattr("os.fsync" if call == "fsync" else "pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new")
    assert (file.read_text(encoding="utf-8"), listing(tmp_path)) == ("old", ["record.json"])


def test_text_is_replaced_and_folders_are_made(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.txt"
    for text in ("eins\n", "zwölf\n"):
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    assert listing(file.parent) == ["b.txt"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_whose_writing_fails_never_appears(old: bool, error: type[BaseException], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if old:
        with whole_folder(folder, "model") as scratch:
            (scratch / "weights").write_text("old", encoding="utf-8")
    with pytest.raises(error), whole_folder(folder, "model") as scratch:  # noqa: PT012 - the failure lies in the middle
        (scratch / "weights").write_text("half", encoding="utf-8")
        assert folder.exists() == old
        raise error
    assert listing(tmp_path) == (["model"] if old else [])
    assert not old or (folder / "weights").read_text(encoding="utf-8") == "old"


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    for name in ("first", "second"):
        with whole_folder(folder, "model") as scratch:
            (scratch / name).touch()
        assert listing(folder) == [name]
        assert read_marker(folder) == Marker("model", frozenset({name}))
    assert listing(folder.parent) == ["model"]


WRITER = """
import os, signal, sys
from pathlib import Path
from attnpress import files
moment, path = sys.argv[1], Path(sys.argv[2])
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the swap":
    files._swap = kill
if moment == "in the middle of the swap":
    real, moves = Path.replace, []
    def replace(self, target):
        moves.append(self)
        kill() if len(moves) == 2 else real(self, target)
    Path.replace = replace
if moment == "in a file":
    files.sync = kill
    files.write_text(path / "file", "half")
with files.whole_folder(path, "model") as scratch:
    (scratch / "weights").write_text("new")
    if moment == "in the block":
        kill()
"""


@pytest.mark.parametrize("moment", ["in the block", "before the swap", "in the middle of the swap", "in a file"])
def test_a_writer_that_is_killed_loses_nothing_and_the_next_one_clears_up(moment: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with whole_folder(folder, "model") as scratch:
        write_text(scratch / "weights", "old")  # whole inside of whole
    killed = subprocess.run([sys.executable, "-c", WRITER, moment, str(folder)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.read_text() for path in tmp_path.rglob("weights") if path.read_text() == "old"] == ["old"]
    if moment == "in a file":
        assert len(listing(folder)) == 2, "what the killed writer left"
        write_text(folder / "file", "whole")
        assert listing(folder) == ["file", "weights"]
        return
    with pytest.raises(ZeroDivisionError), whole_folder(folder, "model"):
        raise ZeroDivisionError
    assert everything(tmp_path)[str(folder / "weights")] == b"old"
    assert listing(tmp_path) == ["model"]


def test_two_writers_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    folder, both = tmp_path / "model", threading.Barrier(2, timeout=30)

    def write(name: str) -> None:
        for _ in range(20):
            with whole_folder(folder, "model") as scratch:
                (scratch / name).touch()
                both.wait()

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert listing(tmp_path) == ["model"]
    assert listing(folder) in (["a"], ["b"])


def someones(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")


def ours_with_a_note(folder: Path) -> None:
    with whole_folder(folder, "export") as scratch:
        (scratch / "model.onnx").touch()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")


def ours_with_a_note_inside(folder: Path) -> None:
    with whole_folder(folder, "export") as scratch:
        (scratch / "data").mkdir()
    (folder / "data" / "notes.txt").write_text("mine", encoding="utf-8")


def another_kind_of_ours(folder: Path) -> None:
    with whole_folder(folder, "model") as scratch:
        (scratch / "weights").touch()


def a_file(folder: Path) -> None:
    folder.write_text("mine", encoding="utf-8")


def a_link_to_someones(folder: Path) -> None:
    someones(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def with_a_false_marker(folder: Path) -> None:
    someones(folder)
    (folder / MARKER).write_text('{"what": "export", "holds": null}', encoding="utf-8")


FOREIGN: list[tuple[Callable[[Path], None], str]] = [
    (someones, r"out: holds thesis\.txt, and is no folder of kind 'export' that attnpress made"),
    (ours_with_a_note, r"out: holds notes\.txt, which attnpress did not write"),
    (ours_with_a_note_inside, r"out: holds data/notes\.txt, which attnpress did not write"),
    (another_kind_of_ours, r"out: holds weights, and is no folder of kind 'export'"),
    (a_file, r"out: is a file; name a folder"),
    (a_link_to_someones, r"out: holds thesis\.txt"),
    (with_a_false_marker, r"out: holds thesis\.txt"),
]


@pytest.mark.parametrize(("make", "message"), FOREIGN)
def test_what_attnpress_did_not_make_is_never_replaced(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=message), whole_folder(tmp_path / "out", "export"):
        pytest.fail("the work began")
    with pytest.raises(OutputError, match=message):
        check_folder(tmp_path / "out", "export")
    assert everything(tmp_path) == before


def test_what_came_while_the_folder_was_made_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="thesis"), whole_folder(tmp_path / "out", "export"):
        someones(tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize("place", [".", "..", "/", "~", "/tmp"])
def test_the_current_folder_and_those_above_it_are_not_replaced(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match=r"current folder|mount point|holds"):
        check_folder(Path(place).expanduser(), "export")


def test_an_empty_folder_is_taken_and_a_link_to_ours_is_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("first", "second"):
        with whole_folder(tmp_path / "link", "export") as scratch:
            (scratch / name).touch()
        assert listing(tmp_path / "empty") == [name]
    assert (tmp_path / "link").is_symlink()


def test_only_a_folder_with_the_right_marker_is_removed(tmp_path: Path) -> None:
    someones(tmp_path / "someones")
    (tmp_path / "checkpoints").mkdir()
    mark(tmp_path / "checkpoints", "checkpoints", frozenset({"checkpoint-8"}))
    (tmp_path / "checkpoints" / "checkpoint-8").mkdir()
    (tmp_path / "link").symlink_to("checkpoints")
    for folder, what in (("someones", "checkpoints"), ("checkpoints", "model"), ("link", "checkpoints")):
        with pytest.raises(OutputError, match="attnpress did not make this folder"):
            remove_folder(tmp_path / folder, what)
    assert listing(tmp_path / "checkpoints") == ["checkpoint-8"]
    remove_folder(tmp_path / "checkpoints", "checkpoints")
    remove_folder(tmp_path / "checkpoints", "checkpoints")
    assert listing(tmp_path) == ["link", "someones"]


@pytest.mark.parametrize(
    "replace", [lambda folder: check_folder(folder, "sweep"), lambda folder: remove_folder(folder, "sweep")]
)
def test_a_folder_whose_marker_lists_nothing_is_kept(replace: Callable[[Path], None], tmp_path: Path) -> None:
    mark(tmp_path, "sweep")
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="notes"):
        replace(tmp_path)
    assert "notes" in listing(tmp_path)


def test_permissions_are_those_of_the_file_before_or_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "new")
        with whole_folder(tmp_path / "folder", "model"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    (tmp_path / "file").chmod(0o604)
    write_text(tmp_path / "file", "newer")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("length", [255, 100, 1])
def test_the_longest_name_that_is_allowed_can_be_written(length: int, tmp_path: Path) -> None:
    check_file(tmp_path / ("x" * length), lambda _: False)
    write_text(tmp_path / ("x" * length), "text")
    with whole_folder(tmp_path / ("y" * length), "model"):
        pass
    assert listing(tmp_path) == ["x" * length, "y" * length]


UNWRITABLE: list[tuple[Callable[[Path], Path], int]] = [
    (lambda folder: folder / "file" / "out", errno.ENOTDIR),
    (lambda folder: folder / "file" / "a" / "b" / "out", errno.ENOTDIR),
    (lambda folder: folder / ("x" * 256), errno.ENAMETOOLONG),
    (lambda folder: folder / "new" / ("x" * 256), errno.ENAMETOOLONG),
    (lambda folder: folder.joinpath(*["x" * 200] * 30), errno.ENAMETOOLONG),
    (lambda folder: folder / "circle" / "out", errno.ELOOP),
    (lambda folder: folder / "circle", errno.ELOOP),
    (lambda _: Path("/proc/out"), errno.ENOENT),
]


@pytest.mark.parametrize(("place", "number"), UNWRITABLE)
def test_a_place_that_cannot_be_written_is_known_before_the_work(
    place: Callable[[Path], Path], number: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "circle").symlink_to("circle")
    path = place(tmp_path)
    checks: list[Callable[[], None]] = [lambda: check_file(path, lambda _: True), lambda: check_folder(path, "export")]
    for check in checks:
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            check()
        assert (raised.value.errno, raised.value.filename) == (number, str(path))
    assert listing(tmp_path) == ["circle", "file"]
    with pytest.raises(OSError, match=os.strerror(number)):
        write_text(path, "text")


def test_a_full_disk_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="No space") as raised:
        check_file(tmp_path / "out.json", lambda _: True)
    assert explain(raised.value) == (
        f"{tmp_path / 'out.json'}: No space left on device; make room, and start the same command again"
    )


def test_a_file_is_replaced_only_if_it_is_of_this_command(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"thesis")
    (tmp_path / "ours").write_bytes(b"ours")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("ours", "empty", "absent", "pipe"):
        check_file(tmp_path / name, lambda content: content == b"ours")
    with pytest.raises(OutputError, match="theirs: exists, and is not what this command writes"):
        check_file(tmp_path / "theirs", lambda content: content == b"ours")
    with pytest.raises(OutputError, match="is a folder; name a file"):
        check_file(tmp_path, lambda _: True)


def test_streams_are_written_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_bytes(tmp_path / "pipe", b"text")
    reader.join()
    assert found == [b"text"]
    print("before")
    write_text(Path("/dev/stdout"), "between\n")
    write_text(Path("/dev/stderr"), "told\n")
    write_text(Path("/dev/null"), "lost")
    print("after")
    assert capfd.readouterr() == ("before\nbetween\nafter\n", "told\n")
    assert [is_stream(Path(name)) for name in ("/dev/null", "/dev/fd/63", str(tmp_path))] == [True, True, False]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
