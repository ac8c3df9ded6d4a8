"""The tail against an oracle of Python integers; its training forward and gradients; what calibration fits for it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpress.config import ConfigError, ProbsSpec, TailName, TensorSpec
from attnpress.config.recipe import parse_spec
from attnpress.core.attention import IntegerAttention, TailedAttention, query_scale, repeat_heads, score_step
from attnpress.core.call import Scales
from attnpress.core.tail import Tail, level, projected
from tests.core.factories import RULES, SEEDS, Call, calls, make_call, make_spec, normal
from tests.core.tails import make_none, with_tail

F32 = np.float32
TAILS: tuple[TailName, ...] = ("mean", "linear")


def tail_row(call: Call, found: IntegerAttention, b: int, h: int, row: int) -> tuple[dict[str, Any], list[float]]:
    """The integers of one row's tail in Python, sums over all keys less those over survivors; and the output."""
    tail, group = call.scales.tail, call.query.shape[1] // call.key.shape[1]
    assert tail is not None
    assert call.scales.v is not None
    allowed = [j for j in range(call.key.shape[2]) if bool(call.allowed()[b, h, row, j])]
    q = found.q_codes[b, h, row].tolist()
    k, v = found.k_codes[b, h // group].tolist(), found.v_codes[b, h // group].tolist()
    code = found.p_codes[b, h, row].tolist()
    survivors = [j for j in allowed if code[j] > 0]
    count, dim = len(allowed) - len(survivors), len(q)
    top = int(found.row_max[b, h, row])
    acc = {j: sum(x * y for x, y in zip(q, k[j], strict=True)) for j in allowed}
    sum_k = [sum(k[j][d] for j in allowed) for d in range(dim)]
    distance = len(allowed) * top - sum(x * y for x, y in zip(q, sum_k, strict=True))
    distance -= sum(top - acc[j] for j in survivors)
    value = [sum(v[j][d] for j in allowed) - sum(v[j][d] for j in survivors) for d in range(len(v[0]))]
    q_scale = found_q_scale(call, b, h, row)
    alpha = F32(F32(q_scale) * F32(scale_at(call.scales.k, h // group))) * F32(call.scaling)
    off = call.cutoff is not None and math.isinf(float(call.cutoff[h])) and call.spec.rule not in ("topk", "nm")
    t, u = level_of(distance, count, alpha, math.inf if off else float(tail.lift[h]), call.spec.p.qmax)
    own: dict[str, Any] = {"count": count, "distance": distance, "level": u, "value": value}
    if count and not off:
        own["exponent"] = t
    total = [F32(x) for x in value]
    if call.spec.tail == "linear":
        score, slope, step = first_order(call, tail, (b, h, row), q, k, v, allowed, survivors)
        own |= {"score": score, "slope": slope}
        mean = F32(score) / F32(max(count, 1))
        rise = [F32(x) - mean * y for x, y in zip(slope, total, strict=True)]
        total = [x + alpha * F32(step) * y for x, y in zip(total, rise, strict=True)]
    divisor = F32(max(sum(code), 1)) + u * F32(count)
    weighted = [sum(code[j] * v[j][d] for j in survivors) for d in range(len(value))]
    scales = [scale_at(call.scales.v, h // group, d) for d in range(len(value))]
    output = [float((F32(w) + u * x) * F32(s) / divisor) for w, x, s in zip(weighted, total, scales, strict=True)]
    return own, output


def first_order(
    call: Call, tail: Tail, at: tuple[int, int, int], q: list[int], k: list[list[int]], v: list[list[int]],
    allowed: list[int], survivors: list[int],
) -> tuple[int, list[int], float]:  # fmt: skip
    group = call.query.shape[1] // call.key.shape[1]
    head = at[1] // group
    step = 1.0
    if tail.directions is not None:
        found = tail.directions
        q = project_in_python(q, found.query[head].long().tolist(), [0] * found.query.shape[-1])
        offset = found.offset[head].long().tolist()
        k = [project_in_python(one, found.key[head].long().tolist(), offset) for one in k]
        step = float(found.step[head])
    matrix = [[sum(k[j][i] * v[j][d] for j in allowed) for d in range(len(v[0]))] for i in range(len(q))]
    scores = {j: sum(x * y for x, y in zip(q, k[j], strict=True)) for j in allowed}
    score = sum(x * sum(k[j][i] for j in allowed) for i, x in enumerate(q)) - sum(scores[j] for j in survivors)
    slope = [
        sum(x * matrix[i][d] for i, x in enumerate(q)) - sum(scores[j] * v[j][d] for j in survivors)
        for d in range(len(v[0]))
    ]
    return score, slope, step


def project_in_python(codes: list[int], directions: list[list[int]], offset: list[int]) -> list[int]:
    sums = [sum(x * row[i] for x, row in zip(codes, directions, strict=True)) for i in range(len(offset))]
    return [max(-127, min(127, (s + 2048 >> 12) - o)) for s, o in zip(sums, offset, strict=True)]


def level_of(distance: int, count: int, alpha: np.float32, lift: float, qmax: int) -> tuple[int, np.float32]:
    if count == 0 or math.isinf(lift):
        return 0, F32(0)
    rate = alpha * F32(1.4426950408889634) * F32(1024)
    with np.errstate(over="ignore"):
        scaled = float(F32(distance) / F32(count) * rate)
    t = max(0, round(min(scaled, 65536.0)) - int(lift))
    octaves, fraction = divmod(t, 1024)
    x = fraction * 64
    fixed = 65536 - (x * (45324 - (x * (15148 - (x * 2596 >> 16)) >> 16)) >> 16)
    return t, F32(0) if t >= 65536 else F32(qmax * fixed * 2.0 ** -(16 + octaves))


def found_q_scale(call: Call, b: int, h: int, row: int) -> float:
    scale = query_scale(call.query, call.scales, call.spec.q)
    return float(scale.expand(len(call.query), call.query.shape[1], call.query.shape[2], 1)[b, h, row, 0])


def scale_at(scale: Tensor | None, head: int, channel: int = 0) -> float:
    assert scale is not None
    return float(scale[0, head if scale.shape[1] > 1 else 0, 0, channel if scale.shape[3] > 1 else 0])


@settings(deadline=None, max_examples=60)
@given(calls(largest=9), st.sampled_from(TAILS), st.integers(1, 10), SEEDS)
def test_is_what_the_contract_says(drawn: Call, tail: TailName, rank: int, seed: int) -> None:
    call = with_tail(drawn, tail, rank, seed)
    found = call.integer()
    prunes = call.spec.sparsity > 0 if call.spec.rule in ("topk", "nm") else call.cutoff is not None
    assert isinstance(found, TailedAttention) == prunes
    if not prunes:
        assert torch.equal(found.output, call.with_(spec=make_none(call)).integer().output)
        return
    for b, h, row in np.ndindex(*call.query.shape[:3]):
        own, output = tail_row(call, found, b, h, row)
        for name, expected in own.items():
            got = getattr(found, f"tail_{name}")[b, h, row]
            assert got.tolist() == (expected if isinstance(expected, list) else [expected]), name
        assert found.output[b, h, row].tolist() == output


@settings(deadline=None, max_examples=60)
@given(calls(), st.sampled_from(TAILS), st.integers(1, 24), SEEDS)
def test_training_sees_the_integers_of_the_reference(drawn: Call, tail: TailName, rank: int, seed: int) -> None:
    call = with_tail(drawn, tail, rank, seed)
    found = call.integer()
    assert torch.equal(call.fake(), found.output)
    for field in dataclasses.fields(found):
        if field.name.startswith("tail_"):
            wanted = {"count": torch.int32, "exponent": torch.int32, "level": torch.float32}
            assert getattr(found, field.name).dtype == wanted.get(field.name.removeprefix("tail_"), torch.int64)


@pytest.mark.parametrize("tail", TAILS)
def test_training_is_exact_where_float32_sums_are_not(tail: TailName) -> None:
    call = make_call(make_spec(sparsity=0.9), rows=3, keys=700, dim=64, heads=1)
    call = with_tail(call.with_(query=call.query * 0 + 1, key=call.key.abs() + 1, value=call.value.abs() + 2), tail, 64)
    assert torch.equal(call.fake(), call.integer().output)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_row_with_nothing_in_its_tail_is_what_it_was(tail: TailName, rule: Any) -> None:
    call = make_call(make_spec(rule=rule, sparsity=0.5), keys=9, spread=2.0)
    bare, found = call.integer(), with_tail(call, tail).integer()
    assert isinstance(found, TailedAttention)
    whole = (found.tail_count == 0).squeeze(-1)
    assert torch.equal(found.output[whole], bare.output[whole])
    assert not torch.equal(found.output, bare.output)
    for name in ("q_codes", "k_codes", "v_codes", "acc", "row_max", "keep", "p_codes", "code_sum", "weighted"):
        assert torch.equal(getattr(found, name), getattr(bare, name))


@pytest.mark.parametrize("tail", TAILS)
def test_one_key_no_key_and_a_head_that_prunes_nothing(tail: TailName) -> None:
    call = make_call(make_spec(sparsity=0.9), rows=4, keys=6, spread=3.0)
    valid = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    valid[:, :, 0, 1:], valid[:, :, 1] = False, False
    call = call.with_(valid=valid, cutoff=torch.tensor([0.5, math.inf, 0.5, 1.0]))
    bare, found = call.integer(), with_tail(call, tail).integer()
    assert torch.equal(found.output[:, :, :2], bare.output[:, :, :2])
    assert torch.equal(found.output[:, :, 1], torch.zeros(2, 4, 8))
    assert torch.equal(found.output[:, 1], bare.output[:, 1])
    assert not torch.equal(found.output[:, 0, 2:], bare.output[:, 0, 2:])


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("mask", ["padding", "causal"])
def test_padding_never_counts(tail: TailName, mask: str) -> None:
    call = with_tail(make_call(make_spec(sparsity=0.9), keys=12, rows=12, mask=mask, spread=2.0), tail)
    far = call.with_(
        key=torch.cat([call.key, call.key[:, :, :3] + 5], 2),
        value=torch.cat([call.value, call.value[:, :, :3] - 7], 2),
        valid=torch.cat([call.allowed(), torch.zeros(2, 4, 12, 3, dtype=torch.bool)], -1),
    )  # fmt: skip
    assert torch.equal(far.integer().output, call.integer().output)
    assert torch.equal(far.fake(), call.fake())


def test_the_level_keeps_the_mass_of_pairs_far_below_one_code() -> None:
    # 180 pairs of a quarter of a code are 45 codes; two octaves below half of one, by hand.
    rate = torch.tensor(1.0)
    t, u = level(torch.tensor([[[[180.0 * 10 * 1024]]]]), torch.tensor([[[[180.0]]]]), rate, torch.zeros(1), 255)
    assert t.item() == 10 * 1024
    assert u.item() == 255 / 1024
    lifted, more = level(torch.tensor([[[[180.0 * 10 * 1024]]]]), torch.tensor([[[[180.0]]]]), rate,
                         torch.tensor([1024.0]), 255)  # fmt: skip
    assert (lifted.item(), more.item()) == (9 * 1024, 255 / 512)


def put(x: Tensor, exact: Tensor) -> Tensor:
    """The exact number, with the gradient of x."""
    return x + (exact - x).detach()


def flat_formula(call: Call, found: IntegerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output in plain float64, autograd through it; what the integers say is put in without changing gradients."""
    heads, tail = call.query.shape[1], call.scales.tail
    assert tail is not None
    assert isinstance(found, TailedAttention)
    alpha = score_step(call.scales.q, call.scales.k, call.scaling, heads).double()  # type: ignore[arg-type]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    scores, coded = q @ k.mT, found.p_codes.double()
    allowed = call.allowed()
    top = scores.masked_fill(~allowed, -math.inf).amax(-1, keepdim=True)
    distance = ((top - scores) * alpha).masked_fill(~allowed, 0.0)
    rest = (allowed & (found.p_codes == 0)).double()
    one = torch.exp(-distance) * (coded > 0)
    weights = one / one.detach().clamp(min=1e-30) * coded
    g = rest.sum(-1, keepdim=True).clamp(min=1)
    log_u = -(distance * rest).sum(-1, keepdim=True) / g
    u = torch.exp(log_u - log_u.detach()) * found.tail_level.double()
    share = torch.ones_like(scores)
    if call.spec.tail == "linear":
        s, step = scores, alpha
        if tail.directions is not None:
            at = tail.directions
            q_seen = put(q @ at.query.double() / 4096, projected(found.q_codes, at.query))
            k_seen = put(k @ at.key.double() / 4096, projected(found.k_codes, at.key, at.offset))
            s, step = q_seen @ k_seen.mT, alpha * at.step.double().view(1, -1, 1, 1)
        share = 1 + step * (s - (s * rest).sum(-1, keepdim=True) / g)
    both = weights + u * share * rest
    return both @ v / (weights + u * rest).sum(-1, keepdim=True) * repeat_heads(call.scales.v, heads)  # type: ignore


@pytest.mark.parametrize("spread", [0.7, 30.0])
@pytest.mark.parametrize(("tail", "rank"), [("mean", 1), ("linear", 3), ("linear", 8)])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_gradients_are_those_of_the_plain_formula(tail: TailName, rank: int, mask: str, spread: float) -> None:
    call = make_call(make_spec(sparsity=0.9), keys=9, rows=9, spread=spread, mask=mask)
    call = with_tail(call.with_(cutoff=torch.tensor([0.3, 0.7, 1.5, 3.0])), tail, rank)
    found = call.integer()
    ours = [x.clone().requires_grad_() for x in (call.query, call.key, call.value)]
    output = call.with_(query=ours[0], key=ours[1], value=ours[2]).fake()
    codes = [x.double().requires_grad_() for x in (found.q_codes, found.k_codes, found.v_codes)]
    exact = flat_formula(call, found, *codes)
    torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-5)
    wanted = normal(5, *output.shape)
    output.backward(wanted)
    exact.backward(wanted.double())
    for x, code, scale in zip(ours, codes, (call.scales.q, call.scales.k, call.scales.v), strict=True):
        assert x.grad is not None
        assert code.grad is not None
        assert scale is not None
        torch.testing.assert_close(
            x.grad.double(), code.grad / scale, rtol=2e-3, atol=2e-4 * float(code.grad.abs().max() / scale.min())
        )


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_with_one_survivor_learns(tail: TailName) -> None:
    call = make_call(make_spec(rule="topk", sparsity=0.99), keys=7)
    for name, learns in (("none", False), (tail, True)):
        own = call if name == "none" else with_tail(call, tail)
        query = call.query.clone().requires_grad_()
        own.with_(query=query).fake().square().sum().backward()
        assert query.grad is not None
        assert bool((query.grad.abs().sum(-1) > 0).all()) == learns


@pytest.mark.parametrize("tail", TAILS)
def test_learned_scales_get_the_gradient_of_the_tail(tail: TailName) -> None:
    learned = TensorSpec(learned=True)
    call = with_tail(make_call(make_spec(sparsity=0.9, q=learned, k=learned, v=learned), spread=2.0), tail)
    known = [x for x in (call.scales.q, call.scales.k, call.scales.v) if x is not None]
    scales = [x.clone().requires_grad_() for x in known]
    learning = Scales(q=scales[0], k=scales[1], v=scales[2], tail=call.scales.tail)
    call.with_(scales=learning).fake().square().sum().backward()
    bare = [x.detach().clone().requires_grad_() for x in scales]
    none = call.with_(spec=make_none(call), scales=Scales(*bare))
    none.fake().square().sum().backward()
    for ours, theirs in zip(scales, bare, strict=True):
        assert ours.grad is not None
        assert bool(ours.grad.isfinite().all())
        assert not torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_dropout_leaves_the_level_alone() -> None:
    call = with_tail(make_call(make_spec(rule="topk", sparsity=0.99), keys=20, heads=2), "mean")
    torch.manual_seed(0)
    mean = torch.stack([call.fake(0.5) for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, call.fake(), rtol=0.2, atol=0.2)
    empty = call.with_(value=torch.zeros_like(call.value))
    assert torch.equal(empty.fake(0.5), torch.zeros_like(mean))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"v": {"bits": None}}, "needs bits"),
        ({"p": {"mode": "unit"}}, "mode 'unit'"),
        ({"threshold_penalty": 1.0}, "trained thresholds"),
        ({"tail": "median"}, "tail"),
        ({"tail_rank": 0}, "tail_rank"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_spec(type(make_spec()), {"tail": "linear", "sparsity": 0.9, **changes})


def test_linear_without_directions_says_what_to_do() -> None:
    call = make_call(make_spec(sparsity=0.9, tail="linear", tail_rank=2))
    for run in (call.integer, call.fake):
        with pytest.raises(ValueError, match="calibrate"):
            run()
    whole = call.with_(spec=make_spec(sparsity=0.9, tail="linear", tail_rank=8))
    assert torch.equal(whole.integer().output, whole.fake())


def test_signed_codes_have_a_tail_too() -> None:
    call = with_tail(make_call(make_spec(sparsity=0.9, p=ProbsSpec(bits=4, signed=True))), "mean")
    assert torch.equal(call.fake(), call.integer().output)


def test_attention_without_keys_or_rows() -> None:
    for rows, keys in ((0, 3), (3, 0)):
        call = make_call(make_spec(sparsity=0.9, tail="mean"), rows=2, keys=4)
        empty = call.with_(query=call.query[:, :, :rows], key=call.key[:, :, :keys], value=call.value[:, :, :keys])
        if keys:
            assert empty.fake().shape == (2, 4, 0, 8)
