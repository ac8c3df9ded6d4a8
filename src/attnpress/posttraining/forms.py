"""A compressed form of an encoder: calibrated on some texts, evaluated on others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, TailName, TensorSpec, TrainSpec
from attnpress.core.cost import total_work
from attnpress.deployment.attention import Linear, deploy
from attnpress.deployment.linear import calibrate_linear, linear_layers
from attnpress.models.binding import bind, bound_modules
from attnpress.models.encoders import Encoder, Rows
from attnpress.models.inputs import Batch
from attnpress.models.outputs import outputs
from attnpress.models.pipeline import called_with_batches
from attnpress.models.watchers import Counting, watched
from attnpress.models.work import pairs_work, summed, tails_work
from attnpress.training.calibration import calibrate
from attnpress.training.unlabelled import train_unlabelled

BATCH = 8
"""Texts per batch in calibration, whose intermediate results are large."""

RATE = 1e-4
"""Peak learning rate for a form that is trained."""

COUNTED = 16
"""Number of texts on which survivors are counted."""


@dataclass(frozen=True)
class Form:
    """A compressed form of a model.

    Attributes:
        bits: of Q, K, V and P.
        sparsity: fraction of valid pairs to prune.
        tail: of the pruned pairs; unused without pruning.
        linear: "int8" for 8-bit linear layers without padding.
    """

    bits: int
    sparsity: float
    tail: TailName
    linear: Linear

    @property
    def attention(self) -> AttentionSpec:
        """The form's attention spec; K is smoothed at 4 bits or less."""
        tensor, tail = TensorSpec(bits=self.bits), self.tail if self.sparsity else "none"
        few = self.bits <= 4
        return AttentionSpec(
            tensor, tensor, tensor, ProbsSpec(bits=self.bits), sparsity=self.sparsity, tail=tail, smooth_key=few
        )


@dataclass(frozen=True)
class Survivors:
    """Remaining attention, over valid pairs.

    Attributes:
        sparsity: fraction of pairs whose probability is zero.
        keys, dense_keys: keys per query with and without pruning.
        work: remaining share of attention's bit operations, including the tail's.
    """

    sparsity: float
    keys: float
    dense_keys: float
    work: float


@dataclass(frozen=True)
class Made:
    """A compressed encoder.

    Attributes:
        encoder: deployed on the CPU.
        form: with "float" linear layers if all stayed in float.
        float_products: products that stayed in float because they lost too much.
    """

    encoder: Encoder
    form: Form
    float_products: list[str]
    survivors: Survivors


@dataclass(frozen=True)
class Lesson:
    """Training of a form before it is deployed.

    Attributes:
        rows: texts.
        epochs: passes over them.
        folder: of checkpoints, from which interrupted training resumes; None keeps none.
    """

    rows: Rows
    epochs: float
    folder: Path | None = None


def make(dense: Encoder, form: Form, rows: Rows, lesson: Lesson | None = None) -> Made:
    """A compressed copy of an encoder.

    Args:
        dense: not changed.
        rows: texts for calibration.
        lesson: train the copy to answer like the dense encoder, while its sparsity rises.

    Raises:
        UnsupportedModelError: see `bind`.
        DivergedError: see `train_unlabelled`.
    """
    encoder = copy.copy(dense)
    begin = form.attention if lesson is None else dataclasses.replace(form.attention, sparsity=0.0)
    encoder.model = model = bind(copy.deepcopy(dense.model), begin)
    calibrate(model, encoder.batches(by_length(rows), BATCH))
    if lesson is not None:
        _teach(dense, encoder, lesson, form.sparsity)
    deploy(model, "cpu", padding="skip")  # the code below needs outputs only, which are the same
    survivors = _survivors(encoder, rows[:COUNTED])
    plan = calibrate_linear(model, _judging_batches(encoder, rows)) if form.linear == "int8" else {}
    deploy(model, "cpu", linear=form.linear, padding="skip")
    linear: Linear = "int8" if linear_layers(model).int8 else "float"
    left = [name for name, product in plan.items() if not product.quantized]
    return Made(encoder, dataclasses.replace(form, linear=linear), left, survivors)


def _teach(dense: Encoder, encoder: Encoder, lesson: Lesson, sparsity: float) -> None:
    student: Any = called_with_batches(encoder.model)
    teacher: Any = bind(copy.deepcopy(called_with_batches(dense.model)), DENSE)
    train_unlabelled(
        student,
        teacher,
        lesson.rows,
        encoder.inputs,
        TrainSpec(epochs=lesson.epochs, learning_rate=RATE, batch_size=2 * BATCH),
        lesson.folder,
        sparsity=sparsity,
        lengths=[sum(map(len, row)) for row in lesson.rows],
    )


def _survivors(encoder: Encoder, rows: Rows) -> Survivors:
    modules = list(bound_modules(encoder.model).values())
    counting = [Counting(module) for module in modules]
    with watched(zip(modules, counting, strict=True)):
        for _ in outputs(encoder.model, encoder.batches(by_length(rows), BATCH)):
            pass
    merged = [watcher.counts.total() for watcher in counting]
    total, pairs = summed(merged), list(zip(modules, merged, strict=True))
    work = total_work(part(*pair) for pair in pairs for part in (pairs_work, tails_work))
    return Survivors(
        float(total.sparsity()),
        float(total.keys_per_row()),
        float(total.pairs / total.rows.clamp(min=1)),
        work.bit_operations_remaining / max(1, work.bit_operations_dense),
    )


def _judging_batches(encoder: Encoder, rows: Rows) -> list[Batch]:
    """Few texts of all lengths, since each product of the encoder costs a pass over them."""
    ordered = by_length(rows)
    return list(encoder.batches(ordered[:: max(1, len(ordered) // BATCH)][:BATCH], BATCH // 2))


def by_length(rows: Rows) -> list[Sequence[str]]:
    """Texts ordered by length, which reduces padding."""
    return sorted(rows, key=lambda row: sum(map(len, row)))
