"""bind and unbind: give a Transformers model compressed attention, without touching its code.

All attention of a model that uses Transformers' AttentionInterface passes through one registered function; the module
it is called for carries its own `CompressedAttention`. Modules are found by one small forward pass, which shows what
really calls the interface, with its true shapes; no list of architectures is kept.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from attnpress.config import AttentionSpec, ConfigError
from attnpress.core.probe import AttentionCall
from attnpress.core.soft_gate import density_penalty
from attnpress.models.attention import LARGEST_HEAD, NAME, PLAN, CompressedAttention
from attnpress.models.forward import UnsupportedModelError, noted
from attnpress.models.modes import evaluation_mode


def bind(
    model: PreTrainedModel, spec: AttentionSpec, layers: Mapping[str, AttentionSpec] | None = None
) -> PreTrainedModel:
    """Attach a `CompressedAttention` to each attention module; a model already bound is bound anew.

    Args:
        model: any Transformers model on the AttentionInterface; changed in place, with a configuration of its own
            (other models that shared its configuration object keep theirs).
        spec: what to compress. Nothing is calibrated yet: see `attnpress.calibrate`.
        layers: specs of single attention modules, by index from 0 or by a pattern of their names; the last one counts.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached, or its heads are too large; left as it was.
        ConfigError: a key of `layers` names no attention module; likewise.
    """
    unbind(model)
    before = model.config._attn_implementation
    own_config(model)
    _switch(model, NAME)
    try:
        found = find_attention(model)
        ids = {id(module) for module, *_ in found}
        names = {id(module): name for name, module in model.named_modules() if id(module) in ids}
        _check_heads(names, found)
        specs = layer_specs(list(names.values()), spec, layers or {})
    except Exception:
        _switch(model, before)
        raise
    for module, query, key in found:
        own = specs[names[id(module)]]
        child = CompressedAttention(own, query.shape[1], key.shape[1], query.shape[-1])
        child.train(module.training)
        module.add_module(NAME, child.to(query.device))
    model._attnpress_before = before
    _give_quantizer(model, spec)
    return model


def layer_specs(
    names: Sequence[str], spec: AttentionSpec, layers: Mapping[str, AttentionSpec]
) -> dict[str, AttentionSpec]:
    """The spec of each attention module, by name.

    Args:
        names: of the attention modules, in the order of the layers.
        spec: of modules that `layers` does not name.
        layers: see `bind`.

    Raises:
        ConfigError: a key names no module.
    """
    found = dict.fromkeys(names, spec)
    for key, own in layers.items():
        chosen = names[int(key) :][:1] if key.isdigit() else fnmatch.filter(names, key)
        if not chosen:
            raise ConfigError(
                f"layers.{key}: no such attention module; the model has {len(names)}, 0 to {len(names) - 1}: "
                f"{names[0]} ... {names[-1]}"
            )
        found.update(dict.fromkeys(chosen, own))
    return found


def unbind(model: PreTrainedModel) -> PreTrainedModel:
    """Remove what `bind` attached and restore the attention implementation that was in force; returns the model."""
    for module in model.modules():
        if isinstance(getattr(module, NAME, None), CompressedAttention):
            delattr(module, NAME)
    before = getattr(model, "_attnpress_before", None)
    if before is not None:
        del model._attnpress_before
        vars(model).pop(PLAN, None)
        _take_quantizer(model)
        _switch(model, before)
    return model


def attentions(model: nn.Module) -> dict[str, CompressedAttention]:
    """The compressed attention modules by the name of the module that carries them, in the order of the layers."""
    ending = "." + NAME
    return {
        name.removesuffix(ending): module
        for name, module in model.named_modules()
        if isinstance(module, CompressedAttention)
    }


def threshold_penalty(model: nn.Module) -> Tensor | None:
    """What trained thresholds add to the loss, after a training forward pass; None where none is trained.

    It is the share of pairs that is kept beyond what is asked for, times `spec.threshold_penalty`.
    """
    densities, specs = [], []
    for module in attentions(model).values():
        if module.density is not None:
            densities.append(module.density)
            specs.append(module.spec)
            module.density = None  # its graph is used up with the loss, and no copy of the model could hold it
    if not densities:
        return None
    penalty = density_penalty(densities, [spec.sparsity for spec in specs])
    return penalty * max(spec.threshold_penalty or 0.0 for spec in specs)


@contextmanager
def probed(model: nn.Module, look: Callable[[str, CompressedAttention, AttentionCall], None]) -> Iterator[None]:
    """Inside the `with` block, `look` is shown each attention call: the module's name, its state, the tensors."""
    modules = attentions(model)
    for name, module in modules.items():
        module.probe = functools.partial(look, name, module)
    try:
        yield
    finally:
        for module in modules.values():
            module.probe = None


@contextmanager
def captured_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention outputs [B, S, H, D] of every call inside the `with` block, in order."""
    outputs: list[Tensor] = []
    modules = list(attentions(model).values())
    for module in modules:
        module.captured = outputs
    try:
        yield outputs
    finally:
        for module in modules:
            module.captured = None


def find_attention(model: PreTrainedModel) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Each attention module once (shared ones too), with the query and key of a small example.

    Raises:
        UnsupportedModelError: no module called the interface.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    token = noted.set(calls)
    try:
        with evaluation_mode(model), torch.no_grad():
            model(**_example(model))
    finally:
        noted.reset(token)
    first: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
    for call in calls:
        first.setdefault(id(call[0]), call)
    if not first:
        raise _unsupported(model)
    return list(first.values())


def _check_heads(names: Mapping[int, str], found: Sequence[tuple[nn.Module, Tensor, Tensor]]) -> None:
    for module, query, _ in found:
        if query.shape[-1] > LARGEST_HEAD:
            raise UnsupportedModelError(
                f"{names[id(module)]}: head size {query.shape[-1]}; compressed attention takes heads of up to "
                f"{LARGEST_HEAD}, beyond which scores of 8-bit codes are no longer exact in float32"
            )


def own_config(model: PreTrainedModel) -> None:
    """Give the model copies of its configurations, so that switching attention does not leak to models sharing them."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            module.config = copy.deepcopy(config, copies)


def _give_quantizer(model: PreTrainedModel, spec: AttentionSpec) -> None:
    """Let `save_pretrained` store the state: the quantizer of `models.hub`, as Transformers' registry knows it."""
    method = weight_quantization(model)
    if method is None:
        config = AUTO_QUANTIZATION_CONFIG_MAPPING[NAME](attention=spec)
        model.config.quantization_config, model.hf_quantizer = config, AutoHfQuantizer.from_config(config)
    else:
        warnings.warn(
            f"the weights are quantized by {method}, whose checkpoints hold no compressed attention: save_pretrained "
            "will not store it. Save before quantizing the weights, and bind and calibrate anew after loading",
            stacklevel=3,
        )


def _take_quantizer(model: PreTrainedModel) -> None:
    if weight_quantization(model) is None and hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
        for name in ("quantization_config", "attn_implementation"):
            vars(model.config).pop(name, None)


def weight_quantization(model: PreTrainedModel) -> str | None:
    """The method by which Transformers has quantized the model's weights; None if it has not."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = None if quantizer is None else quantizer.quantization_config.quant_method
    return None if method in (None, NAME) else str(getattr(method, "value", method))


def _switch(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise _unsupported(model)


def _unsupported(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: its attention does not go through Transformers' AttentionInterface, so it cannot be "
        "compressed; use a model that does (BERT, RoBERTa, DistilBERT, ELECTRA, ALBERT, ViT, ModernBERT, ...)"
    )


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        size = (1, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.zeros(size, dtype=model.dtype, device=device)}
    limit = getattr(config, "vocab_size", 2) - 1
    return {name: value.clamp(max=limit).to(device) for name, value in model.dummy_inputs.items()}
