"""The training and evaluation modes of a model's modules, kept through a look at the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model is in evaluation mode; after it, each module is in the mode that it had.

    `model.train(flag)` would put all modules into one mode, and so undo what a user has frozen: dropout or batch
    normalization that stays in evaluation mode while the rest is trained.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
