"""Float layers around a deployed encoder, computed in one order of summation: embedding norm, pooler, and heads."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUActivation

from attnpress.core.inference import without_gradient
from attnpress.core.ordered import Passes
from attnpress.models.pipeline import after_encoder, place_hook, place_ordered_sums

TANH_HEADS = ("RobertaClassificationHead", "XLMRobertaClassificationHead", "CamembertClassificationHead")
"""Heads that call tanh as a function: dense, tanh, out_proj on the first token."""


class OrderedLayerNorm(nn.LayerNorm):
    """Layer norm as defined in `core.ordered`."""

    compute: Callable[[Tensor, Tensor, Tensor, float], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K]."""
        return without_gradient(self.compute(x, self.weight, self.bias, self.eps), x, self.weight)


class OrderedLinear(nn.Linear):
    """Float32 linear layer as defined in `core.ordered`."""

    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> float32 [..., N]."""
        return without_gradient(self.compute(x, self.weight, self.bias), x, self.weight)


class OrderedActivation(nn.Module):
    """GELU or tanh as defined in `core.ordered`."""

    compute: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [...]."""
        return without_gradient(self.compute(x), x)


class OrderedTanhHead(nn.Module):
    """Classification head of RoBERTa models."""

    dense: nn.Module
    out_proj: nn.Module
    compute: Callable[[Tensor], Tensor]

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states [B, S, K] -> logits [B, N] of the first tokens."""
        first = self.dense(features[:, 0])
        logits: Tensor = self.out_proj(without_gradient(self.compute(first), first))
        return logits


def place_ordered(model: nn.Module, encoder: nn.Module, passes: Passes) -> None:
    """Compute the float layers around the encoder in one order of summation. They remain the same module objects.

    These are the layers of the encoder's own model, every head except one that predicts words (its product is as large
    as the vocabulary and is left to the library), and the modules behind the encoder in a sentence-transformers
    pipeline.
    """
    place_ordered_sums(model)
    layers: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., Tensor]]] = {
        nn.LayerNorm: (OrderedLayerNorm, passes.layer_norm),
        nn.Linear: (OrderedLinear, passes.linear),
    }
    activations = {nn.Tanh: passes.tanh, nn.GELU: passes.gelu, GELUActivation: passes.gelu}
    base = _base_of(model, encoder)
    behind = [] if base is None else list(after_encoder(model, base))
    for module in [] if base is None else [*_around(model, base, encoder), *behind]:
        found = layers.get(type(module))
        exact = getattr(module, "approximate", "none") == "none"
        activation = activations.get(type(module)) if exact else None
        if type(module).__name__ in TANH_HEADS:
            found = OrderedTanhHead, passes.tanh
        elif activation is not None and all(module is not other for other in behind):
            found = OrderedActivation, activation
        elif activation is not None:
            # By a hook, since saving the pipeline stores the class of this module.
            place_hook(_owned(module, behind), functools.partial(_activated, activation))
        if found is not None and not (isinstance(module, nn.LayerNorm) and module.bias is None):
            # The same object keeps hooks, names and tied weights.
            module.__class__, vars(module)["compute"] = found


def _owned(module: nn.Module, parents: Iterable[nn.Module]) -> nn.Module:
    """Replace a module by its own copy: all models of sentence-transformers share one default activation."""
    own = copy.copy(module)
    own._forward_hooks = module._forward_hooks.copy()
    for parent in parents:
        for name, child in list(parent.named_children()):
            if child is module:
                setattr(parent, name, own)
    return own


def _activated(compute: Callable[[Tensor], Tensor], _module: nn.Module, args: tuple[Tensor], _output: Tensor) -> Tensor:
    return without_gradient(compute(args[0]), args[0])


def _base_of(model: nn.Module, encoder: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if getattr(module, "encoder", None) is encoder), None)


def _around(model: nn.Module, base: Any, encoder: nn.Module) -> Iterator[nn.Module]:
    """Modules of the encoder's model outside the encoder, and those of heads."""
    beside = [child for child in base.children() if child is not encoder]
    owner: Any = next((module for module in model.modules() if getattr(module, "base_model", None) is base), base)
    if owner is not base:
        words = getattr(owner, "get_output_embeddings", lambda: None)()
        heads = [child for child in owner.children() if child is not base]
        beside += [head for head in heads if words is None or all(module is not words for module in head.modules())]
    for part in beside:
        yield from part.modules()
