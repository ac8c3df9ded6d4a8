"""deploy: run a compressed model on integer kernels; undeploy reverses it.

Attention gives the bits of training. 8-bit linear layers and execution without padding are optional.
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal, TypeVar

from torch import Tensor, nn

from attnpress.core.call import AttentionCall
from attnpress.core.inference import without_gradient
from attnpress.deployment.linear import int8_encoder, pack_int8, use_int8
from attnpress.kernels import cpu, gpu, ops
from attnpress.kernels.cpu import BackendUnavailableError
from attnpress.kernels.training import training_attention
from attnpress.models.attached import attach
from attnpress.models.attention import CompressedAttention
from attnpress.models.binding import attentions, require_in_use
from attnpress.models.encoder import Packing, find_layers, is_int8, keep_padding, plan_of

AUTO = "auto"

Linear = Literal["float", "int8"]
Padding = Literal["keep", "skip"]

Model = TypeVar("Model", bound=nn.Module)


def deploy(model: Model, backend: str = AUTO, *, linear: Linear = "float", padding: Padding | None = None) -> Model:
    """Replace the attention of a calibrated or trained model by a backend of `attnpress.kernels`, for inference.

    Args:
        model: after `bind` and `calibrate`, or loaded from a compressed checkpoint. It is put into evaluation mode.
        backend: "cpu" (the compiled kernel), "gpu" (the Triton kernel) or "reference". "auto" selects the kernel of the
            model's device for each module that it supports. It warns once if the reference is used instead, because the
            kernel cannot run here or does not support the spec.
        linear: "int8" also converts the encoder's linear layers to 8 bits and its word embedding to 16, except for
            those that `calibrate_linear` left in float. Their float32 weights are freed, so the model cannot be
            undeployed. `save_pretrained` stores the int8 form, and loading restores it whatever `linear` is. Small
            float layers around the encoder are computed in one order of summation. If no product stays in float, a text
            has the same output bits in any batch, on any processor (docs/never_changes.md). For DistilBERT and
            ModernBERT this holds on one processor. Other families keep float layers, with a warning.
        padding: "skip" runs an encoder of the BERT family, DistilBERT or ModernBERT only on the real tokens of a batch;
            hidden states of padding are then 0. "keep" runs it on the padded batch. Default: "skip", or "keep" for
            float linear layers.

    Returns:
        The same model. Modules that compress nothing keep the framework's own attention.

    Raises:
        ValueError: the model is not bound, or the backend does not support its spec.
        BackendUnavailableError: the requested backend is not built, or cannot run here.
    """
    modules = attentions(model)
    if not modules:
        raise ValueError("the model has no compressed attention: call bind(model, spec) and calibrate it first")
    require_in_use(model)
    chosen = {id(module): _choose(module) if backend == AUTO else backend for module in modules.values()}
    for name, module in modules.items():
        if not module.spec.is_dense:
            _check(name, module, chosen[id(module)])
    if "gpu" in chosen.values() and (linear == "int8" or is_int8(model)):
        raise ValueError("int8 linear layers run on the CPU alone: deploy with linear='float', or backend 'cpu'")
    keep_padding(model)
    _deploy_linear(model, linear)
    usual: Padding = "skip" if linear == "int8" or is_int8(model) else "keep"
    if (padding or usual) == "skip":
        _pack(model)
    for module in modules.values():
        module.attend = functools.partial(_attend, chosen[id(module)])
    model.eval()
    return model


def place_on(backend: str, model: nn.Module) -> None:
    """Move a model to the device of a backend requested by name; only "gpu" requires one.

    Raises:
        BackendUnavailableError: the backend cannot run here.
    """
    if backend == "gpu":
        gpu.load()
        nn.Module.to(model, gpu.device())


def undeploy(model: Model) -> Model:
    """Restore the training forward of a model, and return it. A model that is not deployed is left unchanged.

    The model stays in evaluation mode; call `model.train()` to train it.

    Raises:
        ValueError: its linear layers are int8, so their float32 weights are not available.
    """
    if is_int8(model):
        raise ValueError("the linear layers are int8, and their float32 weights gone: load the model again")
    keep_padding(model)
    for module in attentions(model).values():
        module.attend = training_attention
    return model


def _deploy_linear(model: nn.Module, linear: Linear) -> None:
    """Convert linear layers to 8 bits if requested, and pack existing int8 layers for speed."""
    if linear == "int8" and not is_int8(model):
        encoder = int8_encoder(model)
        if encoder is not None:
            use_int8(model, encoder, plan_of(model) or {})
    if is_int8(model):
        pack_int8(model)


def _pack(model: nn.Module) -> None:
    """Remove padding from now on, if the encoder supports it."""
    encoder = find_layers(model)
    if encoder is None or any(state.spec.is_dense for state in attentions(model).values()):
        _say_padding(type(model).__name__)
    else:
        attach(encoder, packing=Packing(encoder))


@functools.cache
def _say_padding(name: str) -> None:
    warnings.warn(
        f"{name}: padding is kept; only encoders of the BERT family, DistilBERT and ModernBERT, whose layers are all "
        "compressed, run without it",
        stacklevel=4,
    )


def _choose(module: CompressedAttention) -> str:
    """The fastest backend for a module's spec on its device."""
    backend = "gpu" if module.cutoff.is_cuda else "cpu"
    if backend == "cpu" and not cpu.is_built():
        _say_once()
        return "reference"
    try:
        if backend == "gpu":
            gpu.load()
        if not module.spec.is_dense:
            ops.check_native(module.spec, module.head_dim, backend)
    except (ValueError, BackendUnavailableError) as error:
        _say_reference(str(error))
        return "reference"
    return backend


@functools.cache
def _say_once() -> None:
    warnings.warn(
        f"the CPU kernel is not built, so attention runs through the slow reference: {cpu.HOW_TO_GET}; pass "
        "backend='reference' to use the reference on purpose",
        stacklevel=5,
    )


@functools.cache
def _say_reference(reason: str) -> None:
    warnings.warn(
        f"attention runs through the slow reference, since {reason}; pass backend='reference' to choose it",
        stacklevel=5,
    )


def _check(name: str, module: CompressedAttention, backend: str) -> None:
    module.require_calibrated(name)
    try:
        ops.check(module.spec, module.scales(), module.head_dim, backend)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _attend(backend: str, call: AttentionCall) -> Tensor:
    """The attention of a backend, without gradients."""
    if call.dropout > 0:
        raise RuntimeError("a deployed model does not train: call undeploy(model), or model.eval()")
    return without_gradient(ops.attention(call, backend=backend), call.query, call.key, call.value)
