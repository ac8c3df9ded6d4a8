"""Metrics of sentence tasks, computed by torchmetrics, in points from 0 to 100 (correlations -100 to 100)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import EvalPrediction

Score = Callable[["Tensor", "Tensor", int], "Tensor"]


@dataclass(frozen=True)
class Metric:
    """A metric and the tasks that it applies to.

    Attributes:
        kind: the kinds of task that it applies to.
        about: one line for users.
        score: function of predictions, targets (both [N]) and the number of classes; returns a fraction.
    """

    kind: Literal["classification", "regression"]
    about: str
    score: Score


def _accuracy(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_accuracy

    return multiclass_accuracy(predictions, targets, classes, average="micro")


def _f1(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score

    if classes == 2:
        return binary_f1_score(predictions, targets)
    return multiclass_f1_score(predictions, targets, classes, average="macro")


def _matthews(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    if any((values == values[0]).all() for values in (predictions, targets)):
        return predictions.new_zeros(())  # undefined; 0 by convention (torchmetrics approaches a limit)
    return multiclass_matthews_corrcoef(predictions, targets, classes)


def _pearson(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.regression import pearson_corrcoef

    return _correlation(pearson_corrcoef, predictions, targets)


def _spearman(predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.regression import spearman_corrcoef

    return _correlation(spearman_corrcoef, predictions, targets)


def _correlation(correlate: Callable[..., Tensor], predictions: Tensor, targets: Tensor) -> Tensor:
    # Standardized first: the correlation is the same, and a small spread loses no digits.
    spreads = [(values - values.mean(), values.std(correction=0)) for values in (predictions, targets)]
    if any(spread == 0 for _, spread in spreads):
        return predictions.new_zeros(())  # a constant correlates with nothing
    return correlate(*(centred / spread for centred, spread in spreads))


METRICS: dict[str, Metric] = {
    "accuracy": Metric("classification", "share of right answers", _accuracy),
    "f1": Metric("classification", "F1 of the second of two labels; the mean over labels when there are more", _f1),
    "matthews": Metric("classification", "Matthews correlation", _matthews),
    "pearson": Metric("regression", "Pearson correlation", _pearson),
    "spearman": Metric("regression", "Spearman rank correlation", _spearman),
}


def score(names: Sequence[str], predictions: Any, targets: Any, classes: int) -> dict[str, float]:
    """Compute the named metrics, in points.

    Args:
        names: keys of METRICS.
        predictions: class indices or values, shape [N].
        targets: the same, shape [N].
        classes: number of classes; unused in regression.
    """
    import torch

    given, wanted = torch.as_tensor(predictions), torch.as_tensor(targets)
    return {name: 100 * float(METRICS[name].score(given, wanted, classes)) for name in names}


def sentence_metrics(names: Sequence[str], classes: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the `compute_metrics` function of a Trainer, for logits [N, classes] (or values [N, 1] when classes is 0).

    The function raises DivergedPredictionsError if a prediction is NaN or infinite.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = check_finite(first_output(prediction.predictions))
        if classes:
            return score(names, logits.argmax(-1), prediction.label_ids, classes)
        targets = np.asarray(prediction.label_ids, dtype=np.float64)
        return score(names, logits.reshape(len(targets)).astype(np.float64), targets, 0)

    return compute


def first_output(predictions: Any) -> NDArray[Any]:
    """The logits, if the model also returns hidden states or attentions."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


class DivergedPredictionsError(FloatingPointError):
    """A prediction is NaN or infinite, so that metrics are meaningless."""


def check_finite(logits: NDArray[Any]) -> NDArray[Any]:
    """Return `logits` unchanged.

    Raises:
        DivergedPredictionsError: a value is NaN or infinite.
    """
    broken = ~np.isfinite(logits)
    if broken.any():
        rows = np.unique(np.nonzero(broken)[0])
        raise DivergedPredictionsError(
            f"predictions hold NaN or infinity in {len(rows)} of {len(logits)} rows (first: row {rows[0]}); "
            "the model has diverged: lower the learning rate or raise the bits"
        )
    return logits
