"""The record of a run: what was measured, on what, with what. Plain JSON; figures and tables are made from it alone."""

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
    """One head: sparsity by its names (fractions of its valid pairs), keys kept per query, and its threshold.

    `threshold` is tau, theta or gamma of the rule; 0 where nothing is pruned by a threshold. `errors` are relative
    root-mean-square errors on a few evaluation rows: of q, k and v from quantizing them, of p and output from all that
    the stage does. Empty in a stage that compresses nothing, and in records made before errors were measured.
    `pruned_mass` is how much of exact P lies on pairs without a P code, on the same rows; None where `errors` is empty,
    and in older records.
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
    """One attention module: its name in the model, pooled figures, its static scales, its heads and its bits.

    `bits` is empty in records made before layers could differ: there, they are those of the stage.
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
    """One stage of a run, evaluated.

    Attributes:
        name: one of STAGES.
        metrics: in points; the first key is the task's headline.
        sparsity, pruned, padded_sparsity, tile_sparsity: fractions, as numerics section 5 defines them.
        padded_length: the length to which `padded_sparsity` pads every sequence.
        keys_per_row: mean number of surviving keys of a real query row.
        bits: of q, k, v, p; None is floating point. Where layers differ, their mean, floating point counted as 32.
        macs_dense, macs_remaining: multiply-accumulates of Q K^T and P V over valid pairs of the evaluation set.
        work: bit operations and bytes, dense and remaining; where there is a tail, also what it has of the remaining
            ones, and its macs_tail of macs_remaining.
        layers: per attention module and head.
        seconds: wall time of the stage, training included.
        output_errors: of each layer, the mean over its heads of the error of the output, in a brief record, which has
            no layers; see `attnpress.records.table`.
        row_scores: what became of each evaluation row, for paired tests; None in records made before these were kept.
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
        """How far the output of each layer moved, mean over heads; empty where that was not measured."""
        heads = [[head.errors for head in layer.heads] for layer in self.layers]
        if not heads or not all(errors and all("output" in head for head in errors) for errors in heads):
            return self.output_errors
        return [statistics.mean(head["output"] for head in errors) for errors in heads]


@dataclass(frozen=True)
class TensorPart:
    """What is read of a matrix."""

    bits: int | None


@dataclass(frozen=True)
class AttentionPart:
    """What is read of a spec."""

    q: TensorPart
    k: TensorPart
    v: TensorPart
    p: TensorPart
    sparsity: Share


@dataclass(frozen=True)
class DataPart:
    """What is read of a task."""

    task: str


@dataclass(frozen=True)
class TrainPart:
    """What is read of a stage's training."""

    epochs: Amount


@dataclass(frozen=True)
class RecipePart:
    """What is read of a recipe; it has more, and older ones had less."""

    model: str
    data: DataPart
    attention: AttentionPart
    compress: TrainPart
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsPart:
    """How many rows there were."""

    train: Whole
    eval: Whole


@dataclass(frozen=True)
class ProvenancePart:
    """What is read of where figures came from."""

    rows: RowsPart
    weights: dict[str, str | None]
    seed: int = 0
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LogPart:
    """An entry of a log of training."""

    step: Whole


@dataclass(frozen=True)
class WorkPart:
    """What is read of a stage's work."""

    bit_operations_dense: Some
    bit_operations_remaining: Whole
    bytes_dense: Some
    bytes_remaining: Whole


@dataclass(frozen=True)
class PlainPart:
    """What is read of the plain data of a record; `work` is by stage."""

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
        stages: in the order they were run.
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
        """The stage of that name, if it was run."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def with_stage(self, stage: StageRecord) -> Record:
        """A copy in which the stage is added, or replaces its namesake."""
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
        RecordError: not JSON, of a newer format, or with a field that is missing, unknown or not of its type.
    """
    try:
        return from_plain(parse_json(text), where)
    except JsonError as error:
        raise RecordError(f"{where}: not a record of a run (line {error.line}: {error})") from None


def from_plain(data: Any, where: str = "record") -> Record:
    """Read a record from its plain data.

    Raises:
        RecordError: of a newer format, or with a field that is missing, unknown or not of its type.
    """
    try:
        found = data["format"]
    except (TypeError, KeyError) as error:
        raise RecordError(f"{where}: not a record of a run ({error!r})") from None
    if found != FORMAT:
        raise RecordError(f"{where}: format {found!r:.40}; this version reads format {FORMAT}: update attnpress")
    if "stages" not in data:  # it has a default in Python, but a file without it was cut
        raise RecordError(f"{where}: damaged record ('stages'): this key is missing")
    return _checked(build_record(Record, data, where, "damaged record"), where)


def read_record(path: Path) -> Record:
    """Read `record.json` of a run folder, or the file itself.

    Raises:
        RecordError: no such file, one that cannot be read, or `from_json`'s reasons.
    """
    file = path / "record.json" if path.is_dir() else path
    if not file.is_file():
        raise RecordError(f"{file}: no such record; give the folder that `attnpress compress --output` wrote")
    return from_json(read_text(file), str(file))


def _checked(record: Record, where: str) -> Record:
    """Returns `record`: each stage is there once, has the headline and layers alike, and its plain data have parts."""
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
