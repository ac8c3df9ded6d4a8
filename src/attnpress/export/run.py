"""The journey: a finished run -> a folder with the exported file, and a record of how it was checked."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attnpress.config import RunConfig
from attnpress.evaluate import finished_model
from attnpress.export import onnx, openvino, trace
from attnpress.export.agreement import TOLERANCE, Agreement, compare
from attnpress.export.errors import ExportError, require
from attnpress.files import MARKER, check_folder, sha256_of, whole_folder, write_text
from attnpress.models.binding import attentions
from attnpress.models.inputs import LABELS
from attnpress.recipe import spec_to_dict
from attnpress.tasks import TaskData

FORMAT = 2
RECORD = "export.json"
ROWS = 4
"""Rows of the example or traced batch."""

Record = dict[str, Any]


def export_run(run_folder: Path, config: RunConfig, kind: str, output: Path | None = None, rows: int = ROWS) -> Record:
    """Export the compressed model of a finished run, check it, and record both.

    Args:
        run_folder: written by `compress`, or by `save_pretrained` of a compressed model.
        config: of the run; its data serve the check.
        kind: one of KINDS.
        output: folder for the file and `export.json`; None is `run_folder/export/KIND`. It appears whole, once the
            check has passed. An earlier export there is replaced, and nothing else.
        rows: of the evaluation set in the traced batch, or in the example that a graph is traced with; at least 2.

    Returns:
        The record.

    Raises:
        ConfigError: the run is not finished.
        OutputError: the output folder holds something else than an export, or cannot be replaced.
        ExportError: an unknown kind, a missing package, a model that this kind cannot say, or a failed check.
    """
    if kind not in KINDS:
        raise ExportError(f"--to {kind}: unknown; use one of {', '.join(KINDS)}")
    if rows < 2:
        raise ExportError(f"--rows {rows}: a graph for any batch is traced with at least two rows")
    make, notes, packages = KINDS[kind]
    require(kind, *packages)
    place = output or run_folder / "export" / kind
    check_folder(place, "export")
    model, data = finished_model(run_folder, config)
    with whole_folder(place, "export") as folder:
        made = make(model, data, example_batch(data, rows), folder)
        record = _record(kind, model, data, folder, packages) | made | {"notes": list(notes)}
        write_text(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def example_batch(data: TaskData, rows: int = ROWS) -> dict[str, Tensor]:
    """The first rows of the evaluation set, padded together, without labels; a single row is taken twice."""
    chosen = list(islice(data.eval, rows))
    batch = data.collate(chosen * 2 if len(chosen) == 1 else chosen)
    return {name: tensor for name, tensor in batch.items() if name not in LABELS}


def _onnx(model: PreTrainedModel, data: TaskData, batch: dict[str, Tensor], folder: Path) -> Record:
    onnx.write_onnx(model, batch, folder)
    return {"evaluation": _as_record(compare(model, onnx.serve_onnx(folder / onnx.FILE), data))}


def _openvino(model: PreTrainedModel, data: TaskData, batch: dict[str, Tensor], folder: Path) -> Record:
    openvino.write_openvino(model, batch, folder)
    served, compiled = openvino.serve_openvino(folder / openvino.FILE)
    compressed = [module for module in attentions(model).values() if not module.spec.is_dense]
    agreement, found = compare(model, served, data), openvino.products(compiled)
    return {
        "evaluation": _as_record(agreement),
        "attention_products": {"expected": 2 * len(compressed), "int8": sum(item.is_int8 for item in found)},
        "execution_graph": [{**dataclasses.asdict(item), "int8": item.is_int8} for item in found],
        "settings": openvino.SETTINGS,
    }


def _trace(model: PreTrainedModel, _: TaskData, batch: dict[str, Tensor], folder: Path) -> Record:
    compared = trace.write_trace(model, batch, folder)
    shape = list(next(iter(batch.values())).shape)
    return {
        "checked": {"recomputed": "from the written codes, with the reference", "equal_to": compared},
        "batch": shape,
    }


Make = Callable[[PreTrainedModel, TaskData, dict[str, Tensor], Path], Record]

KINDS: dict[str, tuple[Make, tuple[str, ...], tuple[str, ...]]] = {
    "onnx": (_onnx, onnx.NOTES, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": (_openvino, openvino.NOTES, ("openvino", "onnx", "onnxscript")),
    "trace": (_trace, trace.NOTES, ()),
}
"""What can be asked for: how it is made and checked, what is to be known about it, and the packages it needs."""


def _as_record(agreement: Agreement) -> Record:
    return {**dataclasses.asdict(agreement), "difference": agreement.difference, "tolerance": TOLERANCE}


def _record(kind: str, model: PreTrainedModel, data: TaskData, folder: Path, packages: tuple[str, ...]) -> Record:
    names = ("attnpress", "torch", "transformers", *packages)
    return {
        "format": FORMAT,
        "kind": kind,
        "attention": {name: spec_to_dict(module.spec) for name, module in attentions(model).items()},
        "task": data.task.name,
        "data": data.fingerprint["eval"],
        "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MARKER},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "machine": platform.processor() or platform.machine(),
    }
