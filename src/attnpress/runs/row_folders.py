"""Predict many files of rows, each into its own file. Running again predicts the missing ones.

The output folder mirrors the input. Beside each finished file is a note of its writer: what it was made from, and its
hash. The folder alone thus records what is done, and any engine, on any machine with access to it, can continue.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.files import is_stream, take_folder
from attnpress.locks import locked
from attnpress.runs.row_files import PredictionError, Progress, Warn, finished
from attnpress.tasks.lines import SUFFIXES, ending
from attnpress.tasks.parquet import PARQUET

WHAT = "predictions"
"""Kind of the output folder, in its marker."""

JSONL = ".jsonl"
READ = (*SUFFIXES, PARQUET)
"""Extensions of the files that are read from a folder."""

NAMED = 5
"""Number of files that a message names."""


@dataclass(frozen=True)
class Pair:
    """An input file of rows, and its output file."""

    source: Path
    output: Path


@dataclass(frozen=True)
class Outcome:
    """Result of a file.

    Attributes:
        progress: of its complete output; None if there is none.
        reason: why there is none.
        warnings: of its writer, unless they were reported at once.
    """

    pair: Pair
    progress: Progress | None
    reason: str = ""
    warnings: tuple[str, ...] = ()


Finish = Callable[[Pair, Warn], Outcome]
"""Function that predicts one file."""

Engine = Callable[[Sequence[Pair]], Iterable[Outcome]]
"""Function that predicts files in any order, and returns their outcomes."""


def are_many(sources: Sequence[Path]) -> bool:
    """True if the output of these inputs is a folder: several inputs, or a folder."""
    return len(sources) > 1 or sources[0].is_dir()


def pair_files(sources: Sequence[Path], output: Path, warn: Warn) -> list[Pair]:
    """Pair each input file with its output, sorted by name.

    Files of a single folder keep their relative paths. Of several inputs, a file keeps its name, and files in a folder
    keep their path including the folder's name. ".jsonl" is appended to other extensions.

    Args:
        sources: files, and folders of files with extensions in READ; hidden ones do not count.
        output: folder.
        warn: receives a message about files that are left out.

    Raises:
        PredictionError: a missing file, a folder without readable files, a stream, two files with one output, or an
            output inside the input.
    """
    found: list[tuple[Path, Path]] = []
    for source in sources:
        if is_stream(source):
            raise PredictionError(f"{source}: a stream has no name for its output; give it alone, or give files")
        if source.is_dir():
            _check_apart(source, output)
            inner = _inside(source, warn)
            above = Path() if len(sources) == 1 else Path(source.resolve().name)
            found += [(source / path, above / path) for path in inner]
        elif source.is_file():
            found.append((source, Path(source.name)))
        else:
            raise PredictionError(f"{source}: no such file; give files, or folders of them")
    pairs = [Pair(source.absolute(), (output / _named(path)).absolute()) for source, path in sorted(found)]
    times = Counter(pair.output for pair in pairs)
    if twice := [pair for pair in pairs if times[pair.output] > 1]:
        raise PredictionError(
            f"{twice[0].source} and {twice[1].source}: both would be answered in {twice[0].output}; rename one, or run "
            "them one by one"
        )
    return sorted(pairs, key=lambda pair: pair.output)


@contextmanager
def held_folder(output: Path) -> Iterator[None]:
    """Claim a folder for predictions, and keep other processes out of it inside the `with` block.

    Raises:
        OutputError: it contains something else.
        PredictionError: another process is using it.
    """
    take_folder(output, WHAT)

    def refuse() -> None:
        raise PredictionError(f"{output}: another process is at work there; wait for its end")

    with locked(output / "run.lock", refuse):
        yield


def missing_pairs(pairs: Sequence[Pair], made_from: Mapping[str, Any]) -> tuple[list[Pair], list[Progress]]:
    """Pairs without an output, and the progress of the other outputs.

    Raises:
        PredictionError: an output does not match its input and `made_from`; all outputs are checked first.
    """
    missing, done, foreign = list[Pair](), list[Progress](), list[str]()
    for pair in pairs:
        try:
            progress = finished(pair.source, pair.output, made_from)
        except PredictionError as error:
            foreign.append(str(error))
            continue
        if progress is None:
            missing.append(pair)
        else:
            done.append(progress)
    if foreign:
        raise PredictionError(foreign[0] + _and_more(len(foreign) - 1))
    return missing, done


def predict_files(
    engine: Engine, pairs: Sequence[Pair], made_from: Mapping[str, Any], *, warn: Warn, notify: Warn
) -> Progress:
    """Predict the files that have no output yet.

    Args:
        engine: predicts them.
        pairs: see `pair_files`; their folder is held.
        made_from: as for `predict_file`; the hash of each input is added.
        warn: receives what is skipped.
        notify: receives a line for each file that is done.

    Returns:
        Sums over all outputs, including those of earlier processes.

    Raises:
        PredictionError: see `missing_pairs`; or some files could not be predicted, while all others are.
    """
    missing, done = missing_pairs(pairs, made_from)
    if done:
        notify(f"{len(done)} of {len(pairs)} files are done already")
    failed: list[str] = []
    for outcome in engine(missing) if missing else ():
        for text in outcome.warnings:
            warn(text)
        if outcome.progress is None:
            failed.append(outcome.reason)
            warn(outcome.reason)
            continue
        done.append(outcome.progress)
        notify(f"{len(done)} of {len(pairs)} files: {outcome.pair.source.name}, {outcome.progress.written} lines")
    if failed:
        raise PredictionError(
            f"{len(failed)} of {len(pairs)} files are not answered, the others are: {failed[0]}"
            f"{_and_more(len(failed) - 1)}; correct them or take them away, and start the same command again"
        )
    return dataclasses.replace(
        Progress(), **{key: sum(getattr(each, key) for each in done) for key in ("lines", "size", "written", "skipped")}
    )


def _inside(folder: Path, warn: Warn) -> list[Path]:
    """Paths of the files in a folder that are read; links to folders are not followed."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name).relative_to(folder) for name in names if not name.startswith(".")]
    left = sorted(str(path) for path in found if ending(path) not in READ)
    kept = [path for path in found if ending(path) in READ]
    if not kept:
        raise PredictionError(f"{folder}: holds no file to read; their names end in {', '.join(READ)}")
    if left:
        warn(f"{folder}: left out, not of a kind that is read: {', '.join(left[:NAMED])}{_and_more(len(left) - NAMED)}")
    return kept


def _refuse_unreadable(error: OSError) -> None:
    raise error


def _check_apart(source: Path, output: Path) -> None:
    if output.resolve().is_relative_to(source.resolve()):
        raise PredictionError(
            f"{output}: lies in the input folder, so that the next run would read it; choose another --output"
        )


def _named(path: Path) -> Path:
    return path if ending(path) == JSONL else path.with_name(path.name + JSONL)


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""
