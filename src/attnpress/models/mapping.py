"""What a loaded model keeps of its files. Weights are mapped when read: what was read stays while any of it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


def leave_files(model: nn.Module, files: Iterable[str]) -> None:
    """Take a model with int8 layers out of the files it was loaded from, but for the codes, which are packed soon.

    Embeddings are mapped again, by themselves: then only blocks of rows in use come into memory. The rest is copied.

    Args:
        model: just loaded; what is not on the CPU stays as it is.
        files: safetensors; they may be replaced or removed later, but not written into.
    """
    names = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    with ExitStack() as stack:
        opened: list[Any] = [stack.enter_context(safe_open(file, "pt")) for file in files]
        holders = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - not a mapping

        def anew(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.int8 or tensor.device.type != "cpu":
                return tensor
            if (name := names.get(id(tensor))) is not None:
                for key in (f"{name}.weight", f"{prefix}{name}.weight", f"{name}.weight".removeprefix(prefix)):
                    if key in holders and (mapped := holders[key].get_tensor(key)).dtype == tensor.dtype:
                        return _like(tensor, mapped)
            return _like(tensor, tensor.detach().clone())

        _replace(model, anew)


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    # With new data alone, a parameter that is a view would still hold on to the tensor that it looks at.
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _replace(model: nn.Module, anew: Callable[[Tensor], Tensor]) -> None:
    """Parameters and buffers by others; tied ones stay tied."""
    found: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too: its number must not be given to another meanwhile
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in found:
                    found[id(tensor)] = tensor, anew(tensor)
                held[name] = found[id(tensor)][1]
