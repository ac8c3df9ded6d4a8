"""run: what a finished run's model says of each line of a JSON-lines file; it goes on where it was killed.

Lines are read in chunks, batched by length within a chunk, and written in the order of the input. Beside the unfinished
output lies its progress: how many lines are done, how many bytes of the output are whole, and what it was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate.utils import tqdm
from filelock import FileLock, Timeout

from attnpress.config import DataSpec, RunConfig
from attnpress.deployment import Linear, deploy
from attnpress.evaluate import finished_classifier, plan_linear
from attnpress.files import sha256_of, sync, write_text
from attnpress.models.loading import weights_hash
from attnpress.tasks import TASKS, load_task, text_columns

CHUNK = 1024
"""Lines done at once: what a kill costs at most."""

Row = dict[str, Any]
Answer = Callable[[Sequence[Row]], list[Row]]
"""From rows that hold their texts to what is said of them, in the same order."""


class PredictionError(ValueError):
    """An input or output file that cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class Progress:
    """How far an output is.

    Attributes:
        lines: of the input that are done.
        size: bytes of the output that are whole.
        written, skipped: lines with an answer, and bad ones.
    """

    lines: int = 0
    size: int = 0
    written: int = 0
    skipped: int = 0


def predict_file(
    answer: Answer, columns: Sequence[str], source: Path, output: Path, made_from: Mapping[str, Any], *,
    warn: Callable[[str], None],
) -> Progress:  # fmt: skip
    """Answer each line of `source` in `output`, or go on with it.

    Args:
        answer: see `make_answer`.
        columns: keys that each line, a JSON object, must have, with texts.
        source: JSON lines; empty lines do not count. A key "id" is handed through.
        output: written whole when all lines are done; one JSON object a good line, with "line" from 1.
        made_from: what else determines the output, plain data: an unfinished output made from something else is not
            gone on with.
        warn: is told of each bad line; it is skipped.

    Raises:
        PredictionError: `source` cannot be read; `output` exists, is being written by another process, or was begun
            from something else.
    """
    if output.exists():
        raise PredictionError(f"{output}: exists already; delete it, or choose another --output")
    if not source.is_file():
        raise PredictionError(f"{source}: no such file; give a file of JSON lines")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, notes = (output.with_name(f".{output.name}.{ending}") for ending in ("unfinished", "progress"))
    identity = {"input": sha256_of(source), **made_from}
    with _alone(output):
        progress = _read_progress(notes, output, identity)
        with partial.open("ab") as out, source.open("rb") as lines:
            out.truncate(progress.size)
            for chunk in _chunks(lines, progress.lines):
                progress = _answer_chunk(answer, columns, source, chunk, out, progress, warn)
                write_text(notes, json.dumps({"made_from": identity, **dataclasses.asdict(progress)}))
        partial.replace(output)
        notes.unlink(missing_ok=True)
    return progress


def _answer_chunk(
    answer: Answer, columns: Sequence[str], source: Path, chunk: Sequence[tuple[int, bytes]], out: BinaryIO,
    progress: Progress, warn: Callable[[str], None],
) -> Progress:  # fmt: skip
    rows, skipped = [], 0
    for number, line in chunk:
        try:
            rows.append({"line": number, **_parse(line, columns)})
        except ValueError as error:
            warn(f"{source}:{number}: {error}; skipped")
            skipped += 1
    kept = ("line", "id")
    for row, said in zip(rows, answer(rows) if rows else [], strict=True):
        found = {key: row[key] for key in kept if key in row} | said
        out.write(json.dumps(found, ensure_ascii=False).encode("utf-8") + b"\n")
    sync(out)
    return Progress(chunk[-1][0], out.tell(), progress.written + len(rows), progress.skipped + skipped)


def _parse(line: bytes, columns: Sequence[str]) -> Row:
    """The line as an object with its texts.

    Raises:
        ValueError: why it is none.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    wrong = [name for name in columns if not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"no text under {', '.join(map(repr, wrong))}")
    return {name: row[name] for name in (*columns, "id") if name in row}


def _chunks(lines: BinaryIO, done: int) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines that are not empty and not yet done; a bar shows how far the file is read."""
    size, chunk = Path(lines.name).stat().st_size, []
    with tqdm(total=size, unit="B", unit_scale=True, desc="run", disable=not sys.stderr.isatty()) as bar:
        for number, line in enumerate(lines, 1):
            bar.update(len(line))
            if number > done and line.strip():
                chunk.append((number, line))
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _read_progress(notes: Path, output: Path, identity: Mapping[str, Any]) -> Progress:
    if not notes.is_file():
        return Progress()
    found = json.loads(notes.read_text(encoding="utf-8"))
    before = found.pop("made_from")
    different = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
    if different:
        raise PredictionError(
            f"{output}: was begun with another {', '.join(different)}; choose another --output, or delete {notes}"
        )
    return Progress(**found)


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PredictionError(f"{output}: another process is writing it; wait for its end") from None
    try:
        yield
    finally:
        lock.release()


def run_file(
    run_folder: Path, config: RunConfig, source: Path, output: Path, *, backend: str, linear: Linear, batch_size: int,
    warn: Callable[[str], None],
) -> Progress:  # fmt: skip
    """`predict_file` with the compressed model of a finished run, deployed.

    Args:
        config: the run's recipe: it names the text columns and the longest input.
        backend, linear: as `deploy` takes them. A model without a plan for int8 layers gets one from the run's
            training rows.

    Raises:
        PredictionError, ConfigError, BackendUnavailableError: see `predict_file`, `finished_classifier` and `deploy`.
    """
    model, tokenizer = finished_classifier(run_folder)
    if linear == "int8":
        plan_linear(model, lambda: load_task(config.data, tokenizer, config.seed), config)
    deploy(model, backend, linear=linear)
    columns, weights = _columns(config.data), weights_hash(str(run_folder / "progressive"))
    answer = make_answer(model, tokenizer, columns, config.data.max_length, batch_size)
    return predict_file(answer, columns, source, output, {"model": weights, "linear": linear}, warn=warn)


def _columns(data: DataSpec) -> tuple[str, ...]:
    if data.task in TASKS:
        return text_columns(TASKS[data.task], data)
    return tuple(name for name in (data.text, data.text_pair) if name)


def make_answer(model: Any, tokenizer: Any, columns: Sequence[str], max_length: int, batch_size: int) -> Answer:
    """A classifier's answers: its label and probability; of a regression, its score.

    Args:
        model, tokenizer: with a sequence classification head, and its own.
        columns: of the texts, one or two.
        max_length: longer inputs are cut to so many tokens, as in training.
        batch_size: rows of about the same length that go through the model together.
    """

    def answer(rows: Sequence[Row]) -> list[Row]:
        encoded = tokenizer(*([row[name] for row in rows] for name in columns), truncation=True, max_length=max_length)
        order = sorted(range(len(rows)), key=lambda row: len(encoded["input_ids"][row]))
        said: list[Row] = [{}] * len(rows)
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            inputs = tokenizer.pad({key: [encoded[key][row] for row in part] for key in encoded}, return_tensors="pt")
            with torch.inference_mode():
                logits = model(**inputs.to(model.device)).logits.float()
            for row, found in zip(part, logits, strict=True):
                said[row] = _say(model.config, found)
        return said

    return answer


def _say(config: Any, logits: torch.Tensor) -> Row:
    if config.problem_type == "regression":
        return {"score": float(logits[0])}
    best = int(logits.argmax())
    return {"label": config.id2label[best], "score": round(float(logits.softmax(-1)[best]), 6)}
