"""Compressed models as Transformers checkpoints: saved by `save_pretrained`, restored by `from_pretrained`.

Transformers' own registry of quantizers does both. Specs go to config.json under `quantization_config`, scales and
thresholds to the safetensors files, beside the weights. `attnpress.registration` imports this module from inside the
import of `transformers.quantizers`, so nothing of Transformers beyond the two base classes may be imported at its top.
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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from attnpress.config import AttentionSpec, ConfigError, ProbsSpec, TensorSpec
from attnpress.core.exponential import T_MAX
from attnpress.core.linear import ProductPlan
from attnpress.core.tail import DIRECTION_MAX, OFFSET_MAX
from attnpress.models.attention import INT8, LARGEST_HEAD, NAME, PLAN, CompressedAttention
from attnpress.models.mapping import leave_files
from attnpress.recipe import parse_spec, spec_to_dict

FORMAT = 1
"""Version of what is stored. A reader refuses every other one by its number."""

BEFORE_BITS = {"bits": 8}
"""What products of checkpoints had that were saved before their plans said so."""

WHOLE = {
    "lift": (0, T_MAX),
    "query_directions": (-DIRECTION_MAX, DIRECTION_MAX),
    "key_directions": (-DIRECTION_MAX, DIRECTION_MAX),
    "key_offset": (-OFFSET_MAX, OFFSET_MAX),
}
"""Whole numbers of the tail, and the bounds within which its sums fit."""

Size = Annotated[int, Field(ge=1, le=2**16)]
HeadSize = Annotated[int, Field(ge=1, le=LARGEST_HEAD)]


class ModelError(ValueError):
    """A model that cannot be found or loaded; the message says which, and what to do."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModuleSpec:
    """Where a checkpoint has compressed attention.

    Attributes:
        heads, kv_heads, head_dim: Hq, Hkv, D.
        attention: the module's own spec; None for that of the whole model.
    """

    heads: Size
    kv_heads: Size
    head_dim: HeadSize
    attention: AttentionSpec | None = None


@register_quantization_config(NAME)
class AttnPressConfig(QuantizationConfigMixin):
    """What to compress, as Transformers' `quantization_config`.

    `from_pretrained(name, quantization_config=AttnPressConfig(bits=8, sparsity=0.95))` binds the model on loading;
    `attnpress.calibrate(model, batches)` is next.

    Args:
        bits: of Q, K, V and P alike; 8 unless given.
        sparsity: fraction of valid pairs to prune; 0 unless given.
        attention: a whole spec, instead of these two.
        modules: by the name of the attention module; only checkpoints have them.
        linear: what `attnpress.calibrate_linear` found, by product; likewise.
        int8: whether the linear layers that `linear` says so of are stored in 8 bits.

    Raises:
        ConfigError: `attention` together with `bits` or `sparsity`.
    """

    def __init__(
        self, bits: int | None = None, sparsity: float | None = None, *,
        attention: AttentionSpec | None = None, modules: Mapping[str, ModuleSpec] | None = None,
        linear: Mapping[str, ProductPlan] | None = None, int8: bool = False,
    ) -> None:  # fmt: skip
        if attention is not None and (bits, sparsity) != (None, None):
            raise ConfigError("AttnPressConfig: give either attention, or bits and sparsity")
        self.quant_method: Any = NAME  # Transformers declares its enumeration of built-in methods
        self.attention = attention or _uniform(8 if bits is None else bits, sparsity or 0.0)
        self.modules, self.linear, self.int8 = dict(modules or {}), dict(linear or {}), int8

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as config.json holds it."""
        modules = {name: spec_to_dict(module) for name, module in self.modules.items()}
        linear = {name: dataclasses.asdict(plan) for name, plan in self.linear.items()}
        attention = spec_to_dict(self.attention)
        return {
            "quant_method": NAME, "format": FORMAT, "attention": attention, "modules": modules, "linear": linear,
            "int8": self.int8,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` gave.

        Raises:
            ModelError: damaged, or of a format that this version does not know.
        """
        found = config_dict.get("format")
        if found != FORMAT:
            raise ModelError(
                f"quantization_config: attnpress format {found!r}; this version reads {FORMAT}: update attnpress"
            )
        try:
            modules = {name: parse_spec(ModuleSpec, plain) for name, plain in config_dict["modules"].items()}
            linear = {
                name: parse_spec(ProductPlan, BEFORE_BITS | plain)
                for name, plain in config_dict.get("linear", {}).items()
            }
            attention, int8 = (
                parse_spec(AttentionSpec, config_dict["attention"]),
                config_dict.get("int8", False) is True,
            )
            config = cls(attention=attention, modules=modules, linear=linear, int8=int8)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"quantization_config of attnpress is damaged: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config


def _uniform(bits: int, sparsity: float) -> AttentionSpec:
    matrix = TensorSpec(bits)
    return AttentionSpec(q=matrix, k=matrix, v=matrix, p=ProbsSpec(bits), sparsity=sparsity)


@register_quantizer(NAME)
class AttnPressQuantizer(HfQuantizer):
    """Saves and restores bound models; `bind` gives each model one. Called by Transformers, not by users."""

    quantization_config: AttnPressConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """Always."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """A checkpoint with compressed attention starts with it, whatever was asked for."""
        importlib.import_module("attnpress.models.binding")  # registers the implementation
        if self.pre_quantized:
            config._attn_implementation = NAME
        return config

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """True for what is ours: Transformers then leaves judging its shape to `_check_state`."""
        return f".{NAME}." in param_name

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            return
        _check_files(checkpoint_files or ())
        if not self.quantization_config.modules:
            raise ModelError(
                "quantization_config of attnpress names no attention modules: it is damaged, or a part of a bound "
                "model was saved; save the whole model that was bound"
            )
        for name, shape in self.quantization_config.modules.items():
            spec = shape.attention or self.quantization_config.attention
            child = CompressedAttention(spec, shape.heads, shape.kv_heads, shape.head_dim)
            _find(model, name).add_module(NAME, child)
        if self.quantization_config.int8:
            self._place_int8(model)

    def _place_int8(self, model: Any) -> None:
        from attnpress.models.encoder import EMBEDDING, entries, find_encoder, place_int8

        encoder, plan = find_encoder(model), self.quantization_config.linear
        known = set() if encoder is None else set(entries(model, encoder))
        if encoder is None or not known - {EMBEDDING} <= set(plan) <= known:
            raise ModelError("quantization_config of attnpress is damaged: its int8 layers are not those of this model")
        for _ in place_int8(model, encoder, plan):
            pass
        setattr(model, INT8, True)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from attnpress.models.binding import attentions, bind

        if self.quantization_config.linear:
            setattr(model, PLAN, self.quantization_config.linear)
        model.is_quantized = False  # its weights are not: half() and training are as open to it as to any other model
        if not self.pre_quantized:
            bind(model, self.quantization_config.attention)
            return
        for name, module in attentions(model).items():
            _check_state(name, module)
        model._attnpress_before = "eager"
        if hasattr(model, INT8):
            leave_files(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Called first by `save_pretrained`: brings the configuration up to date with the modules.

        Histograms go with the weights, so that training can go on from them, unless there is nothing in them.
        """
        model.config.quantization_config = self.quantization_config = config_of(model)
        # A loader that does not know attnpress stops at this name, rather than run the model dense.
        model.config.attn_implementation = NAME
        ending = f".{NAME}.histogram"
        return {name: x for name, x in model.state_dict().items() if not name.endswith(ending) or bool(x.any())}, {}


def config_of(model: nn.Module) -> AttnPressConfig:
    """The configuration of a bound model, with the specs now in force."""
    from attnpress.models.binding import attentions

    states = attentions(model)
    common = next(iter(states.values())).spec
    modules = {
        name: ModuleSpec(state.heads, state.kv_heads, state.head_dim, None if state.spec == common else state.spec)
        for name, state in states.items()
    }
    return AttnPressConfig(
        attention=common, modules=modules, linear=getattr(model, PLAN, None), int8=hasattr(model, INT8)
    )


def check_compressed(folder: Path) -> None:
    """Refuse a folder without a compressed model, before anything is loaded from it.

    Raises:
        ModelError: no config.json, or one that does not name attnpress.
    """
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = saved["quantization_config"]["quant_method"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: not a compressed model: config.json is missing or damaged ({error!r})") from None
    if method != NAME:
        raise ModelError(f"{folder}: not a compressed model: its quant_method is {method!r}")


def _check_files(files: Iterable[str]) -> None:
    for file in files:
        if not file.endswith(".safetensors"):
            raise ModelError(f"{file}: compressed models are read from safetensors files only; save it as one")
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is missing or damaged: {error}") from None


def _find(model: Any, name: str) -> nn.Module:
    """The module of that name, also where a head was put onto the saved model, or taken off."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        try:
            module: nn.Module = model.get_submodule(candidate)
        except AttributeError:
            continue
        return module
    raise ModelError(f"quantization_config of attnpress: {type(model).__name__} has no attention module {name!r}")


def _check_state(name: str, module: CompressedAttention) -> None:
    with torch.device("meta"):
        expected = CompressedAttention(module.spec, module.heads, module.kv_heads, module.head_dim).state_dict()
    for part, tensor in module.state_dict(keep_vars=True).items():
        # The mark that Transformers leaves on tensors it has loaded; without it, this one is uninitialized memory.
        if not getattr(tensor, "_is_hf_initialized", False):
            _refuse_missing(name, part, tensor)
        elif tensor.shape != expected[part].shape:
            shapes = f"{list(tensor.shape)} where {list(expected[part].shape)} fits its spec"
            raise ModelError(f"damaged: {name}.{NAME}.{part} has shape {shapes}")
        elif not _usable(part, tensor):
            raise ModelError(f"damaged: {name}.{NAME}.{part} holds values that it cannot have")
    module.seen.zero_()
    if module.spec.tail != "none":
        module.seen_masses.zero_()


def _refuse_missing(name: str, part: str, tensor: Tensor) -> None:
    if part != "histogram":  # needed only to train on, and then gathered anew
        raise ModelError(f"damaged: the weights lack {name}.{NAME}.{part}")
    tensor.zero_()


def _usable(part: str, tensor: Tensor) -> bool:
    if part == "cutoff":  # +inf keeps every pair
        return not bool(tensor.isnan().any())
    if part in WHOLE:
        least, most = WHOLE[part]
        return bool(((tensor >= least) & (tensor <= most) & (tensor == tensor.round())).all())
    return bool(tensor.isfinite().all())
