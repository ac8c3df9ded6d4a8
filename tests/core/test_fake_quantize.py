"""The training forward: the reference's integers, and gradients against autograd of a plain float64 attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsMode, ProbsSpec, RuleName, TensorSpec
from attnpress.core.attention import dense_attention
from attnpress.core.call import Scales
from attnpress.core.fake_quantize import ACCELERATOR_SLICE, EXACT, SLICE, batch_part, batch_slices, dropout_mask
from tests.core.factories import MASKS, RULES, SEEDS, Call, calls, make_call, make_spec, normal

FLOAT32 = torch.finfo(torch.float32)
MODES: tuple[ProbsMode, ...] = ("row", "unit")


# The same integers as the reference.


@given(calls())
def test_output_is_that_of_the_reference(call: Call) -> None:
    assert torch.equal(call.fake(), call.integer().output)


@given(calls())
def test_every_probability_code_is_that_of_the_reference(call: Call) -> None:
    found = call.integer()
    divisor = found.code_sum.clamp(min=1)
    if call.spec.p.mode == "unit" and not call.spec.p.renormalize:
        divisor = torch.tensor(call.spec.p.qmax)
    assert torch.equal(weights_of(call), found.p_codes.float() / divisor.float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_codes_multiply_exactly_at_any_matmul_precision(precision: str, mode: ProbsMode) -> None:
    call = make_call(
        make_spec(8, "relative", 0.5, p=ProbsSpec(mode=mode)), seed=0, batch=4, heads=12, rows=128, keys=128, dim=64
    )
    torch.set_float32_matmul_precision(precision)
    try:
        found = call.fake()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, call.integer().output)


def weights_of(call: Call, dropout: float = 0.0) -> Tensor:
    """The weight that each query gives to each key [B, Hq, Sq, Sk], seen from outside: the values are unit vectors."""
    batch, kv_heads, keys, _ = call.key.shape
    units = torch.eye(keys).expand(batch, kv_heads, keys, keys)
    spec = dataclasses.replace(call.spec, v=TensorSpec(bits=8, granularity="tensor"))
    scales = dataclasses.replace(call.scales, v=torch.ones(1, 1, 1, 1))
    return call.with_(value=units, spec=spec, scales=scales).fake(dropout)


@settings(max_examples=30)
@given(
    keys=st.sampled_from([517, 518, 519, 520, 1500]), mode=st.sampled_from(MODES), rule=st.sampled_from(RULES),
    bits=st.sampled_from([2, 8]), spread=st.sampled_from([0.0, 1e-3, 1.0]), seed=SEEDS,
)  # fmt: skip
def test_long_rows_are_summed_exactly(
    keys: int, mode: ProbsMode, rule: RuleName, bits: int, spread: float, seed: int
) -> None:
    spec = make_spec(bits, rule, 0.5, p=ProbsSpec(bits=8, mode=mode, renormalize=True))
    call = make_call(spec, seed, batch=1, heads=2, rows=2, keys=keys, dim=3, spread=spread)
    # Values all at one end: nothing cancels, so the sums become as large as they can.
    call = call.with_(value=call.value.abs() + 4).calibrated()
    assert torch.equal(call.fake(), call.integer().output)


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_codes_beyond_float32_are_exact(mode: ProbsMode) -> None:
    keys = 100_003
    spec = make_spec(8, p=ProbsSpec(bits=8, mode=mode, renormalize=True))
    call = make_call(spec, batch=1, heads=1, rows=24, keys=keys, dim=1)
    nearly_flat = torch.linspace(0.0, 1e-2, 24).view(24, 1)
    call = call.with_(query=nearly_flat.expand(1, 1, 24, 1), value=call.value.abs() + 4).calibrated()
    found = call.integer()
    assert mode == "unit" or int(found.code_sum.max()) > EXACT
    assert torch.equal(call.fake(), found.output)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1e-7, 1e-6])
def test_distances_beyond_float32_s_integers_are_pruned_alike(rule: RuleName, alpha: float) -> None:
    signs = torch.tensor([1.0, -1.0, 0.5, -0.2, -0.99, -0.999]).view(1, 1, 6, 1)
    ones = torch.ones(1, 1, 1, 1024)
    spec = make_spec(8, rule, 0.4, p=ProbsSpec(bits=8))
    scales = Scales(q=torch.full((1, 1, 1, 1), 1 / 127), k=torch.full((1, 1, 1, 1), 1 / 127), v=torch.ones(1, 1, 1, 1))
    cutoff = torch.tensor([0.999 if rule == "mass" else 2.0])
    call = Call(ones, signs * ones, signs * ones, None, scales, cutoff, spec, alpha * 127**2)
    found = call.integer()
    assert int((found.row_max - found.acc).max()) > EXACT
    assert torch.equal(weights_of(call), found.p_codes.float() / found.code_sum.float())


@given(calls(largest=8))
def test_memory_layout_does_not_matter(call: Call) -> None:
    names = ("query", "key", "value")
    strided = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in names}
    stretched = {name: getattr(call, name).repeat_interleave(2, -1)[..., ::2] for name in names}
    for inputs in (strided, stretched):
        assert torch.equal(call.with_(**inputs).fake(), call.fake())


@given(calls(largest=6))
def test_output_is_float32_and_ready_for_the_framework(call: Call) -> None:
    output = call.fake()
    assert output.dtype == torch.float32
    assert output.transpose(1, 2).is_contiguous()
    assert bool(output.isfinite().all())


@given(calls(largest=6))
def test_inputs_are_left_alone(call: Call) -> None:
    before = {name: getattr(call, name).clone() for name in ("query", "key", "value")}
    call.fake()
    for name, tensor in before.items():
        assert torch.equal(getattr(call, name).nan_to_num(), tensor.nan_to_num())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_gpu_gives_the_integers_of_the_reference(rule: RuleName, mode: ProbsMode, bits: int, precision: str) -> None:
    spec = make_spec(bits, rule, 0.7, p=ProbsSpec(bits=bits, mode=mode), smooth_key=bits == 4)
    call = make_call(spec, batch=4, heads=12, rows=200, keys=200, dim=32, mask="padding")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)  # TF32, too, holds every code exactly
    try:
        found = on("cuda", call).fake().cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, call.integer().output)


def on(device: str, call: Call) -> Call:
    """The call with its tensors on a device."""
    scales = Scales(*(None if one is None else one.to(device) for one in (call.scales.q, call.scales.k, call.scales.v)))
    names = ("query", "key", "value", "valid", "cutoff")
    moved = {name: None if (one := getattr(call, name)) is None else one.to(device) for name in names}
    return call.with_(scales=scales, **moved)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
def test_batches_larger_than_a_slice_are_worked_through_whole(rule: RuleName, mask: str) -> None:
    call = make_call(make_spec(8, rule, 0.7), batch=9, heads=2, rows=130, keys=140, dim=4, mask=mask)
    call = differentiable(call)
    assert len(batch_slices((9, 2, 130, 140), torch.device("cpu"))) > 1
    output = call.fake()
    assert torch.equal(output, call.integer().output)
    upstream = normal(7, *output.shape)
    whole = torch.autograd.grad(output, tensors(call), upstream)
    for b in range(9):
        one = call.with_(
            query=call.query[b : b + 1], key=call.key[b : b + 1], value=call.value[b : b + 1],
            valid=batch_part(call.valid, slice(b, b + 1)),
        )  # fmt: skip
        parts = torch.autograd.grad(one.fake(), tensors(call), upstream[b : b + 1])
        for found, part in zip(whole, parts, strict=True):
            torch.testing.assert_close(found[b], part[b])


@given(
    st.sampled_from(["cpu", "cuda"]), st.integers(0, 40), st.integers(1, 8), st.integers(1, 300), st.integers(1, 300)
)
def test_slices_cover_the_batch_once_and_stay_small(kind: str, batch: int, heads: int, rows: int, keys: int) -> None:
    limit = SLICE if kind == "cpu" else ACCELERATOR_SLICE
    slices = batch_slices((batch, heads, rows, keys), torch.device(kind))
    assert [i for part in slices for i in range(batch)[part]] == list(range(batch))
    sizes = [len(range(batch)[part]) for part in slices]
    assert all(size == 1 or size * heads * rows * keys <= limit for size in sizes)


# Gradients.


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


# Dropout.


def nearest_rate(rate: float) -> float:
    """Dropout is drawn from one byte a pair."""
    return round(rate * 256) / 256


@given(seed=SEEDS, rate=st.sampled_from([0.1, 0.5, 0.9]), rule=st.sampled_from(RULES))
@settings(max_examples=20)
def test_dropout_removes_codes_and_scales_up_the_rest(seed: int, rate: float, rule: RuleName) -> None:
    call = make_call(make_spec(8, rule), seed, rows=40, keys=40)
    torch.manual_seed(seed)
    weights, dropped = weights_of(call), weights_of(call, rate)
    alive = dropped != 0
    torch.testing.assert_close(dropped[alive], (weights / (1 - nearest_rate(rate)))[alive])
    pairs = int((weights > 0).sum())
    deviation = math.sqrt(rate * (1 - rate) / pairs)
    assert 1 - float(alive.sum()) / pairs == pytest.approx(nearest_rate(rate), abs=5 * deviation)


@given(st.floats(0, 0.99), SEEDS)
def test_the_dropout_mask_keeps_the_share_that_it_tells(rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    kept, share = dropout_mask(torch.empty(7, 3, 41, 13), rate)
    assert share == 1 - nearest_rate(rate)
    assert abs(share - (1 - rate)) <= 1 / 512
    if kept is None:
        assert share == 1
        return
    assert kept.shape == (7, 3, 41, 13)
    assert set(kept.unique().tolist()) <= {0, 1}
    deviation = math.sqrt(share * (1 - share) / kept.numel())
    assert float(kept.double().mean()) == pytest.approx(share, abs=5 * deviation)
    for dim in range(4):
        assert len({line.sum().item() for line in kept.transpose(0, dim)}) > 1, "no pattern along any dimension"


def test_dropout_is_drawn_anew_for_each_call_and_repeats_with_the_seed() -> None:
    call = make_call(make_spec(8), rows=20, keys=20)
    torch.manual_seed(0)
    first, second = weights_of(call, 0.5), weights_of(call, 0.5)
    torch.manual_seed(0)
    assert torch.equal(weights_of(call, 0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [None, 8])
def test_gradients_see_the_very_pairs_that_dropout_removed(mode: ProbsMode, bits: int | None) -> None:
    call = differentiable(make_call(make_spec(8, sparsity=0.5, p=ProbsSpec(bits=bits, mode=mode)), mask="pairs"))
    weights = weights_of(call).detach()
    torch.manual_seed(3)
    dropped = weights_of(call, 0.4).detach()
    torch.manual_seed(3)
    output = call.fake(0.4)
    upstream = normal(9, *output.shape)
    plain = in_float64(call)
    factor = (dropped != 0).double() / (1 - nearest_rate(0.4))
    reference = plain_attention(plain, weights, factor)
    torch.testing.assert_close(output, reference.float())
    assert_gradients(gradients(call, output, upstream), gradients(plain, reference, upstream), terms=400)


# Edges.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [None, 8])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(
    rule: RuleName, mode: ProbsMode, bits: int | None
) -> None:
    q = TensorSpec(bits=bits, granularity="token")
    v = TensorSpec(bits=bits, learned=True)
    spec = make_spec(bits, rule, 0.5, q=q, v=v, p=ProbsSpec(bits=bits, mode=mode), smooth_key=True)
    full = make_call(spec)
    empty = differentiable(full.with_(query=full.query[:0], key=full.key[:0], value=full.value[:0]))
    output = empty.fake(0.1)
    assert output.shape == (0, 4, 5, 8)
    for gradient, x in zip(gradients(empty, output, output), tensors(empty), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_missing_scale_says_what_to_do(name: str) -> None:
    call = make_call(make_spec(8))
    with pytest.raises(ValueError, match="run calibrate"):
        call.with_(scales=dataclasses.replace(call.scales, **{name: None})).fake()


def test_floating_scores_may_be_of_any_size() -> None:
    floating = TensorSpec(bits=None)
    for factor in (1e-6, 1.0, 1e6, 1e12):
        for rule in RULES:
            spec = make_spec(8, rule, 0.3, q=floating, k=floating)
            call = make_call(spec, mask="padding", seed=5).with_(cutoff=None)
            low = call.with_(query=-call.query.abs() * factor, key=call.key.abs())
            weights, allowed = weights_of(low), low.allowed()
            assert bool((weights.sum(-1)[allowed.any(-1)] > 0.99).all()), (factor, rule)
            assert not weights[~allowed].any()
