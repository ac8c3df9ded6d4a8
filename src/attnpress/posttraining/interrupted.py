"""Checkpoints of an interrupted training, kept beside the output folder until the same call finishes it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnpress.files import MARKER, take_folder, write_json
from attnpress.records.strict_json import JsonError, parse_json
from attnpress.runs.folder import hold_folder
from attnpress.training.trainer import last_checkpoint

WHAT = "interrupted training"
"""Kind of the folder, in its marker."""

CHECKPOINTS, MADE_FROM, LOCK = "checkpoints", "made_from.json", "run.lock"


@contextmanager
def kept_training(
    output: Path | None, made_from: Mapping[str, Any], notify: Callable[[str], None]
) -> Iterator[Path | None]:
    """A folder for checkpoints. It is deleted when the `with` block succeeds, and kept when it fails.

    Args:
        output: the folder is beside it; None keeps nothing.
        made_from: everything that the training depends on, as plain data; checkpoints of another training are deleted.
        notify: receives where training resumes, or that another training is deleted.

    Raises:
        OutputError: something else is in its place.
        ConfigError: another process is training there.
    """
    if output is None:
        yield None
        return
    folder = output.with_name(f".{output.name}.distill")
    take_folder(folder, WHAT)
    with hold_folder(folder):
        checkpoints = folder / CHECKPOINTS
        if _read(folder / MADE_FROM) != made_from:
            if checkpoints.is_dir():
                notify(f"an interrupted training with another model, texts or options is deleted: {folder}")
                shutil.rmtree(checkpoints)
            write_json(folder / MADE_FROM, made_from)
        elif (last := last_checkpoint(checkpoints)) is not None:
            notify(f"resuming the training from {Path(last).name.replace('-', ' ')}")
        yield checkpoints
        shutil.rmtree(checkpoints, ignore_errors=True)
        for name in (LOCK, MADE_FROM, MARKER):  # the marker last, since without it the rest would count as foreign
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the user's files stay
        folder.rmdir()


def _read(file: Path) -> Any:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, JsonError):
        return None
