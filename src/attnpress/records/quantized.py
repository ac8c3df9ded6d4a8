"""The record of `quantize`: a model before and after, on texts without labels. Plain JSON, beside the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attnpress.records.reading import Amount, Share, Some, Whole, read_json

FORMAT = 1
FILE = "quantize.json"


@dataclass(frozen=True)
class TextsRecord:
    """The texts that it rests on.

    Attributes:
        calibration, judged: how many thresholds and scales were fitted to, and how many of the others were compared.
        shortest, median, longest: of all these, in tokens, uncut.
        cut: longer than the model takes.
        skipped, repeated: rows of the source that were left out.
        sha256: of the texts.
        training: how many the compressed model was trained on, those for calibration among them.
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
    """What a model costs on one machine.

    Attributes:
        texts_per_second: at the median of a few calls.
        peak_mb: memory that the model and its largest call take.
        file_mb: of its folder.
    """

    texts_per_second: Amount
    peak_mb: Amount
    file_mb: Amount


@dataclass(frozen=True)
class TrialRecord:
    """A form that was tried: its bits, sparsity and linear layers, what it lost, and the bit operations it leaves."""

    bits: Whole
    sparsity: Share
    linear: str
    loss: float
    work: Amount


@dataclass(frozen=True)
class QuantizedRecord:
    """What `quantize` did to a model, and what that cost.

    Attributes:
        model: as it was named.
        kind: decides which figures of agreement there are; the first is the one that `max_loss` is about.
        agreement: with the dense model, on the texts judged.
        attention: the AttentionSpec as plain data.
        linear: "int8" where a linear layer is, else "float"; `linear_layers` counts them.
        float_products: what `calibrate_linear` left in float.
        sparsity, keys_per_query: over valid pairs; `dense_keys` is how many keys per query had.
        work: share of attention's bit operations that is left.
        dense, compressed: what each costs with `threads` threads; the kernel ran its code for `target`.
        distill: epochs of training on the texts alone; None where nothing was trained.
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
        """How many times as many texts a second."""
        return self.compressed.texts_per_second / max(self.dense.texts_per_second, 1e-9)


def read_quantized(file: Path) -> QuantizedRecord:
    """Read such a record.

    Raises:
        RecordError: no such file, of a newer format, or damaged.
    """
    return read_json(file, FORMAT, QuantizedRecord)
