"""calibrate: static scales and thresholds from real batches, padding excluded, merged over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions

Batch = Mapping[str, Any]

LABELS = ("labels", "start_positions", "end_positions")

REFITS = 2
"""Pruning a layer changes what later layers see, so thresholds are fitted again with pruning on."""


def calibrate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fix the static scales of a bound model, then fit its thresholds to `spec.sparsity`.

    Args:
        model: after `bind`.
        batches: keyword arguments of the model's forward (labels are ignored); a handful of real training batches.
            Under torch.distributed, each rank gives its own share, the same number of batches everywhere.

    Raises:
        ValueError: no batches, or none with a real token; the model is not bound.
    """
    modules = list(_bound(model).values())
    kept = list(batches)
    if not kept:
        raise ValueError("calibrate needs at least one batch of real data")
    for module in modules:
        module.observers = module.make_observers()
    try:
        for _ in outputs(model, kept):
            pass
        for module in modules:
            _set_scales(module)
    finally:  # a module with observers runs uncompressed: a failed calibration must not leave it so
        for module in modules:
            module.observers = None
    _fit(model, kept, modules)


def fit_thresholds(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fit per-head thresholds to `spec.sparsity` on the pairs of all batches, pooled, in evaluation mode.

    Trained thresholds (`spec.threshold_penalty`) stay as they are.

    Raises:
        ValueError: the batches hold nothing but padding; the model is not bound.
    """
    _fit(model, list(batches), [module for module in _bound(model).values() if module.spec.threshold_penalty is None])


def _fit(model: nn.Module, batches: list[Batch], modules: list[CompressedAttention]) -> None:
    fitted = [module for module in modules if not module.spec.is_dense]
    for _ in range(1 + REFITS if fitted else 0):
        with watching(fitted, slice(None)):
            for _ in outputs(model, batches):
                pass
        for module in fitted:
            _, pairs = module.take_seen(0.0, reduce_over_ranks)
            if pairs == 0:  # whatever the rule: one that fits nothing would go on with scales of nothing
                raise ValueError("the batches hold no valid pair of tokens, only padding: calibrate on real batches")
            module.fit()


def outputs(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Any]:
    """The model's output for each batch: in evaluation mode, on its own device, without labels and gradients."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name not in LABELS}
            with torch.no_grad():
                output = model(**inputs)
            yield output
    finally:
        model.train(training)


@contextmanager
def watching(modules: Iterable[CompressedAttention], rows: slice) -> Iterator[None]:
    """Inside the `with` block, calls add the pairs of the chosen query rows to `seen`."""
    chosen = list(modules)
    for module in chosen:
        module.rows = rows
    try:
        yield
    finally:
        for module in chosen:
            module.rows = None


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


def _bound(model: nn.Module) -> dict[str, CompressedAttention]:
    modules = attentions(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} is not bound: call bind(model, spec) first")
    return modules


def _set_scales(module: CompressedAttention) -> None:
    observers, module.observers = module.observers or {}, None
    with torch.no_grad():
        for name, observer in observers.items():
            getattr(module, f"{name}_scale").copy_(observer.scale(reduce_over_ranks))
