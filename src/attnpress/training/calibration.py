"""calibrate: static scales and thresholds from real batches, without padding, merged over all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from attnpress.core.observer import Observer
from attnpress.core.thresholds import head_budgets
from attnpress.distributed import reduce_over_ranks
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import bound_modules
from attnpress.models.inputs import Batch, listed
from attnpress.models.outputs import first_output, outputs
from attnpress.models.watchers import Fitting, Gathering, Observing, watched
from attnpress.training.sensitivity import head_changes

SENSITIVITY_BATCHES = 2
"""Number of batches; each head costs a forward pass over them."""

REFITS = 2
"""Pruning a layer changes the inputs of later layers, so thresholds are fitted again with pruning."""


def calibrate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Choose the static scales of a bound model, then fit its thresholds to `spec.sparsity`.

    Args:
        model: after `bind`.
        batches: a few real training batches: mappings from names of forward's arguments to tensors, as a data loader
            returns them; see `forward_inputs` for other content. Under torch.distributed, each rank passes its own
            share, with the same number of batches on all ranks.

    Raises:
        BatchError: there are no batches, or the model cannot be called with one.
        ValueError: no batch contains a real token, or the model is not bound.
    """
    modules = list(bound_modules(model).values())
    kept = listed(batches, "calibrate")
    observing = {module: Observing(module) for module in modules}
    with watched(observing.items()):
        for _ in outputs(model, kept):
            pass
    for name, module in bound_modules(model).items():
        _set_scales(name, module, observing[module].observers)
    _fit_directions(model, kept, modules)
    _fit(model, kept, modules)
    spread = [module for module in modules if module.spec.budget == "sensitivity" and module.spec.sparsity > 0]
    if spread:
        _set_budgets(model, kept[:SENSITIVITY_BATCHES], spread)
        _fit(model, kept, modules)


def fit_thresholds(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fit per-head thresholds to `spec.sparsity` on the pooled pairs of all batches, in evaluation mode.

    Trained thresholds (`spec.threshold_penalty`) are not changed.

    Raises:
        BatchError: see `calibrate`.
        ValueError: the batches contain only padding, or the model is not bound.
    """
    _fit(
        model,
        listed(batches, "fit_thresholds"),
        [module for module in bound_modules(model).values() if module.spec.threshold_penalty is None],
    )


def _fit(model: nn.Module, batches: list[Batch], modules: list[CompressedAttention]) -> None:
    fitted = [module for module in modules if not module.spec.is_dense]
    for _ in range(1 + REFITS if fitted else 0):
        before = [_in_force(module) for module in fitted]
        with watching(fitted, slice(None)):
            for _ in outputs(model, batches):
                pass
        for module in fitted:
            _, pairs = module.take_seen(0.0, reduce_over_ranks)
            if pairs == 0:  # for every rule, since a rule without thresholds would continue with meaningless scales
                raise ValueError("the batches hold no valid pair of tokens, only padding: calibrate on real batches")
            module.fit()
        if all(torch.equal(old, _in_force(module)) for old, module in zip(before, fitted, strict=True)):
            break  # the model is unchanged and would give the same pairs again


def _in_force(module: CompressedAttention) -> Tensor:
    cutoff, tail = module.active_cutoff(), module.tail()
    parts = ([] if cutoff is None else [cutoff]) + ([] if tail is None else [tail.lift])
    return torch.cat([module.cutoff.new_empty(0), *parts])


def _fit_directions(model: nn.Module, batches: list[Batch], modules: list[CompressedAttention]) -> None:
    """Fit the directions of modules that have some, before their thresholds."""
    gathering = {module: Gathering(module) for module in modules if module.has_directions}
    # Watching no rows, modules run without thresholds, which are not fitted yet.
    fitting = watching([module for module in modules if not module.spec.is_dense], slice(0))
    with fitting, watched(gathering.items()):
        for _ in outputs(model, batches if gathering else []):
            pass
    for module, watcher in gathering.items():
        module.fit_directions(watcher.moments, reduce_over_ranks)


def watching(modules: Iterable[CompressedAttention], rows: slice) -> AbstractContextManager[None]:
    """Inside the `with` block, calls add the pairs of the chosen query rows to `seen`."""
    return watched((module, Fitting(rows)) for module in modules)


def _set_scales(name: str, module: CompressedAttention, observers: Mapping[str, Observer]) -> None:
    scales = {}
    for matrix, observer in observers.items():
        try:
            scales[matrix] = observer.scale(reduce_over_ranks)
        except ValueError as error:
            raise ValueError(f"{name}: {matrix}: {error}") from None
        if observer.not_finite:
            warnings.warn(
                f"{name}: {observer.not_finite} values of {matrix} in the calibration batches are NaN or infinite; "
                "its scale is taken from the others: look for broken weights, or a dtype that overflows",
                stacklevel=3,
            )
    module.set_scales(scales)


def _set_budgets(model: nn.Module, batches: list[Batch], modules: list[CompressedAttention]) -> None:
    keep = torch.cat([1 - module.spec.sparsity * torch.ones_like(module.budget) for module in modules])
    budgets = head_budgets(_head_changes(model, batches, modules), keep)
    for module, kept in zip(modules, budgets.split([module.heads for module in modules]), strict=True):
        module.budget.copy_((1 - kept) / module.spec.sparsity)


def _head_changes(model: nn.Module, batches: list[Batch], modules: list[CompressedAttention]) -> Tensor:
    """`head_changes` of pruning only; all matrices stay quantized."""
    fitted = {module: module.cutoff.clone() for module in modules}

    @contextmanager
    def pruning(chosen: CompressedAttention, head: int) -> Iterator[None]:
        chosen.cutoff[head] = fitted[chosen][head]
        yield
        chosen.cutoff[head] = torch.inf

    for module in modules:
        module.cutoff.fill_(torch.inf)
    whole = [first_output(model, batch) for batch in batches]
    changes = head_changes(model, batches, whole, modules, pruning)
    for module, cutoff in fitted.items():
        module.cutoff.copy_(cutoff)
    return changes
