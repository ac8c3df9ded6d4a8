"""What several processes of one training need: who this one is, and sums over all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor


def this_process() -> PartialState:
    """This process among those of `torchrun` or `accelerate launch`; without an accelerator they talk through gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def reduce_over_ranks(tensor: Tensor, how: str) -> Tensor:
    """The "max" or "sum" of the tensor over all ranks; the tensor itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    merged = tensor.clone()
    dist.all_reduce(merged, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return merged
