"""deploy: run a compressed model on real kernels; undeploy goes back.

Attention gives bit for bit what was trained. Linear layers in 8 bits, and leaving padding out, are asked for by name.
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal, TypeVar

from torch import Tensor, nn

from attnpress.config import AttentionSpec
from attnpress.core.attention import Scales
from attnpress.core.fake_quantize import fake_quantize_attention
from attnpress.kernels import cpu, ops
from attnpress.kernels.linear import is_supported
from attnpress.linear import int8_encoder, pack_int8, say_float, say_slow, use_int8
from attnpress.models.attention import INT8, PLAN, CompressedAttention
from attnpress.models.binding import attentions
from attnpress.models.encoder import Packing, find_encoder

AUTO = "auto"

PACKING = "_attnpress_packing"
"""Attribute of a model whose encoder runs without padding."""

Linear = Literal["float", "int8"]
Padding = Literal["keep", "skip"]

Model = TypeVar("Model", bound=nn.Module)


def deploy(model: Model, backend: str = AUTO, *, linear: Linear = "float", padding: Padding | None = None) -> Model:
    """Swap the attention of a calibrated or trained model for a backend of `attnpress.kernels`, for inference.

    Args:
        model: after `bind` and `calibrate`, or loaded from a compressed checkpoint; put into evaluation mode.
        backend: "cpu" (the compiled kernel) or "reference"; "auto" takes the kernel where it is built and says once,
            as a warning, where it is not.
        linear: "int8" also puts the encoder's linear layers into 8 bits and its word embedding into 16, but for what
            `calibrate_linear` left in float. Their float32 weights are let go, so such a model cannot be undeployed.
            `save_pretrained` stores it as it is; loaded again, it has int8 layers whatever is said here. Families
            other than BERT's keep float layers, said once in a warning.
        padding: "skip" runs an encoder of the BERT family on the real tokens of a batch alone; hidden states of
            padding are then 0. "keep" runs it on the whole rectangle. "skip" unless linear layers are in float.

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
    _unpack(model)
    _deploy_linear(model, linear)
    usual: Padding = "skip" if linear == "int8" or hasattr(model, INT8) else "keep"
    packing = _pack(model) if (padding or usual) == "skip" else None
    for module in attentions(model).values():
        module.attend = functools.partial(_attend, chosen, packing)
    model.eval()
    return model


def undeploy(model: Model) -> Model:
    """Give the model back its training forward; returns it. Does nothing to a model that was not deployed.

    Raises:
        ValueError: its linear layers are int8, so their float32 weights are gone.
    """
    if hasattr(model, INT8):
        raise ValueError("the linear layers are int8, and their float32 weights gone: load the model again")
    _unpack(model)
    for module in attentions(model).values():
        module.attend = fake_quantize_attention
    return model


def _deploy_linear(model: nn.Module, linear: Linear) -> None:
    """Put linear layers into 8 bits if that is asked for, and have those that are run as fast as they can."""
    if hasattr(model, INT8):
        if is_supported():
            pack_int8(model)
        else:
            say_slow()
        return
    encoder = int8_encoder(model) if linear == "int8" else None
    if encoder is None:
        return
    if not is_supported():
        say_float(type(model).__name__, "this processor has no VNNI, without which oneDNN's sums of bytes saturate")
        return
    use_int8(model, encoder, getattr(model, PLAN, None) or {})


def _pack(model: nn.Module) -> Packing | None:
    """Leave padding out from now on, where the encoder allows it."""
    encoder = find_encoder(model)
    if encoder is None or any(state.spec.is_dense for state in attentions(model).values()):
        _say_padding(type(model).__name__)
        return None
    packing = Packing(encoder)
    setattr(model, PACKING, packing)
    return packing


def _unpack(model: nn.Module) -> None:
    packing: Packing | None = vars(model).pop(PACKING, None)
    if packing is not None:
        packing.remove()


@functools.cache
def _say_padding(name: str) -> None:
    warnings.warn(
        f"{name}: padding is kept; only encoders of the BERT family whose layers are all compressed run without it",
        stacklevel=4,
    )


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
    module.require_calibrated(name)
    try:
        ops.check(module.spec, module.scales(), module.head_dim, backend)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _attend(
    backend: str, packing: Packing | None, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None,
    scales: Scales, cutoff: Tensor | None, spec: AttentionSpec, scaling: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The signature of `fake_quantize_attention`, without its gradients."""
    if dropout > 0:
        raise RuntimeError("a deployed model does not train: call undeploy(model), or model.eval()")
    if packing is not None and packing.bounds is not None:
        return ops.attention_packed(query, key, value, packing.bounds, scales, cutoff, spec, scaling, backend=backend)
    return ops.attention(query, key, value, valid, scales, cutoff, spec, scaling, backend=backend)
