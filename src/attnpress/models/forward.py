"""The function through which all attention of a bound model passes, as registered with Transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from attnpress.core.probe import AttentionCall
from attnpress.models.attention import NAME, CompressedAttention

SCORE_TERMS = ("position_bias", "softcap", "s_aux", "sinks")
"""Arguments by which some models change their scores beyond a mask: biases, soft caps, attention sinks."""

BOUNDS = "attnpress_bounds"
"""Argument with the bounds of sequences that lie end to end in one row, int64 [sequences + 1]."""

noted: ContextVar[list[tuple[nn.Module, Tensor, Tensor]] | None] = ContextVar("attention_calls", default=None)
"""While an example passes through a model that is not bound yet: where each module notes its call."""


class UnsupportedModelError(ValueError):
    """A model whose attention does not go through Transformers' AttentionInterface, or needs what the method lacks."""


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
        Output [B, S, H, D] in the query's dtype, and the attention weights (only where nothing is compressed).

    Raises:
        UnsupportedModelError: scores with a position bias, soft cap or sink, which the integer ones cannot carry.
        RuntimeError: the module was never bound, for example because a configuration was copied from a bound model.
    """
    state: CompressedAttention | None = getattr(module, NAME, None)
    terms = [name for name in SCORE_TERMS if kwargs.get(name) is not None]
    if terms:
        raise UnsupportedModelError(f"{type(module).__name__} adds {', '.join(terms)} to its scores; not supported")
    if state is None:
        return _without_state(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if state.probe is not None:
        state.probe(_attention_call(module, query, key, value, attention_mask, scaling))
    if state.observers is not None or (state.spec.is_dense and state.rows is None):
        output, weights = _eager(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        if state.observers is not None or state.counts is not None:
            valid = valid_pairs(module, query, key, attention_mask)
            real = real_rows(module, query, key, valid)
            state.observe(query, key, value, valid, real)
            state.count_dense(query, key, valid, real)
    else:
        valid = valid_pairs(module, query, key, attention_mask)
        real = real_rows(module, query, key, valid)
        scaling = usual_scaling(query) if scaling is None else scaling
        with torch.autocast(query.device.type, enabled=False):
            exact = state(query, key, value, valid, real, scaling, dropout, kwargs.get(BOUNDS))
        output, weights = exact.transpose(1, 2).to(query.dtype).contiguous(), None
    if state.captured is not None:
        state.captured.append(output)
    return output, weights


def _attention_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> AttentionCall:
    valid = valid_pairs(module, query, key, mask)
    real = real_rows(module, query, key, valid)
    return AttentionCall(query, key, value, valid, real, usual_scaling(query) if scaling is None else scaling)


def usual_scaling(query: Tensor) -> float:
    """1 / sqrt(D)."""
    return float(query.shape[-1] ** -0.5)


def valid_pairs(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The framework's mask as bool [B or 1, 1 or H, Sq, Sk], True = may attend; None if all pairs may.

    Raises:
        ValueError: the mask holds values other than 0 and "very negative": it is a bias, not a mask.
    """
    if mask is None:
        rows, keys = query.shape[2], key.shape[2]
        if not getattr(module, "is_causal", False) or rows == 1:
            return None
        return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return mask
    valid = mask == 0
    if not torch.compiler.is_compiling() and bool((~valid & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise ValueError("attention_mask adds a bias to the scores; compressed attention takes masks of 0 and min only")
    return valid


def real_rows(module: nn.Module, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor | None:
    """Rows of real tokens, bool [B or 1, 1, Sq, 1], or None if all are: a real token may attend to itself."""
    offset = key.shape[2] - query.shape[2]
    same_tokens = offset == 0 or getattr(module, "is_causal", False)
    if valid is None or not same_tokens:
        return None
    square = valid.expand(*valid.shape[:-2], query.shape[2], key.shape[2])
    return square.diagonal(offset, -2, -1).any(1, keepdim=True).unsqueeze(-1)


def _without_state(
    module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    seen = noted.get()
    if seen is None:
        raise RuntimeError(f"{type(module).__name__} asks for attention {NAME!r} but was never bound: call bind(model)")
    seen.append((module, query, key))
    value, mask, scaling, dropout = args
    return _eager(module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    # Each model file of Transformers has its own eager function; calling that one makes "nothing compressed" exact.
    function: Callable[..., tuple[Tensor, Tensor | None]] = sys.modules[type(module).__module__].eager_attention_forward
    return function


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)
