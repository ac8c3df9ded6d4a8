"""SparsityDriver: raises the sparsity of a bound model step by step, in any training loop."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import nn

from attnpress.config import ConfigError, Count, ScheduleSpec, Sparsity
from attnpress.config.recipe import checked
from attnpress.core.schedule import sparsity_at
from attnpress.distributed import reduce_over_ranks
from attnpress.models.attention import HISTOGRAM_DECAY, ROW_STRIDE, CompressedAttention
from attnpress.models.binding import attentions
from attnpress.models.watchers import Fitting, start, stop

Target = float | Mapping[str, float]


class SparsityDriver:
    """Raises the sparsity of a bound model step by step, in any training loop.

    Call `begin(step)` before a step's forward passes and `end()` after its update. The driver stores nothing of the
    model. It looks up the attention modules at each call, so the model may be bound again. Thresholds and histograms
    are module buffers, so a checkpoint contains everything that a resumed run needs.

    Args:
        model: bound and calibrated.
        schedule: how sparsity grows.
        target: final sparsity, from 0 to below 1; or one for each attention module, by name.
        total: number of training steps.

    Raises:
        ConfigError: the model is not bound, `target` does not match its attention modules, or a number is out of range.
    """

    def __init__(self, model: nn.Module, schedule: ScheduleSpec, target: Target, total: int) -> None:
        self.model, self.schedule, self.achieved = model, schedule, 0.0
        self.target, self.total = _checked_target(target), checked(Count, total, "total")
        self.targets()

    @property
    def modules(self) -> list[CompressedAttention]:
        """The model's current attention modules, in the order of the layers."""
        return [module for module, _ in self.targets()]

    def targets(self) -> list[tuple[CompressedAttention, float]]:
        """The model's current attention modules, each with its final sparsity.

        Raises:
            ConfigError: there are none, or `target` names others.
        """
        found = attentions(self.model)
        if not found:
            raise ConfigError(
                f"{type(self.model).__name__} is not bound, so nothing of it can be pruned: call bind(model, spec) and "
                "calibrate(model, batches) first; a model_init has to return such a model"
            )
        named = self.target if isinstance(self.target, Mapping) else dict.fromkeys(found, self.target)
        if different := sorted(set(found) ^ set(named)):
            raise ConfigError(
                f"target: {different[0]} is in one of the target and the model only; give a sparsity for each of "
                f"{', '.join(found)}, or one number for all"
            )
        return [(module, named[name]) for name, module in found.items()]

    def begin(self, step: int) -> float:
        """Refit thresholds to the sparsity of `step` (from 0), and watch its pairs; returns the mean sparsity."""
        asked = []
        for module, target in self.targets():
            asked.append(sparsity_at(step, self.total, self.schedule, target))
            if self.schedule.kind != "fixed":
                module.set_sparsity(asked[-1])
            start(module, Fitting(slice(step % ROW_STRIDE, None, ROW_STRIDE)))
        return asked[0] if len(set(asked)) == 1 else statistics.fmean(asked)

    def end(self) -> float:
        """Add the pairs that all ranks saw in this step to the running histogram.

        Returns:
            The fraction of those pairs that this step's thresholds pruned; the previous value if no row was watched.
        """
        counts = []
        for module in self.modules:
            stop(module, Fitting)
            counts.append(module.take_seen(HISTOGRAM_DECAY, reduce_over_ranks))
        pruned, pairs = torch.stack(counts).sum(0).tolist()
        self.achieved = float(pruned / pairs) if pairs else self.achieved
        return self.achieved

    def freeze(self) -> None:
        """Set the target itself at the end of training, since the last step may have requested less."""
        for module, target in self.targets():
            if self.schedule.kind != "fixed":
                module.set_sparsity(target)


def _checked_target(target: Target) -> Target:
    if isinstance(target, Mapping):
        return {name: checked(Sparsity, own, f"target of {name}") for name, own in target.items()}
    number: float = checked(Sparsity, target, "target")
    return number
