"""Int8 linear layers of a deployed encoder: calibrated, judged by what they cost, and put in place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnpress.calibration import Batch, outputs
from attnpress.core.linear import ProductPlan, Step, fake_quantize_linear
from attnpress.kernels.linear import ACTIVATIONS, Int8Linear
from attnpress.models.attention import INT8, PLAN
from attnpress.models.encoder import activation_name, drop_activation, find_encoder, place_product, products

TOLERANCE = 0.05
"""Largest relative change of the model's output that int8 linear layers may make together."""

JUDGED = 2
"""Batches on which each product is judged alone: one pass over them for each product."""


def calibrate_linear(
    model: nn.Module, batches: Iterable[Batch], *, tolerance: float | None = TOLERANCE
) -> dict[str, ProductPlan]:
    """Prepare a compressed model for `deploy(model, linear="int8")`; `save_pretrained` stores what was found.

    The inputs of each linear layer of the encoder get a static step from the values of real tokens; padding is never
    counted. Then each product is put into 8 bits alone, which shows what it changes, and as long as all of
    them together change the output by more than `tolerance`, the worst goes back to float.

    Args:
        model: after `calibrate`, not deployed with int8 layers. Unchanged but for its plan.
        batches: as `calibrate` takes them. The first two serve to judge products.
        tolerance: of the relative change, in norm, of the model's first output: logits, or hidden states. None puts
            every product into 8 bits and judges none.

    Returns:
        The plan, by product: "0.qkv", "0.attention", "0.up", "0.down" for layer 0. Empty, with a warning, where
        linear layers have to stay in float: another family than BERT's, or weights that are not float32.

    Raises:
        ValueError: no batches, values that are not finite, or a model with int8 layers already.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("calibrate_linear needs at least one batch of real data")
    encoder = int8_encoder(model)
    if encoder is None:
        return {}
    ranges = _input_ranges(model, encoder, kept)
    plan = {name: ProductPlan(low, high) for name, (low, high) in ranges.items()}
    if tolerance is not None:
        plan = _judge(model, encoder, plan, kept[:JUDGED], tolerance)
    setattr(model, PLAN, plan)
    return plan


def int8_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder whose linear layers may become int8; None, said once in a warning, where they have to stay in float.

    Raises:
        ValueError: they are int8 already.
    """
    encoder = find_encoder(model)
    if encoder is None:
        say_float(type(model).__name__, "its layers are not those of BERT, RoBERTa or ELECTRA encoders")
        return None
    if next(encoder.parameters()).dtype != torch.float32:
        say_float(type(model).__name__, "its weights are not float32")
        return None
    if hasattr(model, INT8):
        raise ValueError("the linear layers are int8 already, and their float32 weights gone: load the model again")
    return encoder


def use_int8(model: nn.Module, encoder: nn.Module, plan: Mapping[str, ProductPlan]) -> None:
    """Put int8 products where the plan has them; float32 weights of those layers are let go."""
    activation = activation_name(encoder)
    fused = activation in ACTIVATIONS
    for name, layers in list(products(encoder)):
        if not plan[name].quantized:
            continue
        index, _, kind = name.partition(".")
        after, then = "none", None
        if kind == "up" and fused:
            after, then = activation, _step_if_quantized(plan[f"{index}.down"])
            drop_activation(encoder, int(index))
        place_product(encoder, name, _merge(layers, plan[name].step, after, then))
    setattr(model, INT8, True)


def _merge(layers: Sequence[nn.Linear], step: Step, activation: str, output: Step | None) -> Int8Linear:
    """Linear layers on the same input as one, their outputs side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])
    return Int8Linear(weight, bias, step, activation, output)


def _step_if_quantized(plan: ProductPlan) -> Step | None:
    return plan.step if plan.quantized else None


@functools.cache
def say_float(name: str, reason: str) -> None:
    """Warn, once, that a model's linear layers stay as they are."""
    warnings.warn(f"{name}: linear layers stay in float, since {reason}", stacklevel=4)


def _input_ranges(model: nn.Module, encoder: nn.Module, batches: Iterable[Batch]) -> dict[str, list[float]]:
    """Smallest and largest input of each product, over the real tokens of all batches."""
    ranges: dict[str, list[float]] = {}
    for batch in batches:
        real = real_tokens(batch)
        with contextlib.ExitStack() as stack:
            for name, layers in products(encoder):
                hook = functools.partial(_widen, ranges, name, real)
                stack.callback(layers[0].register_forward_pre_hook(hook).remove)
            for _ in outputs(model, [batch]):
                pass
    return ranges


def _widen(
    ranges: dict[str, list[float]], name: str, real: Tensor | None, layer: nn.Module, args: tuple[Tensor]
) -> None:
    x = args[0] if real is None else args[0][real]
    if x.numel():
        low, high = (float(bound) for bound in x.aminmax())
        before = ranges.setdefault(name, [low, high])
        ranges[name] = [min(low, before[0]), max(high, before[1])]


def real_tokens(batch: Batch) -> Tensor | None:
    """Which tokens of a batch are real, bool [B, S]; None if all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.dim() != 2 else mask.bool()


def _judge(
    model: nn.Module, encoder: nn.Module, plan: dict[str, ProductPlan], batches: Sequence[Batch], tolerance: float
) -> dict[str, ProductPlan]:
    """The plan with the error of each product alone, and without those that together would change too much."""
    layers = dict(products(encoder))
    expected = _answer(model, batches)

    def error(chosen: Iterable[str]) -> float:
        with _fake_quantized({name: layers[name] for name in chosen}, plan):
            return float((_answer(model, batches) - expected).norm() / expected.norm().clamp(min=1e-30))

    errors = {name: error([name]) for name in plan}
    judged = {name: dataclasses.replace(entry, error=errors[name]) for name, entry in plan.items()}
    quantized = sorted(judged, key=errors.__getitem__)
    while quantized and error(quantized) > tolerance:
        worst = quantized.pop()
        judged[worst] = dataclasses.replace(judged[worst], quantized=False)
    return judged


@contextlib.contextmanager
def _fake_quantized(layers: Mapping[str, Sequence[nn.Linear]], plan: Mapping[str, ProductPlan]) -> Iterator[None]:
    """Inside the `with` block, the layers of these products give what 8 bits would."""
    with contextlib.ExitStack() as stack:
        for name, members in layers.items():
            for layer in members:
                stack.callback(layer.register_forward_hook(functools.partial(_in_8_bits, plan[name].step)).remove)
        yield


def _in_8_bits(step: Step, layer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    return fake_quantize_linear(args[0], layer.weight, layer.bias, step)


def _answer(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The model's first output for all batches, as one row of numbers; only real tokens where it has tokens."""
    parts = []
    for batch in batches:
        real = real_tokens(batch)
        for output in outputs(model, [batch]):
            first = output[0]
            by_token = real is not None and first.shape[:2] == real.shape
            parts.append((first[real] if by_token else first).double().flatten())
    return torch.cat(parts)
