"""Helpers for training with several processes: their state, and sums over all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor


def this_process() -> PartialState:
    """State of this process under `torchrun` or `accelerate launch`; without an accelerator, gloo is the backend."""
    return PartialState(cpu=not torch.accelerator.is_available())


def reduce_over_ranks(tensor: Tensor, how: str) -> Tensor:
    """The "max" or "sum" of a tensor over all ranks; the tensor itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    merged = tensor.clone()
    dist.all_reduce(merged, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return merged
