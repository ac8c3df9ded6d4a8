"""Int8 linear layers of a deployed encoder: calibration, selection and installation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnpress.config import RunConfig
from attnpress.core.linear import ACTIVATION_BITS, Bits, ProductPlan, fake_quantize_linear
from attnpress.kernels.linear import PASSES, PackedProduct
from attnpress.models.encoder import (
    entries,
    family_of,
    find_layers,
    is_int8,
    place_int8,
    plan_of,
    products,
    set_plan,
)
from attnpress.models.inputs import Batch, forward_inputs, listed
from attnpress.models.linear import Int8Linear
from attnpress.models.ordered import OrderedLinear, place_ordered
from attnpress.models.outputs import outputs
from attnpress.tasks import TaskData
from attnpress.tasks.batches import training_batches

TOLERANCE = 0.25
"""Largest relative change of the model's output by all int8 linear layers together.

Rounding moves attention's codes across their borders, so even a relative change of weights by 1e-5 changes the logits
of MiniLM on MRPC by 0.04, one by 1e-3 changes them by 0.08, and int8 layers, which predict equally well, by 0.10 to
0.15.
"""

JUDGED = 2
"""Batches on which each product is measured; each product costs one pass over them."""


@dataclasses.dataclass(frozen=True)
class LinearLayers:
    """Number of a model's linear layers by implementation; Q, K and V of a layer count as one.

    Attributes:
        int8: integer products.
        ordered: float32 in one order of summation, around the encoder.
        library: floating point by torch.
    """

    int8: int
    ordered: int
    library: int


def linear_layers(model: nn.Module) -> LinearLayers:
    """Count a model's linear layers by their current implementation."""
    kinds = [type(module) for module in model.modules()]
    return LinearLayers(*(kinds.count(kind) for kind in (Int8Linear, OrderedLinear, nn.Linear)))


def calibrate_linear(
    model: nn.Module, batches: Iterable[Batch], *, tolerance: float = TOLERANCE, bits: Bits = ACTIVATION_BITS
) -> dict[str, ProductPlan]:
    """Select the products that stay in float under `deploy(model, linear="int8")`; `save_pretrained` stores the plan.

    Each product of the encoder is quantized alone, and the word embedding converted to 16 bits, to measure its effect.
    While all together change the output by more than `tolerance`, the worst one goes back to float. Padding is
    excluded.

    Args:
        model: after `calibrate`, without int8 layers. Only its plan is changed.
        batches: as for `calibrate`; the first two are used.
        tolerance: maximum relative change, in norm, of the model's first output (logits or hidden states).
        bits: of the products' input codes. 7 are as fast on every processor; 8 need twice the multiplications without
            VNNI. Results of each are the same everywhere.

    Returns:
        The plan, by product: "0.qkv", "0.attention", "0.up", "0.down" for layer 0, and "embedding" for that of words,
            unless another layer shares its weight. Empty, with a warning, if all stay in float: an unsupported family,
            or weights that are not float32.

    Raises:
        ValueError: there are no batches, other bits, or a model that already has int8 layers.
    """
    if bits not in (7, 8):
        raise ValueError(f"bits {bits!r}: the inputs of int8 linear layers have 7 or 8")
    kept = [forward_inputs(model, batch, number) for number, batch in enumerate(listed(batches, "calibrate_linear"))]
    encoder = int8_encoder(model)
    if encoder is None:
        return {}
    plan = _judge(model, encoder, kept[:JUDGED], tolerance, bits)
    set_plan(model, plan)
    return plan


def int8_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder whose linear layers can become int8; None, with a warning, if there is none.

    Raises:
        ValueError: they are already int8.
    """
    encoder = find_layers(model)
    if encoder is None:
        say_float(type(model).__name__, "its layers are not those of BERT, DistilBERT or ModernBERT encoders")
        return None
    if next(encoder.parameters()).dtype != torch.float32:
        say_float(type(model).__name__, "its weights are not float32")
        return None
    if is_int8(model):
        raise ValueError("the linear layers are int8 already, and their float32 weights gone: load the model again")
    wrapped = next((layer for _, layers in products(encoder) for layer in layers if type(layer) is not nn.Linear), None)
    if wrapped is not None:
        kind = f"{type(wrapped).__module__}.{type(wrapped).__qualname__}"
        say_float(type(model).__name__, f"some are {kind}; merge adapters first, by merge_and_unload")
        return None
    if sum(family_of(module) is not None for module in model.modules()) > 1:
        _say_first(type(model).__name__)
    return encoder


def use_int8(model: nn.Module, encoder: nn.Module, plan: Mapping[str, ProductPlan]) -> None:
    """Install int8 layers according to the plan, all of them if it is empty; their float32 weights are freed."""
    entire = dict(plan) or {name: ProductPlan() for name in entries(model, encoder)}
    for layer, replaced in place_int8(model, encoder, entire):
        layer.take(replaced)
    set_plan(model, entire)


def pack_int8(model: nn.Module) -> None:
    """Use compiled code for a model's int8 layers, and for the float layers beside them."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.use(PackedProduct)
    encoder = find_layers(model)
    if encoder is not None:
        place_ordered(model, encoder, PASSES)


@functools.cache
def say_float(name: str, reason: str) -> None:
    """Warn, once, that a model's linear layers stay in float."""
    warnings.warn(f"{name}: linear layers stay in float, since {reason}", stacklevel=4)


@functools.cache
def _say_first(name: str) -> None:
    warnings.warn(
        f"{name} holds several encoders, and only the first one's linear layers become int8: call calibrate_linear and "
        "deploy for each of them",
        stacklevel=4,
    )


def real_tokens(batch: Batch) -> Tensor | None:
    """The real tokens of a batch, bool [B, S]; None if all are real."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.dim() != 2 else mask.bool()


def _judge(
    model: nn.Module, encoder: nn.Module, batches: Sequence[Batch], tolerance: float, bits: Bits
) -> dict[str, ProductPlan]:
    """The plan with the error of each product alone; the worst are removed until the total is within the tolerance."""
    layers = entries(model, encoder)
    expected = _answer(model, batches)

    def error(chosen: Iterable[str]) -> float:
        with _fake_quantized((layer for name in chosen for layer in layers[name]), bits):
            return float((_answer(model, batches) - expected).norm() / expected.norm().clamp(min=1e-30))

    errors = {name: error([name]) for name in layers}
    judged = {name: ProductPlan(found, bits=bits) for name, found in errors.items()}
    quantized = sorted(judged, key=errors.__getitem__)
    while quantized and error(quantized) > tolerance:
        worst = quantized.pop()
        judged[worst] = dataclasses.replace(judged[worst], quantized=False)
    return judged


@contextlib.contextmanager
def _fake_quantized(layers: Iterable[nn.Module], bits: Bits) -> Iterator[None]:
    """Inside the `with` block, these layers compute as if quantized."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(functools.partial(_in_few_bits, bits)).remove)
        yield


def _in_few_bits(bits: Bits, layer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return output.half().float()
    return fake_quantize_linear(args[0], layer.weight, layer.bias, bits)


def _answer(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The model's first output for all batches as one vector; only real tokens, if it has tokens."""
    parts = []
    for batch in batches:
        real = real_tokens(batch)
        for output in outputs(model, [batch]):
            first = output[0]
            by_token = real is not None and first.shape[:2] == real.shape
            parts.append((first[real] if by_token else first).double().flatten())
    return torch.cat(parts)


def plan_linear(model: nn.Module, data: Callable[[], TaskData], config: RunConfig) -> dict[str, ProductPlan]:
    """The plan of int8 linear layers.

    Args:
        data: of the run; used only if the model has no plan, to make one from its calibration batches.
    """
    return plan_of(model) or calibrate_linear(model, training_batches(data(), config.calibration, config.seed))
