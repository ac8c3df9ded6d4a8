"""Validation of the state of compressed attention: legal ranges of its tensors, and its spec as a tensor of bytes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpress.config import AttentionSpec, ConfigError
from attnpress.config.recipe import comparable, parse_spec, spec_to_dict
from attnpress.config.rules import RULES
from attnpress.core.exponential import T_MAX
from attnpress.core.quantizer import LARGEST_SCALE, SMALLEST_SCALE
from attnpress.core.rules import rule_of
from attnpress.core.rules.base import BINS, NATS_PER_BIN
from attnpress.core.tail import DIRECTION_MAX, OFFSET_MAX
from attnpress.core.thresholds import fixed_cutoff

VERSION = 1
"""Version of the extra state. Other versions are refused."""

EXTRA_SIZE = 2048
"""Size of the extra state in bytes, padded with spaces, since in-place loading needs a fixed size."""

WIDEST = BINS * NATS_PER_BIN
"""The largest threshold of the histogram, in nats. It prunes no pair with a P code."""

WHOLE = {
    "lift": (0, T_MAX),
    "query_directions": (-DIRECTION_MAX, DIRECTION_MAX),
    "key_directions": (-DIRECTION_MAX, DIRECTION_MAX),
    "key_offset": (-OFFSET_MAX, OFFSET_MAX),
}
"""Integers of the tail, with the bounds that their sums require."""

UNSET = ("q_scale", "k_scale", "v_scale", "cutoff")
"""The names that calibration sets."""

FREE = ("sparsity", "budget", "threshold_penalty", "observer", "learned", "power_of_two")
"""Keys of a spec that may differ between a state and its module, since scales and thresholds do not depend on them. The
sparsity is taken from the state."""


class NotCalibratedError(ValueError, RuntimeError):
    """Compressed attention was called, deployed or saved before its scales and thresholds were set."""


class StateError(ValueError):
    """State of compressed attention is damaged, of another version, or of another spec."""


@dataclass(frozen=True)
class Extra:
    """State of one module in a state dict besides its tensors.

    Attributes:
        spec: with the current sparsity.
        unset: scales and thresholds that are not set.
    """

    spec: AttentionSpec
    unset: frozenset[str]


def pack_extra(spec: AttentionSpec, unset: Iterable[str]) -> Tensor:
    """The extra state as JSON text in uint8 [EXTRA_SIZE]; a tensor, since safetensors store only tensors."""
    attention = spec_to_dict(spec)
    if spec.predictor_bits is None:  # a state without it stays one that earlier versions read
        del attention["predictor_bits"]
    plain = {"version": VERSION, "attention": attention, "unset": sorted(unset)}
    text = json.dumps(plain, separators=(",", ":")).encode()
    return torch.frombuffer(bytearray(text.ljust(EXTRA_SIZE)), dtype=torch.uint8)


def unpack_extra(stored: Any) -> Extra:
    """Read the result of `pack_extra`.

    Raises:
        StateError: the state is damaged, or of another version.
    """
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.dim() != 1:
        raise StateError(f"damaged: uint8 [{EXTRA_SIZE}] expected")
    try:
        plain = json.loads(bytes(stored.tolist()))
    except ValueError:
        raise StateError("damaged: it is not JSON") from None
    version = plain.get("version") if isinstance(plain, dict) else None
    if version != VERSION:
        raise StateError(f"version {version!r}; this version of attnpress reads {VERSION}: update attnpress")
    unset = plain.get("unset")
    if not isinstance(unset, list) or not all(name in UNSET for name in unset):
        raise StateError(f"damaged: unset is {unset!r}; names among {', '.join(UNSET)} are allowed")
    try:
        return Extra(parse_whole_spec(plain.get("attention")), frozenset(unset))
    except ConfigError as error:
        raise StateError(f"damaged: {error}") from None


def parse_whole_spec(plain: Any) -> AttentionSpec:
    """Parse a stored spec. Unlike in a recipe, every key that affects the computation must be present.

    Raises:
        ConfigError: a key is missing, unknown, or has an invalid value.
    """
    if not isinstance(plain, Mapping):
        raise ConfigError(f"attention: an object is expected, found {type(plain).__name__}")
    for key in ("q", "k", "v", "p", "rule", "sparsity"):
        if key not in plain:
            raise ConfigError(f"attention.{key} is missing")
        if key in ("q", "k", "v", "p") and (not isinstance(plain[key], Mapping) or "bits" not in plain[key]):
            raise ConfigError(f"attention.{key}.bits is missing")
    return parse_spec(AttentionSpec, plain)


def differences(stored: AttentionSpec, own: AttentionSpec) -> list[str]:
    """The fields that change the meaning of scales and thresholds, with both values; see FREE."""
    theirs, ours = dict(_flat(comparable(stored))), dict(_flat(comparable(own)))
    return [
        f"{key} is {theirs.get(key)} in the state and {ours.get(key)} in the model"
        for key in ours | theirs
        if theirs.get(key) != ours.get(key) and key.rpartition(".")[2] not in FREE
    ]


def fault(part: str, tensor: Tensor, spec: AttentionSpec) -> str | None:
    """The reason why the values of a scale, threshold, budget or histogram are invalid; None if they are valid.

    Args:
        part: the tensor's name in `CompressedAttention`.
        tensor: its values. Values of a meta tensor are not checked.
    """
    if tensor.device.type == "meta":
        return None
    expected = torch.float64 if part in ("histogram", "budget", "masses") else torch.float32
    if tensor.dtype != expected:
        return f"has dtype {tensor.dtype} instead of {expected}"
    legal, allowed = _range(part, tensor, spec)
    if bool(legal.all()):
        return None
    return f"holds {float(tensor[~legal][0]):g}; {allowed} is allowed"


def _range(part: str, tensor: Tensor, spec: AttentionSpec) -> tuple[Tensor, str]:
    if part.endswith("_scale"):
        # A learned one counts by its magnitude.
        magnitude = tensor.detach().abs() if _is_learned(part, spec) else tensor.detach()
        inside = (magnitude >= SMALLEST_SCALE) & (magnitude <= LARGEST_SCALE)
        return inside, f"a scale of {SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g}"
    if part in WHOLE:
        least, most = WHOLE[part]
        return (tensor >= least) & (tensor <= most) & (tensor == tensor.round()), f"a whole number of {least} to {most}"
    if part != "cutoff":
        finite = tensor.detach().isfinite()
        return (finite, "a finite number") if part == "trained_cutoff" else (finite & (tensor >= 0), "0 or more")
    if spec.threshold is not None and not RULES[spec.rule].counts:
        own = fixed_cutoff(spec, tensor.numel()).to(tensor.device).view(tensor.shape)
        same = torch.isclose(tensor, own, rtol=1e-5, atol=1e-6)
        return same, f"{float(own.flatten()[0]):g}, which is the spec's own,"
    return rule_of(spec).usable(tensor)


def _is_learned(part: str, spec: AttentionSpec) -> bool:
    return {"q_scale": spec.q, "k_scale": spec.k, "v_scale": spec.v}[part].learned


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def saving_call() -> Mapping[str, Any] | None:
    """Local variables of the `PreTrainedModel.save_pretrained` in progress, such as `self` and its arguments.

    Transformers does not pass quantizers the weights given for saving, and does not tell them that a bound part is
    saved within an unbound model:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "save_pretrained" and frame.f_globals["__name__"] == "transformers.modeling_utils":
            return frame.f_locals
        frame = frame.f_back
    return None


def refuse_part() -> None:
    """Refuse to save a Transformers model of which only a part is bound, since its config.json would not record that.

    Raises:
        StateError: says what to do.
    """
    saving = saving_call()
    whole = None if saving is None else saving["self"]
    if whole is not None and getattr(whole, "hf_quantizer", None) is None:
        raise StateError(
            f"this {type(whole).__name__} was not bound itself but shares bound attention, and its checkpoint would "
            "come back without compression: save the model that was given to bind, or bind and calibrate this one"
        )
