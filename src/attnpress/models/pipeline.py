"""Pipelines of sentence-transformers: their batches, and the sums that they compute after the encoder.

Such a model is an `nn.Sequential` of modules that pass on one dictionary of features; one of them contains a
Transformers model. The library is optional and not imported here, so its modules are recognized by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnpress.core.ordered import ordered_sum

LIBRARY = "sentence_transformers"

SUMMED = ("mean", "mean_sqrt_len_tokens", "weightedmean")
"""Poolings that sum over tokens; all others select values, independent of the order of summation."""

Features = dict[str, Any]


def is_pipeline(model: nn.Module) -> bool:
    """True if a model is a SentenceTransformer, a CrossEncoder or similar."""
    return isinstance(model, nn.Sequential) and _is_of_library(type(model))


def called_with_batches(model: nn.Module) -> nn.Module:
    """The module whose forward accepts a batch: the model itself, or the Transformers model inside a pipeline."""
    if not is_pipeline(model):
        return model
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def after_encoder(model: nn.Module, base: nn.Module) -> Iterator[nn.Module]:
    """Every module of a pipeline behind the one with the encoder's model; none for other models."""
    if is_pipeline(model):
        for part in model.children():
            modules = list(part.modules())
            if all(module is not base for module in modules):
                yield from modules


def place_ordered_sums(model: nn.Module) -> None:
    """Compute a pipeline's means over tokens and its norms in one order of summation from now on.

    Hooks are used, since saving a pipeline stores the classes of its modules.
    """
    for module in model.modules():
        hook = _HOOKS.get(type(module).__name__) if _is_of_library(type(module)) else None
        if hook is not None:
            place_hook(module, hook)


def place_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Register a forward hook, unless attnpress has already registered one on the module."""
    if not any(_function(held) is _function(hook) for held in module._forward_hooks.values()):
        module.register_forward_hook(hook)


def _function(hook: Any) -> Any:
    return hook.func if isinstance(hook, functools.partial) else hook


def ordered_pooling(module: Any, _: Any, features: Features) -> Features:
    """Repeat the pooling of hidden states [B, S, K], with the sums over tokens in one order.

    Weights of words, if another module has set some, are left to the library.
    """
    modes = (module.pooling_mode,) if isinstance(module.pooling_mode, str) else module.pooling_mode
    states = features["token_embeddings"]
    if "token_weights_sum" in features or states.dim() != 3 or "cu_seq_lens_q" in features:
        return features
    real, positions = _tokens(module, features, states)
    parts = features["sentence_embedding"].split(states.shape[-1], -1)
    pooled = [
        _pooled(mode, states, real, positions) if mode in SUMMED and states.dtype == torch.float32 else part
        for mode, part in zip(modes, parts, strict=True)
    ]
    features["sentence_embedding"] = torch.cat(pooled, -1)
    return features


def ordered_norm(module: Any, _: Any, features: Features) -> Features:
    """Repeat the normalization, with the sum of squares in one order."""
    found = features.get(module.module_output_name)
    if found is not None and found.dtype == torch.float32:
        features[module.module_output_name] = found / _root(ordered_sum(found, found)).clamp(min=1e-12).unsqueeze(-1)
    return features


_HOOKS: dict[str, Callable[..., Any]] = {"Pooling": ordered_pooling, "Normalize": ordered_norm}


def _tokens(module: Any, features: Features, states: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that count, float32 [B, S], and their positions from the first real one, from 1."""
    mask = features.get("attention_mask")
    if mask is None or mask.shape[-1] != states.shape[1]:
        mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
    places = torch.arange(states.shape[1], device=states.device) - mask.int().argmax(1, keepdim=True)
    prompt = features.get("prompt_length")
    if not module.include_prompt and prompt is not None:
        mask = mask * (places >= (int(prompt.flatten()[0]) if isinstance(prompt, Tensor) else int(prompt)))
    return mask.float(), (places + 1).float()


def _pooled(mode: str, states: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    weights = real * positions if mode == "weightedmean" else real
    # Weights are integers, so their sum is exact in any order; padding adds zeros.
    count = weights.sum(1, keepdim=True).clamp(min=1e-9)
    total = ordered_sum((states * weights.unsqueeze(-1)).mT)
    return total / (_root(count) if mode == "mean_sqrt_len_tokens" else count)


def _root(x: Tensor) -> Tensor:
    # In float64, since torch's float32 root (of a vector library) is not always correctly rounded.
    return x.double().sqrt().float()


def _is_of_library(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == LIBRARY for base in kind.__mro__)
