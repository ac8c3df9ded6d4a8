"""Memory-mapped weights of a loaded model. A mapping stays in memory while any tensor in it is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnpress.models.linear import Int8Linear


def leave_files(model: nn.Module) -> None:
    """Detach a model with int8 layers from its files, except for the codes, which are packed soon.

    Args:
        model: just loaded; tensors that are not on the CPU stay as they are.
    """
    packed_soon = {id(module.codes) for module in model.modules() if isinstance(module, Int8Linear)}
    found: dict[int, tuple[Tensor, Tensor]] = {}  # keep the old one alive, so that its id is not reused
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is None or id(tensor) in packed_soon or tensor.device.type != "cpu":
                    continue
                if id(tensor) not in found:  # tied ones stay tied
                    found[id(tensor)] = tensor, _copy(tensor)
                held[name] = found[id(tensor)][1]


def _copy(tensor: Tensor) -> Tensor:
    # Setting only `data` would keep the base tensor of a view alive.
    data = tensor.detach().clone()
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
