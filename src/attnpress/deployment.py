"""deploy: run a compressed model's attention on a real kernel, bit for bit what was trained; undeploy goes back."""

from __future__ import annotations

import functools
import warnings
from typing import TypeVar

from torch import Tensor, nn

from attnpress.config import AttentionSpec
from attnpress.core.attention import Scales
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.kernels import cpu, ops
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions

AUTO = "auto"

Model = TypeVar("Model", bound=nn.Module)


def deploy(model: Model, backend: str = AUTO) -> Model:
    """Swap the attention of a calibrated or trained model for a backend of `attnpress.kernels`, for inference.

    Args:
        model: after `bind` and `calibrate`, or loaded from a compressed checkpoint; put into evaluation mode.
        backend: "cpu" (the compiled kernel) or "reference"; "auto" takes the kernel where it is built and says once,
            as a warning, where it is not.

    Returns:
        The same model. Modules that compress nothing keep the framework's own attention.

    Raises:
        ValueError: the model is not bound, or the backend cannot run its spec.
        BackendUnavailableError: the backend named is not built here.
    """
    modules = attentions(model)
    if not modules:
        raise ValueError("the model has no compressed attention: call bind(model, spec) and calibrate it first")
    chosen = _choose() if backend == AUTO else backend
    for name, module in modules.items():
        if not module.spec.is_dense:
            _check(name, module, chosen)
    for module in modules.values():
        module.attend = functools.partial(_attend, chosen)
    model.eval()
    return model


def undeploy(model: Model) -> Model:
    """Give the model back its training forward; returns it. Does nothing to a model that was not deployed."""
    for module in attentions(model).values():
        module.attend = fake_quantize_attention
    return model


def _choose() -> str:
    if cpu.is_built():
        return "cpu"
    _say_once()
    return "reference"


@functools.cache
def _say_once() -> None:
    warnings.warn(
        "the compiled CPU kernel is not built, so attention runs through the slow reference; build it with "
        "`make kernel`, or pass backend='reference' to mean it",
        stacklevel=4,
    )


def _check(name: str, module: CompressedAttention, backend: str) -> None:
    try:
        ops.check(module.spec, module.scales(), module.head_dim, backend)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _attend(
    backend: str, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scales: Scales,
    cutoff: Tensor | None, spec: AttentionSpec, scaling: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The signature of `fake_quantize_attention`, without its gradients."""
    if dropout > 0:
        raise RuntimeError("a deployed model does not train: call undeploy(model), or model.eval()")
    return ops.attention(query, key, value, valid, scales, cutoff, spec, scaling, backend=backend)
