"""Predict files of rows. An interrupted prediction resumes.

The file is read twice: once to count usable rows before anything is written, and once to predict. Rows are processed in
chunks, batched by length within a chunk, and written in the order of the input. The progress is stored beside the
unfinished output: the number of lines done, the valid bytes of the output, and what it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from accelerate.utils import tqdm

from attnpress.files import explain, is_stream, naming, open_stream, sha256_of, sync, write_text
from attnpress.locks import alone
from attnpress.records.strict_json import JsonError, dump_json, is_unicode, parse_json
from attnpress.tasks.lines import Broken, Numbered, Record, ending, foreign_kind, newline_of, plain_rows, read_rows
from attnpress.tasks.parquet import PARQUET, parquet_rows

CHUNK = 1024
"""Lines per chunk, the most that a kill loses."""

TOLD = 5
"""Skipped lines reported one by one, and lines named per reason in the summary."""

PLAIN = ".txt"
"""Extension of a tab-separated table, or of plain lines."""

KEPT = ("line", "id")
"""Keys of a row that are copied to the output."""

Row = dict[str, Any]
Answer = Callable[[Sequence[Row]], Sequence[Row | Broken]]
"""Function from rows with their texts to their answers, in the same order."""
Warn = Callable[[str], None]


class PredictionError(ValueError):
    """An input, an output or a model's answers cannot be used. The message gives the reason and says what to do."""


@dataclass(frozen=True)
class Progress:
    """Progress of an output.

    Attributes:
        lines: input lines that are done.
        size: valid bytes of the output.
        written, skipped: number of lines with an answer, and of bad lines.
        sha256: of the valid bytes.
    """

    lines: int = 0
    size: int = 0
    written: int = 0
    skipped: int = 0
    sha256: str = hashlib.sha256().hexdigest()


@dataclass
class Survey:
    """Content of an input, before prediction.

    Attributes:
        usable: rows with all their texts.
        done: rows up to the line at which an earlier process stopped.
        skipped: other rows.
        first: the first of them: line and reason.
        kinds: by reason: number of rows, and the lines of the first ones.
    """

    usable: int = 0
    done: int = 0
    skipped: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    kinds: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def skip(self, line: int, reason: str) -> None:
        """Count an unusable row."""
        kind = reason.split(" (")[0]
        count, lines = self.kinds.get(kind, (0, []))
        self.kinds[kind] = (count + 1, [*lines, line] if count < TOLD else lines)
        self.skipped += 1
        if len(self.first) < TOLD:
            self.first.append((line, reason))

    def summary(self) -> str:
        """Number of skipped rows by reason, the most frequent first."""
        ranked = sorted(self.kinds.items(), key=lambda item: -item[1][0])
        parts = [
            f"{count} {kind} (line {', '.join(map(str, lines))}{', ...' if count > len(lines) else ''})"
            for kind, (count, lines) in ranked[:TOLD]
        ]
        others = sum(count for _, (count, _) in ranked[TOLD:])
        return "; ".join([*parts, *([f"{others} for other reasons"] if others else [])])


class Input:
    """The rows of a file, read again at each use; each is a `Row` with "line", "id" and its texts, or broken.

    Args:
        name: as the user gave it; its extension selects the format.
        file: path of the content.
        columns: of the texts.
        may_be_plain: a .txt file whose first line is not a header with this column holds one text per line; if False,
            it is always a table.

    Raises:
        PredictionError: the content is of an unsupported kind.
    """

    def __init__(self, name: Path, file: Path, columns: Sequence[str], may_be_plain: bool = True) -> None:
        self.name, self.file, self.columns, self.may_be_plain = name, file, columns, may_be_plain
        with file.open("rb") as content:
            self.head = content.read(256)
        if not self.is_parquet and (foreign := foreign_kind(self.head)):
            raise PredictionError(f"{name}: {foreign}")

    @property
    def is_parquet(self) -> bool:
        """True for Parquet files, which are read by row groups; a line is then a row."""
        return ending(self.name) == PARQUET

    @property
    def is_plain(self) -> bool:
        """True if each line is a text."""
        if not self.may_be_plain or ending(self.name) != PLAIN or len(self.columns) != 1:
            return False
        first = self.head.decode("utf-8-sig", errors="replace").partition("\n")[0].removesuffix("\r")
        return "\t" not in first and first != self.columns[0]

    def __iter__(self) -> Iterator[tuple[int, Row | Broken]]:
        for line, record in self._records():
            yield line, record if isinstance(record, Broken) else _row(line, record, self.columns)

    def _records(self) -> Numbered:
        if self.is_parquet:
            yield from parquet_rows(self.file, (*self.columns, "id"))
            return
        with self.file.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline_of(self.name)) as lines:
            if self.is_plain:
                yield from plain_rows(lines, self.columns[0])
            else:
                yield from read_rows(self.name, lines, (*self.columns, "id"))

    def survey(self, done: int) -> Survey:
        """Count the rows.

        Args:
            done: last line that an earlier process has finished.

        Raises:
            PredictionError: there are rows, but none is usable.
        """
        survey = Survey()
        for line, row in self:
            survey.done += line <= done
            if isinstance(row, Broken):
                survey.skip(line, row.reason)
            else:
                survey.usable += 1
        if survey.skipped and not survey.usable:
            raise PredictionError(self._useless(survey))
        return survey

    def _useless(self, survey: Survey) -> str:
        line, reason = survey.first[0]
        array = "; the file looks like one JSON array" if self.head.lstrip().startswith(b"[") else ""
        example = json.dumps(dict.fromkeys(self.columns, "..."), ensure_ascii=False)
        return (
            f"{self.name}: none of its {survey.skipped} lines can be used (line {line}: {reason}{array}); give a line "
            f"such as {example} for each text, or a .csv or .tsv file with columns of these names"
        )


def predict_file(
    answer: Answer,
    columns: Sequence[str],
    source: Path,
    output: Path,
    made_from: Mapping[str, Any],
    *,
    warn: Warn,
    may_be_plain: bool = True,
) -> Progress:
    """Answer each row of `source` in `output`, or resume an unfinished output.

    Args:
        answer: see `make_answer`.
        columns: keys that each row must have, with texts.
        source: CSV, tab-separated text, JSON lines or Parquet, by its extension; empty lines do not count. A column or
            key "id" is copied. A stream, such as /dev/stdin, is read to its end first.
        output: written when all lines are done, with one JSON object per valid line and "line" from 1. A stream, such
            as /dev/stdout, is appended to, and not resumed.
        made_from: other inputs that determine the output, as plain data; an unfinished output made from something else
            is not resumed.
        warn: receives the first bad lines, or a summary of all; they are skipped. Also an unfinished output that does
            not match its progress; it is restarted.
        may_be_plain: see `Input`.

    Raises:
        PredictionError: `source` cannot be read or has no usable row; `output` exists, is being written by another
            process, or was started from something else; no row of a chunk could be answered.
        TaskError: a table with duplicate columns, or a quote that is never closed.
    """
    with _as_file(source) as file:
        rows = Input(source, file, columns, may_be_plain)
        if is_stream(output):
            _tell(rows, rows.survey(0), warn)
            with open_stream(output) as out:
                return _answer_all(
                    answer, rows, _Written(out, lambda stream: stream.flush()), Progress(), lambda _: None, warn
                )
        _check_free(output)
        _make_place(output)
        with _alone(output):
            _check_free(output)
            return _go_on(answer, rows, output, {"input": sha256_of(file), **made_from}, warn)


def finish_file(
    answer: Answer,
    columns: Sequence[str],
    source: Path,
    output: Path,
    made_from: Mapping[str, Any],
    *,
    warn: Warn,
    may_be_plain: bool = True,
) -> Progress:
    """`predict_file` for one of many files; a finished output and the record of its origin are kept.

    It waits while another process writes the output.

    Raises:
        PredictionError: see `predict_file`, and `finished`.
    """
    identity = _identity(source, made_from)
    _make_place(output)
    with alone(output, lambda: warn(f"{output}: another process is writing it; waiting for its end")):
        if os.path.lexists(output):
            return _whole(output, identity)
        if not _beside(output, "unfinished").exists():  # a deleted output is made again
            _beside(output, "progress").unlink(missing_ok=True)
        rows = Input(source, source, columns, may_be_plain)
        return _go_on(answer, rows, output, identity, warn, keep_notes=True)


def finished(source: Path, output: Path, made_from: Mapping[str, Any]) -> Progress | None:
    """Progress of a complete output of `finish_file`; None if there is none yet.

    Raises:
        PredictionError: the output was not written by `finish_file`, was changed since, or was made from something
            else.
    """
    return _whole(output, _identity(source, made_from)) if os.path.lexists(output) else None


def _whole(output: Path, identity: Mapping[str, Any]) -> Progress:
    notes = _beside(output, "progress")
    progress = _read_progress(notes, output, identity, output)
    if progress is None:
        raise PredictionError(f"{output}: exists, and {notes.name} does not say how it was made; move it away")
    if not output.is_file() or (output.stat().st_size, sha256_of(output)) != (progress.size, progress.sha256):
        raise PredictionError(f"{output}: was changed after it was written; move it away, or delete it")
    return progress


def _make_place(output: Path) -> None:
    with naming(output):
        output.parent.mkdir(parents=True, exist_ok=True)


def _identity(source: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    try:
        with naming(source):
            return {"input": sha256_of(source), **made_from}
    except OSError as error:  # an error of this file only
        raise PredictionError(explain(error)) from None


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f".{output.name}.{what}")


class _Written:
    """An output, with the number of its bytes and their hash."""

    def __init__(self, file: BinaryIO, flush: Callable[[BinaryIO], None] = sync) -> None:
        self.file, self.flush_file, self.size, self.digest = file, flush, 0, hashlib.sha256()

    def flush(self) -> None:
        self.flush_file(self.file)

    def count(self, content: bytes) -> None:
        self.size += len(content)
        self.digest.update(content)

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.count(content)

    def holds(self, progress: Progress, survey: Survey) -> bool:
        """Read the output of an earlier process; False if it does not match its progress."""
        last, answers = b"", 0
        while self.size < progress.size and (last := self.file.readline(progress.size - self.size)):
            self.count(last)
            answers += 1
        found = (self.size, self.digest.hexdigest(), answers, survey.done)
        rows = progress.written + progress.skipped
        return found == (progress.size, progress.sha256, progress.written, rows)

    def begin_anew(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.size, self.digest = 0, hashlib.sha256()


def _go_on(
    answer: Answer, rows: Input, output: Path, identity: Mapping[str, Any], warn: Warn, keep_notes: bool = False
) -> Progress:
    partial, notes = _beside(output, "unfinished"), _beside(output, "progress")
    begun, progress = notes.exists() or partial.exists(), _read_progress(notes, output, identity, notes)
    survey = rows.survey(progress.lines if progress else 0)
    partial.touch()
    with partial.open("r+b") as file:
        out = _Written(file)
        if progress is None or not out.holds(progress, survey):
            if begun and (progress or file.seek(0, 2)):
                warn(f"{partial}: is not what {notes.name} says of it; restarted")
            progress = Progress()
            out.begin_anew()
        file.truncate(out.size)
        _tell(rows, survey, warn)
        note = _noting(notes, identity)
        progress = _answer_all(answer, rows, out, progress, note, warn)
    if keep_notes:
        note(progress)  # also for an input without rows
    partial.replace(output)
    if not keep_notes:
        notes.unlink(missing_ok=True)
    return progress


def _noting(notes: Path, identity: Mapping[str, Any]) -> Callable[[Progress], None]:
    return lambda progress: write_text(notes, json.dumps({"made_from": identity, **asdict(progress)}))


def _tell(rows: Input, survey: Survey, warn: Warn) -> None:
    if rows.is_plain:
        warn(f"{rows.name}: read as plain lines: its first line is no header with a column {rows.columns[0]!r}")
    for line, reason in survey.first:
        warn(f"{rows.name}:{line}: {reason}; skipped")
    if survey.skipped > len(survey.first):
        warn(f"{rows.name}: {survey.skipped} of {survey.skipped + survey.usable} lines skipped: {survey.summary()}")


def _answer_all(
    answer: Answer, rows: Input, out: _Written, progress: Progress, note: Callable[[Progress], None], warn: Warn
) -> Progress:
    for chunk in _chunks(rows, progress.lines):
        good = [row for _, row in chunk if not isinstance(row, Broken)]
        written = 0
        for row, said in zip(good, _answer_each(answer, rows.name, good, progress), strict=True):
            if isinstance(said, Broken):
                warn(f"{rows.name}:{row['line']}: {said.reason}; skipped")
            else:
                found = {key: row[key] for key in KEPT if key in row} | said
                out.write(dump_json(found).encode("utf-8") + b"\n")
                written += 1
        out.flush()
        skipped = progress.skipped + len(chunk) - written
        progress = Progress(chunk[-1][0], out.size, progress.written + written, skipped, out.digest.hexdigest())
        note(progress)
    return progress


def _answer_each(answer: Answer, name: Path, rows: Sequence[Row], progress: Progress) -> Sequence[Row | Broken]:
    """Answers of a chunk. If the model fails, each row is tried alone, so that one row does not affect the others.

    Raises:
        PredictionError: no row can be answered, so the failure is not due to single rows.
    """
    if not rows:
        return []
    try:
        said = answer(rows)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        said = [_answer_one(answer, row) for row in rows]
    broken = [found for found in said if isinstance(found, Broken)]
    if len(broken) == len(rows) and (len(rows) > 1 or not progress.written):
        first, last = rows[0]["line"], rows[-1]["line"]
        raise PredictionError(f"{name}: the model answers none of the lines {first} to {last}: {broken[0].reason}")
    return said


def _answer_one(answer: Answer, row: Row) -> Row | Broken:
    try:
        return answer([row])[0]
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Broken(f"not answered ({reason})", reason)


def _row(line: int, record: Record, columns: Sequence[str]) -> Row | Broken:
    for name in columns:
        text = record.get(name)
        if not isinstance(text, str):
            keys = ", ".join(map(repr, record))[:120]
            found = f"found {text!r:.40}" if name in record else f"keys there: {keys or 'none'}"
            return Broken(f"no text under {name!r} ({found})", "")
        if not is_unicode(text):
            return Broken(f"an unpaired surrogate under {name!r}", "")
    row: Row = {"line": line} | {name: record[name] for name in (*columns, "id") if name in record}
    try:
        dump_json(row.get("id"))
    except ValueError as error:
        return Broken(f"an id that cannot be written ({error})", "")
    return row


def _chunks(rows: Input, done: int) -> Iterator[list[tuple[int, Row | Broken]]]:
    """Rows that are not yet done, with a progress bar."""
    chunk: list[tuple[int, Row | Broken]] = []
    with tqdm(unit="rows", desc="run", disable=not sys.stderr.isatty()) as bar:
        for line, row in rows:
            bar.update()
            if line > done:
                chunk.append((line, row))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _read_progress(notes: Path, output: Path, identity: Mapping[str, Any], stale: Path) -> Progress | None:
    """The progress of an earlier process; None if there is none that can be read.

    Raises:
        PredictionError: the output was made from something else; `stale` is what to delete.
    """
    try:
        found = parse_json(notes.read_text(encoding="utf-8"))
        before = found.pop("made_from")
        different = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
        progress = Progress(**found)
        counts = (progress.lines, progress.size, progress.written, progress.skipped)
        if not all(type(count) is int and count >= 0 for count in counts):
            return None
    except (FileNotFoundError, JsonError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        return None
    if different:
        raise PredictionError(
            f"{output}: was begun with another {', '.join(different)}; choose another --output, or delete {stale}"
        )
    return progress


def _check_free(output: Path) -> None:
    if output.exists():
        raise PredictionError(f"{output}: exists already; delete it, or choose another --output")


@contextlib.contextmanager
def _as_file(source: Path) -> Iterator[Path]:
    """A file that can be read twice: the source itself, or a copy of a stream."""
    if source.is_file():
        yield source
    elif is_stream(source):
        with tempfile.NamedTemporaryFile() as copy, source.open("rb") as stream:
            shutil.copyfileobj(stream, copy)
            copy.flush()
            yield Path(copy.name)
    else:
        what = "is a folder" if source.is_dir() else "no such file"
        raise PredictionError(f"{source}: {what}; give a file of JSON lines, CSV, tab-separated text or Parquet")


def _alone(output: Path) -> AbstractContextManager[None]:
    def refuse() -> None:
        raise PredictionError(f"{output}: another process is writing it; wait for its end")

    return alone(output, refuse)
