"""Distillation losses against the dense teacher: attention outputs and softened predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpress.config import ConfigError, DistillationSpec


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Mean squared error of attention outputs over real tokens, relative to the teacher's power, averaged over layers.

    A layer whose teacher output is all zeros counts by its absolute error.

    Args:
        student, teacher: per layer [B, S, H, D].
        tokens: 1 for real tokens, [B, S].
    """
    weight = tokens.view(*tokens.shape, 1, 1).to(teacher[0].dtype)
    errors = []
    for s, t in zip(student, teacher, strict=True):
        power = (t**2 * weight).sum()
        errors.append(((s - t) ** 2 * weight).sum() / torch.where(power > 0, power, 1.0))
    return torch.stack(errors).mean()


def states_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Squared error of hidden states [B, S, K] over real tokens, relative to the teacher's power.

    Args:
        tokens: 1 for real tokens, [B, S].
    """
    weight = tokens.unsqueeze(-1).to(teacher.dtype)
    return ((student - teacher) ** 2 * weight).sum() / (teacher**2 * weight).sum().clamp(min=1e-30)


def logits_loss(student: Any, teacher: Any, temperature: float, tokens: Tensor) -> Tensor:
    """Divergence of the predictions, softened by `temperature` and scaled by its square (Hinton et al. 2015).

    Classification compares classes, extractive question answering positions (start and end, averaged). Regression uses
    the squared difference.
    """
    if hasattr(student, "start_logits"):
        hidden = tokens == 0
        pairs = [(student.start_logits, teacher.start_logits), (student.end_logits, teacher.end_logits)]
        return torch.stack([_divergence(s, t, temperature, hidden) for s, t in pairs]).mean()
    if student.logits.shape[-1] == 1:
        return F.mse_loss(student.logits, teacher.logits)
    return _divergence(student.logits, teacher.logits, temperature, None)


def _divergence(student: Tensor, teacher: Tensor, temperature: float, hidden: Tensor | None) -> Tensor:
    if hidden is not None:
        lowest = torch.finfo(student.dtype).min
        student, teacher = student.masked_fill(hidden, lowest), teacher.masked_fill(hidden, lowest)
    ours, theirs = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def check_gradients(outputs: Sequence[Tensor], spec: DistillationSpec) -> None:
    """Refuse to distil attention outputs that carry no gradient, since the loss term would silently have no effect.

    Raises:
        ConfigError: reentrant gradient checkpointing, whose forward pass records no gradient.
    """
    if spec.attention > 0 and not any(output.requires_grad for output in outputs):
        raise ConfigError(
            "distillation.attention: attention outputs carry no gradient, as under reentrant gradient checkpointing; "
            "use gradient checkpointing with use_reentrant=False, or set distillation.attention to 0"
        )
