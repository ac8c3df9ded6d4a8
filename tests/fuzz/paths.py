"""Outputs at any path: folders of others, links, devices, names of all kinds. Allowed: what was asked for, whole; or an
error that names the path, with nothing changed. What attnpress did not make is there afterwards, as it was.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

from attnpress.files import (
    OutputError,
    check_file,
    check_folder,
    explain,
    mark,
    remove_folder,
    take_folder,
    whole_folder,
    write_text,
)

REGRESSIONS: list[int] = [*range(100), 2606, 447291570]
"""Seeds that are replayed as tests: some of every kind, and each that failed once."""

NAMES = (
    "a",
    "b",
    "model",
    ".hidden",
    "ä ö",
    "x" * 255,
    "x" * 256,
    "x" * 120,
    "-",
    "..",
    ".",
    "new\nline",
    "\udcff",
    "*",
)
CONTENT = "mine"


def replay(seed: int) -> str:
    """One output; returns how it ended.

    Raises:
        AssertionError: not as it may; names the seed.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        _plant(rng, root)
        try:
            return _write(rng, root)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r:.2000}") from error


def _write(rng: random.Random, root: Path) -> str:
    path, before = _path(rng, root), _others(root)
    how = rng.choice(("file", "folder", "folder", "take", "remove", "fails"))
    try:
        if how == "file":
            check_file(path, lambda content: content == b"ours")
            write_text(path, "ours")
        elif how == "take":
            take_folder(path, "sweep")
        elif how == "remove":
            remove_folder(path, "model")
        else:
            _write_folder(path, fails=how == "fails")
        ended = "written"
    except (OutputError, OSError) as error:
        said, ended = (str(error) if isinstance(error, OutputError) else explain(error)), "refused"
        assert "\n" not in said.replace(str(path), ""), said
        assert str(path) in said, f"{said} names no path"
    except ZeroDivisionError:
        ended = "failed"
    after = _others(root)
    lost = {name for name, content in before.items() if after.get(name) != content}
    assert not lost, f"{how} to {path} lost {lost}"
    assert not [name for name in map(str, root.rglob("*")) if name.endswith((".unfinished", ".replaced"))]
    if ended == "written" and how == "file":
        assert Path(os.path.realpath(path)).read_text(encoding="utf-8") == "ours"
    if ended == "written" and how == "folder":
        check_folder(path, "model")
        assert {entry.name for entry in Path(os.path.realpath(path)).iterdir()} == {
            "weights",
            "deep",
            ".attnpress.json",
        }
    return ended


def _write_folder(path: Path, *, fails: bool) -> None:
    with whole_folder(path, "model") as scratch:
        write_text(scratch / "weights", "new")
        (scratch / "deep").mkdir()
        if fails:
            raise ZeroDivisionError


def _others(root: Path) -> dict[str, str | None]:
    """What attnpress did not make: every file with its content, every link with its target, every folder of others."""
    found: dict[str, str | None] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            if path.is_symlink():
                found[str(path)] = str(path.readlink())
            elif path.is_file() and (content := path.read_text(encoding="utf-8")).startswith(CONTENT):
                found[str(path)] = content
    return found


def _plant(rng: random.Random, root: Path) -> None:
    for _ in range(rng.choice((0, 1, 3, 6))):
        path = root.joinpath(
            *rng.choices([name for name in NAMES if len(name) < 256 and name not in "..-"], k=rng.choice((1, 2)))
        )
        kind = rng.choice(("file", "folder", "empty", "ours", "ours with a file", "checkpoints", "link"))
        try:
            if kind == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{CONTENT} {rng.random()}", encoding="utf-8")
            elif kind == "link":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(rng.choice((".", "..", "a", "nowhere", str(root), path.name)))
            elif kind in ("ours", "ours with a file"):
                _write_folder(path, fails=False)
            else:
                path.mkdir(parents=True, exist_ok=True)
            if kind in ("folder", "ours with a file"):
                # Not "weights": in a folder of ours that would be our own file, which somebody wrote over.
                (path / rng.choice(("thesis", "poem", "notes"))).write_text(f"{CONTENT} too", encoding="utf-8")
            if kind == "checkpoints":
                mark(path, "model" if rng.random() < 0.5 else "checkpoints")
        except (OSError, OutputError):
            continue


def _path(rng: random.Random, root: Path) -> Path:
    planted = [path for path in sorted(root.rglob("*")) if "/.attnpress" not in str(path)]
    kind = rng.choice(("planted", "planted", "inside", "new", "root", "device"))
    if kind == "planted" and planted:
        return rng.choice(planted)
    if kind == "inside" and planted:
        return rng.choice(planted) / rng.choice(NAMES)
    if kind == "root":
        return root
    if kind == "device":
        return rng.choice((Path("/dev/null/out"), Path("/proc/out"), root / "a" / ".." / "b"))
    return root.joinpath(*rng.choices(NAMES, k=rng.choice((1, 2, 3))))
