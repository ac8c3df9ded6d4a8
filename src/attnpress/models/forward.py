"""The attention function that bound models call, as registered with Transformers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.utils import output_capturing

from attnpress.config import TensorSpec
from attnpress.core.arguments import causal_mask
from attnpress.core.attention import repeat_heads
from attnpress.core.call import AttentionCall
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.models.attention import NAME, CompressedAttention

SCORE_TERMS = ("position_bias", "softcap", "s_aux", "sinks")
"""Arguments for score terms besides a mask: biases, soft caps, attention sinks."""

BOUNDS = "attnpress_bounds"
"""Argument with the bounds of packed sequences, int64 [sequences + 1]."""


WINDOW = "sliding_window"
"""Argument by which Transformers tells attention of its window, where it has one; the mask tells of it as well."""


@dataclass(frozen=True)
class NotedCall:
    """Shapes of an attention call of a module while an example passes through the model.

    Attributes:
        query, key, value: shapes [B, Hq or Hkv, S, D].
        is_biased: True if the mask adds something to scores, or could learn to.
    """

    module: nn.Module
    query: torch.Size
    key: torch.Size
    value: torch.Size
    device: torch.device
    is_biased: bool


noted: ContextVar[list[NotedCall] | None] = ContextVar("attention_calls", default=None)
"""Where modules of an unbound model record their calls while an example passes through it."""


class UnsupportedModelError(ValueError):
    """The model's attention does not use Transformers' AttentionInterface, or has features that are not supported."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function registered with Transformers' AttentionInterface under the name "attnpress".

    Returns:
        Output [B, S, H, D] in the query's dtype, and the attention weights [B, H, Sq, Sk] if requested.

    Raises:
        UnsupportedModelError: scores have a position bias, soft cap or sink, which integer scores cannot represent.
        NotCalibratedError: scales or thresholds are not set.
        RuntimeError: the module was never bound, for example because a configuration was copied from a bound model.
    """
    state: CompressedAttention | None = getattr(module, NAME, None)
    terms = [name for name in SCORE_TERMS if kwargs.get(name) is not None]
    if terms:
        raise UnsupportedModelError(f"{type(module).__name__} adds {', '.join(terms)} to its scores; not supported")
    if state is None:
        return _without_state(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    scaling = usual_scaling(query) if scaling is None else scaling
    compressed = not state.runs_uncompressed
    if compressed and state.unset:
        fitted = not any(watcher.before_thresholds for watcher in state.watchers)
        state.require_calibrated(type(module).__name__, thresholds=fitted)
    if compressed or state.watchers:
        valid = valid_pairs(module, query, key, attention_mask)
        real = real_rows(module, query, key, valid)
        call = state.call(query, key, value, valid, real, scaling, dropout, kwargs.get(BOUNDS))
    if compressed:
        with torch.autocast(query.device.type, enabled=False):
            attend = functools.partial(_in_windows, state, kwargs.get(WINDOW)) if BOUNDS in kwargs else state
            output = attend(call).transpose(1, 2).to(query.dtype).contiguous()
            weights = None
            if _wants_weights(module, kwargs):
                weights = compressed_probs(call)[..., : key.shape[2]].to(query.dtype)
    else:
        if state.watchers:
            state.show(call)
        output, weights = eager_function(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for watcher in state.watchers:
        watcher.hear(output)
    return output, weights


def _in_windows(state: CompressedAttention, window: int | None, call: AttentionCall) -> Tensor:
    """Attention of sequences that lie end to end, [1, Hq, Sq, D], where a token may see those less than `window` away.

    Where all sequences are shorter, or there is no window, that is one call; else one for each of them.
    """
    assert call.bounds is not None
    places = call.bounds.tolist()
    if window is None or max(end - begin for begin, end in itertools.pairwise(places)) <= window:
        return state.forward(call)
    parts = []
    for begin, end in itertools.pairwise(places):
        query, key, value = (x[:, :, begin:end] for x in (call.query, call.key, call.value))
        place = torch.arange(end - begin, device=query.device)
        near = (place.unsqueeze(-1) - place).abs() < window
        valid = None if end - begin <= window else near.view(1, 1, *near.shape)
        parts.append(state(call.with_(query=query, key=key, value=value, valid=valid, bounds=None)))
    return torch.cat(parts, 2)


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True if the caller asks for attention weights: by an argument, by the configuration, or for the whole model.

    Some models, such as GPT-2, do not pass the argument on; Transformers then collects the weights with a hook.
    """
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False) or _is_collecting()
    return bool(asked)


def _is_collecting() -> bool:
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any("attentions" in key for key in collector.get() or ())


@torch.no_grad()
def compressed_probs(call: AttentionCall) -> Tensor:
    """P as the compressed attention uses it, with tails; float32 [B, Hq, Sq, Sk].

    Row i of P is the attention output for values that are unit vectors, which two bits at scale 1 represent exactly.
    """
    key, keys = call.key, call.key.shape[2]
    units = torch.eye(keys, device=key.device).expand(*key.shape[:2], keys, keys)
    spec = dataclasses.replace(call.spec, v=TensorSpec(bits=2, granularity="tensor"))
    scales = dataclasses.replace(call.scales, v=torch.ones(1, 1, 1, 1, device=key.device))
    return fake_quantize_attention(call.with_(value=units, scales=scales, spec=spec, dropout=0.0))


def usual_scaling(query: Tensor) -> float:
    """1 / sqrt(D)."""
    return float(query.shape[-1] ** -0.5)


def valid_pairs(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The framework's mask as bool [B or 1, 1 or H, Sq, Sk], True = may attend; None if all pairs are valid.

    Raises:
        ValueError: the mask holds values other than 0 and "very negative", and is thus a bias.
    """
    if mask is None:
        may_attend_to_all = not getattr(module, "is_causal", False) or query.shape[2] == 1
        return None if may_attend_to_all else causal_mask(query, key)
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return mask
    valid = mask == 0
    if not torch.compiler.is_compiling() and adds_bias(mask):
        raise ValueError("attention_mask adds a bias to the scores; compressed attention takes masks of 0 and min only")
    return valid


def adds_bias(mask: Tensor) -> bool:
    """True if a floating-point mask holds values other than 0 and "very negative"."""
    return bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def real_rows(module: nn.Module, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor | None:
    """Rows of real tokens, bool [B or 1, 1, Sq, 1], or None if all are real. A real token may attend to itself.

    In cross-attention the mask says nothing about query rows, so all count.
    """
    if getattr(getattr(module, NAME, None), "is_cross", False):
        return None
    offset = key.shape[2] - query.shape[2]
    same_tokens = offset == 0 or getattr(module, "is_causal", False)
    if valid is None or not same_tokens:
        return None
    square = valid.expand(*valid.shape[:-2], query.shape[2], key.shape[2])
    return square.diagonal(offset, -2, -1).any(1, keepdim=True).unsqueeze(-1)


def _without_state(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    seen = noted.get()
    if seen is None:
        raise RuntimeError(
            f"{type(module).__name__} asks for attention {NAME!r} but was never bound: call bind(model), with an "
            "`example` that passes through this module if bind's own does not"
        )
    # Zeros from a parameter are a bias that is still to be learned.
    biased = mask is not None and mask.is_floating_point() and (mask.requires_grad or adds_bias(mask))
    seen.append(NotedCall(module, query.shape, key.shape, value.shape, query.device, biased))
    scaling, dropout = args
    return eager_function(module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def eager_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of a module: from the file of its class, or of its nearest base class in Transformers.

    Each model file of Transformers has its own eager function. Using it makes an uncompressed model exact. A class that
    derives from none of Transformers gets the usual formula.
    """
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            found: Callable[..., tuple[Tensor, Tensor | None]] = function
            return found
    return usual_attention


def usual_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T * scaling + mask) V as in most model files, with keys and values repeated for their query heads.

    Returns:
        Output [B, Sq, Hq, D], and the weights [B, Hq, Sq, Sk].
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = query @ key.mT * (usual_scaling(query) if scaling is None else scaling)
    valid = valid_pairs(module, query, key, attention_mask)
    if valid is not None:
        scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)
