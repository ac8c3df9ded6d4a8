"""Training and evaluation modes of a model's modules, preserved while the model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the `with` block; afterwards restore the mode of each module.

    `model.train(flag)` would set all modules to one mode, and undo frozen ones, such as dropout or batch normalization
    that stays in evaluation mode while the rest is trained.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
