"""Export a finished run to a folder with the files and a record of their verification."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attnpress.config import RunConfig
from attnpress.config.recipe import spec_to_dict
from attnpress.export import accelforge, csr, density, onnx, openvino, qonnx, scalesim, tables, trace
from attnpress.export.agreement import TOLERANCE, Agreement, compare
from attnpress.export.errors import ExportError, require
from attnpress.export.recording import record_batch
from attnpress.export.sequences import AttendedSequence, sequences_of
from attnpress.files import MARKER, check_folder, sha256_of, whole_folder, write_text
from attnpress.models.binding import attentions
from attnpress.models.inputs import LABELS
from attnpress.records.lanes import SCHEDULES
from attnpress.records.provenance import versions
from attnpress.runs.finished import finished_model
from attnpress.tasks import TaskData

FORMAT = 2
RECORD = "export.json"
BATCH = 16
"""Maximum number of evaluation rows padded together."""

Record = dict[str, Any]
Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format that a run can be exported to.

    Attributes:
        make: writes the files into a folder, verifies them, and returns the result.
        notes: notes for users.
        packages: required packages.
        rows: default number of rows of the evaluation set.
        together: True if they must be one batch.
    """

    make: Callable[[PreTrainedModel, TaskData, list[Batch], Path], Record]
    notes: tuple[str, ...]
    packages: tuple[str, ...] = ()
    rows: int = 4
    together: bool = False


def export_run(
    run_folder: Path,
    config: RunConfig,
    kind: str,
    output: Path | None = None,
    rows: int | None = None,
    batch: int = BATCH,
) -> Record:
    """Export the compressed model of a finished run, verify the export, and record both.

    Args:
        run_folder: written by `compress`, or by `save_pretrained` of a compressed model.
        config: of the run; its data are used for verification.
        kind: one of KINDS.
        output: folder for the files and `export.json`; None is `run_folder/export/KIND`. It is created only after the
            verification has passed. It replaces only an earlier export.
        rows: rows of the evaluation set to record, or rows in the example that a graph is traced with; at least 2. None
            uses the default of the kind.
        batch: maximum number of rows padded together; a trace has one file per batch.

    Returns:
        The record.

    Raises:
        ConfigError: the run is not finished.
        OutputError: the output folder contains something other than an export, or cannot be replaced.
        ExportError: an unknown kind, a missing package, a model that the format does not support, or a failed check.
    """
    if kind not in KINDS:
        raise ExportError(f"--to {kind}: unknown; use one of {', '.join(KINDS)}")
    chosen = KINDS[kind]
    rows = chosen.rows if rows is None else rows
    if rows < 2:
        raise ExportError(f"--rows {rows}: a graph for any batch is traced with at least two rows")
    require(kind, *chosen.packages)
    place = output or run_folder / "export" / kind
    check_folder(place, "export")
    model, data = finished_model(run_folder, config)
    with whole_folder(place, "export") as folder:
        made = chosen.make(model, data, example_batches(data, rows, rows if chosen.together else batch), folder)
        record = _record(kind, model, data, folder, chosen.packages) | made | {"notes": list(chosen.notes)}
        write_text(folder / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def example_batch(data: TaskData, rows: int = 4) -> Batch:
    """The first rows of the evaluation set, padded together, without labels. A single row is duplicated."""
    return example_batches(data, rows, rows)[0]


def example_batches(data: TaskData, rows: int, batch: int) -> list[Batch]:
    """The first rows of the evaluation set in batches, without labels. A single row is duplicated."""
    chosen = list(islice(data.eval, rows))
    parts = [chosen[begin : begin + batch] for begin in range(0, len(chosen), batch)]
    if len(chosen) == 1:
        parts = [chosen * 2]
    collated = [data.collate(part) for part in parts]
    return [{name: tensor for name, tensor in one.items() if name not in LABELS} for one in collated]


def _onnx(model: PreTrainedModel, data: TaskData, batches: list[Batch], folder: Path) -> Record:
    onnx.write_onnx(model, batches[0], folder)
    return {"evaluation": _as_record(compare(model, onnx.serve_onnx(folder / onnx.FILE), data))}


def _openvino(model: PreTrainedModel, data: TaskData, batches: list[Batch], folder: Path) -> Record:
    openvino.write_openvino(model, batches[0], folder)
    served, compiled = openvino.serve_openvino(folder / openvino.FILE)
    compressed = [module for module in attentions(model).values() if not module.spec.is_dense]
    agreement, found = compare(model, served, data), openvino.products(compiled)
    return {
        "evaluation": _as_record(agreement),
        "attention_products": {"expected": 2 * len(compressed), "int8": sum(item.is_int8 for item in found)},
        "execution_graph": [{**dataclasses.asdict(item), "int8": item.is_int8} for item in found],
        "settings": openvino.SETTINGS,
    }


def _trace(model: PreTrainedModel, _: TaskData, batches: list[Batch], folder: Path) -> Record:
    written = trace.write_shards(model, batches, folder)
    return {
        "checked": {"recomputed": "from the written codes, with the reference", "equal_to": written["compared"]},
        "batch": list(next(iter(batches[0].values())).shape),
        **{key: written[key] for key in ("tokens", "bytes", "bytes_a_token")},
    }


def _sequences(model: PreTrainedModel, batches: list[Batch]) -> Iterator[AttendedSequence]:
    return sequences_of(record_batch(model, batch) for batch in batches)


def _csr(model: PreTrainedModel, _: TaskData, batches: list[Batch], folder: Path) -> Record:
    return csr.write_csr(_sequences(model, batches), folder)


def _csv(model: PreTrainedModel, data: TaskData, batches: list[Batch], folder: Path) -> Record:
    found = tables.write_tables(list(_sequences(model, batches)), folder, data.task.name)
    return {"lanes": {str(lanes): {each: found.total(lanes, each) for each in SCHEDULES} for lanes in found.lanes}}


def _density(model: PreTrainedModel, _: TaskData, batches: list[Batch], folder: Path) -> Record:
    found = density.write_density(_sequences(model, batches), folder)
    return {"density": {name: layer["density"] for name, layer in found["layers"].items()}}


def _scalesim(model: PreTrainedModel, _: TaskData, batches: list[Batch], folder: Path) -> Record:
    return {"cycles": scalesim.write_scalesim(_sequences(model, batches), folder)}


def _qonnx(model: PreTrainedModel, _: TaskData, batches: list[Batch], folder: Path) -> Record:
    return {"quant_nodes": qonnx.write_qonnx(model, batches[0], folder)}


def _accelforge(model: PreTrainedModel, _: TaskData, batches: list[Batch], folder: Path) -> Record:
    specs = {name: module.spec for name, module in attentions(model).items()}
    return accelforge.write_accelforge(_sequences(model, batches), specs, folder)


KINDS: dict[str, Kind] = {
    "onnx": Kind(_onnx, onnx.NOTES, ("onnx", "onnxscript", "onnxruntime"), together=True),
    "openvino": Kind(_openvino, openvino.NOTES, ("openvino", "onnx", "onnxscript"), together=True),
    "trace": Kind(_trace, trace.NOTES),
    "csr": Kind(_csr, csr.NOTES, rows=16),
    "csv": Kind(_csv, tables.NOTES, rows=64),
    "density": Kind(_density, density.NOTES, rows=64),
    "scalesim": Kind(_scalesim, scalesim.NOTES, ("scalesim",), rows=16),
    "qonnx": Kind(_qonnx, qonnx.NOTES, ("qonnx", "onnx", "onnxscript"), rows=2, together=True),
    "accelforge": Kind(_accelforge, accelforge.NOTES, rows=64),
}
"""Supported formats."""


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
        "versions": versions(names),
        "machine": platform.processor() or platform.machine(),
    }
