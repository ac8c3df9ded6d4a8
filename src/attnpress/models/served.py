"""Replacement for the Transformers model inside a pipeline, computed by another runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput


class Served(nn.Module):
    """Replacement for the Transformers model, computed by another runtime.

    Args:
        replaced: provides the configuration.
        run: function from arrays by name to the outputs.
    """

    def __init__(self, replaced: Any, run: Callable[[Mapping[str, Tensor]], Any]) -> None:
        super().__init__()
        self.config, self.run = replaced.config, run
        self.register_buffer("place", torch.zeros(1), persistent=False)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def forward(self, **inputs: Any) -> Any:
        """Hidden states [B, S, K], or logits [B, classes], under the name that the model uses."""
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        name = "logits" if "ForSequenceClassification" in str(self.config.architectures) else "last_hidden_state"
        return ModelOutput({name: torch.as_tensor(self.run(tensors)[0]).float()})
