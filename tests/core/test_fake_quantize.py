"""The training forward: the reference's integers, and gradients against autograd of a plain float64 attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpress.config import ProbsMode, ProbsSpec, RuleName, TailName, TensorSpec
from attnpress.core.call import Scales
from attnpress.core.fake_quantize import ACCELERATOR_SLICE, EXACT, SLICE, batch_part, batch_slices
from tests.core.factories import (
    MASKS,
    MODES,
    RULES,
    SEEDS,
    Call,
    calls,
    differentiable,
    gradients,
    make_call,
    make_spec,
    normal,
    tensors,
    weights_of,
)
from tests.core.tails import with_tail

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


def fake_at(precision: str, call: Call) -> torch.Tensor:
    torch.set_float32_matmul_precision(precision)
    try:
        return call.fake()
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_codes_multiply_exactly_at_any_matmul_precision(precision: str, mode: ProbsMode) -> None:
    call = make_call(
        make_spec(8, "relative", 0.5, p=ProbsSpec(mode=mode)), seed=0, batch=4, heads=12, rows=128, keys=128, dim=64
    )
    assert torch.equal(fake_at(precision, call), call.integer().output)


@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 1), ("linear", 64)])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_sums_of_a_tail_are_exact_at_any_matmul_precision(precision: str, tail: TailName, rank: int) -> None:
    spec = make_spec(8, "relative", 0.5)
    call = with_tail(make_call(spec, seed=0, batch=4, heads=12, rows=128, keys=128, dim=64), tail, rank)
    assert torch.equal(fake_at(precision, call), call.integer().output)


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
