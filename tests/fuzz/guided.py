"""What reads bytes, led by coverage: atheris changes recipes and records so that new branches of the readers run.

A case is so many runs of libFuzzer from a seed, in a process of its own, which begins with the project's own files.
Allowed is what `recipes` and `records` allow. Needs `pip install atheris`; without it a case is "skipped".
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = 3000
"""Of one case: a second or two."""

REGRESSIONS: list[int] = [0, 1]
"""Seeds that are replayed as tests."""


def replay(seed: int) -> str:
    """Some runs on one reader; returns which, or "skipped".

    Raises:
        AssertionError: one ended otherwise than it may; names the seed and shows the bytes.
    """
    if importlib.util.find_spec("atheris") is None:
        return "skipped"
    name = list(READERS)[seed % len(READERS)]
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(_samples(name)):
            (corpus / str(number)).write_bytes(content)
        flags = [f"-seed={seed + 1}", f"-runs={RUNS}", "-max_len=4096", f"-artifact_prefix={place}/found-"]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", name, *flags, str(corpus)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        found = [file.read_bytes() for file in sorted(Path(place).glob("found-*"))]
    assert done.returncode == 0, f"seed {seed} ({name}): {found} {done.stdout[-3000:]} {done.stderr[-1000:]}"
    return name


def _samples(name: str) -> list[bytes]:
    ending = "yaml" if name in ("recipe", "yaml") else "json"
    folder = ROOT / ("recipes" if ending == "yaml" else "records")
    files = sorted(folder.rglob(f"*.{ending}"), key=lambda file: (file.stat().st_size, str(file)))
    return [file.read_bytes()[:4096] for file in files[:20]]


def main(name: str, words: list[str]) -> None:
    """Fuzz one reader in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["attnpress"]):
        read = READERS[name]()
    atheris.Setup([sys.argv[0], *words], read)
    atheris.Fuzz()


def _recipe() -> Callable[[bytes], None]:
    from attnpress.config import RunConfig
    from tests.fuzz.recipes import read_back

    def read(content: bytes) -> None:
        read_back(RunConfig, content, [])

    return read


def _yaml() -> Callable[[bytes], None]:
    from attnpress.config.strict_yaml import YamlError, parse_yaml

    return functools.partial(_parse, parse_yaml, YamlError)


def _json() -> Callable[[bytes], None]:
    from attnpress.records.strict_json import JsonError, parse_json

    return functools.partial(_parse, parse_json, JsonError)


def _record() -> Callable[[bytes], None]:
    from attnpress.records.reading import RecordError
    from attnpress.records.run import from_json

    return functools.partial(_parse, from_json, RecordError)


def _parse(parse: Callable[[str], object], refusal: type[Exception], content: bytes) -> None:
    said = "nothing"
    try:
        parse(content.decode("utf-8", "replace"))
    except refusal as error:
        said = str(error)
    assert 0 < len(said) < 2000, said


READERS = {"recipe": _recipe, "yaml": _yaml, "json": _json, "record": _record}
"""Each imports what it reads with, which atheris then watches."""

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
