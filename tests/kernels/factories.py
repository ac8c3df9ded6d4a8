"""Random attention calls for the kernel tests: shapes, dtypes, masks, bits, rules and extreme values from one seed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsMode, ProbsSpec, RuleName, TailName, TensorSpec
from attnpress.core.arguments import with_causal
from attnpress.core.attention import IntegerAttention
from attnpress.core.call import Scales
from attnpress.core.tail import Directions, Tail
from attnpress.kernels import cpu
from tests.core.factories import Call

COMPILER = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
needs_kernel = pytest.mark.skipif(
    COMPILER is None and not cpu.is_built(), reason="no C++ compiler here, so there is no CPU kernel to test"
)
"""Where there is a compiler, a kernel that is missing fails: `make kernel` says why."""

MASKS = ("none", "padding", "left padding", "window", "holes", "by head", "all masked")
EXTREMES = ("none", "nan", "inf", "huge", "tiny", "zero", "equal")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case(Call):
    """A call of the operator, which knows the causal order without a mask."""

    def integer(self) -> IntegerAttention:
        return Call.integer(self.in_mask())

    def allowed(self) -> Tensor:
        return Call.allowed(self.in_mask())

    def in_mask(self) -> Case:
        """The same call with the causal order as a part of its mask."""
        valid = with_causal(self.valid, self.query, self.key) if self.causal else self.valid
        return self.with_(valid=valid, causal=False)


def make_mask(kind: str, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor | None:
    batch, heads, rows, keys = shape
    lengths = torch.randint(0, keys + 1, (batch, 1, 1, 1), generator=generator)
    places = torch.arange(keys).view(1, 1, 1, keys)
    if kind == "none":
        return None
    if kind == "padding":
        return places < lengths
    if kind == "left padding":
        return (places >= lengths).expand(batch, 1, rows, keys).contiguous()
    if kind == "window":
        return (places - torch.arange(rows).view(1, 1, rows, 1)).abs() <= max(1, keys // 5)
    if kind == "all masked":
        return torch.zeros(batch, 1, rows, keys, dtype=torch.bool)
    return torch.rand(batch, heads if kind == "by head" else 1, rows, keys, generator=generator) > 0.4


def spoil(x: Tensor, extreme: str, generator: torch.Generator) -> None:
    """Put what real activations hold on a bad day into a few places of `x`, or everywhere."""
    values = {"nan": [torch.nan], "inf": [torch.inf, -torch.inf], "huge": [3e4, -6e4], "tiny": [1e-7, -1e-30]}
    if extreme == "zero":
        x.zero_()
    elif extreme == "equal":
        x.copy_(x[..., :1, :1].expand_as(x).clone())
    elif extreme in values:
        for value in values[extreme]:
            x[torch.rand(x.shape, generator=generator) < 0.02] = value


def make_scales(spec: AttentionSpec, heads: int, kv_heads: int, dim: int, generator: torch.Generator) -> Scales:
    def scale(tensor_spec: TensorSpec, count: int) -> Tensor | None:
        if tensor_spec.granularity == "token":
            return None
        shape = (
            1,
            1 if tensor_spec.granularity == "tensor" else count,
            1,
            dim if tensor_spec.granularity == "channel" else 1,
        )
        return (torch.rand(shape, generator=generator) * 3 + 0.5) / tensor_spec.qmax

    found = Scales(q=scale(spec.q, heads), k=scale(spec.k, kv_heads), v=scale(spec.v, kv_heads))
    if spec.tail == "none":
        return found
    return Scales(found.q, found.k, found.v, tail=make_tail(spec, heads, kv_heads, dim, generator))


def make_tail(spec: AttentionSpec, heads: int, kv_heads: int, dim: int, generator: torch.Generator) -> Tail:
    """Any tail that calibration could fit: small and large lifts and directions."""
    lift = torch.randint(0, 3000, (heads,), generator=generator).float()
    if spec.tail == "mean" or spec.tail_rank >= dim:
        return Tail(lift)
    rank = spec.tail_rank

    def whole(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    reach = (200, 2000, 32767)[int(torch.randint(0, 3, (), generator=generator))]
    step = torch.rand(kv_heads, generator=generator) / 10
    shape = (kv_heads, dim, rank)
    return Tail(lift, Directions(whole(reach, *shape), whole(reach, *shape), whole(40, kv_heads, rank), step))


def make_case(
    shape: tuple[int, int, int, int, int, int], spec: AttentionSpec, *, mask: str = "none", extreme: str = "none",
    dtype: torch.dtype = torch.float32, cutoff: float | None = None, causal: bool = False, transposed: bool = True,
    seed: int = 0,
) -> Case:  # fmt: skip
    """A call of shape (B, Hq, Hkv, Sq, Sk, D); `transposed` stores tensors as models do, tokens before heads."""
    batch, heads, kv_heads, rows, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for count, length in ((heads, rows), (kv_heads, keys), (kv_heads, keys)):
        x = torch.randn(batch, length, count, dim, generator=generator).transpose(1, 2)
        x = x if transposed else x.contiguous()
        spoil(x, extreme, generator)
        tensors.append(x.to(dtype))
    query, key, value = tensors
    spread = None if cutoff is None else torch.rand(heads, generator=generator) * cutoff
    valid = make_mask(mask, (batch, heads, rows, keys), generator)
    scales = make_scales(spec, heads, kv_heads, dim, generator)
    return Case(query, key, value, valid, scales, spread, spec, dim**-0.5, causal=causal)


def bits(low: int = 2) -> st.SearchStrategy[int]:
    return st.integers(low, 8)


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    rules: tuple[RuleName, ...] = ("relative", "relative", "threshold", "topk")
    mode: ProbsMode = draw(st.sampled_from(("row", "unit")))
    tails: tuple[TailName, ...] = ("none", "mean", "linear") if mode == "row" else ("none",)
    return AttentionSpec(
        q=TensorSpec(
            bits=draw(bits()),
            granularity=draw(st.sampled_from(("tensor", "head", "token"))),
            power_of_two=draw(st.booleans()),
        ),
        k=TensorSpec(bits=draw(bits()), granularity=draw(st.sampled_from(("tensor", "head")))),
        v=TensorSpec(bits=draw(bits()), granularity=draw(st.sampled_from(("tensor", "head", "channel")))),
        p=ProbsSpec(
            bits=draw(bits()), mode=mode, signed=draw(st.booleans()),
            renormalize=draw(st.booleans()),
        ),
        rule=draw(st.sampled_from(rules)),
        sparsity=draw(st.sampled_from((0.0, 0.3, 0.5, 0.9, 0.98))),
        smooth_key=draw(st.booleans()),
        tail=draw(st.sampled_from(tails)),
        tail_rank=draw(st.sampled_from((1, 2, 3, 8, 9, 20, 256))),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, longest: int = 200) -> Case:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = (
        draw(st.integers(1, 3)), kv_heads * group, kv_heads,
        draw(st.integers(1, longest)), draw(st.integers(1, longest)),
        4 * draw(st.integers(4, 64)) if draw(st.booleans()) else draw(st.sampled_from((16, 32, 64, 80, 128, 256))),
    )  # fmt: skip
    return make_case(
        shape, draw(specs()), mask=draw(st.sampled_from(MASKS)), extreme=draw(st.sampled_from(EXTREMES)),
        dtype=draw(st.sampled_from(DTYPES)), cutoff=draw(st.sampled_from((None, 0.5, 3.0, 8.0))),
        causal=draw(st.booleans()), transposed=draw(st.booleans()), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
