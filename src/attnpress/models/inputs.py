"""Inputs of a model's forward from a batch: tensors on its device, without labels. Errors name the key."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from attnpress.models.pipeline import called_with_batches, is_pipeline

Batch = Mapping[str, Any]

LABELS = frozenset({"labels", "label", "label_ids", "start_positions", "end_positions"})
"""Names of labels in datasets and collators; a forward pass without loss needs none."""

WRAPPED = ("_orig_mod", "module", "base_model", "model")
"""Attributes under which torch.compile, DataParallel and PEFT store the wrapped model."""


class BatchError(ValueError):
    """A model cannot be called with a batch. The message names the batch and the key, and says what to do."""


def listed(batches: Iterable[Batch], needed_by: str) -> list[Batch]:
    """The batches as a list, so that they can be passed through a model several times.

    Args:
        needed_by: the calling function, for the message.

    Raises:
        BatchError: there are none, or a single batch instead of several.
    """
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise BatchError(f"{needed_by} takes several batches, found one {type(batches).__name__}: put it into a list")
    if not isinstance(batches, Iterable):
        raise BatchError(f"{needed_by} takes a list of batches or a data loader, found {type(batches).__name__}")
    kept = list(batches)
    if not kept:
        raise BatchError(
            f"{needed_by} needs at least one batch of real data; an iterator that was already read is empty"
        )
    return kept


def forward_inputs(model: nn.Module, batch: Batch, number: int = 0) -> dict[str, Any]:
    """Arguments of the model's forward from a batch of a data loader.

    Tensors are moved to the model's device. Lists of numbers and NumPy arrays become tensors. Labels are left out,
    except where an encoder-decoder derives its decoder inputs from them. Texts and other values that are not tensors
    are left out if forward does not accept their names. None and flags are kept.

    Args:
        number: of the batch, for messages.

    Raises:
        BatchError: the batch is not a mapping, has no inputs or no rows, or has a value that forward cannot accept.
    """
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"batch {number} is a {type(batch).__name__}; a batch is a mapping from the names of forward's arguments "
            "to tensors, such as {'input_ids': ..., 'attention_mask': ...}"
        )
    if is_pipeline(model):  # whose preprocessing adds further keys to the tensors
        batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor | list | np.ndarray)}
        model = called_with_batches(model)
    device, (names, takes_others) = next(model.parameters()).device, _arguments(model)
    found = {}
    for name, value in batch.items():
        if name in LABELS and not _makes_decoder_inputs(model, name, batch):
            continue
        if name in names:
            found[name] = send_to_device(_as_input(value, f"batch {number}, key {name!r}"), device)
        elif isinstance(value, torch.Tensor | bool | int | float) and not takes_others:
            raise BatchError(
                f"batch {number}, key {name!r}: {type(model).__name__} takes no such argument; leave it out, or "
                "correct its name"
            )
        elif isinstance(value, torch.Tensor | bool | int | float):
            found[name] = send_to_device(value, device)
    _check_rows(found, number)
    return found


def describe(inputs: Mapping[str, Any]) -> str:
    """Names, dtypes, shapes and ranges of a batch's tensors, for messages."""
    found = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.numel()}
    kinds = {name: f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for name, x in found.items()}
    return ", ".join(f"{kinds[name]} from {x.min().item():g} to {x.max().item():g}" for name, x in found.items())


def _arguments(model: nn.Module) -> tuple[set[str], bool]:
    """Names of forward's arguments, and whether it accepts others; of a wrapper, those of the wrapped model."""
    parameters = inspect.signature(model.forward).parameters.values()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {parameter.name for parameter in parameters if parameter.kind not in variable}
    wrapped = next((found for name in WRAPPED if isinstance(found := getattr(model, name, None), nn.Module)), None)
    if not names and wrapped is not None:
        return _arguments(wrapped)
    return names, any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _makes_decoder_inputs(model: nn.Module, name: str, batch: Batch) -> bool:
    config: Any = getattr(model, "config", None)
    needed = getattr(config, "is_encoder_decoder", False) and batch.get("decoder_input_ids") is None
    return name == "labels" and needed


def _as_input(value: Any, where: str) -> Any:
    """Convert lists and arrays of numbers to a tensor; keep other values as they are."""
    if not isinstance(value, list | np.ndarray):
        if isinstance(value, str | bytes):
            raise BatchError(f"{where}: is a text; give the tensors that a tokenizer makes of it")
        return value
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        raise BatchError(f"{where}: is a list of tensors; give one tensor with a row for each example")
    try:
        tensor = torch.as_tensor(np.asarray(value))
        return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            f"{where}: cannot become a tensor ({error}); pad the rows to one length, for example by "
            'tokenizer(texts, padding=True, return_tensors="pt")'
        ) from None


def _check_rows(inputs: Mapping[str, Any], number: int) -> None:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BatchError(
            f"batch {number}: holds no tensor that forward takes; give input_ids, pixel_values or the like"
        )
    ids = tensors.get("input_ids")
    if ids is not None and ids.dim() < 2:
        raise BatchError(
            f"batch {number}, key 'input_ids': has shape {list(ids.shape)}, which is one example; a batch has a row "
            "for each, as a DataLoader with a collate_fn makes it"
        )
    empty = [name for name, value in tensors.items() if value.numel() == 0]
    if empty:
        raise BatchError(f"batch {number}, key {empty[0]!r}: is empty, of shape {list(tensors[empty[0]].shape)}")
