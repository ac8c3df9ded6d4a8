"""Record of `quantize`: a model before and after, on texts without labels. Plain JSON, beside the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attnpress.records.reading import Amount, Share, Some, Whole, read_json

FORMAT = 1
FILE = "quantize.json"


@dataclass(frozen=True)
class TextsRecord:
    """The texts used.

    Attributes:
        calibration, judged: number of texts for calibration, and number of other texts for comparison.
        shortest, median, longest: lengths of all these in tokens, without truncation.
        cut: number of texts longer than the model accepts.
        skipped, repeated: number of rows of the source that were left out.
        sha256: of the texts.
        training: number of texts the compressed model was trained on, including those for calibration.
    """

    calibration: Some
    judged: Some
    shortest: Whole
    median: Whole
    longest: Whole
    cut: Whole
    skipped: Whole
    repeated: Whole
    sha256: str
    training: Whole = 0


@dataclass(frozen=True)
class CostRecord:
    """Cost of a model on one machine.

    Attributes:
        texts_per_second: median over a few calls.
        peak_mb: memory of the model and its largest call.
        file_mb: of its folder.
    """

    texts_per_second: Amount
    peak_mb: Amount
    file_mb: Amount


@dataclass(frozen=True)
class TrialRecord:
    """A form that was tried: bits, sparsity, linear layers, loss, and remaining bit operations."""

    bits: Whole
    sparsity: Share
    linear: str
    loss: float
    work: Amount


@dataclass(frozen=True)
class QuantizedRecord:
    """Result of `quantize`, with its cost.

    Attributes:
        model: the name given by the user.
        kind: determines the metrics of agreement; `max_loss` applies to the first one.
        agreement: with the dense model, on the judged texts.
        attention: the AttentionSpec as plain data.
        linear: "int8" if there is an int8 layer, else "float"; `linear_layers` counts them.
        float_products: products that `calibrate_linear` left in float.
        sparsity, keys_per_query: over valid pairs; `dense_keys` is the number of keys per query without pruning.
        work: remaining share of attention's bit operations.
        dense, compressed: cost of each with `threads` threads; the kernel used `target`.
        distill: epochs of training on the texts; None without training.
        max_loss, trials: of a search for the most compressed form.
    """

    model: str
    kind: Literal["embedder", "classifier", "reranker"]
    texts: TextsRecord
    agreement: dict[str, float]
    attention: dict[str, Any]
    linear: Literal["float", "int8"]
    linear_layers: dict[str, Whole]
    float_products: list[str]
    sparsity: Share
    keys_per_query: Amount
    dense_keys: Amount
    work: Amount
    dense: CostRecord
    compressed: CostRecord
    threads: Some
    target: str
    provenance: dict[str, Any]
    distill: Amount | None = None
    max_loss: Share | None = None
    trials: list[TrialRecord] = field(default_factory=list)
    format: int = FORMAT

    @property
    def speedup(self) -> float:
        """Ratio of texts per second, compressed over dense."""
        return self.compressed.texts_per_second / max(self.dense.texts_per_second, 1e-9)


def read_quantized(file: Path) -> QuantizedRecord:
    """Read such a record.

    Raises:
        RecordError: the file is missing, damaged or of a newer format.
    """
    return read_json(file, FORMAT, QuantizedRecord)
