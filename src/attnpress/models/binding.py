"""bind and unbind: give a Transformers model compressed attention without changing its code.

All attention of a model that uses Transformers' AttentionInterface passes through one registered function. Each
attention module carries its own `CompressedAttention`. A small forward pass finds the modules that call the interface
and their shapes, so no list of architectures is needed.
"""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from attnpress.config import LARGEST_HEAD, AttentionSpec, ConfigError
from attnpress.core.call import Attend, AttentionCall
from attnpress.core.soft_gate import density_penalty
from attnpress.models.attached import attach, attached_to
from attnpress.models.attention import NAME, CompressedAttention, is_compressed
from attnpress.models.encoder import keep_padding, set_plan
from attnpress.models.example import example_inputs
from attnpress.models.forward import NotedCall, UnsupportedModelError, noted
from attnpress.models.modes import evaluation_mode
from attnpress.models.watchers import Capturing, Looking, watched

Model = TypeVar("Model", bound=nn.Module)

OTHER_TOKENS = ("key_value_states", "encoder_hidden_states")
"""Arguments of Transformers' attention modules for cross-attention."""


def bind(
    model: Model,
    spec: AttentionSpec,
    layers: Mapping[str, AttentionSpec] | None = None,
    *,
    example: Mapping[str, Any] | None = None,
) -> Model:
    """Attach a `CompressedAttention` to each attention module. A bound model is bound again.

    Args:
        model: any Transformers model that uses the AttentionInterface, or a module that contains some, such as a
            SentenceTransformer or a PEFT model. It is changed in place and gets its own copy of its configuration;
            other models that shared the configuration object are not affected.
        spec: what to compress. Call `attnpress.calibrate` next.
        layers: specs of single attention modules, by index from 0 or by a pattern of their names. If several patterns
            match a module, the last one applies.
        example: keyword arguments of the model's forward, for the small pass that finds its attention modules. By
            default they are generated. Modules that the pass does not reach are not bound.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached or is not supported, or no example could be
            generated. The model is left unchanged.
        ConfigError: a key of `layers` matches no attention module. The model is left unchanged.
    """
    roots = transformers_models(model)
    names = {id(module): name for name, module in model.named_modules()}
    with _all_or_nothing(model):
        for root in roots:
            own_config(root)
        unbind(model)
        before = [root.config._attn_implementation for root in roots]
        found = []
        for root in roots:
            _switch(root, NAME)
            found += find_attention(root, example)
        _check_calls(names, found)
        specs = layer_specs([names[id(call.module)] for call in found], spec, layers or {})
        for call in found:
            own = specs[names[id(call.module)]]
            child = CompressedAttention(own, call.query[1], call.key[1], call.query[-1], call.is_cross)
            child.train(call.module.training)
            call.module.add_module(NAME, child.to(call.device))
        for root, implementation in zip(roots, before, strict=True):
            mark_bound(root, implementation)
            _give_quantizer(root, spec)
    return model


def transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """The model itself, or the outermost Transformers models inside it.

    Raises:
        UnsupportedModelError: there is none.
    """
    if isinstance(model, PreTrainedModel):
        return [model]
    found: dict[int, PreTrainedModel] = {}
    waiting = list(model.children()) if isinstance(model, nn.Module) else []
    while waiting:
        module = waiting.pop(0)
        if isinstance(module, PreTrainedModel):
            found[id(module)] = module
        else:
            waiting = [*module.children(), *waiting]
    if not found:
        inner = ", for example its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Transformers model and holds none: pass a PreTrainedModel{inner}"
        )
    return list(found.values())


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo all changes to the model's modules, except values of tensors, if the `with` block fails."""
    held = [(vars(module), dict(vars(module))) for module in model.modules()]
    # Children and hooks are in dictionaries that are changed in place.
    held += [
        (inner, dict(inner))
        for attributes, _ in list(held)
        for name, inner in attributes.items()
        if name == "_modules" or ("_hooks" in name and isinstance(inner, dict))
    ]
    try:
        yield
    except BaseException:
        for changed, before in held:
            changed.clear()
            changed.update(before)
        raise


def layer_specs(
    names: Sequence[str], spec: AttentionSpec, layers: Mapping[str, AttentionSpec]
) -> dict[str, AttentionSpec]:
    """The spec of each attention module, by name.

    Args:
        names: of the attention modules, in the order of the layers.
        spec: default for modules that `layers` does not match.
        layers: see `bind`.

    Raises:
        ConfigError: a key matches no module.
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


def unbind(model: Model) -> Model:
    """Remove what `bind` attached, and restore the previous attention implementation. Returns the model."""
    keep_padding(model)
    for module in list(model.modules()):
        if isinstance(getattr(module, NAME, None), CompressedAttention):
            delattr(module, NAME)
    bound = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for root in [module for module in bound if attached_to(module).implementation is not None]:
        before = attached_to(root).implementation or ""
        warning = attached_to(root).warning
        if warning is not None:
            warning.remove()
        attach(root, implementation=None, warning=None)
        set_plan(root, None)
        _take_quantizer(root)
        _switch(root, before)
    return model


def mark_bound(model: PreTrainedModel, implementation: str) -> None:
    """Remember a bound model's previous attention implementation, and warn if another one replaces compression."""
    attach(model, implementation=implementation, warning=model.register_forward_pre_hook(_warn_if_switched))


def _warn_if_switched(model: PreTrainedModel, _: Any) -> None:
    if not is_compressed(model.config):
        warnings.warn(f"{_switched(model)}, so nothing is compressed: {BACK}", stacklevel=2)


def require_in_use(model: nn.Module) -> None:
    """Check that no bound model inside was switched to another attention implementation.

    Raises:
        ConfigError: one was.
    """
    for root in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        if attached_to(root).implementation is not None and not is_compressed(root.config):
            raise ConfigError(f"{_switched(root)}: {BACK}")


BACK = f"call its set_attn_implementation({NAME!r}) to compress again, or unbind it"


def _switched(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} was switched to {model.config._attn_implementation!r} attention after bind"


def attentions(model: nn.Module) -> dict[str, CompressedAttention]:
    """Compressed attention modules by the name of their parent module, in the order of the layers."""
    ending = "." + NAME
    return {
        name.removesuffix(ending): module
        for name, module in model.named_modules()
        if isinstance(module, CompressedAttention)
    }


def threshold_penalty(model: nn.Module) -> Tensor | None:
    """The loss term of trained thresholds after a training forward pass; None if no threshold is trained.

    It is the share of pairs kept beyond the requested one, times `spec.threshold_penalty`.
    """
    densities, specs = [], []
    for module in attentions(model).values():
        if module.density is not None:
            densities.append(module.density)
            specs.append(module.spec)
            module.density = None  # its graph is freed with the loss, and prevents copies of the model
    if not densities:
        return None
    penalty = density_penalty(densities, [spec.sparsity for spec in specs])
    return penalty * max(spec.threshold_penalty or 0.0 for spec in specs)


@contextmanager
def probed(model: nn.Module, look: Callable[[str, CompressedAttention, AttentionCall], None]) -> Iterator[None]:
    """Inside the `with` block, `look` receives each attention call: the module's name, its state, the tensors."""

    def looking(name: str) -> Looking:
        return Looking(lambda module, call: look(name, module, call))

    with watched((module, looking(name)) for name, module in attentions(model).items()):
        yield


@contextmanager
def attending(strategies: Mapping[CompressedAttention, Attend]) -> Iterator[None]:
    """Inside the `with` block, modules compute their calls by the given strategy."""
    own = {module: module.attend for module in strategies}
    for module, attend in strategies.items():
        module.attend = attend
    try:
        yield
    finally:
        for module, attend in own.items():
            module.attend = attend


@contextmanager
def captured_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the attention outputs [B, S, H, D] of every call inside the `with` block, in order."""
    outputs: list[Tensor] = []
    with watched((module, Capturing(outputs)) for module in attentions(model).values()):
        yield outputs


@dataclass(frozen=True)
class Found:
    """An attention module, with the shapes of its first call [B, Hq or Hkv, S, D].

    Attributes:
        is_cross: True for cross-attention.
        is_biased: True if its mask adds a bias to the scores.
    """

    module: nn.Module
    query: torch.Size
    key: torch.Size
    value: torch.Size
    device: torch.device
    is_cross: bool
    is_biased: bool


def find_attention(model: PreTrainedModel, example: Mapping[str, Any] | None = None) -> list[Found]:
    """Find each attention module once (shared ones too) by passing a small example through the model.

    Args:
        model: with the attention implementation NAME.
        example: keyword arguments of its forward; None generates some.

    Raises:
        UnsupportedModelError: no module called the interface, or the model rejects the example.
    """
    failures: list[Exception] = []
    for inputs in example_inputs(model) if example is None else [example]:
        try:
            found = _pass_through(model, inputs)
        except UnsupportedModelError:
            raise
        except Exception as error:  # models raise errors of any type for unsuitable inputs
            failures.append(error)
            continue
        if not found:
            raise _unsupported(model)
        return found
    reason = " ".join(str(failures[0]).split())[:200] if failures else "its forward takes none of the usual arguments"
    made = "the example does not pass through it" if example is not None else "no example input could be made for it"
    raise UnsupportedModelError(
        f"{type(model).__name__}: {made} ({reason}); pass bind a small batch of the keyword arguments of its forward "
        "as example={...}"
    ) from (failures[0] if failures else None)


def _pass_through(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Found]:
    calls: list[NotedCall] = []
    others: set[int] = set()

    def note_others(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(kwargs.get(name) is not None for name in OTHER_TOKENS):
            others.add(id(module))

    token = noted.set(calls)
    hooks = [module.register_forward_pre_hook(note_others, with_kwargs=True) for module in model.modules()]
    try:
        with evaluation_mode(model), _learnable(model):
            model(**inputs)
    finally:
        noted.reset(token)
        for hook in hooks:
            hook.remove()
    found: dict[int, Found] = {}
    for call in calls:
        is_causal = getattr(call.module, "is_causal", False)
        is_cross = id(call.module) in others or (call.query[2] != call.key[2] and not is_causal)
        seen = found.get(id(call.module))
        flags = (
            is_cross or (seen is not None and seen.is_cross),
            call.is_biased or (seen is not None and seen.is_biased),
        )
        found[id(call.module)] = Found(call.module, call.query, call.key, call.value, call.device, *flags)
    return list(found.values())


@contextmanager
def _learnable(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block every parameter requires gradients, so that learned biases show as `requires_grad`."""
    frozen = [p for p in model.parameters() if p.is_floating_point() and not (p.requires_grad or p.is_inference())]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _check_calls(names: Mapping[int, str], found: Sequence[Found]) -> None:
    for call in found:
        name, dim = names[id(call.module)], call.query[-1]
        if dim > LARGEST_HEAD:
            raise UnsupportedModelError(
                f"{name}: head size {dim}; compressed attention takes heads of up to "
                f"{LARGEST_HEAD}, beyond which scores of 8-bit codes are no longer exact in float32"
            )
        if call.value[-1] != dim:
            raise UnsupportedModelError(
                f"{name}: heads of {dim} values in Q and K but {call.value[-1]} in V; compressed attention takes one "
                "size for all three"
            )
        if call.query[1] % call.key[1] or call.key[1] != call.value[1]:
            raise UnsupportedModelError(
                f"{name}: {call.query[1]}, {call.key[1]} and {call.value[1]} heads of Q, K and V; compressed attention "
                "takes as many of V as of K, and a multiple of them of Q"
            )
        if call.is_biased:
            raise UnsupportedModelError(
                f"{name} ({type(call.module).__name__}) adds a bias to its scores by way of the attention mask; "
                "compressed attention takes masks that only allow or forbid"
            )


def own_config(model: PreTrainedModel) -> None:
    """Copy the model's configurations, so that switching attention does not affect models that share them."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            module.config = copy.deepcopy(config, copies)


def _give_quantizer(model: PreTrainedModel, spec: AttentionSpec) -> None:
    """Attach the quantizer of `models.hub`, through which `save_pretrained` stores the state."""
    method = weight_quantization(model)
    if method is None:
        config = AUTO_QUANTIZATION_CONFIG_MAPPING[NAME](attention=spec)
        model.config.quantization_config, model.hf_quantizer = config, AutoHfQuantizer.from_config(config)
    else:
        warnings.warn(
            f"the weights are quantized by {method}, whose checkpoints hold no compressed attention: save_pretrained "
            "will not store it. Save before quantizing the weights, and bind and calibrate again after loading",
            stacklevel=3,
        )


def _take_quantizer(model: PreTrainedModel) -> None:
    if weight_quantization(model) is None and hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
        for name in ("quantization_config", "attn_implementation"):
            vars(model.config).pop(name, None)


def weight_quantization(model: PreTrainedModel) -> str | None:
    """The method by which Transformers quantized the model's weights; None if it did not."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = None if quantizer is None else quantizer.quantization_config.quant_method
    return None if method in (None, NAME) else str(getattr(method, "value", method))


def _switch(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    known = {id(part.config) for part in parts}
    # Transformers reaches configurations of models. A model put together from others gives these new ones, and leaves
    # their layers with those that they were made with.
    for part in parts:
        for module in part.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and id(config) not in known:
                config._attn_implementation_internal = part.config._attn_implementation
    if model.config._attn_implementation != name:
        raise _unsupported(model)


def _unsupported(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: its attention does not go through Transformers' AttentionInterface, so it cannot be "
        "compressed; use a model that does (BERT, RoBERTa, DistilBERT, ELECTRA, ALBERT, ViT, ModernBERT, ...)"
    )


def bound_modules(model: nn.Module) -> dict[str, CompressedAttention]:
    """Like `attentions`, but requires a bound model that uses them.

    Raises:
        ConfigError: the model is not bound, or was switched to another attention implementation.
    """
    modules = attentions(model)
    if not modules:
        raise ConfigError(f"{type(model).__name__} is not bound: call bind(model, spec) first")
    require_in_use(model)
    return modules
