"""What attention calls may be given: masks of every shape that broadcasts, no keys at all, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsSpec, TensorSpec
from attnpress.core.arguments import pair_mask
from attnpress.core.attention import key_validity
from attnpress.core.call import Scales
from attnpress.core.cost import count_pairs
from attnpress.core.probe import probe
from attnpress.core.quantizer import smooth_key
from attnpress.core.soft_gate import soft_gate_attention
from tests.core.factories import RULES, Call, make_call, make_spec, normal

B, HQ, HKV, SQ, SK = 2, 4, 2, 5, 7
SHAPES: list[tuple[int, ...]] = [
    (), (1,), (SK,), (1, SK), (SQ, SK), (SQ, 1), (1, 1), (1, SQ, SK), (HQ, SQ, SK), (HQ, 1, SK), (HQ, 1, 1),
    (HQ, SQ, 1),
    (1, 1, SQ, SK), (B, 1, 1, SK), (B, 1, SQ, 1), (B, 1, 1, 1), (1, HQ, 1, SK), (1, HQ, SQ, SK), (B, HQ, 1, 1),
    (B, HQ, SQ, 1), (B, HQ, SQ, SK),
]  # fmt: skip


def mask_of(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.35


def in_full(call: Call) -> Call:
    return call.with_(valid=call.allowed().clone())


def smoothed(shape: tuple[int, ...], **changes: Any) -> Call:
    call = make_call(make_spec(8, smooth_key=True, **changes), batch=B, heads=HQ, kv_heads=HKV, rows=SQ, keys=SK)
    return call.with_(key=call.key + 3, valid=mask_of(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_of_any_shape_means_what_it_broadcasts_to(shape: tuple[int, ...]) -> None:
    call = smoothed(shape, sparsity=0.5)
    expected, found = in_full(call).integer(), call.integer()
    for field in dataclasses.fields(found):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name
    assert torch.equal(call.fake(), in_full(call).fake())


@pytest.mark.parametrize("shape", [(), (SK,), (SQ, SK), (HQ, 1, SK), (B, 1, SQ, 1)], ids=str)
def test_a_mask_of_any_shape_in_all_that_looks_at_calls(shape: tuple[int, ...]) -> None:
    call = smoothed(shape)
    full = in_full(call)

    def seen(one: Call) -> list[Tensor]:
        shown = probe(one.with_(cutoff=None))
        soft = soft_gate_attention(one.with_(cutoff=torch.ones(1)))
        assert one.valid is not None
        counts = count_pairs(torch.ones(B, HQ, SQ, SK), None, one.valid)
        return [shown.after, shown.counted, shown.histogram, *shown.loss.values(), *soft, *counts.tensors()]

    for found, expected in zip(seen(call), seen(full), strict=True):
        assert torch.equal(found, expected)


def test_the_mean_that_smoothing_takes_is_over_the_keys_even_of_a_mask_with_one_flag_for_all() -> None:
    key = normal(0, B, HKV, SK, 8)
    expected = smooth_key(key, None)
    for shape in ((1, 1), (SQ, 1), (B, 1, SQ, 1), (SK,)):
        assert torch.equal(smooth_key(key, key_validity(torch.ones(shape, dtype=torch.bool))), expected)


def test_bytes_that_are_neither_0_nor_1_count_as_true() -> None:
    call = smoothed((B, 1, SQ, SK))
    assert call.valid is not None
    odd = (call.valid.to(torch.uint8) * 254).view(torch.bool)
    assert torch.equal(call.with_(valid=odd).integer().output, call.integer().output)
    assert torch.equal(call.with_(valid=odd).fake(), call.fake())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["row", "unit"])
def test_no_keys_at_all_give_zeros_and_gradients_of_zero(rule: Any, mode: Any) -> None:
    spec = make_spec(8, rule, 0.5, p=ProbsSpec(mode=mode), smooth_key=True)
    call = make_call(spec, rows=SQ, keys=SK)
    call = call.with_(key=call.key[:, :, :0], value=call.value[:, :, :0])
    found = call.integer()
    assert torch.equal(found.output, torch.zeros(2, 4, SQ, 8))
    assert found.p_codes.shape == found.acc.shape == found.keep.shape == (2, 4, SQ, 0)
    assert found.k_codes.shape == (2, 4, 0, 8)
    leaf = call.query.clone().requires_grad_()
    output = call.with_(query=leaf).fake()
    assert torch.equal(output, found.output)
    (grad,) = torch.autograd.grad(output.sum(), leaf)
    assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 4, 0, 8)])
@pytest.mark.parametrize("keys", [0, 7, 600])
def test_no_queries_or_no_batch_give_nothing(shape: tuple[int, ...], keys: int) -> None:
    query, key = torch.zeros(shape), torch.zeros(shape[0], 4, keys, 8)
    one = torch.ones(1, 1, 1, 1)
    call = Call(query, key, key, None, Scales(q=one, k=one, v=one), None, make_spec(8), 0.5)
    assert call.integer().output.shape == call.fake().shape == shape


@pytest.mark.parametrize("bad", [0.0, -0.01, 1e-45, 1e38, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_scales_that_no_calibration_gives_are_refused(name: str, bad: float) -> None:
    call = make_call(make_spec(8))
    scale = getattr(call.scales, name).clone()
    scale[:, -1] = bad
    call = call.with_(scales=dataclasses.replace(call.scales, **{name: scale}))
    for run in (call.integer, call.fake):
        with pytest.raises(ValueError, match=rf"{name}_scale: scales are 2\^-40 to 2\^40, found .*calibrate"):
            run()


def test_a_scale_of_queries_that_find_their_own_is_not_looked_at() -> None:
    call = make_call(make_spec(8, q=TensorSpec(granularity="token")))
    unused = call.with_(scales=dataclasses.replace(call.scales, q=torch.zeros(1)))
    assert torch.equal(unused.integer().output, call.integer().output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling": -0.5}, "scaling: a factor of the scores from .* found -0.5"),
        ({"scaling": 0.0}, "scaling: .* found 0.0"),
        ({"scaling": math.nan}, "scaling: .* found nan"),
        ({"scaling": math.inf}, "scaling: .* found inf"),
        ({"scaling": 1e-30}, "scaling: .* found 1e-30"),
        ({"cutoff": torch.full((4,), -1.0)}, "cutoff: thresholds are 0 or more, up to inf, found -1.0"),
        ({"cutoff": torch.tensor([1, 1, 1, math.nan])}, "cutoff: .* found nan"),
        ({"cutoff": torch.full((4,), -math.inf)}, "cutoff: .* found -inf"),
        ({"cutoff": torch.ones(3)}, r"cutoff: float32 \[4\] .* found torch.float32 \[3\]"),
        ({"cutoff": torch.ones(4, dtype=torch.float64)}, r"cutoff: float32 \[4\] .* found torch.float64"),
        ({"scales": Scales(torch.ones(1), torch.ones(1), torch.ones(1))}, r"q_scale: float32 \[1, 1 or 4, 1, 1\]"),
        ({"query": torch.ones(2, 4, 5, 8, dtype=torch.int32)}, "query: floating-point numbers .* found torch.int32"),
        ({"key": torch.ones(2, 4, 7)}, "key: floating-point numbers"),
        ({"key": torch.ones(2, 0, 7, 8), "value": torch.ones(2, 0, 7, 8)}, "do not fit together"),
        ({"key": torch.ones(2, 3, 7, 8), "value": torch.ones(2, 3, 7, 8)}, "do not fit together"),
        ({"key": torch.ones(1, 4, 7, 8), "value": torch.ones(1, 4, 7, 8)}, "do not fit together"),
        ({"value": torch.ones(2, 4, 6, 8)}, "do not fit together"),
        ({"value": torch.ones(2, 4, 7, 8, device="meta")}, "value: .* on the device of the query .* on meta"),
        ({"valid": torch.ones(5, 6, dtype=torch.bool)}, r"valid: a bool mask broadcastable to .*\[2, 4, 5, 7\]"),
        ({"valid": torch.ones(3, 1, 1, 7, dtype=torch.bool)}, "valid: .* found torch.bool"),
        ({"valid": torch.ones(1, 1, 1, 5, 7, dtype=torch.bool)}, "valid: .* found torch.bool"),
        ({"valid": torch.ones(5, 7)}, "valid: .* found torch.float32"),
        ({"valid": torch.ones(5, 7, dtype=torch.bool, device="meta")}, "valid: .* on meta"),
    ],
)  # fmt: skip
def test_what_no_call_may_be_given_is_named(change: dict[str, Any], message: str) -> None:
    call = make_call(make_spec(8, sparsity=0.5), rows=5, keys=7, dim=8).with_(**change)
    for run in (call.integer, call.fake):
        with pytest.raises(ValueError, match=message):
            run()


def test_pair_mask_is_a_view_and_none_stays_none() -> None:
    query, key = torch.zeros(B, HQ, SQ, 8), torch.zeros(B, HKV, SK, 8)
    valid = mask_of((SQ, 1))
    found = pair_mask(valid, query, key)
    assert found is not None
    assert found.shape == (1, 1, SQ, SK)
    assert found.data_ptr() == valid.data_ptr()
    assert pair_mask(None, query, key) is None


def test_heads_of_values_may_have_a_size_of_their_own() -> None:
    call = make_call(AttentionSpec(v=TensorSpec(granularity="tensor")))
    call = call.with_(value=normal(9, 2, 4, 7, 12))
    assert call.fake().shape == call.integer().output.shape == (2, 4, 5, 12)
