"""CompressedAttention: the state of one attention module (scales, thresholds, histogram), and its computation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnpress.config import AttentionSpec, TensorSpec
from attnpress.config.rules import RULES
from attnpress.core.arguments import pair_mask, some_key
from attnpress.core.call import Attend, AttentionCall, Scales
from attnpress.core.observer import Reduce, alone
from attnpress.core.quantizer import positive_scale
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS
from attnpress.core.soft_gate import GAIN, soft_gate_attention
from attnpress.core.tail import (
    Directions,
    Moments,
    Tail,
    fit_directions,
    fit_lift,
    sees_whole_score,
)
from attnpress.core.thresholds import fit_cutoff, fixed_cutoff
from attnpress.kernels.training import training_attention
from attnpress.models.state import (
    WIDEST,
    NotCalibratedError,
    StateError,
    differences,
    fault,
    pack_extra,
    refuse_part,
    unpack_extra,
)

NAME = "attnpress"
"""Name of the attention implementation, the quantization method, and the child module with the state."""

ROW_STRIDE = 8
"""In training, every eighth query row feeds the running histogram, with an offset that changes each step."""

HISTOGRAM_DECAY = 0.95
"""Decay of the histogram per step: thresholds follow about the last 20 steps."""

EXTRA = "_extra_state"
"""Suffix of extra states in a state dict of torch."""


def is_compressed(config: Any) -> bool:
    """True if a model with this configuration uses compressed attention, or attention that wraps it (timed)."""
    return str(config._attn_implementation).startswith(NAME)


class Watcher:
    """Base class of objects that observe the calls of attention modules; see `models.watchers`.

    Attributes:
        uncompressed: modules run uncompressed while it watches them.
        before_thresholds: it works without fitted thresholds, and also watches modules that compress nothing.
    """

    uncompressed = False
    before_thresholds = False

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Called before each call is computed, without gradients."""

    def hear(self, output: Tensor) -> None:
        """Called with each output [B, S, H, D] as the model receives it, with gradients."""


class CompressedAttention(nn.Module):
    """Compression of one attention module of a Transformers model, attached to it as the child `attnpress`.

    Buffers are float32 whatever the model's dtype: q_scale, k_scale, v_scale (parameters if learned), and cutoff [Hq]
    in the unit of the rule (see `core.rules`). The float64 histogram [Hq, BINS] holds the pairs that thresholds are
    fitted to. Some options add state:

    - `spec.budget` "sensitivity": float64 budget [Hq]. Budget times current sparsity is the sparsity asked of each
    head.
    - `spec.threshold_penalty`: the parameter trained_cutoff [1], in GAIN nats, replaces cutoff. Each training call
    stores in `density` the share of pairs that the soft gate passes.
    - `spec.tail`: lift [Hq] and float64 masses [Hq, 2] are fitted with cutoff; masses run like the histogram. "linear"
    also stores `core.tail.Directions`, fitted in calibration, unless it sees the whole score.

    Each call is passed to the `watchers`. One of them adds to `seen`; `take_seen` moves that into the histogram.

    `unset` names scales and thresholds without a value. `calibrate` sets them, and `set_scales` sets scales by hand. A
    state dict holds the spec, the current sparsity and `unset` as extra state; see `models.state`.

    Args:
        spec: what to compress; `spec.sparsity` is the current sparsity and changes with `set_sparsity`.
        heads, kv_heads, head_dim: Hq, Hkv, D.
        is_cross: True for cross-attention.
    """

    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    cutoff: Tensor
    budget: Tensor
    trained_cutoff: Tensor
    histogram: Tensor
    seen: Tensor
    lift: Tensor
    masses: Tensor
    seen_masses: Tensor
    query_directions: Tensor
    key_directions: Tensor
    key_offset: Tensor
    direction_step: Tensor

    def __init__(self, spec: AttentionSpec, heads: int, kv_heads: int, head_dim: int, is_cross: bool = False) -> None:
        super().__init__()
        self.spec, self.heads, self.kv_heads, self.head_dim, self.is_cross = spec, heads, kv_heads, head_dim, is_cross
        self.attend: Attend = training_attention
        self.watchers: list[Watcher] = []
        self.density: Tensor | None = None
        for name, tensor_spec in self.quantized().items():
            scale = torch.ones(self._scale_shape(name, tensor_spec), dtype=torch.float32)
            if tensor_spec.learned:
                self.register_parameter(f"{name}_scale", nn.Parameter(scale))
            else:
                self.register_buffer(f"{name}_scale", scale)
        self.register_buffer("cutoff", torch.full((heads,), torch.inf, dtype=torch.float32))
        self.register_buffer("histogram", torch.zeros(heads, BINS, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(heads, BINS, dtype=torch.float64), persistent=False)
        even = torch.ones(heads, dtype=torch.float64)
        self.register_buffer("budget", even, persistent=spec.budget != "uniform")
        self._make_tail()
        if spec.threshold is not None:
            self.cutoff.copy_(fixed_cutoff(spec, heads))
        if spec.threshold_penalty is not None:
            self.trained_cutoff = nn.Parameter(torch.full((1,), WIDEST / GAIN))
        self.unset = {f"{name}_scale" for name in self.quantized()}
        if spec.sparsity > 0 and self.fits_thresholds():
            self.unset.add("cutoff")

    def _make_tail(self) -> None:
        """Create the buffers of the tail. Without a tail there are none, which keeps checkpoints unchanged."""
        if self.spec.tail == "none":
            return
        self.register_buffer("lift", torch.zeros(self.heads, dtype=torch.float32))
        self.register_buffer("masses", torch.zeros(self.heads, 2, dtype=torch.float64))
        self.register_buffer("seen_masses", torch.zeros(self.heads, 2, dtype=torch.float64), persistent=False)
        if self.has_directions:
            shape = self.kv_heads, self.head_dim, self.spec.tail_rank
            for name in ("query_directions", "key_directions"):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
            self.register_buffer("key_offset", torch.zeros(shape[0], shape[2], dtype=torch.float32))
            self.register_buffer("direction_step", torch.ones(shape[0], dtype=torch.float32))

    @property
    def has_directions(self) -> bool:
        """True if the tail sees the score in fitted directions."""
        return self.spec.tail == "linear" and not sees_whole_score(self.spec, self.head_dim)

    def tail(self) -> Tail | None:
        """The fitted parameters of the tail; None without a tail."""
        if self.spec.tail == "none":
            return None
        if not self.has_directions:
            return Tail(self.lift)
        found = self.query_directions, self.key_directions, self.key_offset, self.direction_step
        return Tail(self.lift, Directions(*found))

    def fit_directions(self, moments: Moments, reduce: Reduce = alone) -> None:
        """Fit the directions in which the codes of all ranks vary most.

        Raises:
            ValueError: no real token was seen.
        """
        found = fit_directions(Moments(*(reduce(x, "sum") for x in moments.tensors())), self.spec.tail_rank)
        self.query_directions.copy_(found.query)
        self.key_directions.copy_(found.key)
        self.key_offset.copy_(found.offset)
        self.direction_step.copy_(found.step)

    def quantized(self) -> dict[str, TensorSpec]:
        """Specs of the matrices among q, k, v that have a static scale."""
        specs = {"q": self.spec.q, "k": self.spec.k, "v": self.spec.v}
        return {name: spec for name, spec in specs.items() if spec.bits is not None and spec.granularity != "token"}

    def _scale_shape(self, name: str, spec: TensorSpec) -> tuple[int, ...]:
        heads = 1 if spec.granularity == "tensor" else self.heads if name == "q" else self.kv_heads
        return (1, heads, 1, self.head_dim if spec.granularity == "channel" else 1)

    def fits_thresholds(self) -> bool:
        """True if the rule has thresholds that are fitted to the requested sparsity, or trained."""
        return self.spec.threshold is None and not RULES[self.spec.rule].counts

    def set_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Set static scales by "q", "k", "v": float32 of the buffer's shape, or broadcastable to it.

        Raises:
            ValueError: a scale does not exist, or a value is not allowed. Nothing is changed.
        """
        for name, scale in scales.items():
            wrong = fault(f"{name}_scale", scale, self.spec) if name in self.quantized() else "does not exist"
            if wrong is not None:
                raise ValueError(f"{name}_scale {wrong}")
        with torch.no_grad():
            for name, scale in scales.items():
                getattr(self, f"{name}_scale").copy_(scale)
                self.unset.discard(f"{name}_scale")

    def require_calibrated(self, name: str, *, thresholds: bool = True) -> None:
        """Raise an error if scales or thresholds are not set.

        Args:
            name: of the module, for the message.
            thresholds: whether thresholds are needed; False while pairs are only observed to fit them.

        Raises:
            NotCalibratedError: says what is missing and what to do.
        """
        for part in [part for part in self.unset if not self._is_untouched(part)]:
            self.unset.discard(part)  # the user has written values there
        lacking = sorted(self.unset if thresholds else self.unset - {"cutoff"})
        if lacking:
            raise NotCalibratedError(
                f"{name}: compressed attention is not calibrated ({', '.join(lacking)} not set): call "
                "calibrate(model, batches) first, or load a calibrated state"
            )

    def _is_untouched(self, part: str) -> bool:
        if part != "cutoff":
            return bool((getattr(self, part) == 1).all())
        if self.spec.threshold_penalty is not None:
            return bool((self.trained_cutoff == WIDEST / GAIN).all())
        return bool(self.cutoff.isinf().all())

    @property
    def runs_uncompressed(self) -> bool:
        """True if calls are computed by the framework, because of the spec or of a watcher."""
        if any(watcher.uncompressed for watcher in self.watchers):
            return True
        return self.spec.is_dense and not any(watcher.before_thresholds for watcher in self.watchers)

    def show(self, call: AttentionCall) -> None:
        """Pass a call to the watchers, except for the recomputation of gradient checkpointing in the backward pass."""
        if self.watchers and not _recomputing():
            with torch.no_grad():
                for watcher in self.watchers:
                    watcher.see(self, call)

    def scales(self) -> Scales:
        """The current scales. Learned ones count by magnitude, so that negative ones recover in training."""
        values = {name: getattr(self, f"{name}_scale") for name in self.quantized()}
        learned = {name: positive_scale(values[name].abs()) for name, spec in self.quantized().items() if spec.learned}
        return Scales(**(values | learned), tail=self.tail())

    def active_cutoff(self) -> Tensor | None:
        """The current thresholds [Hq]; None if nothing is pruned."""
        if self.spec.sparsity == 0 and self.spec.threshold is None:
            return None
        if self.spec.threshold_penalty is None:
            return self.cutoff
        # Below zero, not even the row maximum would be kept.
        return (self.trained_cutoff.detach() * GAIN).clamp(min=0).repeat(self.heads)

    def threshold(self) -> Tensor:
        """tau, theta or gamma of each head, [Hq]; 0 (gamma: 1) prunes nothing."""
        cutoff = self.active_cutoff()
        return torch.zeros_like(self.cutoff) if cutoff is None else rule_of(self.spec).to_threshold(cutoff)

    def set_sparsity(self, sparsity: float) -> None:
        """Set the requested sparsity. Thresholds are refitted to the pairs seen so far, unless they are trained."""
        self.spec = dataclasses.replace(self.spec, sparsity=sparsity)
        if self.spec.threshold_penalty is None:
            if sparsity > 0 and self.fits_thresholds():
                self.unset.add("cutoff")  # until fitted: if that fails, old ones must not stay in use
            self.fit()

    def fit(self) -> None:
        """Fit thresholds (and lift) to the current sparsity on the pairs seen so far."""
        if self.spec.tail != "none":
            self.lift.copy_(fit_lift(self.masses))
        # Without pruning there may be no histogram to fit to, and no threshold is used.
        if not self.fits_thresholds() or self.spec.is_dense:
            return
        if self.spec.threshold_penalty is None:
            self.cutoff.copy_(fit_cutoff(self.spec, self.histogram, self.spec.sparsity * self.budget))
        else:
            with torch.no_grad():
                pooled = fit_cutoff(self.spec, self.histogram.sum(0, keepdim=True), self.spec.sparsity)
                self.trained_cutoff.copy_(pooled.clamp(max=WIDEST) / GAIN)
        self.unset.discard("cutoff")

    def take_seen(self, decay: float, reduce: Reduce = alone) -> Tensor:
        """Update histogram = decay * histogram + the pairs seen by all ranks since the last call.

        Returns:
            float64 [2]: how many of the pairs seen the current thresholds prune, and how many there are.
        """
        seen = reduce(self.seen, "sum").clone()
        self.histogram.mul_(decay).add_(seen)
        self.seen.zero_()
        if self.spec.tail != "none":
            self.masses.mul_(decay).add_(reduce(self.seen_masses, "sum"))
            self.seen_masses.zero_()
        return torch.stack([rule_of(self.spec).pruned(self.spec, seen, self.active_cutoff()).sum(), seen.sum()])

    def forward(self, call: AttentionCall) -> Tensor:
        """Compute compressed attention; float32 [B, Hq, Sq, D].

        Args:
            call: from `call`; it has `bounds` only in a deployed module.
        """
        self.show(call)
        if self.training and self.spec.threshold_penalty is not None and call.cutoff is not None:
            output, self.density = soft_gate_attention(call.with_(cutoff=self.trained_cutoff * GAIN))
            return output
        return self.attend(call)

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        real: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        bounds: Tensor | None = None,
    ) -> AttentionCall:
        """The call of these tensors with the current scales, thresholds and spec; see `AttentionCall`."""
        key, value, valid = some_key(key, value, pair_mask(valid, query, key))
        scales, cutoff = self.scales(), self.active_cutoff()
        return AttentionCall(query, key, value, valid, scales, cutoff, self.spec, scaling, real, dropout, bounds)

    def __getstate__(self) -> dict[str, Any]:
        """Without the density of the last training step, whose graph cannot be copied."""
        return vars(self) | {"density": None}

    def get_extra_state(self) -> Tensor:
        """The spec with the current sparsity, and what is not set yet; uint8, see `models.state.pack_extra`."""
        refuse_part()
        return pack_extra(self.spec, self.unset)

    def set_extra_state(self, state: Any) -> None:
        """Restore the current sparsity. The rest of the spec must match this module's own.

        Raises:
            StateError: the state is damaged, of another version, or of another spec. The message names the fields.
        """
        if _is_empty(state):
            return
        extra = unpack_extra(state)
        wrong = differences(extra.spec, self.spec)
        if wrong:
            raise StateError(f"{'; '.join(wrong)}: bind the model with the spec of the state")
        other_thresholds = (extra.spec.threshold_penalty is None) != (self.spec.threshold_penalty is None)
        self.spec = dataclasses.replace(self.spec, sparsity=extra.spec.sparsity)
        self.unset = set(extra.unset)
        if other_thresholds and self.spec.sparsity > 0 and self.fits_thresholds():
            self.unset.add("cutoff")  # only one of state and module has trained thresholds

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        wrong = self._wrong_with(own)
        if wrong:
            error_msgs.extend(f"{prefix}{line}" for line in wrong)
            return
        lost = self.unset - own.keys()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if EXTRA in own:
            self.unset |= lost if self.spec.sparsity > 0 else lost - {"cutoff"}
        elif own:
            missing_keys[:] = [key for key in missing_keys if key != prefix + EXTRA]
            self.unset -= own.keys()
            warnings.warn(
                "the state of compressed attention is from an older version of attnpress, which did not store the "
                "spec: the spec and the current sparsity stay those that the model was bound with",
                stacklevel=2,
            )

    def _wrong_with(self, own: Mapping[str, Any]) -> list[str]:
        """The reason why the tensors of a state dict cannot be loaded; checked before any is loaded."""
        if EXTRA in own and not _is_empty(own[EXTRA]):
            try:
                wrong = differences(unpack_extra(own[EXTRA]).spec, self.spec)
            except StateError as error:
                return [f"{EXTRA}: {error}"]
            if wrong:
                return [f"{line}; bind the model with the spec of the state" for line in wrong]
        parts = {name: tensor for name, tensor in own.items() if name in self._parameters | self._buffers}
        faults = {name: fault(name, tensor, self.spec) for name, tensor in parts.items()}
        return [f"{name} {reason}" for name, reason in faults.items() if reason is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedAttention:
        # model.half() must not round scales, thresholds and counts: only their device may change.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _is_empty(state: Any) -> bool:
    """True for a tensor without data, a placeholder for data of another process."""
    return isinstance(state, Tensor) and state.device.type == "meta"


def _recomputing() -> bool:
    """True in the second forward of gradient checkpointing, inside the backward pass; its pairs were counted before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
