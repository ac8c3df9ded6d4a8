"""Files are written whole or not at all: what was there stays until the new content is complete."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from attnpress.files import sha256_of, whole_folder, write_text


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
        folder.mkdir()
        (folder / "weights").write_text("old", encoding="utf-8")
    with pytest.raises(error), whole_folder(folder) as scratch:  # noqa: PT012 - the failure lies in the middle
        (scratch / "weights").write_text("half", encoding="utf-8")
        assert folder.exists() == old
        raise error
    assert listing(tmp_path) == (["model"] if old else [])
    assert not old or (folder / "weights").read_text(encoding="utf-8") == "old"


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    for name in ("first", "second"):
        with whole_folder(folder) as scratch:
            (scratch / name).touch()
        assert listing(folder) == [name]
    assert listing(folder.parent) == ["model"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    leaving = whole_folder(tmp_path / "model")
    scratch = leaving.__enter__()  # and never left, as in a process that was killed
    (scratch / "half").touch()
    with whole_folder(tmp_path / "model") as fresh:
        (fresh / "weights").touch()
    assert listing(tmp_path) == ["model"]
    assert listing(tmp_path / "model") == ["weights"]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
