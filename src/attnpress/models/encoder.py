"""Encoders in deployment: their linear layers, and execution without padding.

BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA share the structure and names of their layers. `find_encoder` finds
only these: their products are fused with the surrounding operations. `find_layers` also finds DistilBERT and
ModernBERT, whose linear layers are replaced one by one. All of them run without padding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import GELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward  # noqa: F401 - models.forward asks for it

from attnpress.core.linear import ProductPlan
from attnpress.models.attached import attach, attached_to
from attnpress.models.attention import NAME, CompressedAttention, is_compressed
from attnpress.models.forward import BOUNDS, attention_forward
from attnpress.models.linear import HalfEmbedding, Int8Linear, Int8Output

LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")

PRODUCTS: dict[str, tuple[str, ...]] = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention": ("attention.output.dense",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
}
"""Linear layers of an encoder layer by product; those with the same input are one product."""

FLOAT = ProductPlan(quantized=False)


@dataclass(frozen=True)
class Family:
    """Encoders of the same structure, and where their linear layers are.

    Attributes:
        layers: classes of an encoder's layers, by module of Transformers and name.
        row: attribute of the encoder that lists them.
        products: linear layers by the product that computes them.
    """

    layers: tuple[str, ...]
    row: str
    products: Mapping[str, tuple[str, ...]]

    def has(self, module: nn.Module) -> bool:
        """True if a module is an encoder of this family, and not a decoder."""
        layers = getattr(module, self.row, None)
        return isinstance(layers, nn.ModuleList) and len(layers) > 0 and all(map(self._is_layer, layers))

    def _is_layer(self, layer: nn.Module) -> bool:
        plain = not (getattr(layer, "is_decoder", False) or getattr(layer, "add_cross_attention", False))
        return type(layer).__name__ in self.layers and plain


BERT = Family(LAYERS, "layer", PRODUCTS)
MODERNBERT = Family(
    ("ModernBertEncoderLayer",),
    "layers",
    {"qkv": ("attn.Wqkv",), "attention": ("attn.Wo",), "up": ("mlp.Wi",), "down": ("mlp.Wo",)},
)
ONE_BY_ONE = (
    Family(
        ("TransformerBlock",),
        "layer",
        {
            "query": ("attention.q_lin",),
            "key": ("attention.k_lin",),
            "value": ("attention.v_lin",),
            "attention": ("attention.out_lin",),
            "up": ("ffn.lin1",),
            "down": ("ffn.lin2",),
        },
    ),
    MODERNBERT,
)
"""DistilBERT and ModernBERT: each product is one linear layer; everything else stays Transformers' own."""

EMBEDDING = "embedding"
"""Name of the word embedding in plans. It is converted to half precision along with the products."""


def find_encoder(model: nn.Module) -> nn.Module | None:
    """The module whose `layer` list holds encoder layers of the BERT family; None if there is none."""
    return next((module for module in model.modules() if BERT.has(module)), None)


def find_layers(model: nn.Module) -> nn.Module | None:
    """The module that lists encoder layers of a known family; None if there is none."""
    return next((module for module in model.modules() if family_of(module) is not None), None)


def family_of(encoder: nn.Module) -> Family | None:
    """The family of an encoder; None if it is unknown."""
    return next((family for family in (BERT, *ONE_BY_ONE) if family.has(encoder)), None)


def plan_of(model: nn.Module) -> dict[str, ProductPlan] | None:
    """The plan of a model's int8 layers; None if there is none."""
    plan = attached_to(find_layers(model)).plan
    return None if plan is None else dict(plan)


def set_plan(model: nn.Module, plan: Mapping[str, ProductPlan] | None) -> None:
    """Store a plan on the encoder, where a model and its wrappers share it; None removes it."""
    encoder = find_layers(model)
    if encoder is not None:
        attach(encoder, plan=None if plan is None else dict(plan))


def is_int8(model: nn.Module) -> bool:
    """True if the model has int8 layers."""
    return any(isinstance(module, Int8Linear | HalfEmbedding) for module in model.modules())


def find_embedding(model: nn.Module, encoder: nn.Module) -> nn.Embedding | None:
    """The word embedding that feeds the encoder; None if another layer shares its weight."""
    parents = [module for module in model.modules() if module is encoder or encoder in module.children()]
    embeddings = next((found for parent in parents if (found := getattr(parent, "embeddings", None)) is not None), None)
    words = getattr(embeddings, "word_embeddings", getattr(embeddings, "tok_embeddings", None))
    if not isinstance(words, nn.Embedding):
        return None
    sharing = [module for module in model.modules() if getattr(module, "weight", None) is words.weight]
    return words if len(sharing) == 1 else None


def states(encoder: nn.Module) -> Iterator[CompressedAttention]:
    """The compressed attention of each layer."""
    return (module for module in encoder.modules() if isinstance(module, CompressedAttention))


def products(encoder: Any) -> Iterator[tuple[str, list[nn.Linear]]]:
    """Every product of the encoder by name, such as "0.qkv", with the linear layers that it computes."""
    family = family_of(encoder) or BERT
    row = list(getattr(encoder, family.row))
    for index, layer in enumerate(row):
        if layer in row[:index]:
            continue  # a layer that is used several times
        for name, places in family.products.items():
            yield f"{index}.{name}", [layer.get_submodule(place) for place in places]


def entries(model: nn.Module, encoder: nn.Module) -> dict[str, list[Any]]:
    """All possible entries of a plan, by name: every product, and the word embedding unless its weight is shared."""
    words = find_embedding(model, encoder)
    return ({} if words is None else {EMBEDDING: [words]}) | dict(products(encoder))


def place_int8(
    model: nn.Module, encoder: Any, plan: Mapping[str, ProductPlan]
) -> Iterator[tuple[Int8Linear | HalfEmbedding, list[Any]]]:
    """Put empty int8 layers where the plan has them; yields each with the layers that it replaces.

    If both products around a GELU are int8, the first applies it and outputs codes. Plans of older versions have no
    entry for word embeddings, which then stay in float.
    """
    for name, layers in entries(model, encoder).items():
        if name not in plan or not plan[name].quantized:
            continue
        if name == EMBEDDING:
            embedding = HalfEmbedding(layers[0].num_embeddings, layers[0].embedding_dim)
            model.set_submodule(next(path for path, module in model.named_modules() if module is layers[0]), embedding)
            yield embedding, layers
            continue
        index, _, kind = name.partition(".")
        family = family_of(encoder) or BERT
        if family is not BERT:
            product = Int8Linear.like(layers, bits=plan[name].bits)
            getattr(encoder, family.row)[int(index)].set_submodule(family.products[kind][0], product)
            yield product, layers
            continue
        layer, down = encoder.layer[int(index)], plan.get(f"{index}.down", FLOAT)
        activated = kind == "up" and down.quantized and _has_gelu(layer)
        product = Int8Linear.like(layers, activated, plan[name].bits, down.bits)
        if kind == "qkv":
            layer.attention.self = MergedSelfAttention(layer.attention.self, product)
        elif kind == "up":
            layer.intermediate.dense = product
        else:
            parent = PRODUCTS[kind][0].removesuffix(".dense")
            layer.set_submodule(parent, Int8Output(layer.get_submodule(parent), product))
        if activated:
            layer.intermediate.intermediate_act_fn = nn.Identity()
        yield product, layers


def _has_gelu(layer: Any) -> bool:
    return type(layer.intermediate.intermediate_act_fn) is GELUActivation


class MergedSelfAttention(nn.Module):
    """Replacement for a self-attention: one product for Q, K and V, followed by the current attention.

    Args:
        replaced: the module to replace; its compressed attention moves over.
        product: [B, S, width] -> [B, S, 3 * width], Q, K and V side by side.
    """

    is_causal = False

    def __init__(self, replaced: Any, product: nn.Module) -> None:
        super().__init__()
        self.config, self.product = replaced.config, product
        self.heads, self.head_dim = replaced.num_attention_heads, replaced.attention_head_size
        self.scaling = replaced.scaling
        self.add_module(NAME, getattr(replaced, NAME))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of hidden states [B, S, width]; returns the output of the same shape, and the weights."""
        merged = self.product(hidden_states)
        each = merged.view(*hidden_states.shape[:2], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attention_forward)
        output, weights = attend(self, *each, attention_mask, scaling=self.scaling, **kwargs)
        return output.flatten(2), weights


@dataclass(frozen=True)
class Packed:
    """How one call of an encoder was packed; passed with its arguments, so a model can serve several calls at once.

    Attributes:
        real: bool [B, S], True for real tokens.
        bounds: int64 [B + 1], the bounds of the sequences in the packed row, from 0 to the number of real tokens.
    """

    real: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Packed:
        """Pack the given real tokens."""
        return cls(real, torch.cat([real.new_zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)]))


PACKED = "attnpress_packed"
"""Name of the encoder's argument for `Packed`."""


class Packing:
    """Runs an encoder on the real tokens of a batch, packed into one row. Holds no state of any call."""

    def __init__(self, encoder: nn.Module) -> None:
        pack = _pack_inputs if family_of(encoder) is MODERNBERT else _pack
        self._handles: list[RemovableHandle] = [
            encoder.register_forward_pre_hook(pack, with_kwargs=True),
            encoder.register_forward_hook(_unpack, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Run the encoder with padding again."""
        for handle in self._handles:
            handle.remove()


def keep_padding(model: nn.Module) -> None:
    """Run all encoders of a model with padding again."""
    for module in model.modules():
        packing = attached_to(module).packing
        if packing is not None:
            packing.remove()
            attach(module, packing=None)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _pack(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Of an encoder that takes hidden states and a mask of pairs."""
    call = _signature(type(encoder).forward).bind(encoder, *args, **kwargs)
    hidden, mask = call.arguments["hidden_states"], call.arguments.get("attention_mask")
    if mask is None or _is_looked_into(encoder, kwargs):
        return None
    real = padding_alone(mask, *hidden.shape[:2])
    return None if real is None else _packed(call, real, {"hidden_states": hidden}, None)


def _pack_inputs(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Of ModernBERT, whose layers lie in the model itself: it takes tokens, and makes masks and rotations from them.

    Tokens keep the positions that they have in the padded batch; windows are kept by attention, sequence by sequence.
    """
    call = _signature(type(encoder).forward).bind(encoder, *args, **kwargs)
    mask, given = call.arguments.get("attention_mask"), call.arguments.get("inputs_embeds")
    name, tokens = ("input_ids", call.arguments.get("input_ids")) if given is None else ("inputs_embeds", given)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None or _is_looked_into(encoder, kwargs):
        return None
    real, positions = mask.bool(), call.arguments.get("position_ids")
    if bool(real.all()) or not bool(real.any()):
        return None
    positions = torch.arange(real.shape[1], device=real.device) if positions is None else positions
    kinds = dict.fromkeys(("full_attention", "sliding_attention"))
    return _packed(call, real, {name: tokens, "position_ids": positions.expand(real.shape)}, kinds)


def _packed(call: inspect.BoundArguments, real: Tensor, by_token: Mapping[str, Tensor], mask: Any) -> Arguments:
    """The arguments of a call, with what there is for each token end to end in one row."""
    packed = Packed.of(real)
    call.arguments.update({name: x[real].unsqueeze(0) for name, x in by_token.items()}, attention_mask=mask)
    return call.args[1:], {**call.kwargs, PACKED: packed, BOUNDS: packed.bounds}


def _is_looked_into(encoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether a caller, a watcher or another attention needs the padded batch, or the model is being compiled."""
    config = next(found for module in encoder.modules() if (found := getattr(module, "config", None)) is not None)
    if not is_compressed(config):
        return True  # only compressed attention knows the bounds of packed sequences
    asked = ("output_hidden_states", "output_attentions")
    wants_each_layer = any(kwargs.get(name) or getattr(config, name) for name in asked)
    return wants_each_layer or torch.compiler.is_compiling() or any(state.watchers for state in states(encoder))


def _unpack(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    packed: Packed | None = kwargs.get(PACKED)
    if packed is None:
        return output
    states = output[0][0]
    padded = states.new_zeros(*packed.real.shape, states.shape[-1])
    padded[packed.real] = states
    if isinstance(output, tuple):
        return padded, *output[1:]
    output.last_hidden_state = padded
    return output


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def padding_alone(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """The real tokens according to a framework's mask; None if all are real, or if the mask is not plain padding.

    Args:
        mask: bool (True = may attend), or float of 0 and "very negative", [B or 1, 1, S, S].

    Returns:
        bool [B, S]; each real token may attend to all the others of its row of the batch.
    """
    if mask.shape[1:] != (1, length, length):
        return None
    square = mask[:, 0].expand(batch, length, length)
    valid = square if square.dtype == torch.bool else square == 0
    real = valid.diagonal(dim1=-2, dim2=-1)
    biased = square.dtype != torch.bool and bool((~valid & (square > torch.finfo(square.dtype).min / 2)).any())
    if biased or bool(real.all()) or not bool(real.any()):
        return None
    rows = real.unsqueeze(2)
    return real if torch.equal(valid & rows, real.unsqueeze(1) & rows) else None
