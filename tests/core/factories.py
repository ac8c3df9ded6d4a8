"""Attention calls for the tests of core: drawn by hypothesis or made from a seed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsMode, ProbsSpec, RuleName, TensorSpec
from attnpress.config.rules import RULES as FACTS
from attnpress.core.attention import IntegerAttention, NanWarning, integer_attention, key_validity
from attnpress.core.call import AttentionCall, Scales
from attnpress.core.fake_quantize import (
    fake_quantize_attention,
)
from attnpress.core.observer import Observer
from attnpress.core.quantizer import positive_scale, smooth_key

RULES: tuple[RuleName, ...] = ("relative", "threshold", "topk", "mass", "nm")
MASKS = ("none", "padding", "causal", "pairs")
SEEDS = st.integers(0, 2**32 - 1)


@contextmanager
def expecting_nan() -> Iterator[None]:
    """For calls that are given NaN, whose warning has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NanWarning)
        yield


@dataclass(frozen=True)
class Call(AttentionCall):
    """One attention call, and what becomes of it."""

    def integer(self) -> IntegerAttention:
        with expecting_nan():
            return integer_attention(self)

    def fake(self, dropout: float = 0.0) -> Tensor:
        with expecting_nan():
            return fake_quantize_attention(self.with_(dropout=dropout))

    def allowed(self) -> Tensor:
        """`valid`, always as a tensor [B, Hq, Sq, Sk]."""
        shape = (*self.query.shape[:3], self.key.shape[2])
        return torch.ones(shape, dtype=torch.bool) if self.valid is None else self.valid.expand(shape)

    def calibrated(self) -> Self:
        """The call with scales fixed on its own tensors."""
        return self.with_(scales=make_scales(self.query, self.key, self.value, self.valid, self.spec))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def make_spec(
    bits: int | None = 8, rule: RuleName = "relative", sparsity: float = 0.0, **changes: Any
) -> AttentionSpec:
    """The same bits for all four matrices; `changes` go to `AttentionSpec`."""
    tensor = TensorSpec(bits=bits)
    matrices: dict[str, Any] = {"q": tensor, "k": tensor, "v": tensor, "p": ProbsSpec(bits=bits)}
    return AttentionSpec(**(matrices | {"rule": rule, "sparsity": sparsity} | changes))


def make_mask(kind: str, seed: int, batch: int, heads: int, rows: int, keys: int) -> Tensor | None:
    """None, key padding [B, 1, 1, Sk], causal [1, 1, Sq, Sk], or any pairs [B, Hq, Sq, Sk]; rows may be empty."""
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.randint(0, keys + 1, (batch, 1, 1, 1), generator=generator(seed))
        return torch.arange(keys) < lengths
    if kind == "causal":
        return torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)
    density = torch.rand(batch, heads, rows, 1, generator=generator(seed))
    return torch.rand(batch, heads, rows, keys, generator=generator(seed + 1)) < density


def make_scales(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, spec: AttentionSpec) -> Scales:
    """Calibrated on the call itself; a matrix that was not observed (an empty batch) gets scale 1."""
    shown = {"q": query, "k": smooth_key(key, key_validity(valid)) if spec.smooth_key else key, "v": value}
    found: dict[str, Tensor] = {}
    for name, x in shown.items():
        tensor_spec: TensorSpec = getattr(spec, name)
        if tensor_spec.bits is None or tensor_spec.granularity == "token":
            continue
        observer = Observer("absmax", tensor_spec.granularity, tensor_spec.qmax, power_of_two=tensor_spec.power_of_two)
        observer.update(x, None)
        found[name] = observer.scale()
    return Scales(found.get("q"), found.get("k"), found.get("v"))


def make_cutoff(spec: AttentionSpec, heads: int, seed: int) -> Tensor | None:
    """Thresholds [Hq] that prune some pairs; None where the rule needs none."""
    if FACTS[spec.rule].counts or spec.sparsity == 0:
        return None
    drawn = torch.rand(heads, generator=generator(seed)).clamp(min=0.05)
    return drawn if spec.rule == "mass" else 6 * drawn


def make_call(
    spec: AttentionSpec,
    seed: int = 0,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    rows: int = 5,
    keys: int = 7,
    dim: int = 8,
    mask: str = "none",
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """A call on normal data; `spread` multiplies the queries, so that rows run from flat to one-hot."""
    kv_heads = kv_heads or heads
    query = (normal(seed, batch, heads, rows, dim) * spread).to(dtype)
    key, value = (normal(seed + i, batch, kv_heads, keys, dim).to(dtype) for i in (1, 2))
    valid = make_mask(mask, seed + 3, batch, heads, rows, keys)
    cutoff = make_cutoff(spec, heads, seed + 4)
    return Call(query, key, value, valid, Scales(), cutoff, spec, dim**-0.5).calibrated()


QuantizedBits = st.integers(2, 8)


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    """All four matrices quantized, each its own way."""
    q_granularity: Literal["tensor", "head", "token"] = draw(st.sampled_from(["tensor", "head", "token"]))
    k_granularity: Literal["tensor", "head"] = draw(st.sampled_from(["tensor", "head"]))
    v_granularity: Literal["tensor", "head", "channel"] = draw(st.sampled_from(["tensor", "head", "channel"]))
    flag = st.booleans()
    return AttentionSpec(
        q=TensorSpec(bits=draw(QuantizedBits), granularity=q_granularity, power_of_two=draw(flag)),
        k=TensorSpec(bits=draw(QuantizedBits), granularity=k_granularity, power_of_two=draw(flag)),
        v=TensorSpec(bits=draw(QuantizedBits), granularity=v_granularity, power_of_two=draw(flag)),
        p=ProbsSpec(
            bits=draw(QuantizedBits), mode=draw(st.sampled_from(["row", "unit"])),
            signed=draw(flag), renormalize=draw(flag),
        ),
        rule=draw(st.sampled_from(RULES)),
        sparsity=draw(st.sampled_from([0.0, 0.3, 0.9, 0.99])),
        smooth_key=draw(flag),
    )  # fmt: skip


@st.composite
def calls(draw: st.DrawFn, largest: int = 20) -> Call:
    """Any shape up to `largest`, any mask, any spec; now and then NaN, infinities and huge values among the inputs."""
    seed, kv_heads = draw(SEEDS), draw(st.integers(1, 2))
    call = make_call(
        draw(specs()),
        seed,
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        rows=draw(st.integers(1, largest)),
        keys=draw(st.integers(1, largest)),
        dim=draw(st.integers(1, largest)),
        mask=draw(st.sampled_from(MASKS)),
        spread=draw(st.sampled_from([0.0, 0.01, 1.0, 10.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )
    if draw(st.integers(0, 3)) == 0:
        call = call.with_(**{name: wounded(getattr(call, name), seed) for name in ("query", "key", "value")})
    return call


def wounded(x: Tensor, seed: int) -> Tensor:
    """The tensor with NaN, infinities and the dtype's own extremes at a few random places."""
    largest = torch.finfo(x.dtype).max
    extremes = torch.tensor([torch.nan, torch.inf, -torch.inf, largest, -largest, 2.0**-20], dtype=x.dtype)
    chosen = extremes[torch.randint(len(extremes), x.shape, generator=generator(seed))]
    return torch.where(torch.rand(x.shape, generator=generator(seed + 1)) < 0.1, chosen, x)


def random_scale(seed: int, *shape: int) -> Tensor:
    return positive_scale(torch.exp(normal(seed, *shape)))


FLOAT32 = torch.finfo(torch.float32)
MODES: tuple[ProbsMode, ...] = ("row", "unit")


def weights_of(call: Call, dropout: float = 0.0) -> Tensor:
    """The weight that each query gives to each key [B, Hq, Sq, Sk], seen from outside: the values are unit vectors."""
    batch, kv_heads, keys, _ = call.key.shape
    units = torch.eye(keys).expand(batch, kv_heads, keys, keys)
    spec = dataclasses.replace(call.spec, v=TensorSpec(bits=8, granularity="tensor"))
    scales = dataclasses.replace(call.scales, v=torch.ones(1, 1, 1, 1))
    return call.with_(value=units, spec=spec, scales=scales).fake(dropout)


def differentiable(call: Call) -> Call:
    """The call with leaves that take gradients: inputs, and scales that are learned."""
    inputs = {name: getattr(call, name).detach().clone().requires_grad_() for name in ("query", "key", "value")}
    scales = {
        name: scale.clone().requires_grad_() if (scale := getattr(call.scales, name)) is not None else None
        for name in learned(call.spec)
    }
    return call.with_(**inputs, scales=dataclasses.replace(call.scales, **scales))


def learned(spec: AttentionSpec) -> list[str]:
    return [name for name in ("q", "k", "v") if getattr(spec, name).learned and getattr(spec, name).bits is not None]


def tensors(call: Call) -> list[Tensor]:
    """What gradients are wanted for."""
    return [call.query, call.key, call.value, *(getattr(call.scales, name) for name in learned(call.spec))]


def in_float64(call: Call) -> Call:
    widened = {name: getattr(call, name).detach().double().requires_grad_() for name in ("query", "key", "value")}
    scales = {
        name: None if scale is None else scale.detach().double().requires_grad_()
        for name, scale in vars(call.scales).items()
    }
    return call.with_(**widened, scales=Scales(**scales))


def dequantized(x: Tensor, scale: Tensor | None, spec: TensorSpec) -> Tensor:
    """The textbook fake quantizer: clamp, then a rounding that gradients ignore; autograd does the rest (LSQ too)."""
    if spec.bits is None:
        return x
    if scale is None:
        scale = (x.detach().abs().amax(-1, keepdim=True) / spec.qmax).float().double()
    edge = spec.qmax * (1 + 1e-6)  # the value that a scale was taken from is inside
    ratio = (x / scale).clamp(-edge, edge)
    return (ratio + (ratio.round() - ratio).detach()) * scale


def plain_attention(call: Call, weights: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """Differentiable float64 attention whose softmax stands at the given weights (they need not add up to one).

    Args:
        weights: [B, Hq, Sq, Sk], what the compressed call gives to each pair before dropout; zeros take no part.
        factor: dropout's, 0 or 1 / (1 - rate).
    """
    groups = call.query.shape[1] // call.key.shape[1]
    q = dequantized(call.query, call.scales.q, call.spec.q)
    k, v = (
        dequantized(x, scale, spec).repeat_interleave(groups, 1)
        for x, scale, spec in (
            (call.key, call.scales.k, call.spec.k), (call.value, call.scales.v, call.spec.v)
        )
    )  # fmt: skip
    scores = q @ k.mT * call.scaling
    moved = weights.double() * torch.exp(scores - scores.detach())
    lost = 1 - weights.double().sum(-1, keepdim=True)
    return (moved / (moved.sum(-1, keepdim=True) + lost) * factor) @ v


def assert_gradients(found: Iterable[Tensor], expected: Iterable[Tensor], terms: int) -> None:
    """Equal within the rounding of float32 sums of so many terms, each of order one or as large as the result."""
    for ours, theirs in zip(found, expected, strict=True):
        rounding = terms * FLOAT32.eps * max(1.0, float(theirs.abs().max()))
        assert float((ours.double() - theirs).abs().max()) <= rounding


def gradients(call: Call, output: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, tensors(call), upstream.to(output.dtype))
