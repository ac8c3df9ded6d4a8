"""The reference attention against an oracle of Python integers, and the dense one against torch's own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import AttentionSpec, ProbsMode, ProbsSpec, RuleName, TensorSpec
from attnpress.core.attention import IntegerAttention, dense_attention, key_validity, repeat_heads
from tests.core.factories import MASKS, RULES, SEEDS, Call, calls, make_call, make_mask, make_spec, normal

F32 = np.float32


@dataclass(frozen=True)
class Answer:
    """One row of one head, as the contract defines it."""

    acc: list[int]
    row_max: int
    keep: list[bool]
    p_codes: list[int]
    weighted: list[int]
    output: list[float]


def codes_of(x: Tensor, scale: list[float], qmax: int) -> list[int]:
    """Codes of one token's values."""
    codes = []
    for value, step in zip(x.float().tolist(), scale, strict=True):
        if math.isnan(value):
            codes.append(0)
            continue
        with np.errstate(over="ignore"):
            exact = float(F32(value) * (F32(1) / F32(step)))
        codes.append(max(-qmax, min(qmax, round(exact))) if math.isfinite(exact) else int(math.copysign(qmax, exact)))
    return codes


def smoothed(key: Tensor, valid: list[bool]) -> Tensor:
    """Keys [Sk, D] of one head less their mean over valid ones, in fractions."""
    columns = []
    for column in key.float().T.tolist():
        counted = [on_grid(x) for x, real in zip(column, valid, strict=True) if real]
        mean = F32(float(sum(counted) / len(counted))) if counted else F32(0)
        with np.errstate(over="ignore"):
            columns.append([float(F32(x) - mean) for x in column])
    return torch.tensor(columns).T


def on_grid(x: float) -> Fraction:
    """The nearest multiple of 2^-20, at most 2^16 in magnitude; 0 for what is not finite."""
    if not math.isfinite(x):
        return Fraction(0)
    return max(Fraction(-(2**16)), min(Fraction(2**16), Fraction(round(Fraction(x) * 2**20), 2**20)))


def probability(distance: int, alpha: np.float32) -> int:
    rate = alpha * F32(1.4426950408889634) * F32(1024)
    octaves, fraction = divmod(min(round(float(F32(distance) * rate)), 18 * 1024), 1024)
    x = fraction * 64
    value = 65536 - (x * (45324 - (x * (15148 - (x * 2596 >> 16)) >> 16)) >> 16)
    return (value + (1 << octaves) // 2) >> octaves


def kept(
    spec: AttentionSpec, distance: dict[int, int], probs: dict[int, int], alpha: np.float32, cutoff: float
) -> set[int]:
    """Keys that survive, among the valid ones that the dictionaries hold."""
    ranked = sorted(distance, key=lambda i: (distance[i], i))
    if spec.rule == "topk":
        return set(ranked[: max(1, round((1 - spec.sparsity) * len(ranked)))])
    if spec.rule == "nm":
        kept_of_four, groups = max(1, 4 - math.floor(4 * spec.sparsity)), {i // 4 for i in ranked}
        return {i for group in groups for i in [j for j in ranked if j // 4 == group][:kept_of_four]}
    if math.isinf(cutoff):
        return set(ranked)
    if spec.rule == "relative":
        return {i for i in ranked if distance[i] <= math.floor(F32(cutoff) / alpha)}
    if spec.rule == "threshold":
        least = F32(math.exp(-cutoff)) * F32(sum(probs.values()))
        return {i for i in ranked if distance[i] == 0 or F32(probs[i]) >= least}
    found: set[int] = set()
    for i in ranked:
        if sum(probs[j] for j in found) < Fraction(cutoff) * sum(probs.values()):
            found.add(i)
    return found


def p_code(p: int, total: int, spec: ProbsSpec) -> int:
    if spec.mode == "row":
        return (p * spec.qmax + 32768) // 65536
    return round(float(F32(p) * (F32(spec.qmax) / F32(total))))


def answer(call: Call, b: int, h: int, i: int) -> Answer:
    """One row, from its inputs on, one scalar at a time."""
    spec, group = call.spec, call.query.shape[1] // call.key.shape[1]
    keys, dim = call.key.shape[2:]
    valid = call.allowed()
    q_scale = scale_of(call.scales.q, h, dim) if call.scales.q is not None else token_step(call.query[b, h, i], spec.q)
    k_scale, v_scale = scale_of(call.scales.k, h // group, dim), scale_of(call.scales.v, h // group, dim)
    key = call.key[b, h // group]
    if spec.smooth_key:
        key = smoothed(key, [bool(valid[b, :, :, j].any()) for j in range(keys)])
    q = codes_of(call.query[b, h, i], q_scale, spec.q.qmax)
    k = [codes_of(key[j], k_scale, spec.k.qmax) for j in range(keys)]
    v = [codes_of(call.value[b, h // group, j], v_scale, spec.v.qmax) for j in range(keys)]
    acc = [sum(x * y for x, y in zip(q, row, strict=True)) for row in k]
    alpha = (F32(q_scale[0]) * F32(k_scale[0])) * F32(call.scaling)
    allowed = [j for j in range(keys) if valid[b, h, i, j]]
    row_max = max((acc[j] for j in allowed), default=0)
    distance = {j: row_max - acc[j] for j in allowed}
    probs = {j: probability(distance[j], alpha) for j in allowed}
    survivors = kept(spec, distance, probs, alpha, math.inf if call.cutoff is None else float(call.cutoff[h]))
    total = sum(probs.values())
    codes = [p_code(probs[j], total, spec.p) if j in survivors else 0 for j in range(keys)]
    weighted = [sum(codes[j] * v[j][d] for j in range(keys)) for d in range(dim)]
    divisor = spec.p.qmax if spec.p.mode == "unit" and not spec.p.renormalize else max(1, sum(codes))
    output = [float(F32(w) * F32(s) / F32(divisor)) for w, s in zip(weighted, v_scale, strict=True)]
    return Answer(acc, row_max, [j in survivors for j in range(keys)], codes, weighted, output)


def scale_of(scale: Tensor | None, head: int, dim: int) -> list[float]:
    assert scale is not None
    return scale[0, min(head, scale.shape[1] - 1), 0].expand(dim).tolist()


def token_step(x: Tensor, spec: TensorSpec) -> list[float]:
    largest = max((abs(value) for value in x.float().tolist() if math.isfinite(value)), default=0.0)
    step = float(min(max(F32(largest) / F32(spec.qmax), F32(2.0**-40)), F32(2.0**40))) if largest else 1.0
    if spec.power_of_two:
        mantissa, exponent = math.frexp(step)
        step = math.ldexp(1.0, exponent - (mantissa == 0.5))
    return [step] * len(x)


def answer_of(found: IntegerAttention, b: int, h: int, i: int) -> Answer:
    columns = (found.acc, found.row_max, found.keep, found.p_codes, found.weighted, found.output)
    acc, row_max, keep, p_codes, weighted, output = (column[b, h, i].tolist() for column in columns)
    return Answer(acc, row_max[0], keep, p_codes, weighted, output)


@given(calls(largest=5))
def test_every_integer_and_the_output_are_those_of_the_oracle(call: Call) -> None:
    found = call.integer()
    for b, h, i in product(*map(range, call.query.shape[:3])):
        assert answer_of(found, b, h, i) == answer(call, b, h, i)
        assert int(found.code_sum[b, h, i]) == sum(found.p_codes[b, h, i].tolist())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["row", "unit"])
@pytest.mark.parametrize(("signed", "renormalize"), [(False, False), (True, True)])
def test_every_rule_and_mode_is_that_of_the_oracle(
    rule: RuleName, mode: ProbsMode, signed: bool, renormalize: bool
) -> None:
    probs = ProbsSpec(bits=4, mode=mode, signed=signed, renormalize=renormalize)
    call = make_call(make_spec(8, rule, 0.5, p=probs), heads=4, kv_heads=2, rows=3, keys=6, dim=4, mask="pairs")
    found = call.integer()
    for b, h, i in product(*map(range, call.query.shape[:3])):
        assert answer_of(found, b, h, i) == answer(call, b, h, i)
    assert bool(found.keep.any()), "some pair survives"
    assert not torch.equal(found.keep, call.allowed()), "some pair is pruned"


@given(calls(largest=8))
def test_integers_have_the_documented_types_and_ranges(call: Call) -> None:
    found, spec = call.integer(), call.spec
    kinds = {field.name: getattr(found, field.name).dtype for field in dataclasses.fields(found)}
    assert kinds == {
        "q_codes": torch.int8, "k_codes": torch.int8, "v_codes": torch.int8, "acc": torch.int32,
        "row_max": torch.int32, "keep": torch.bool, "p_codes": torch.uint8, "code_sum": torch.int64,
        "weighted": torch.int64, "output": torch.float32,
    }  # fmt: skip
    for codes, matrix in ((found.q_codes, spec.q), (found.k_codes, spec.k), (found.v_codes, spec.v)):
        assert int(codes.abs().max()) <= matrix.qmax
    assert int(found.p_codes.max()) <= spec.p.qmax
    assert bool(found.output.isfinite().all())
    assert not (found.keep & ~call.allowed()).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["row", "unit"])
def test_a_row_without_a_valid_key_outputs_zeros(rule: RuleName, mode: ProbsMode) -> None:
    spec = make_spec(8, rule, 0.5, p=ProbsSpec(mode=mode))
    valid = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    valid[:, :, 2] = False
    found = make_call(spec).with_(valid=valid).integer()
    assert not found.output[:, :, 2].any()
    assert bool(found.output[:, :, [0, 1, 3, 4]].any())


@pytest.mark.parametrize("rule", RULES)
@given(seed=SEEDS, extra=st.integers(1, 5))
@settings(max_examples=20)
def test_outputs_do_not_depend_on_padding_or_batch_mates(rule: RuleName, seed: int, extra: int) -> None:
    spec = make_spec(4, rule, 0.6, smooth_key=True)
    call = make_call(spec, seed, batch=3, keys=6 + extra, rows=4)
    valid = (torch.arange(6 + extra) < 6).view(1, 1, 1, -1)
    padded = call.with_(valid=valid).integer()
    alone = call.with_(
        query=call.query[1:2], key=call.key[1:2, :, :6], value=call.value[1:2, :, :6], valid=None
    ).integer()
    assert torch.equal(padded.p_codes[1:2, ..., :6], alone.p_codes)
    assert torch.equal(padded.output[1:2], alone.output)


@given(SEEDS, st.sampled_from(MASKS), st.integers(1, 9), st.integers(1, 9))
def test_dense_attention_is_that_of_torch(seed: int, mask: str, rows: int, keys: int) -> None:
    query, key, value = normal(seed, 2, 4, rows, 8), normal(seed + 1, 2, 2, keys, 8), normal(seed + 2, 2, 2, keys, 8)
    valid = make_mask(mask, seed + 3, 2, 4, rows, keys)
    found = dense_attention(query, key, value, valid, 0.3)
    reachable = torch.ones(2, 4, rows, 1, dtype=torch.bool) if valid is None else valid.any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(query, key, value, valid, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, torch.where(reachable, expected, 0.0))


@pytest.mark.parametrize("mode", ["row", "unit"])
def test_eight_bits_are_close_to_dense_attention(mode: ProbsMode) -> None:
    call = make_call(make_spec(8, p=ProbsSpec(bits=8, mode=mode)), rows=16, keys=12, dim=32, mask="causal")
    dense = dense_attention(call.query, call.key, call.value, call.valid, call.scaling)
    error = (call.integer().output - dense).abs()
    # A step of V is about 4/127; P in mode "unit" has steps of 1/255 that do not add up to one.
    assert float(error.mean()) < 0.01
    assert float(error.max()) < 0.06


def test_smoothing_keys_helps_where_they_share_an_offset() -> None:
    offset = 20 * normal(9, 1, 1, 1, 16)
    errors = []
    for smooth in (False, True):
        call = make_call(make_spec(4, smooth_key=smooth, v=TensorSpec(bits=8), p=ProbsSpec(bits=8)), dim=16, keys=16)
        call = call.with_(key=call.key + offset).calibrated()
        dense = dense_attention(call.query, call.key, call.value, None, call.scaling)
        errors.append(float((call.integer().output - dense).abs().mean()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("name", ["q", "k", "v", "p"])
def test_integers_need_bits_for_all_four(name: str) -> None:
    floating = ProbsSpec(bits=None) if name == "p" else TensorSpec(bits=None)
    changes: dict[str, Any] = {"q": floating, "k": floating} if name in "qk" else {name: floating}
    call = make_call(make_spec(8)).with_(spec=make_spec(8, **changes))
    with pytest.raises(ValueError, match="needs bits for all of q, k, v and p"):
        call.integer()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_missing_scale_names_its_matrix_and_the_mend(name: str) -> None:
    call = make_call(make_spec(8))
    with pytest.raises(ValueError, match=rf"{name} has no scale yet: run calibrate"):
        call.with_(scales=dataclasses.replace(call.scales, **{name: None})).integer()


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_batch_gives_an_empty_output(rule: RuleName) -> None:
    call = make_call(make_spec(8, rule, 0.5))
    empty = call.with_(query=call.query[:0], key=call.key[:0], value=call.value[:0])
    assert empty.integer().output.shape == (0, 4, 5, 8)


def test_heads_are_repeated_in_groups() -> None:
    x = torch.arange(2).view(1, 2, 1, 1)
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert repeat_heads(x, 2) is x
    assert repeat_heads(x[:, :1], 6).shape[1] == 1, "what all heads share stays shared"


def test_keys_are_valid_if_any_query_may_see_them() -> None:
    assert key_validity(None) is None
    found = key_validity(torch.tensor([[[[True, False, False], [False, True, False]]]]))
    assert found is not None
    assert found.shape == (1, 1, 3, 1)
    assert found.flatten().tolist() == [True, True, False]
