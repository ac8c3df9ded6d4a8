"""What a loaded model keeps of its files. Weights are mapped when read: what was read stays while any of it does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnpress.models.linear import Int8Linear


def leave_files(model: nn.Module) -> None:
    """Take a model with int8 layers out of the files it was loaded from, but for the codes, which are packed soon.

    Args:
        model: just loaded; what is not on the CPU stays as it is.
    """
    packed_soon = {id(module.codes) for module in model.modules() if isinstance(module, Int8Linear)}
    found: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too: its number must not be given to another meanwhile
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
    # With new data alone, a parameter that is a view would still hold on to the tensor that it looks at.
    data = tensor.detach().clone()
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
