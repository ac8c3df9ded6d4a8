"""Compressed models as Transformers checkpoints, for `save_pretrained` and `from_pretrained`.

Both go through Transformers' registry of quantizers. Specs are stored in config.json under `quantization_config`;
scales and thresholds are stored in the safetensors files, beside the weights. `attnpress.models.registration` imports
this module during the import of `transformers.quantizers`, so at top level it may import only the two base classes from
Transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from attnpress.config import LARGEST_HEAD, AttentionSpec, ConfigError, ProbsSpec, TensorSpec
from attnpress.config.recipe import parse_spec, spec_to_dict
from attnpress.core.linear import ProductPlan
from attnpress.models.attention import EXTRA, NAME, CompressedAttention
from attnpress.models.checkpoint import ModelError as ModelError
from attnpress.models.checkpoint import (
    check_geometry,
    check_readable,
    check_tensors,
    fault_of,
    names_in,
    shapes_of,
    wrong_with,
)
from attnpress.models.linear import HalfEmbedding, Int8Linear
from attnpress.models.mapping import leave_files
from attnpress.models.state import parse_whole_spec, saving_call, unpack_extra

FORMAT = 1
"""Version of the stored format. Other versions are refused."""

BEFORE_BITS = {"bits": 8}
"""Input bits of products in checkpoints that do not store them."""


Size = Annotated[int, Field(ge=1, le=2**16)]
HeadSize = Annotated[int, Field(ge=1, le=LARGEST_HEAD)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModuleSpec:
    """One compressed attention module of a checkpoint.

    Attributes:
        heads, kv_heads, head_dim: Hq, Hkv, D.
        attention: the module's own spec; None for that of the whole model.
        is_cross: True for cross-attention.
    """

    heads: Size
    kv_heads: Size
    head_dim: HeadSize
    attention: AttentionSpec | None = None
    is_cross: bool = False

    def make(self, common: AttentionSpec) -> CompressedAttention:
        """An empty state for such a module; `common` is the spec of the whole model."""
        return CompressedAttention(self.attention or common, self.heads, self.kv_heads, self.head_dim, self.is_cross)


@register_quantization_config(NAME)
class AttnPressConfig(QuantizationConfigMixin):
    """What to compress, as a `quantization_config` of Transformers.

    `from_pretrained(name, quantization_config=AttnPressConfig(bits=8, sparsity=0.95))` binds the model on loading. Call
    `attnpress.calibrate(model, batches)` next.

    Args:
        bits: of Q, K, V and P; 8 by default.
        sparsity: fraction of valid pairs to prune; 0 by default.
        attention: a whole spec, instead of `bits` and `sparsity`.
        modules: by the name of the attention module; only in checkpoints.
        linear: result of `attnpress.calibrate_linear`, by product; only in checkpoints.
        int8: True if the linear layers selected by `linear` are stored in 8 bits.

    Raises:
        ConfigError: `attention` is given together with `bits` or `sparsity`.
    """

    def __init__(
        self,
        bits: int | None = None,
        sparsity: float | None = None,
        *,
        attention: AttentionSpec | None = None,
        modules: Mapping[str, ModuleSpec] | None = None,
        linear: Mapping[str, ProductPlan] | None = None,
        int8: bool = False,
    ) -> None:
        if attention is not None and (bits, sparsity) != (None, None):
            raise ConfigError("AttnPressConfig: give either attention, or bits and sparsity")
        self.quant_method: Any = NAME  # Transformers declares an enumeration of its own methods
        self.attention = attention or _uniform(8 if bits is None else bits, sparsity or 0.0)
        self.modules, self.linear, self.int8 = dict(modules or {}), dict(linear or {}), int8

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored in config.json."""
        modules = {name: spec_to_dict(module) for name, module in self.modules.items()}
        linear = {name: dataclasses.asdict(plan) for name, plan in self.linear.items()}
        attention = spec_to_dict(self.attention)
        return {
            "quant_method": NAME,
            "format": FORMAT,
            "attention": attention,
            "modules": modules,
            "linear": linear,
            "int8": self.int8,
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the result of `to_dict`.

        Raises:
            ModelError: the data are damaged, or of a format that this version does not support.
        """
        found = config_dict.get("format")
        if found != FORMAT:
            raise ModelError(
                f"quantization_config: attnpress format {found!r}; this version reads {FORMAT}: update attnpress"
            )
        try:
            unknown = sorted(config_dict.keys() - cls().to_dict().keys())
            if unknown or type(config_dict.get("int8", False)) is not bool:
                raise ModelError(f"unknown key {unknown[0]!r}" if unknown else "int8 is neither true nor false")
            modules = {name: _parse_module(name, plain) for name, plain in config_dict["modules"].items()}
            linear = {
                name: parse_spec(ProductPlan, BEFORE_BITS | plain)
                for name, plain in config_dict.get("linear", {}).items()
            }
            attention = parse_whole_spec(config_dict["attention"])
            config = cls(attention=attention, modules=modules, linear=linear, int8=config_dict.get("int8", False))
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"quantization_config of attnpress is damaged: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config


def _parse_module(name: str, plain: Any) -> ModuleSpec:
    if plain.get("attention") is not None:
        try:
            parse_whole_spec(plain["attention"])
        except ConfigError as error:
            raise ConfigError(f"modules.{name}.{error}") from None
    return parse_spec(ModuleSpec, plain)


def _uniform(bits: int, sparsity: float) -> AttentionSpec:
    matrix = TensorSpec(bits)
    return AttentionSpec(q=matrix, k=matrix, v=matrix, p=ProbsSpec(bits), sparsity=sparsity)


@register_quantizer(NAME)
class AttnPressQuantizer(HfQuantizer):
    """Saves and restores bound models. `bind` gives each model one; only Transformers calls it."""

    quantization_config: AttnPressConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """A checkpoint with compressed attention always uses it, whatever implementation was requested."""
        importlib.import_module("attnpress.models.binding")  # registers the implementation
        if self.pre_quantized:
            config._attn_implementation = NAME
        return config

    def update_dtype(self, dtype: Any) -> Any:
        """The dtype to load, which has to be float32 where linear layers are int8."""
        if self.quantization_config.int8 and dtype not in (None, torch.float32):
            raise ModelError(f"its int8 linear layers compute in float32: load it without {dtype}")
        return dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """True for tensors of attnpress, so that Transformers leaves the check of their shape to `_check_state`."""
        return f".{NAME}." in param_name

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            return
        modules = self.quantization_config.modules
        if not modules:
            raise ModelError(
                "quantization_config of attnpress names no attention modules: it is damaged, or a part of a bound "
                "model was saved; save the whole model that was bound"
            )
        files = [str(file) for file in checkpoint_files or ()]
        check_readable(files)
        self._stored = {name for file in files for name in names_in(file)}
        states = {name: module.make(self.quantization_config.attention) for name, module in modules.items()}
        carriers = {name: _find(model, name) for name in states}
        check_geometry(model, {carriers[name]: state for name, state in states.items()})
        check_tensors(files, states)
        for name, state in states.items():
            carriers[name].add_module(NAME, state)
        # Tensors of attnpress were just checked. A missing histogram, or extra state of an older version, must not be
        # reported as weights that need training.
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), rf"\.{NAME}\."}
        if self.quantization_config.int8:
            self._place_int8(model)

    def _place_int8(self, model: Any) -> None:
        from attnpress.models.encoder import EMBEDDING, entries, find_layers, place_int8

        encoder, plan = find_layers(model), self.quantization_config.linear
        known = set() if encoder is None else set(entries(model, encoder))
        if encoder is None or not known - {EMBEDDING} <= set(plan) <= known:
            raise ModelError("quantization_config of attnpress is damaged: its int8 layers are not those of this model")
        for _ in place_int8(model, encoder, plan):
            pass
        for module in model.modules():
            holds_int8 = any(isinstance(child, Int8Linear | HalfEmbedding) for child in module.children())
            if holds_int8 and not module._parameters and not module._buffers:
                # It has nothing to initialize, but ModernBERT would initialize its children's weights.
                module._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from attnpress.models.binding import attentions, bind, mark_bound
        from attnpress.models.encoder import is_int8, set_plan

        if self.quantization_config.linear:
            set_plan(model, self.quantization_config.linear)
        model.is_quantized = False  # its weights are not quantized: half() and training work as for any other model
        if not self.pre_quantized:
            bind(model, self.quantization_config.attention)
            return
        vars(model).pop("_keys_to_ignore_on_load_missing", None)
        for name, module in attentions(model).items():
            _check_loaded(name, module)
        _check_ordinary(model, self._stored)
        mark_bound(model, "eager")
        if is_int8(model):
            leave_files(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Called first by `save_pretrained`: updates the configuration from the modules.

        Histograms are saved with the weights, unless they are empty, so that training can continue from them. If
        `save_pretrained` receives weights as `state_dict`, those are stored, with the model's own scales and thresholds
        where they have none.

        Raises:
            NotCalibratedError: scales or thresholds are not set.
            ModelError: the given weights hold invalid scales, or are of another spec; or the configuration could not be
                loaded.
        """
        from attnpress.models.binding import attentions

        for name, module in attentions(model).items():
            module.require_calibrated(name)
        if model.config.output_attentions:
            raise ModelError(
                "config.output_attentions is True, with which Transformers loads no compressed checkpoint: set it to "
                "False, and pass output_attentions=True to the model's forward instead"
            )
        state = model.state_dict()
        given = (saving_call() or {}).get("state_dict")
        if given is not None:
            ours = {name: x for name, x in state.items() if f".{NAME}." in name and name not in given}
            state = {**given, **ours}
        model.config.quantization_config = self.quantization_config = config_of(model, state)
        # A loader without attnpress stops at this name instead of running the model dense.
        model.config.attn_implementation = NAME
        ending = f".{NAME}.histogram"
        return {name: x for name, x in state.items() if not name.endswith(ending) or bool(x.any())}, {}


def config_of(model: nn.Module, stored: Mapping[str, Tensor] | None = None) -> AttnPressConfig:
    """The configuration of a bound model, with the current specs, or with those of the weights to be `stored`.

    Raises:
        ModelError: the weights are of another spec.
    """
    from attnpress.models.binding import attentions
    from attnpress.models.encoder import is_int8, plan_of

    states = attentions(model)
    specs = {name: _stored_spec(name, state, stored or {}) for name, state in states.items()}
    common = next(iter(specs.values()))
    modules = {
        name: ModuleSpec(
            state.heads,
            state.kv_heads,
            state.head_dim,
            None if specs[name] == common else specs[name],
            state.is_cross,
        )
        for name, state in states.items()
    }
    return AttnPressConfig(attention=common, modules=modules, linear=plan_of(model), int8=is_int8(model))


def _stored_spec(name: str, state: CompressedAttention, stored: Mapping[str, Tensor]) -> AttentionSpec:
    own = {part: stored[key] for part in state.state_dict() if (key := f"{name}.{NAME}.{part}") in stored}
    faults = [f"{part} {wrong}" for part, x in own.items() if (wrong := fault_of(part, x, state.spec)) is not None]
    if faults:
        raise ModelError(f"state_dict given to save_pretrained: {name}.{NAME}.{faults[0]}")
    return unpack_extra(own[EXTRA]).spec if EXTRA in own else state.spec


def check_compressed(folder: Path) -> None:
    """Check that a folder contains a compressed model, before anything is loaded from it.

    Raises:
        ModelError: there is no config.json, or it does not name attnpress.
    """
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = saved["quantization_config"]["quant_method"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{folder}: not a compressed model: config.json is missing or damaged ({error!r})") from None
    if method != NAME:
        raise ModelError(f"{folder}: not a compressed model: its quant_method is {method!r}")


def _find(model: Any, name: str) -> nn.Module:
    """The module of that name, also if a head was added to the saved model or removed from it."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        try:
            module: nn.Module = model.get_submodule(candidate)
        except AttributeError:
            continue
        return module
    raise ModelError(f"quantization_config of attnpress: {type(model).__name__} has no attention module {name!r}")


def _check_loaded(name: str, module: CompressedAttention) -> None:
    """Check the tensors after loading, since files may use other names."""
    vars(module).pop(EXTRA, None)  # if the file has none, Transformers leaves a tensor of that name
    expected = shapes_of(module)
    for part, tensor in module.state_dict(keep_vars=True).items():
        # Transformers marks the tensors that it has loaded; a tensor without the mark is uninitialized memory.
        if part != EXTRA and not getattr(tensor, "_is_hf_initialized", False):
            if part != "histogram":  # needed only for further training, and then collected again
                raise ModelError(f"damaged: the weights lack {name}.{NAME}.{part}")
            tensor.zero_()
        wrong = wrong_with(part, tensor, expected[part], module.spec)
        if wrong is not None:
            raise ModelError(f"damaged: {name}.{NAME}.{part} {wrong}")
    module.unset.clear()
    module.seen.zero_()
    if module.spec.tail != "none":
        module.seen_masses.zero_()


def _check_ordinary(model: Any, stored: set[str]) -> None:
    """Check that a model of the saved class lacks no weights. Another class may have its own head, to be trained.

    Weights that are `stored` but not loaded have another shape, which only `ignore_mismatched_sizes` lets through.
    """
    if type(model).__name__ not in (model.config.architectures or ()):
        return
    lost = [name for name, tensor in model.named_parameters() if not getattr(tensor, "_is_hf_initialized", False)]
    lost = [name for name in lost if name not in stored]
    if lost:
        raise ModelError(f"damaged: the checkpoint lacks {', '.join(lost[:3])}")
