"""CompressedAttention: the state of one attention module (scales, thresholds, histogram), and what a call does."""

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
from attnpress.core.fake_quantize import (
    fake_quantize_attention,
)
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
"""Of the attention implementation, the quantization method, and the child module that holds the state."""

ROW_STRIDE = 8
"""While training, one query row in eight feeds the running histogram; its offset moves on with each step."""

HISTOGRAM_DECAY = 0.95
"""What a step leaves of the histogram: thresholds follow the last 20 or so steps of the model being trained."""

EXTRA = "_extra_state"
"""How torch ends the names of extra states in a state dict."""


class Watcher:
    """Looks at the calls of attention modules while it is on their lists; see `models.watchers`.

    Attributes:
        uncompressed: a module that it watches runs as its framework has it.
        before_thresholds: it needs no fitted thresholds, and has modules that compress nothing run as if they did.
    """

    uncompressed = False
    before_thresholds = False

    def see(self, module: CompressedAttention, call: AttentionCall) -> None:
        """Is shown each call before it is computed, without gradients."""

    def hear(self, output: Tensor) -> None:
        """Is shown each output [B, S, H, D] as the model gets it, with gradients."""


class CompressedAttention(nn.Module):
    """Compression of one attention module of a Transformers model; attached to it as the child `attnpress`.

    Buffers are float32 whatever the model's dtype: q_scale, k_scale, v_scale (parameters if learned), cutoff [Hq]
    in the unit of the rule (see `core.rules`), and float64 histogram [Hq, BINS] of the pairs that thresholds are fitted
    to.
    With `spec.budget` sensitivity, float64 budget [Hq] times the sparsity in force is what is asked of each head.
    With `spec.threshold_penalty`, the parameter trained_cutoff [1], in GAIN nats, is in force instead of cutoff, and
    each training call leaves the share of pairs that its soft gate lets through in `density`.
    With `spec.tail`, lift [Hq] and float64 masses [Hq, 2] are fitted with cutoff, and run as the histogram does; with
    "linear", what `core.tail.Directions` holds is fitted in calibration, unless the whole score is seen.
    `watchers` are shown each call. One of them adds to `seen`; `take_seen` moves that into the histogram.

    `unset` names what nothing has set yet of scales and thresholds; `calibrate` sets them, `set_scales` by hand. A
    state dict holds the spec, the sparsity in force and `unset` as extra state: see `models.state`.

    Args:
        spec: what to do; `spec.sparsity` is the sparsity in force and changes with `set_sparsity`.
        heads, kv_heads, head_dim: Hq, Hkv, D.
        is_cross: whether its queries are of other tokens than its keys.
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
        self.attend: Attend = fake_quantize_attention
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
        """Buffers of the tail; none where the spec has none, so that checkpoints stay what they were."""
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
        """Whether the tail sees the score in fitted directions."""
        return self.spec.tail == "linear" and not sees_whole_score(self.spec, self.head_dim)

    def tail(self) -> Tail | None:
        """What was fitted for the tail; None without one."""
        if self.spec.tail == "none":
            return None
        if not self.has_directions:
            return Tail(self.lift)
        found = self.query_directions, self.key_directions, self.key_offset, self.direction_step
        return Tail(self.lift, Directions(*found))

    def fit_directions(self, moments: Moments, reduce: Reduce = alone) -> None:
        """Put the directions where the codes of all ranks vary most.

        Raises:
            ValueError: none was of a real token.
        """
        found = fit_directions(Moments(*(reduce(x, "sum") for x in moments.tensors())), self.spec.tail_rank)
        self.query_directions.copy_(found.query)
        self.key_directions.copy_(found.key)
        self.key_offset.copy_(found.offset)
        self.direction_step.copy_(found.step)

    def quantized(self) -> dict[str, TensorSpec]:
        """Specs of those of q, k, v that have a static scale."""
        specs = {"q": self.spec.q, "k": self.spec.k, "v": self.spec.v}
        return {name: spec for name, spec in specs.items() if spec.bits is not None and spec.granularity != "token"}

    def _scale_shape(self, name: str, spec: TensorSpec) -> tuple[int, ...]:
        heads = 1 if spec.granularity == "tensor" else self.heads if name == "q" else self.kv_heads
        return (1, heads, 1, self.head_dim if spec.granularity == "channel" else 1)

    def fits_thresholds(self) -> bool:
        """Whether the rule has thresholds that are fitted to the sparsity asked for, or trained."""
        return self.spec.threshold is None and not RULES[self.spec.rule].counts

    def set_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Give static scales their values: by "q", "k", "v", float32 of the buffer's shape or broadcastable to it.

        Raises:
            ValueError: there is no such scale, or a value that none can have; nothing is changed.
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
        """Refuse to go on with scales and thresholds that nothing has set.

        Args:
            name: of the module, for the message.
            thresholds: whether they are needed too; not while pairs are only looked at, to fit them.

        Raises:
            NotCalibratedError: with the mend.
        """
        for part in [part for part in self.unset if not self._is_untouched(part)]:
            self.unset.discard(part)  # somebody wrote values of their own there
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
        """Whether calls are computed as the framework has them, for the spec's sake or for that of a watcher."""
        if any(watcher.uncompressed for watcher in self.watchers):
            return True
        return self.spec.is_dense and not any(watcher.before_thresholds for watcher in self.watchers)

    def show(self, call: AttentionCall) -> None:
        """Show a call to the watchers; not the second time, inside the backward pass of gradient checkpointing."""
        if self.watchers and not _recomputing():
            with torch.no_grad():
                for watcher in self.watchers:
                    watcher.see(self, call)

    def scales(self) -> Scales:
        """The scales in force; learned ones by magnitude, so that one that training drives past zero comes back."""
        values = {name: getattr(self, f"{name}_scale") for name in self.quantized()}
        learned = {name: positive_scale(values[name].abs()) for name, spec in self.quantized().items() if spec.learned}
        return Scales(**(values | learned), tail=self.tail())

    def active_cutoff(self) -> Tensor | None:
        """The thresholds [Hq], or None while nothing is to be pruned."""
        if self.spec.sparsity == 0 and self.spec.threshold is None:
            return None
        if self.spec.threshold_penalty is None:
            return self.cutoff
        # Below zero, not even the row maximum would be kept.
        return (self.trained_cutoff.detach() * GAIN).clamp(min=0).repeat(self.heads)

    def threshold(self) -> Tensor:
        """tau, theta or gamma of each head as the rule's definition has it, [Hq]; 0 (gamma: 1) prunes nothing."""
        cutoff = self.active_cutoff()
        return torch.zeros_like(self.cutoff) if cutoff is None else rule_of(self.spec).to_threshold(cutoff)

    def set_sparsity(self, sparsity: float) -> None:
        """Ask for a sparsity from now on; thresholds are refitted to the pairs seen so far, unless they are trained."""
        self.spec = dataclasses.replace(self.spec, sparsity=sparsity)
        if self.spec.threshold_penalty is None:
            if sparsity > 0 and self.fits_thresholds():
                self.unset.add("cutoff")  # until they are fitted: where that fails, old ones must not go on unseen
            self.fit()

    def fit(self) -> None:
        """Put the thresholds where they give the sparsity in force on the pairs seen so far, and the lift with them."""
        if self.spec.tail != "none":
            self.lift.copy_(fit_lift(self.masses))
        # Where nothing is taken, there may be no histogram to fit to, and no threshold is in force.
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
        """histogram = decay * histogram + what all ranks have seen since the last time.

        Returns:
            Of the pairs seen, how many the thresholds in force prune, and how many there are; float64 [2].
        """
        seen = reduce(self.seen, "sum").clone()
        self.histogram.mul_(decay).add_(seen)
        self.seen.zero_()
        if self.spec.tail != "none":
            self.masses.mul_(decay).add_(reduce(self.seen_masses, "sum"))
            self.seen_masses.zero_()
        return torch.stack([rule_of(self.spec).pruned(self.spec, seen, self.active_cutoff()).sum(), seen.sum()])

    def forward(self, call: AttentionCall) -> Tensor:
        """Compressed attention; float32 [B, Hq, Sq, D].

        Args:
            call: from `call`; its `bounds` only where the module is deployed.
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
        """The call of these tensors with the scales, thresholds and spec in force; see `AttentionCall`."""
        key, value, valid = some_key(key, value, pair_mask(valid, query, key))
        scales, cutoff = self.scales(), self.active_cutoff()
        return AttentionCall(query, key, value, valid, scales, cutoff, self.spec, scaling, real, dropout, bounds)

    def get_extra_state(self) -> Tensor:
        """The spec with the sparsity in force, and what is not set yet; uint8, see `models.state.pack_extra`."""
        refuse_part()
        return pack_extra(self.spec, self.unset)

    def set_extra_state(self, state: Any) -> None:
        """Take over the sparsity in force; the rest of the spec has to be this module's own.

        Raises:
            StateError: damaged, of another version, or of another spec; names the fields.
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
            self.unset.add("cutoff")  # those of the state are trained, and these are not, or the other way round

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
            self.unset |= lost - {"cutoff"}
        elif own:
            missing_keys[:] = [key for key in missing_keys if key != prefix + EXTRA]
            self.unset -= own.keys()
            warnings.warn(
                "the state of compressed attention is from an older version of attnpress, which did not store the "
                "spec: the spec and the sparsity in force stay those that the model was bound with",
                stacklevel=2,
            )

    def _wrong_with(self, own: Mapping[str, Any]) -> list[str]:
        """What keeps the tensors of a state dict from being loaded, before any of them is."""
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
    """True of a tensor without data, which stands for what another process holds."""
    return isinstance(state, Tensor) and state.device.type == "meta"


def _recomputing() -> bool:
    """True in the second forward of gradient checkpointing, inside the backward pass: its pairs were seen before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
