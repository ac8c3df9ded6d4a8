"""inspect: the effect of compression on each head of a model, on your texts, before training.

Sensitivity is measured: one head is compressed while all others stay exact, and the model's last hidden states are
compared. Training recovers much of such a change, so a suggestion is only a start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpress.config import DENSE, AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.attention import dense_attention
from attnpress.core.call import Attend, AttentionCall
from attnpress.core.cost import attention_work
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.core.probe import probe
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attending, attentions, bind, probed
from attnpress.models.outputs import first_output
from attnpress.tasks.tokens import encode as token_ids
from attnpress.training.calibration import calibrate
from attnpress.training.sensitivity import head_changes

TOLERANCE = 0.5
"""Maximum relative change of the hidden states, before training, for a suggestion.

On the dense model of the demo, its recipe changes them by 0.7. That cost 1.3 points of accuracy before training, and
0.2 after it.
"""

BEGIN = 8
"""Bits of a suggestion. 4 bits need more care and training."""

MASS = 0.99


def spec_of(bits: int, sparsity: float) -> AttentionSpec:
    """A spec with equal bits for all four matrices; K is smoothed at 4 bits or less."""
    tensor = TensorSpec(bits=bits)
    return AttentionSpec(tensor, tensor, tensor, ProbsSpec(bits=bits), sparsity=sparsity, smooth_key=bits <= 4)


TRIALS = tuple(spec_of(bits, sparsity) for bits in (8, 4) for sparsity in (0.0, 0.5, 0.8, 0.9, 0.95))
QUANTIZED, PRUNED = spec_of(4, 0.0), spec_of(8, 0.9)
"""Specs with which the sensitivity of single heads is measured."""


@dataclass(frozen=True)
class HeadView:
    """One head, before compression.

    Attributes:
        layer: name of the attention module; head: from 0.
        zeros: fraction of valid pairs whose 8-bit P code is zero without pruning.
        keys_99: mean number of keys that hold 99 % of a row's P.
        q_max, k_max, v_max: largest magnitudes; those of K and V are of the corresponding key head.
        change_4bit, change_pruned: relative change of the last hidden states if only this head is quantized to 4 bits,
            or to 8 bits with 90 % of its pairs pruned.
    """

    layer: str
    head: int
    zeros: float
    keys_99: float
    q_max: float
    k_max: float
    v_max: float
    change_4bit: float = 0.0
    change_pruned: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A spec tried on the whole model: change of its last hidden states, and remaining share of bit operations."""

    spec: AttentionSpec
    change: float
    work: float


@dataclass(frozen=True)
class Inspection:
    """Result for a model.

    Attributes:
        heads, trials: of single heads, and of the whole model.
        suggestion: the cheapest trial with BEGIN bits within TOLERANCE; None if there is none.
    """

    heads: list[HeadView]
    trials: list[Trial]
    suggestion: AttentionSpec | None


def inspect_model(model: Any, batch: Mapping[str, Tensor]) -> Inspection:
    """Inspect every head of a model on one batch. The model is unbound afterwards.

    Args:
        model: any Transformers model on the AttentionInterface; its first output [B, S, ...] is compared.
        batch: its inputs, without labels; attention_mask marks real tokens.

    Raises:
        UnsupportedModelError: see `bind`.
    """
    bind(model, DENSE)
    exact = first_output(model, batch)
    trials = [_try(model, batch, exact, spec) for spec in TRIALS]
    changes = [_head_changes(model, batch, exact, spec) for spec in (QUANTIZED, PRUNED)]
    heads = [
        dataclasses.replace(view, change_4bit=quantized, change_pruned=pruned)
        for view, quantized, pruned in zip(_views(model, batch), *changes, strict=True)
    ]
    bind(model, DENSE)
    within = [trial for trial in trials if trial.spec.p.bits == BEGIN and trial.change <= TOLERANCE]
    return Inspection(heads, trials, min(within, key=lambda trial: trial.work).spec if within else None)


def _try(model: Any, batch: Mapping[str, Tensor], exact: Tensor, spec: AttentionSpec) -> Trial:
    calibrate(bind(model, spec), [batch])
    dense, left = 0, 0

    def count(_: str, state: CompressedAttention, call: AttentionCall) -> None:
        nonlocal dense, left
        seen = probe(call)
        survivors = int(((seen.codes > 0) & seen.counted).sum())
        work = attention_work(int(seen.counted.sum()), survivors, state.head_dim, state.spec.bits)
        dense, left = dense + work.bit_operations_dense, left + work.bit_operations_remaining

    with probed(model, count):
        hidden = first_output(model, batch)
    return Trial(spec, _change(hidden, exact), left / max(1, dense))


def _head_changes(model: Any, batch: Mapping[str, Tensor], exact: Tensor, spec: AttentionSpec) -> list[float]:
    calibrate(bind(model, spec), [batch])
    states = list(attentions(model).values())

    def compressing(chosen: CompressedAttention, head: int) -> AbstractContextManager[None]:
        return attending({**dict.fromkeys(states, _exact), chosen: _with_one_head(head)})

    moved = head_changes(model, [batch], [exact], states, compressing)
    changes: list[float] = (moved / _size(exact.double())).tolist()
    return changes


def _exact(call: AttentionCall) -> Tensor:
    return dense_attention(call.query.float(), call.key.float(), call.value.float(), call.valid, call.scaling)


def _with_one_head(head: int) -> Attend:
    def attend(call: AttentionCall) -> Tensor:
        output, compressed = _exact(call), fake_quantize_attention(call)
        output[:, head] = compressed[:, head]
        return output

    return attend


def _views(model: Any, batch: Mapping[str, Tensor]) -> list[HeadView]:
    calibrate(bind(model, spec_of(8, 0.0)), [batch])
    views: dict[str, list[HeadView]] = {}

    def look(name: str, state: CompressedAttention, call: AttentionCall) -> None:
        if name not in views:  # the first call of a module that several layers share
            views[name] = _look(name, state, call)

    with probed(model, look):
        first_output(model, batch)
    return [view for found in views.values() for view in found]


def _look(name: str, state: CompressedAttention, call: AttentionCall) -> list[HeadView]:
    seen = probe(call.with_(cutoff=None))
    rows = seen.counted.any(-1).sum((0, 2)).clamp(min=1)
    pairs = seen.counted.sum((0, 2, 3)).clamp(min=1)
    zeros = ((seen.codes == 0) & seen.counted).sum((0, 2, 3)) / pairs
    ranked = (seen.before * seen.counted).sort(-1, descending=True).values
    needed = ((ranked.cumsum(-1) - ranked < MASS) & (ranked > 0)).sum((0, 2, 3)) / rows
    tokens = None if call.real is None else call.real
    ranges = [_largest(x, tokens, state.heads) for x in (call.query, call.key, call.value)]
    columns = [column.tolist() for column in (zeros, needed, *ranges)]
    return [HeadView(name, head, *row) for head, row in enumerate(zip(*columns, strict=True))]


def _largest(x: Tensor, real: Tensor | None, heads: int) -> Tensor:
    magnitude = x.float().abs() if real is None or real.shape[2] != x.shape[2] else x.float().abs() * real
    return magnitude.amax((0, 2, 3)).repeat_interleave(heads // x.shape[1])


def _change(hidden: Tensor, exact: Tensor) -> float:
    return float((hidden - exact).norm() / _size(exact))


def _size(exact: Tensor) -> Tensor:
    size: Tensor = exact.norm()
    return size.clamp(min=torch.finfo(torch.float32).tiny)


def recipe_lines(spec: AttentionSpec) -> dict[str, Any]:
    """The keys of `attention:` in a recipe that differ from the defaults."""
    usual = AttentionSpec()
    lines: dict[str, Any] = {
        name: {"bits": getattr(spec, name).bits} for name in "qkvp" if getattr(spec, name) != getattr(usual, name)
    }
    own = {name: getattr(spec, name) for name in ("smooth_key", "tail", "tail_rank")}
    changed = {name: value for name, value in own.items() if value != getattr(usual, name)}
    return {"attention": {**lines, "sparsity": spec.sparsity, **changed}}


def encode(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """The texts as one padded batch; texts without tokens get a stand-in, see `tasks.tokens`."""
    encoded = token_ids(tokenizer, [texts], min(tokenizer.model_max_length, 512))
    if len(texts) == 1:  # also for a tokenizer without a padding token
        return {key: torch.tensor(rows) for key, rows in encoded.items()}
    return dict(tokenizer.pad(encoded, return_tensors="pt"))
