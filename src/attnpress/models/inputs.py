"""What a model's forward is given of a batch: tensors on its device, without labels, and errors that name the key."""

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
"""Names under which data sets and collators hand labels over; a model needs none to be looked at."""

WRAPPED = ("_orig_mod", "module", "base_model", "model")
"""Where torch.compile, DataParallel and PEFT keep the model that they wrap."""


class BatchError(ValueError):
    """A batch that a model cannot be called with; the message names the batch, the key and what to do."""


def listed(batches: Iterable[Batch], needed_by: str) -> list[Batch]:
    """The batches as a list, so that they can be passed through a model several times.

    Args:
        needed_by: the function that needs them, for the message.

    Raises:
        BatchError: none, or a single batch instead of several.
    """
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise BatchError(f"{needed_by} takes several batches, found one {type(batches).__name__}: put it into a list")
    kept = list(batches)
    if not kept:
        raise BatchError(
            f"{needed_by} needs at least one batch of real data; an iterator that was read before has none left"
        )
    return kept


def forward_inputs(model: nn.Module, batch: Batch, number: int = 0) -> dict[str, Any]:
    """Arguments of the model's forward from a batch as a data loader gives it.

    Tensors go to the model's device; lists of numbers and NumPy arrays become tensors. Labels are left out, but for
    those from which an encoder-decoder makes its decoder's inputs; so are texts, and other values that are no tensors
    under names that forward does not know. None and flags are handed on.

    Args:
        number: of the batch, for messages.

    Raises:
        BatchError: not a mapping, no input in it, no rows, or a value that forward cannot take.
    """
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"batch {number} is a {type(batch).__name__}; a batch is a mapping from the names of forward's arguments "
            "to tensors, such as {'input_ids': ..., 'attention_mask': ...}"
        )
    if is_pipeline(model):  # whose preprocessing adds notes of its own to the tensors
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


def _arguments(model: nn.Module) -> tuple[set[str], bool]:
    """Names of forward's arguments, and whether it takes others as well; of a wrapper, those of what it wraps."""
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
    """Numbers in lists or arrays as a tensor; whatever else forward may know what to do with, as it is."""
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
