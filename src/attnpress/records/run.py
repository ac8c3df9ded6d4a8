"""Record of a run: measurements, data and provenance. Plain JSON; figures and tables are made from it alone."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpress.records.reading import Amount, RecordError, Share, Some, Whole, build_record, read_text
from attnpress.records.row_scores import RowScores
from attnpress.records.strict_json import JsonError, parse_json

FORMAT = 1
STAGES = ("dense", "dense_control", "quantized", "one_shot", "progressive")


@dataclass(frozen=True)
class HeadRecord:
    """One head: its sparsity figures (fractions of its valid pairs), keys per query, and threshold.

    `threshold` is tau, theta or gamma of the rule; 0 if no threshold is used. `errors` are relative root-mean-square
    errors on a few evaluation rows: of q, k and v from quantization, of p and output from the whole stage. It is empty
    in a stage that compresses nothing, and in old records. `pruned_mass` is the exact P on pairs without a P code, on
    the same rows; None if `errors` is empty, and in old records.
    """

    sparsity: Share
    pruned: Share
    tile_sparsity: Share
    keys_per_row: Amount
    threshold: float
    errors: dict[str, float] = field(default_factory=dict)
    pruned_mass: Share | None = None


@dataclass(frozen=True)
class LayerRecord:
    """One attention module: its name, pooled figures, static scales, heads and bits.

    `bits` is empty in records from before layers could differ; the bits of the stage then apply.
    """

    name: str
    sparsity: Share
    pruned: Share
    padded_sparsity: Share
    tile_sparsity: Share
    keys_per_row: Amount
    scales: dict[str, list[float]]
    heads: list[HeadRecord]
    bits: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRecord:
    """One evaluated stage of a run.

    Attributes:
        name: one of STAGES.
        metrics: in points; the first key is the task's headline.
        sparsity, pruned, padded_sparsity, tile_sparsity: fractions, see numerics section 5.
        padded_length: length to which `padded_sparsity` pads every sequence.
        keys_per_row: mean number of surviving keys of a real query row.
        bits: of q, k, v, p; None is floating point. If layers differ, their mean, with floating point as 32.
        macs_dense, macs_remaining: multiply-accumulates of Q K^T and P V over valid pairs of the evaluation set.
        work: bit operations and bytes, dense and remaining; with a tail, also its share of the remaining ones, and
            macs_tail as part of macs_remaining.
        layers: per attention module and head.
        seconds: wall time of the stage, including training.
        output_errors: relative error of each layer's output, mean over heads; in a brief record, which has no layers
            (see `attnpress.records.table`).
        row_scores: score of each evaluation row, for paired tests; None in older records.
    """

    name: str
    metrics: dict[str, float]
    sparsity: Share
    pruned: Share
    padded_sparsity: Share
    padded_length: Whole
    tile_sparsity: Share
    keys_per_row: Amount
    bits: Mapping[str, int | float | None]
    macs_dense: Some
    macs_remaining: Whole
    work: dict[str, Whole]
    layers: list[LayerRecord]
    seconds: Amount
    output_errors: list[float] = field(default_factory=list)
    row_scores: RowScores | None = None

    def errors_by_layer(self) -> list[float]:
        """Relative error of each layer's output, mean over heads; empty if it was not measured."""
        heads = [[head.errors for head in layer.heads] for layer in self.layers]
        if not heads or not all(errors and all("output" in head for head in errors) for errors in heads):
            return self.output_errors
        return [statistics.mean(head["output"] for head in errors) for errors in heads]


@dataclass(frozen=True)
class TensorPart:
    """Fields of a matrix that are read."""

    bits: int | None


@dataclass(frozen=True)
class AttentionPart:
    """Fields of a spec that are read."""

    q: TensorPart
    k: TensorPart
    v: TensorPart
    p: TensorPart
    sparsity: Share


@dataclass(frozen=True)
class DataPart:
    """Fields of a task that are read."""

    task: str


@dataclass(frozen=True)
class TrainPart:
    """Fields of a stage's training that are read."""

    epochs: Amount


@dataclass(frozen=True)
class RecipePart:
    """Fields of a recipe that are read; older recipes have fewer keys."""

    model: str
    data: DataPart
    attention: AttentionPart
    compress: TrainPart
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsPart:
    """Number of rows."""

    train: Whole
    eval: Whole


@dataclass(frozen=True)
class ProvenancePart:
    """Fields of the provenance that are read."""

    rows: RowsPart
    weights: dict[str, str | None]
    seed: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LogPart:
    """An entry of a training log."""

    step: Whole


@dataclass(frozen=True)
class WorkPart:
    """Fields of a stage's work that are read."""

    bit_operations_dense: Some
    bit_operations_remaining: Whole
    bytes_dense: Some
    bytes_remaining: Whole


@dataclass(frozen=True)
class PlainPart:
    """Fields of a record's plain data that are read; `work` is by stage."""

    work: dict[str, WorkPart]
    recipe: RecipePart
    provenance: ProvenancePart
    training: dict[str, list[LogPart]]


@dataclass(frozen=True)
class Record:
    """A whole run.

    Attributes:
        recipe: the RunConfig as plain data.
        headline: name of the metric that is compared.
        majority: headline of always predicting the most frequent class, in points; None outside classification.
        provenance: versions, hashes of data and weights, machine, row counts.
        stages: in the order in which they were run.
        training: log history of each trained stage.
        targets: of a regression, what each evaluation row was to be; None elsewhere, and in older records.
    """

    recipe: dict[str, Any]
    headline: str
    majority: float | None
    provenance: dict[str, Any]
    stages: list[StageRecord] = field(default_factory=list)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    format: int = FORMAT
    targets: RowScores | None = None

    def stage(self, name: str) -> StageRecord | None:
        """The stage of that name; None if it was not run."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def with_stage(self, stage: StageRecord) -> Record:
        """A copy with the stage added, or replacing one of the same name."""
        others = [known for known in self.stages if known.name != stage.name]
        ordered = sorted([*others, stage], key=lambda known: STAGES.index(known.name))
        return dataclasses.replace(self, stages=ordered)


def with_head_figures(stage: StageRecord, figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> StageRecord:
    """A copy whose heads have these fields, by the name of their layer; layers that are not named stay as they are."""

    def one(layer: LayerRecord) -> LayerRecord:
        pairs = zip(layer.heads, figures.get(layer.name, [{}] * len(layer.heads)), strict=True)
        return dataclasses.replace(layer, heads=[dataclasses.replace(head, **found) for head, found in pairs])

    return dataclasses.replace(stage, layers=[one(layer) for layer in stage.layers])


def from_json(text: str, where: str = "record") -> Record:
    """Read a record.

    Raises:
        RecordError: not JSON, of a newer format, or a field is missing, unknown or of the wrong type.
    """
    try:
        return from_plain(parse_json(text), where)
    except JsonError as error:
        raise RecordError(f"{where}: not a record of a run (line {error.line}: {error})") from None


def from_plain(data: Any, where: str = "record") -> Record:
    """Read a record from its plain data.

    Raises:
        RecordError: of a newer format, or a field is missing, unknown or of the wrong type.
    """
    try:
        found = data["format"]
    except (TypeError, KeyError) as error:
        raise RecordError(f"{where}: not a record of a run ({error!r})") from None
    if found != FORMAT:
        raise RecordError(f"{where}: format {found!r:.40}; this version reads format {FORMAT}: update attnpress")
    if "stages" not in data:  # it has a default in Python, but a file without it is truncated
        raise RecordError(f"{where}: damaged record ('stages'): this key is missing")
    return _checked(build_record(Record, data, where, "damaged record"), where)


def read_record(path: Path) -> Record:
    """Read `record.json` of a run folder, or the file itself.

    Raises:
        RecordError: the file is missing or unreadable, or for the reasons of `from_json`.
    """
    file = path / "record.json" if path.is_dir() else path
    if not file.is_file():
        raise RecordError(f"{file}: no such record; give the folder that `attnpress compress --output` wrote")
    return from_json(read_text(file), str(file))


def _checked(record: Record, where: str) -> Record:
    """Validate a record and return it: unique stages with the headline and matching layers, complete plain data."""
    names = [stage.name for stage in record.stages]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecordError(f"{where}: damaged record (stages): {twice[0]!r} is there twice")
    for stage in record.stages:
        if stage.name not in STAGES:
            raise RecordError(f"{where}: damaged record (stages): {stage.name!r:.40} is none of {', '.join(STAGES)}")
        if record.headline not in stage.metrics:
            raise RecordError(f"{where}: damaged record (stage {stage.name!r}): no metric {record.headline!r}")
        if len({len(layer.heads) for layer in stage.layers} - {0}) > 1:
            raise RecordError(f"{where}: damaged record (stage {stage.name!r}): layers differ in their heads")
    rows = {f"stage {stage.name!r}, row_scores": stage.row_scores for stage in record.stages}
    for place, packed in (rows | {"targets": record.targets}).items():
        try:
            _ = packed and packed.values()
        except ValueError as error:
            raise RecordError(f"{where}: damaged record ({place}): {error}") from None
    plain = {name: getattr(record, name) for name in ("recipe", "provenance", "training")}
    plain["work"] = {stage.name: stage.work for stage in record.stages}
    found = build_record(PlainPart, plain, where, "damaged record", extra=True)
    if record.stage("dense") and "dense" not in found.provenance.weights:
        raise RecordError(f"{where}: damaged record (provenance.weights 'dense'): this key is missing")
    return record
