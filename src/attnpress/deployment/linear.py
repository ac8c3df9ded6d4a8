"""Int8 linear layers of a deployed encoder: calibrated, judged by what they cost, and put in place."""

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
from attnpress.models.encoder import entries, find_layers, is_int8, place_int8, plan_of, set_plan
from attnpress.models.inputs import Batch, forward_inputs, listed
from attnpress.models.linear import Int8Linear
from attnpress.models.ordered import OrderedLinear, place_ordered
from attnpress.models.outputs import outputs
from attnpress.tasks import TaskData
from attnpress.tasks.batches import training_batches

TOLERANCE = 0.25
"""Largest relative change of the model's output that int8 linear layers may make together.

Rounding moves attention's codes across their borders, so even a change of weights by a hundred-thousandth moves the
logits of MiniLM on MRPC by 0.04, one by a thousandth by 0.08, and int8 layers, which predict as well, by 0.10 to 0.15.
"""

JUDGED = 2
"""Batches on which each product is judged alone: one pass over them for each product."""


@dataclasses.dataclass(frozen=True)
class LinearLayers:
    """How many of a model's linear layers are computed in which way; Q, K and V of a layer count as one.

    Attributes:
        int8: as integer products.
        ordered: in float32 in one order, around the encoder.
        library: in floating point by torch.
    """

    int8: int
    ordered: int
    library: int


def linear_layers(model: nn.Module) -> LinearLayers:
    """What a model's linear layers compute, as they are now: so that nothing says int8 where it was float."""
    kinds = [type(module) for module in model.modules()]
    return LinearLayers(*(kinds.count(kind) for kind in (Int8Linear, OrderedLinear, nn.Linear)))


def calibrate_linear(
    model: nn.Module, batches: Iterable[Batch], *, tolerance: float = TOLERANCE, bits: Bits = ACTIVATION_BITS
) -> dict[str, ProductPlan]:
    """Find what has to stay in float under `deploy(model, linear="int8")`; `save_pretrained` stores what was found.

    Each product of the encoder is put into 8 bits alone, and the word embedding into 16, which shows what it changes.
    As long as all of them together change the output by more than `tolerance`, the worst goes back to float. Padding
    is never counted.

    Args:
        model: after `calibrate`, not deployed with int8 layers. Unchanged but for its plan.
        batches: as `calibrate` takes them. The first two serve.
        tolerance: of the relative change, in norm, of the model's first output: logits, or hidden states.
        bits: of the codes of the products' inputs. 7 are as fast on every processor; 8 take twice the
            multiplications where there is no VNNI. The results of either are the same everywhere.

    Returns:
        The plan, by product: "0.qkv", "0.attention", "0.up", "0.down" for layer 0, "embedding" for that of words,
        unless its weight serves another layer too. Empty, with a warning, where all have to stay in float: another
        family than BERT's, or weights that are not float32.

    Raises:
        ValueError: no batches, other bits, or a model with int8 layers already.
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
    """The encoder whose linear layers may become int8; None, said once in a warning, where they have to stay in float.

    Raises:
        ValueError: they are int8 already.
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
    return encoder


def use_int8(model: nn.Module, encoder: nn.Module, plan: Mapping[str, ProductPlan]) -> None:
    """Put int8 layers where the plan has them, all of them if it is empty; float32 weights of those are let go."""
    entire = dict(plan) or {name: ProductPlan() for name in entries(model, encoder)}
    for layer, replaced in place_int8(model, encoder, entire):
        layer.take(replaced)
    set_plan(model, entire)


def pack_int8(model: nn.Module) -> None:
    """Let compiled code compute the int8 layers that a model has, and the small float layers beside them."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.use(PackedProduct)
    encoder = find_layers(model)
    if encoder is not None:
        place_ordered(model, encoder, PASSES)


@functools.cache
def say_float(name: str, reason: str) -> None:
    """Warn, once, that a model's linear layers stay as they are."""
    warnings.warn(f"{name}: linear layers stay in float, since {reason}", stacklevel=4)


def real_tokens(batch: Batch) -> Tensor | None:
    """Which tokens of a batch are real, bool [B, S]; None if all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.dim() != 2 else mask.bool()


def _judge(
    model: nn.Module, encoder: nn.Module, batches: Sequence[Batch], tolerance: float, bits: Bits
) -> dict[str, ProductPlan]:
    """The plan with the error of each product alone, and without those that together would change too much."""
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
    """Inside the `with` block, these layers give what they would in few bits."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(functools.partial(_in_few_bits, bits)).remove)
        yield


def _in_few_bits(bits: Bits, layer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return output.half().float()
    return fake_quantize_linear(args[0], layer.weight, layer.bias, bits)


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


def plan_linear(model: nn.Module, data: Callable[[], TaskData], config: RunConfig) -> dict[str, ProductPlan]:
    """What of the linear layers is to be in 8 bits.

    Args:
        data: of the run; asked for only if the model has no plan, which is then made from its calibration batches.
    """
    return plan_of(model) or calibrate_linear(model, training_batches(data(), config.calibration, config.seed))
