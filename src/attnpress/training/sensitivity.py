"""Measured sensitivity of single heads: change of the model's output if one head is modified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from attnpress.distributed import reduce_over_ranks
from attnpress.models.attention import CompressedAttention
from attnpress.models.inputs import Batch
from attnpress.models.outputs import first_output


def head_changes(
    model: nn.Module,
    batches: Sequence[Batch],
    untouched: Sequence[Tensor],
    modules: Sequence[CompressedAttention],
    treating: Callable[[CompressedAttention, int], AbstractContextManager[None]],
) -> Tensor:
    """Change of the model's first output if one head alone is modified, head by head.

    Args:
        batches: each head costs a forward pass over them.
        untouched: the first output for each batch with no head modified.
        modules: whose heads are measured.
        treating: returns a `with` block inside which only the given head of the given module is modified.

    Returns:
        The norm of the difference over all batches of all ranks; float64 [heads of all modules], in order.
    """
    changes = []
    for module in modules:
        for head in range(module.heads):
            with treating(module, head):
                moved = [first_output(model, batch) - before for batch, before in zip(batches, untouched, strict=True)]
            changes.append(torch.stack([part.double().square().sum() for part in moved]).sum())
    return reduce_over_ranks(torch.stack(changes), "sum").sqrt()
