"""Outputs without gradients: requesting a gradient is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_gradient(output: Tensor, *inputs: Tensor | None) -> Tensor:
    """The same output. If its inputs require gradients, a backward pass through it raises RuntimeError."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return output
    if not any(x is not None and x.requires_grad for x in inputs):
        return output
    refused: Tensor = _Refusal.apply(output.detach(), *inputs)  # type: ignore[no-untyped-call]
    return refused


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor | None) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a deployed model has no gradients: call attnpress.undeploy(model) before training, or, if its linear "
            "layers are int8, load the model that was saved before it was deployed"
        )
