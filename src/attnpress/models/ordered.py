"""The small float layers around a deployed encoder, computed in one order: embeddings' norm, pooler, and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUActivation

from attnpress.core.inference import without_gradient
from attnpress.core.ordered import Passes

TANH_HEADS = ("RobertaClassificationHead", "XLMRobertaClassificationHead", "CamembertClassificationHead")
"""Heads that call tanh as a function: dense, tanh, out_proj of the first token."""


class OrderedLayerNorm(nn.LayerNorm):
    """A layer norm as `core.ordered` defines it."""

    compute: Callable[[Tensor, Tensor, Tensor, float], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K]."""
        return without_gradient(self.compute(x, self.weight, self.bias, self.eps), x, self.weight)


class OrderedLinear(nn.Linear):
    """A float32 linear layer as `core.ordered` defines it."""

    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> float32 [..., N]."""
        return without_gradient(self.compute(x, self.weight, self.bias), x, self.weight)


class OrderedActivation(nn.Module):
    """GELU or tanh as `core.ordered` defines it."""

    compute: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [...]."""
        return without_gradient(self.compute(x), x)


class OrderedTanhHead(nn.Module):
    """A classification head of the RoBERTa kind."""

    dense: nn.Module
    out_proj: nn.Module
    compute: Callable[[Tensor], Tensor]

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states [B, S, K] -> logits [B, N], of the first tokens."""
        first = self.dense(features[:, 0])
        logits: Tensor = self.out_proj(without_gradient(self.compute(first), first))
        return logits


def place_ordered(model: nn.Module, encoder: nn.Module, passes: Passes) -> None:
    """Have the float layers around the encoder computed in one order; they stay the modules that they are.

    That is what belongs to the encoder's own model, and every head beside it but one that predicts words: its product
    is as large as the vocabulary, and stays a library's.
    """
    kinds: dict[type[nn.Module], tuple[type[nn.Module], Callable[..., Tensor]]] = {
        nn.LayerNorm: (OrderedLayerNorm, passes.layer_norm),
        nn.Linear: (OrderedLinear, passes.linear),
        nn.Tanh: (OrderedActivation, passes.tanh),
        GELUActivation: (OrderedActivation, passes.gelu),
    }
    for module in _around(model, encoder):
        found = kinds.get(type(module))
        if type(module).__name__ in TANH_HEADS:
            found = OrderedTanhHead, passes.tanh
        if found is not None and not (isinstance(module, nn.LayerNorm) and module.bias is None):
            # The same object: hooks, names and ties of its weights stay.
            module.__class__, vars(module)["compute"] = found


def _around(model: Any, encoder: nn.Module) -> Iterator[nn.Module]:
    """Modules of the encoder's model that are not in the encoder, and those of heads."""
    base = next((module for module in model.modules() if getattr(module, "encoder", None) is encoder), None)
    if base is None:
        return
    beside = [child for child in base.children() if child is not encoder]
    if getattr(model, "base_model", None) is base and model is not base:
        words = getattr(model, "get_output_embeddings", lambda: None)()
        heads = [child for child in model.children() if child is not base]
        beside += [head for head in heads if words is None or all(module is not words for module in head.modules())]
    for part in beside:
        yield from part.modules()
