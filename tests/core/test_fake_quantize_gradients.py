"""Gradients of the training forward: those of a plain attention on the dequantized matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import ProbsMode, ProbsSpec, RuleName, TensorSpec
from attnpress.core.attention import dense_attention
from attnpress.core.call import Scales
from tests.core.factories import (
    MASKS,
    MODES,
    RULES,
    SEEDS,
    Call,
    assert_gradients,
    calls,
    differentiable,
    gradients,
    in_float64,
    learned,
    make_call,
    make_spec,
    normal,
    plain_attention,
    weights_of,
)

# Gradients.


@settings(max_examples=50)
@given(
    rule=st.sampled_from(RULES), mode=st.sampled_from(MODES), mask=st.sampled_from(MASKS), bits=st.integers(3, 8),
    kv_heads=st.sampled_from([2, 4]), token=st.booleans(), learned=st.booleans(),
    channel=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_gradients_are_those_of_a_plain_attention(
    rule: RuleName,
    mode: ProbsMode,
    mask: str,
    bits: int,
    kv_heads: int,
    token: bool,
    learned: bool,
    channel: bool,
    seed: int,
) -> None:
    spec = make_spec(
        bits, rule, 0.5,
        q=TensorSpec(bits=bits, granularity="token" if token else "head", learned=learned and not token),
        k=TensorSpec(bits=bits, granularity="tensor", learned=learned),
        v=TensorSpec(bits=bits, granularity="channel" if channel else "head", learned=learned),
        p=ProbsSpec(bits=8, mode=mode),
    )  # fmt: skip
    call = differentiable(clipping(make_call(spec, seed, kv_heads=kv_heads, mask=mask)))
    output = call.fake()
    upstream = normal(seed + 9, *output.shape)
    plain = in_float64(call)
    expected = gradients(plain, plain_attention(plain, weights_of(call).detach()), upstream)
    assert_gradients(gradients(call, output, upstream), scaled_steps(call, expected), terms=400)


def clipping(call: Call) -> Call:
    """The call with static scales so small that some values are clipped, and none rounds on the very edge."""
    shrunk = {name: None if scale is None else scale * 0.7123 for name, scale in vars(call.scales).items()}
    return call.with_(scales=Scales(**shrunk))


def scaled_steps(call: Call, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of learned scales, multiplied by LSQ's 1 / sqrt(count * qmax)."""
    inputs, steps = list(gradients[:3]), gradients[3:]
    for name, step in zip(learned(call.spec), steps, strict=True):
        x = {"q": call.query, "k": call.key, "v": call.value}[name]
        inputs.append(step / math.sqrt(x.numel() // step.numel() * getattr(call.spec, name).qmax))
    return inputs


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("names", ["qk", "v", "p", "qkv", "qkp", "vp", "qkvp"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_where_some_matrices_stay_in_floating_point(names: str, mask: str, rule: RuleName) -> None:
    floating = {name: ProbsSpec(bits=None) if name == "p" else TensorSpec(bits=None) for name in names}
    call = differentiable(make_call(make_spec(8, rule, 0.5, **floating), mask=mask))
    output = call.fake()
    upstream = normal(9, *output.shape)
    plain = in_float64(call)
    weights = weights_of(call).detach()
    reference = plain_attention(plain, weights)
    torch.testing.assert_close(output, reference.float())
    assert_gradients(gradients(call, output, upstream), gradients(plain, reference, upstream), terms=400)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_compressed_is_dense_attention_with_its_gradients(mask: str, mode: ProbsMode) -> None:
    call = differentiable(make_call(make_spec(None, p=ProbsSpec(bits=None, mode=mode)), kv_heads=2, mask=mask))
    output = call.fake()
    plain = in_float64(call)
    dense = dense_attention(plain.query, plain.key, plain.value, call.valid, call.scaling)
    torch.testing.assert_close(output.double(), dense, rtol=1e-5, atol=1e-6)
    upstream = normal(9, *output.shape)
    assert_gradients(gradients(call, output, upstream), gradients(plain, dense, upstream), terms=200)


def test_gradients_of_eight_bits_point_where_the_dense_ones_do() -> None:
    call = differentiable(make_call(make_spec(8), rows=16, keys=16, dim=32))
    upstream = normal(9, 2, 4, 16, 32)
    dense = dense_attention(call.query, call.key, call.value, None, call.scaling)
    for found, expected in zip(gradients(call, call.fake(), upstream), gradients(call, dense, upstream), strict=True):
        assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), 0)) > 0.99
        assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.05)


def test_smoothed_keys_get_the_gradients_of_softmax() -> None:
    call = differentiable(make_call(make_spec(None, smooth_key=True), mask="padding"))
    bare = call.with_(spec=make_spec(None))
    upstream = normal(9, 2, 4, 5, 8)
    found, expected = (gradients(one, one.fake(), upstream) for one in (call, bare))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_come_in_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    call = differentiable(make_call(make_spec(8), dtype=dtype))
    wide = differentiable(make_call(make_spec(8)).with_(scales=call.scales))
    upstream = normal(9, 2, 4, 5, 8)
    found, expected = (gradients(one, one.fake(), upstream) for one in (call, wide))
    assert {gradient.dtype for gradient in found} == {dtype}
    for ours, theirs in zip(found, expected, strict=True):
        assert float(torch.cosine_similarity(ours.float().flatten(), theirs.flatten(), 0)) > 0.98


@given(calls(largest=6))
def test_gradients_are_finite_whatever_the_inputs(call: Call) -> None:
    call = differentiable(call)
    output = call.fake()
    for gradient in gradients(call, output, normal(1, *output.shape)):
        assert bool(gradient.isfinite().all())


def test_nan_and_infinity_in_floating_queries_and_keys_count_as_zero_and_saturate() -> None:
    call = make_call(make_spec(8, q=TensorSpec(bits=None), k=TensorSpec(bits=None)), batch=1, heads=1, rows=3, keys=4)
    call.query[0, 0, 0, 0], call.query[0, 0, 1, 0] = math.nan, math.inf
    call.key[0, 0, 0, 1], call.key[0, 0, 2, 0] = math.nan, -math.inf
    call = differentiable(call)
    output = call.fake()
    assert bool(output.isfinite().all())
    zeroed = call.with_(query=call.query.detach().nan_to_num(nan=0.0), key=call.key.detach().nan_to_num(nan=0.0))
    assert torch.equal(output, zeroed.fake())
    for gradient in gradients(call, output, torch.ones_like(output)):
        assert bool(gradient.isfinite().all())
